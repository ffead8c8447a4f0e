"""One control plane, one S3 server and one operator per session: what every integration test talks to.

With CI=true what cannot be started is a failure; elsewhere too: there is nothing here that a machine with Python cannot build.
"""

import random
import string
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from support.faulty_s3 import Faulty, faulty_s3
from testcluster import Cluster, S3Server, binaries
from testcluster.operator import Operator


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """etcd, kube-apiserver and kube-controller-manager."""
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """versitygw."""
    with S3Server() as running:
        yield running


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """A fresh one."""
    return s3.create_bucket(f"faults-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def faulty(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A proxy before the S3 server, and the environment that leads there."""
    with faulty_s3(s3.endpoint) as running:
        for name, value in (s3.environment() | {"AWS_ENDPOINT_URL": running.endpoint}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        yield running


@pytest.fixture(scope="session")
def helm_binary() -> Path:
    """Real Helm."""
    return binaries.ensure(["helm"])["helm"]


@pytest.fixture
def kubectl(cluster: Cluster) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """kubectl as admin."""
    return cluster.kubectl


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace with its default service account; deleted at the end, without waiting."""
    name = "test-" + "".join(random.choices(string.ascii_lowercase, k=8))
    cluster.kubectl("create", "namespace", name)
    for _ in range(100):
        if cluster.kubectl("-n", name, "get", "serviceaccount", "default", check=False).returncode == 0:
            break
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false", check=False)


@pytest.fixture(scope="session")
def operator(cluster: Cluster) -> Iterator[Operator]:
    """The operator, with the rights of the chart's ServiceAccount; short backoffs."""
    running = Operator(cluster, arguments=["--restart-backoff-seconds=0.2"])
    with running:
        yield running
        assert running.tracebacks() == []
