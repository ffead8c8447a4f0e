"""Which pod may post: the chain of owners from the token's pod to the resource, over the port of an API server that is a dict."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer

from finetune_api import names
from finetune_cli.sweep_objects import merge
from finetune_operator.control.loop import Key
from finetune_operator.control.progress import ProgressServer
from finetune_operator.control.queue import WorkQueue
from finetune_operator.control.worker import Reconciler
from finetune_operator.domain.types import Settings
from finetune_operator.kube import port
from finetune_operator.kube.port import CHILDREN, JOBS, PODS, Object, Resource
from finetune_operator.observe.metrics import Metrics

KEY = ("ns", "ft")
META = {"name": "ft", "namespace": "ns", "resourceVersion": "1"}
SPEC = {"trainer": {"command": ["x"]}}
SETTINGS = Settings(trainer_image="trainer:1", progress_url="https://progress:8443", progress_ca="PEM")


def owned(name: str, uid: str, kind: str, owner: str, owner_uid: str) -> Object:
    refs = [{"kind": kind, "name": owner, "uid": owner_uid, "controller": True}]
    return {"metadata": {"name": name, "namespace": "ns", "uid": uid, "ownerReferences": refs}}


class Api:
    """What is asked of an API server here: objects by name, and whose token it is (that of the pod of its name)."""

    def __init__(self) -> None:
        self.objects: dict[tuple[Resource, str], Object] = {}
        self.applied("u1")
        self.attempt("j1", "p1")

    def applied(self, uid: str, status: Object | None = None) -> None:
        self.objects[JOBS, "ft"] = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND_JOB,
            "metadata": META | {"uid": uid},
            "spec": SPEC,
            "status": {"attempt": 1} if status is None else status,
        }

    def attempt(self, child_uid: str, pod_uid: str) -> None:
        job_uid = self.objects[JOBS, "ft"]["metadata"]["uid"]
        self.objects[CHILDREN, "ft-1"] = owned("ft-1", child_uid, names.KIND_JOB, "ft", job_uid)
        self.objects[PODS, pod_uid] = owned(pod_uid, pod_uid, "Job", "ft-1", child_uid)

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        if (resource, name) not in self.objects:
            raise port.NotFound(404, "NotFound", name)
        return self.objects[resource, name]

    async def list(self, resource: Resource, namespace: str | None, selector: str = "") -> AsyncIterator[Object]:
        for (kind, _), found in self.objects.items():
            if kind is resource:
                yield found

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Object, subresource: str = "") -> Object:
        self.objects[resource, name] = merge(self.objects[resource, name], {"status": patch["status"]})
        return self.objects[resource, name]

    async def review(self, group: str, kind: str, spec: Object) -> Object:
        pod = self.objects[PODS, spec["token"]]["metadata"]
        at = "authentication.kubernetes.io"
        extra = {f"{at}/pod-name": [pod["name"]], f"{at}/pod-uid": [pod["uid"]]}
        user = {"username": "system:serviceaccount:ns:default", "extra": extra}
        return {"authenticated": True, "audiences": [names.PROGRESS_AUDIENCE], "user": user}


class Posts:
    """A progress server, and posts to it."""

    def __init__(self, api: Api, reconciler: Reconciler, server: TestServer) -> None:
        self.api, self.reconciler, self.server = api, reconciler, server

    async def post(self, pod: str, percent: int = 1, attempt: int = 1) -> int:
        url = f"/v1/namespaces/ns/{names.PLURAL_JOB}/ft/attempts/{attempt}/progress"
        body = json.dumps({"trainerStatus": {"progressPercentage": percent}})
        headers = {"Authorization": f"Bearer {pod}"}
        async with ClientSession() as client, client.post(self.server.make_url(url), data=body, headers=headers) as answer:
            return answer.status


@pytest.fixture
async def posts() -> AsyncIterator[Posts]:
    api, metrics = Api(), Metrics()
    queue: WorkQueue[Key] = WorkQueue(metrics)
    cluster: Any = api
    reconciler = Reconciler(cluster, SETTINGS, queue, metrics)
    server = TestServer(ProgressServer(cluster, reconciler, queue, metrics).app())
    await server.start_server()
    yield Posts(api, reconciler, server)
    queue.close()
    await server.close()


async def test_the_pod_of_the_current_attempt_is_heard(posts: Posts) -> None:
    assert await posts.post("p1") == 200
    assert await posts.post("p1", attempt=2) == 403


async def test_a_pod_that_saves_after_its_job_was_deleted_is_heard(posts: Posts) -> None:
    del posts.api.objects[CHILDREN, "ft-1"]
    posts.api.applied("u1", {"attempt": 1, "jobsStatus": [{"name": "ft-1", "uid": "j1"}]})
    posts.api.objects[PODS, "stranger"] = owned("stranger", "stranger", "Job", "ft-1", "another")
    assert await posts.post("p1") == 200
    assert await posts.post("stranger") == 403
    assert await posts.post("p1", attempt=2) == 403
    posts.api.applied("u1", {"attempt": 2, "jobsStatus": [{"name": "ft-2", "uid": "j2"}]})
    assert await posts.post("p1", attempt=2) == 403


async def test_a_pod_of_a_job_that_was_made_anew_is_refused_although_its_token_is_remembered(posts: Posts) -> None:
    await posts.reconciler.reconcile(KEY)
    assert await posts.post("p1", 77) == 200
    del posts.api.objects[CHILDREN, "ft-1"]
    posts.api.applied("u2", {})
    job = posts.api.objects[JOBS, "ft"]
    observed = await posts.reconciler.observe(job)
    assert [pod["metadata"]["uid"] for pod in observed.pods] == ["p1"], "before its first attempt a job looks for older pods"
    assert observed.progress is not None
    assert observed.progress.job_uid == "u1"
    await posts.reconciler.reconcile(KEY)
    assert await posts.post("p1", 78) == 403
    assert posts.reconciler.progress == {}
    posts.api.attempt("j2", "p2")
    assert await posts.post("p2", 1) == 200
    assert posts.reconciler.progress[KEY].job_uid == "u2"


def told(posts: Posts) -> int | None:
    found: int | None = (posts.api.objects[JOBS, "ft"]["status"].get("trainerStatus") or {}).get("progressPercentage")
    return found


async def test_what_was_taken_is_written_before_the_operator_ends(posts: Posts) -> None:
    for percent in (41, 42):
        assert await posts.post("p1", percent) == 200
        await posts.reconciler.reconcile(KEY)
    assert told(posts) == 41, "progress alone waits for its turn"
    posts.reconciler.queue.close()
    await posts.reconciler.flush()
    assert told(posts) == 42
    assert await posts.post("p1", 43) == 503, "nobody would write it down"


async def test_a_report_that_comes_while_the_one_before_is_written_is_written_too(posts: Posts) -> None:
    await posts.reconciler.reconcile(KEY)
    assert await posts.post("p1", 42) == 200
    patch = posts.api.patch

    async def slow(*arguments: Any, **more: Any) -> Object:
        assert await posts.post("p1", 43) == 200
        return await patch(*arguments, **more)

    posts.api.patch = slow  # type: ignore[method-assign]
    posts.reconciler._written.clear()
    await posts.reconciler.reconcile(KEY)
    posts.api.patch = patch  # type: ignore[method-assign]
    assert told(posts) == 42
    posts.reconciler.queue.close()
    await posts.reconciler.flush()
    assert told(posts) == 43


async def test_a_report_whose_token_is_judged_late_does_not_replace_a_newer_one(posts: Posts) -> None:
    review, asked, late = posts.api.review, asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any) -> Object:
        posts.api.review = review  # type: ignore[method-assign]
        asked.set()
        await late.wait()
        return await review(*arguments)

    posts.api.review = slow  # type: ignore[method-assign]
    first = asyncio.create_task(posts.post("p1", 1))
    await asked.wait()
    assert await posts.post("p1", 2) == 200
    late.set()
    assert await first == 200
    assert posts.reconciler.progress[KEY].report.trainer_status.progress_percentage == 2
