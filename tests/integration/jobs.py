"""Manifests and waiting, for tests that run FineTuneJobs."""

import json
import time
from collections.abc import Callable
from typing import Any

import yaml

from testcluster import Cluster

Object = dict[str, Any]
PATIENCE = 400.0  # seconds; the machine may be busy with anything, and only a failure waits so long


def manifest(name: str, **spec: Any) -> Object:
    """A FineTuneJob that is right; `spec` replaces fields."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "task": "SequenceClassification",
            "model": {"uri": "hf://sentence-transformers/all-MiniLM-L6-v2"},
            "dataset": {"uri": "s3://data/feedback", "labels": ["negative", "neutral", "positive"]},
            "output": {"storageUri": f"s3://models/{name}"},
            **spec,
        },
    }


class Jobs:
    """FineTuneJobs of one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def apply(self, *manifests: Object) -> None:
        self.cluster.kubectl("-n", self.namespace, "apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))

    def patch(self, name: str, spec: Object) -> None:
        self.cluster.kubectl("-n", self.namespace, "patch", "ftj", name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def list(self, kind: str, *arguments: str) -> list[Object]:
        found: list[Object] = json.loads(
            self.cluster.kubectl("-n", self.namespace, "get", kind, "-o", "json", *arguments).stdout
        )["items"]
        return found

    def get(self, name: str, kind: str = "ftj") -> Object:
        found: Object = json.loads(self.cluster.kubectl("-n", self.namespace, "get", kind, name, "-o", "json").stdout)
        return found

    def status(self, name: str) -> Object:
        found: Object = self.get(name).get("status", {})
        return found

    def condition(self, name: str, kind: str) -> Object:
        conditions = self.status(name).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})

    def wait_state(self, name: str, state: str, seconds: float = PATIENCE) -> Object:
        """Until status.state is this; the status."""
        return wait(lambda: s if (s := self.status(name)).get("state") == state else None, f"{name} {state}", seconds)

    def wait_pod(self, name: str, seconds: float = PATIENCE) -> str:
        """Until a pod of the job's Job of that name is there; its name."""

        def find() -> str | None:
            pods = self.list("pods", "-l", f"batch.kubernetes.io/job-name={name}")
            return str(pods[0]["metadata"]["name"]) if pods else None

        return wait(find, f"a pod of {name}", seconds)


def wait(check: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Until `check` answers something true; that. AssertionError after `seconds`."""
    end, pause = time.monotonic() + seconds, 0.1
    while not (found := check()):
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.5)  # a look costs as much processor time as a step of training
    return found
