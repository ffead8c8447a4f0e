"""Plays the kubelet: binds pods to a node that it keeps alive, and drives their status from a script or from a real process."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

from testcluster.podscript import PodScript, RunProcess
from testcluster.podspec import Object, PodFiles
from testcluster.processes import Child

NODE = "scripted"
Script = Callable[[Object], PodScript | RunProcess]
MAX_MESSAGE = 4096
CALL_TURNS = 10


class _Ending(Exception):  # noqa: N818
    """The pod or its ServiceAccount is gone: its namespace is being deleted."""


class PodRunner:
    """Runs all pods of a cluster in a thread of its own. See the package's docstring for the API."""

    def __init__(self, kubeconfig: Path, script: Script, *, image_commands: dict[str, list[str]] | None = None) -> None:
        self._config = yaml.safe_load(Path(kubeconfig).read_text())
        self._script = script
        self._image_commands = image_commands or {}
        self._folder = Path(tempfile.mkdtemp(prefix="finetune-pods-"))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="pods", daemon=True)
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Queue[tuple[int | None, str]]] = {}
        self._grace: dict[str, float] = {}
        self._uids: dict[str, str] = {}  # pod name -> uid of the newest pod with that name
        self._pids: dict[str, int] = {}
        self._files: dict[str, PodFiles] = {}
        self._oom: set[str] = set()
        self._running: set[str] = set()
        self._error: BaseException | None = None

    # -------------------------------------------------------------------------------------------- for the test's thread --
    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Watching pods."""
        self._thread.start()
        if not self._started.wait(30) or self._error:
            raise RuntimeError("the pod runner did not start") from self._error

    def stop(self) -> None:
        """Ends every process that was started; raises what went wrong in a script."""
        if self._loop and self._stop and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(20)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._error:
            raise RuntimeError("the pod runner failed") from self._error

    def process_of(self, pod: str) -> int:
        """The pid of a pod's process."""
        return self._pids[pod]

    def log_of(self, pod: str) -> str:
        """What a pod's process printed so far."""
        log = self._files[pod].log
        return log.read_text(errors="replace") if log.exists() else ""

    def root_of(self, pod: str) -> Path:
        """The folder that stands for the pod's file system."""
        return self._files[pod].root

    def finish(self, pod: str, exit_code: int = 0, message: str = "") -> None:
        """Ends a scripted pod now."""
        if self._loop is None:
            raise RuntimeError("not started")
        self._loop.call_soon_threadsafe(self._ends[self._uids[pod]].put_nowait, (exit_code, message))

    def oom_kill(self, pod: str) -> None:
        """SIGKILL to a pod's process, reported as OOMKilled."""
        self._oom.add(pod)
        os.killpg(self._pids[pod], signal.SIGKILL)

    def wait_running(self, pod: str, timeout: float = 10.0) -> None:
        """Until the pod runs."""
        end = time.monotonic() + timeout
        while pod not in self._running:
            if time.monotonic() > end:
                raise TimeoutError(f"{pod} does not run after {timeout:.0f} s")
            time.sleep(0.02)

    # ------------------------------------------------------------------------------------------------- in the thread ----
    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with self._session() as self._http:
                await self._make_node()
                self._started.set()
                work = [asyncio.create_task(self._watch()), asyncio.create_task(self._keep_node())]
                stop = asyncio.create_task(self._stop.wait())
                done, _ = await asyncio.wait([*work, stop], return_when=asyncio.FIRST_COMPLETED)
                tasks = [*work, stop, *self._tasks.values()]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for task in done - {stop}:
                    task.result()
        except Exception as error:  # noqa: BLE001  (raised again in the test's thread, by stop)
            self._error = error
        finally:
            self._started.set()
            for pid in self._pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        cluster, user = self._config["clusters"][0]["cluster"], self._config["users"][0]["user"]
        context = ssl.create_default_context(cafile=cluster["certificate-authority"])
        if "client-certificate" in user:
            context.load_cert_chain(user["client-certificate"], user["client-key"])
        headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
        connector = aiohttp.TCPConnector(ssl=context, limit=50)
        async with aiohttp.ClientSession(cluster["server"], connector=connector, headers=headers) as session:
            yield session

    async def _call(
        self, method: str, path: str, body: Object | None = None, kind: str = "application/json"
    ) -> tuple[int, Object]:
        data = json.dumps(body) if body is not None else None
        for turn in range(1, CALL_TURNS + 1):
            async with self._http.request(method, path, data=data, headers={"Content-Type": kind}) as response:
                # An API server that just came back is not ready for everything at once.
                if (response.status != 429 and response.status < 500) or turn == CALL_TURNS:
                    return response.status, await response.json(content_type=None)
            await asyncio.sleep(random.uniform(0.2, 0.6))
        raise AssertionError("the last turn returns")

    async def _make_node(self) -> None:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}
        await self._call("POST", "/api/v1/nodes", node)
        condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": _now()}
        size = {"cpu": "1000", "memory": "1000Gi", "pods": "10000", "nvidia.com/gpu": "1000"}
        status = {"status": {"conditions": [condition], "capacity": size, "allocatable": size}}
        await self._call("PATCH", f"/api/v1/nodes/{NODE}/status", status, "application/merge-patch+json")

    async def _keep_node(self) -> None:
        path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        spec = {"holderIdentity": NODE, "leaseDurationSeconds": 40}
        while True:
            renewed = {**spec, "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # an outage: the next turn renews it
                code, _ = await self._call("PATCH", f"{path}/{NODE}", {"spec": renewed}, "application/merge-patch+json")
                if code == 404:
                    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": NODE}, "spec": renewed}
                    await self._call("POST", path, lease)
            await asyncio.sleep(10)

    async def _watch(self) -> None:
        version = ""
        while True:
            if not version:
                try:
                    code, listed = await self._call("GET", "/api/v1/pods")
                except (aiohttp.ClientError, TimeoutError):
                    code, listed = 0, {}
                if code != 200:
                    await asyncio.sleep(0.5)  # away, or not ready yet after it was away
                    continue
                for pod in listed["items"]:
                    self._see(pod)
                version = listed["metadata"]["resourceVersion"]
            query = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": "300"}
            timeout = aiohttp.ClientTimeout(total=None, sock_read=330)
            try:
                async with self._http.get("/api/v1/pods", params=query, timeout=timeout) as stream:
                    while line := await stream.content.readline():
                        event = json.loads(line)
                        if event["type"] == "ERROR":  # a Status object; 410 wants a new list
                            version = ""
                            break
                        version = event["object"]["metadata"]["resourceVersion"]
                        if event["type"] in ("ADDED", "MODIFIED"):
                            self._see(event["object"])
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(0.5)  # the API server is away: a test may have stopped it
                version = ""

    def _see(self, pod: Object) -> None:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        if uid not in self._tasks:
            self._ends[uid] = asyncio.Queue()
            self._uids[name] = uid
            self._tasks[uid] = asyncio.create_task(self._guard(self._live(pod)))
        if pod["metadata"].get("deletionTimestamp"):
            self._grace[uid] = float(pod["metadata"].get("deletionGracePeriodSeconds") or 0)
            self._ends[uid].put_nowait((None, ""))

    async def _guard(self, life: Coroutine[Any, Any, None]) -> None:
        try:
            await life
        except asyncio.CancelledError:
            raise
        except (aiohttp.ClientError, TimeoutError):
            await asyncio.sleep(0)  # the API server went away under this pod; what it saw last is all that is known
        except Exception as error:  # noqa: BLE001  (raised again in the test's thread, by stop)
            self._error = error

    async def _live(self, pod: Object) -> None:
        if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            return
        if pod["metadata"].get("deletionTimestamp"):  # of a runner that is gone: nothing of it is left to end
            await self._delete(pod)
            return
        script = self._script(pod)
        if isinstance(script, PodScript) and not script.schedulable:
            condition = {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": "0/1 nodes are available",
            }
            await self._status(pod, {"conditions": [condition]})
            await self._ends[pod["metadata"]["uid"]].get()
            await self._delete(pod)
            return
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod["metadata"]["name"]},
            "target": {"kind": "Node", "name": NODE},
        }
        code, answer = await self._call("POST", f"{_path(pod)}/binding", binding)
        if code >= 300 and code not in (403, 404, 409):  # its namespace ends; gone; bound already
            raise RuntimeError(f"binding of {_path(pod)}: {code} {answer.get('message')}")
        try:
            await (self._run_process(pod) if isinstance(script, RunProcess) else self._play(pod, script))
        except _Ending:
            await self._delete(pod)

    # ------------------------------------------------------------------------------------------------------- scripted ---
    async def _play(self, pod: Object, script: PodScript) -> None:
        if script.waiting:
            await self._status(pod, {"phase": "Pending", "containerStatuses": [_container(pod, {"waiting": script.waiting})]})
            await self._ends[pod["metadata"]["uid"]].get()
            await self._delete(pod)
            return
        started = await self._set_running(pod)
        code, message, deleted = script.exit_code, script.message, False
        with contextlib.suppress(TimeoutError):
            asked, said = await asyncio.wait_for(self._ends[pod["metadata"]["uid"]].get(), script.seconds)
            deleted = asked is None
            code, message = (script.exit_code_on_term if asked is None else asked), said
        if deleted and await self._outlasts(pod, script.seconds_on_term):
            code = 137
        await self._set_ended(pod, started, code, message, script.reason, script.pod_reason, list(script.conditions))
        if deleted:
            await self._delete(pod)
        else:
            await self._ends[pod["metadata"]["uid"]].get()
            await self._delete(pod)

    async def _outlasts(self, pod: Object, seconds: float) -> bool:
        """Lets a pod that was asked to end go on for so long, or until its grace period is over: whether that came first."""
        uid, clock = pod["metadata"]["uid"], asyncio.get_running_loop().time
        asked = clock()
        while (left := asked + min(seconds, self._grace[uid]) - clock()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ends[uid].get(), left)  # news of it: its grace period may be another
        return self._grace[uid] < seconds

    # -------------------------------------------------------------------------------------------------------- process ---
    async def _run_process(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        root = self._folder / pod["metadata"]["uid"]
        root.mkdir(parents=True)
        objects = await self._referenced(pod)
        tokens = await self._tokens(pod)
        files = PodFiles(pod, root, lambda kind, n: objects[(kind, n)], lambda _pod, spec: tokens[spec.get("audience", "")])
        files.prepare()
        self._files[name] = files
        env = files.environment()
        command = files.command(self._image_commands, env)
        base = {k: os.environ[k] for k in ("PATH", "LANG", "OMP_NUM_THREADS") if k in os.environ}
        # A Child dies with this process, whatever kills it, and a command that does not exist is exit code 127.
        child = Child.start(name, command, log=files.log, environment={**base, **env}, directory=files.working_dir())
        self._pids[name] = child.pid
        started = await self._set_running(pod)
        end = asyncio.create_task(_exit_code(child))
        asked = asyncio.create_task(self._ends[pod["metadata"]["uid"]].get())
        await asyncio.wait({end, asked}, return_when=asyncio.FIRST_COMPLETED)
        deleted = asked.done()
        if deleted and not end.done():
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
            child.signal_group(signal.SIGTERM)
            done, _ = await asyncio.wait({end}, timeout=grace)
            if not done:
                child.signal_group(signal.SIGKILL)
        code = await end
        child.signal_group(signal.SIGKILL)  # a container ends with its first process
        self._pids.pop(name, None)
        message = files.termination.read_text(errors="replace")[:MAX_MESSAGE] if files.termination.exists() else ""
        if not message and code and files.container.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            message = "\n".join(files.log.read_text(errors="replace")[-2048:].splitlines()[-80:])
        reason = "OOMKilled" if name in self._oom else ""
        await self._set_ended(pod, started, 128 - code if code < 0 else code, message, reason, "", [])
        if not deleted:
            await asked
        asked.cancel()
        await self._delete(pod)

    async def _referenced(self, pod: Object) -> dict[tuple[str, str], Object]:
        """The Secrets and ConfigMaps that the pod names, read up front."""
        namespace, found = pod["metadata"]["namespace"], {}
        text = json.dumps(pod["spec"])
        for kind, plural in (("secret", "secrets"), ("configmap", "configmaps")):
            if kind not in text.lower():
                continue
            _, listed = await self._call("GET", f"/api/v1/namespaces/{namespace}/{plural}")
            found.update({(kind, o["metadata"]["name"]): o for o in listed["items"]})
        return found

    async def _tokens(self, pod: Object) -> dict[str, str]:
        """A token bound to the pod for every audience that it projects; the API server's own has the empty name."""
        sources = [s for v in pod["spec"].get("volumes", []) for s in v.get("projected", {}).get("sources", [])]
        audiences = {s["serviceAccountToken"].get("audience", "") for s in sources if "serviceAccountToken" in s}
        return {audience: await self.mint(pod, audience) for audience in audiences}

    async def mint(self, pod: Object, audience: str | None) -> str:
        """A TokenRequest for the pod's ServiceAccount, bound to the pod."""
        meta = pod["metadata"]
        account = pod["spec"].get("serviceAccountName", "default")
        bound = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
        spec: Object = {"expirationSeconds": 3600, "boundObjectRef": bound, "audiences": [audience] if audience else []}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token"
        code, answer = await self._call("POST", path, body)
        if code == 404:
            raise _Ending
        if code >= 300:
            raise RuntimeError(f"no token for {meta['name']}: {answer.get('message')}")
        return str(answer["status"]["token"])

    # --------------------------------------------------------------------------------------------------------- status ---
    async def _set_running(self, pod: Object) -> str:
        now = _now()
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": now}
        state = _container(pod, {"running": {"startedAt": now}}, ready=True)
        await self._status(pod, {"phase": "Running", "startTime": now, "conditions": [ready], "containerStatuses": [state]})
        self._running.add(pod["metadata"]["name"])
        return now

    async def _set_ended(
        self, pod: Object, started: str, code: int, message: str, reason: str, pod_reason: str, conditions: list[Object]
    ) -> None:
        ended = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "message": message}
        state = _container(pod, {"terminated": {**ended, "startedAt": started, "finishedAt": _now()}})
        status: Object = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [state]}
        if conditions:
            status["conditions"] = [{**c, "lastTransitionTime": _now()} for c in conditions]
        if pod_reason:
            status["reason"] = pod_reason
        await self._status(pod, status)

    async def _status(self, pod: Object, status: Object) -> None:
        # Strategic, so that conditions of other types stay: PodScheduled, and DisruptionTarget of the Eviction API.
        kind = "application/strategic-merge-patch+json"
        code, answer = await self._call("PATCH", f"{_path(pod)}/status", {"status": status}, kind)
        if code >= 300 and code != 404:  # 404: the pod is gone, which is no news to report
            raise RuntimeError(f"status of {_path(pod)}: {code} {answer.get('message')}")

    async def _delete(self, pod: Object) -> None:
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        await self._call("DELETE", _path(pod), body)


async def _exit_code(child: Child) -> int:
    """Waits without a thread: a pidfd becomes readable when its process ends."""
    over = asyncio.Event()
    descriptor = os.pidfd_open(child.pid)
    try:
        asyncio.get_running_loop().add_reader(descriptor, over.set)
        await over.wait()
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
    return child.process.wait()


def _path(pod: Object) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _container(pod: Object, state: Object, *, ready: bool = False) -> Object:
    container = pod["spec"]["containers"][0]
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": ready,
        "restartCount": 0,
        "state": {"waiting": None, "running": None, "terminated": None, **state},
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
