"""The progress server: trainers POST how far they are, in Kubeflow Trainer's wire protocol, over TLS.

Who posts is proven by the pod's projected token (its own audience, bound to the pod): TokenReview names the pod, the pod's owner names
the Job, the Job's owner names the resource, and its status names the attempt. Only the pod of the current attempt is heard. A Job that
was deleted to suspend or stop has pods that still save: the status has its uid, and what they report then is the newest checkpoint.
"""

import hashlib
import json
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count

from aiohttp import web
from aiohttp.typedefs import Middleware
from pydantic import ValidationError

from finetune_api import names
from finetune_api.report import MAX_PROGRESS_BYTES, ProgressReport
from finetune_api.sentences import explain
from finetune_operator.control.loop import Key
from finetune_operator.control.queue import WorkQueue
from finetune_operator.control.worker import Reconciler
from finetune_operator.domain.child import child_name, owned_by
from finetune_operator.domain.status import recorded_uid
from finetune_operator.domain.types import Object, Progress
from finetune_operator.kube import port
from finetune_operator.kube.port import CHILDREN, JOBS, PODS, Cluster
from finetune_operator.observe.metrics import Metrics

log = logging.getLogger(__name__)

TRUST_SECONDS = 60.0
CACHE_SIZE = 20_000
POSTS_PER_SECOND = 2.0
"""Per pod, over a burst of BURST posts: five seconds between posts is what trainers do."""
BURST = 20.0


class Denied(Exception):  # noqa: N818
    """This caller may not post this; the answer says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class _Trusted:
    job_uid: str
    until: float
    allowance: float = BURST
    seen: float = 0.0


class ProgressServer:
    """Keeps the newest report of every running job, and tells the queue."""

    def __init__(self, cluster: Cluster, reconciler: Reconciler, queue: WorkQueue[Key], metrics: Metrics) -> None:
        self.cluster = cluster
        self.reconciler = reconciler
        self.queue = queue
        self.metrics = metrics
        self._trusted: OrderedDict[str, _Trusted] = OrderedDict()
        self._arrivals = count(1)

    def app(self, *middlewares: Middleware) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=MAX_PROGRESS_BYTES, middlewares=middlewares)
        # Nothing but names: "x%2F..%2Fname" would lead to the same object under a key, and an allowance, of its own.
        name = "[a-z0-9][-a-z0-9.]*"
        app.router.add_post(
            f"/v1/namespaces/{{namespace:{name}}}/{names.PLURAL_JOB}/{{name:{name}}}/attempts/{{attempt:\\d+}}/progress",
            self.post,
        )
        return app

    async def post(self, request: web.Request) -> web.Response:
        """200 {} when the report is taken; else a JSON sentence."""
        try:
            await self._take(request)
            status, body = 200, {}
        except Denied as denied:
            status, body = denied.status, {"message": str(denied)}
        except web.HTTPRequestEntityTooLarge:
            status, body = 413, {"message": f"the body may have {MAX_PROGRESS_BYTES} bytes"}
        except port.ApiError as error:
            log.warning("progress: the caller could not be verified: %s", error)
            status, body = 503, {"message": "the caller cannot be verified now"}
        self.metrics.progress_posts.labels(str(status)).inc()
        return web.json_response(body, status=status)

    async def _take(self, request: web.Request) -> None:
        namespace, name, attempt = (request.match_info[part] for part in ("namespace", "name", "attempt"))
        key, number, arrival = (namespace, name), int(attempt[:9]), next(self._arrivals)
        trusted = await self._verify(request, key, number)
        self._limit(trusted)
        report = _parse(await request.read())
        if self.queue.closed:
            raise Denied(503, "this operator ends: post again")  # nobody would write it down
        before = self.reconciler.progress.get(key)
        if before and before.job_uid == trusted.job_uid and before.attempt > number:
            raise Denied(409, f"attempt {number} is over")
        if before and (before.job_uid, before.attempt) == (trusted.job_uid, number) and before.arrival > arrival:
            return  # it was overtaken while the caller was verified
        self.reconciler.progress[key] = Progress(report, datetime.now(UTC), number, trusted.job_uid, arrival)
        self.reconciler.unwritten.add(key)
        self.queue.add_after(key, 0.2)

    async def _verify(self, request: web.Request, key: Key, attempt: int) -> _Trusted:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Denied(401, "a bearer token is needed")
        proof = hashlib.sha256(f"{token}\0{key}\0{attempt}".encode()).hexdigest()
        now = time.monotonic()
        known = self._trusted.get(proof)
        if known is None or known.until < now or known.job_uid != (self.reconciler.uid(key) or known.job_uid):
            job_uid = await self._ask(token, key, attempt)
            known = _Trusted(job_uid, now + TRUST_SECONDS, *((known.allowance, known.seen) if known else ()))
            self._trusted[proof] = known
            self._trusted.move_to_end(proof)
            while len(self._trusted) > CACHE_SIZE:
                self._trusted.popitem(last=False)
        return known

    async def _ask(self, token: str, key: Key, attempt: int) -> str:
        """The uid of the resource, if a pod of this attempt of it holds the token. Raises Denied."""
        review = await self.cluster.review(
            "authentication.k8s.io", "TokenReview", {"token": token, "audiences": [names.PROGRESS_AUDIENCE]}
        )
        if not review.get("authenticated") or names.PROGRESS_AUDIENCE not in (review.get("audiences") or []):
            raise Denied(401, "the token is not valid here")
        user = review.get("user", {})
        extra = user.get("extra") or {}
        pod_name = (extra.get("authentication.kubernetes.io/pod-name") or [""])[0]
        pod_uid = str((extra.get("authentication.kubernetes.io/pod-uid") or [""])[0])
        if not pod_name or not pod_uid:
            raise Denied(403, "the token is not bound to a pod")
        if not str(user.get("username", "")).startswith(f"system:serviceaccount:{key[0]}:"):
            raise Denied(403, "the token is of another namespace")
        try:
            job = await self.cluster.get(JOBS, *key)
            child_uid = await self._child_uid(job, child_name(key[1], attempt))
            pod = await self.cluster.get(PODS, key[0], pod_name)
        except port.NotFound as error:
            raise Denied(403, "there is no such job or pod") from error
        if not child_uid or not owned_by(pod, child_uid) or pod["metadata"]["uid"] != pod_uid:
            raise Denied(403, "the token is not of this attempt's pod")
        current = int((job.get("status") or {}).get("attempt") or 0)
        if attempt < current:
            raise Denied(409, f"attempt {attempt} is over; the current one is {current}")
        return str(job["metadata"]["uid"])

    async def _child_uid(self, job: Object, name: str) -> str | None:
        """Of the job's Job of this name; of one that is gone, as noted when it was there."""
        try:
            child = await self.cluster.get(CHILDREN, job["metadata"]["namespace"], name)
        except port.NotFound:
            return recorded_uid(job.get("status") or {}, name)
        uid: str = child["metadata"]["uid"]
        return uid if owned_by(child, job["metadata"]["uid"]) else None

    def _limit(self, trusted: _Trusted) -> None:
        now = time.monotonic()
        trusted.allowance = min(BURST, trusted.allowance + (now - trusted.seen) * POSTS_PER_SECOND)
        trusted.seen = now
        if trusted.allowance < 1:
            raise Denied(429, f"at most {POSTS_PER_SECOND:g} posts a second")
        trusted.allowance -= 1


def _parse(body: bytes) -> ProgressReport:
    try:
        return ProgressReport.model_validate(json.loads(body))
    except ValidationError as error:
        raise Denied(400, "; ".join(explain(error)[:5])) from error
    except (ValueError, RecursionError) as error:  # json recurses with the nesting of what it reads
        raise Denied(400, "the body is not JSON") from error
