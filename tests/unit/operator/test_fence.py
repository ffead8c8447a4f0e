"""Nothing is written once the lease has expired: the adapter asks before every write, whatever the write is."""

import inspect
import socket

import pytest
from kubernetes.aio.client import Configuration

from finetune_operator.kube import port
from finetune_operator.kube.aio import AioCluster
from finetune_operator.kube.port import EVENTS, JOBS

READS = {"get": (JOBS, "ns", "a"), "review": ("authentication.k8s.io", "TokenReview", {}), "discover": ("/version",)}
WRITES = {
    "create": (EVENTS, "ns", {}),
    "delete": (JOBS, "ns", "a", "uid"),
    "patch": (JOBS, "ns", "a", {}, "status"),
}


def cluster(remaining: float) -> AioCluster:
    with socket.create_server(("127.0.0.1", 0)) as free:
        configuration = Configuration(host=f"http://127.0.0.1:{free.getsockname()[1]}")
    return AioCluster(configuration, fence=lambda: remaining)


def test_every_method_of_the_port_is_known_here() -> None:
    methods = {name for name, _ in inspect.getmembers(port.Cluster, inspect.isfunction) if not name.startswith("_")}
    assert methods == {*READS, *WRITES, "list", "close"}


@pytest.mark.parametrize("method", WRITES)
async def test_without_the_lease_no_write_begins(method: str) -> None:
    fenced = cluster(0.0)
    with pytest.raises(port.NotLeading, match="the lease has expired"):
        await getattr(fenced, method)(*WRITES[method])
    await fenced.close()


@pytest.mark.parametrize(("method", "remaining"), [*((m, 0.0) for m in READS), *((m, 1.0) for m in WRITES)])
async def test_reads_go_on_and_so_do_writes_with_the_lease(method: str, remaining: float) -> None:
    open_ = cluster(remaining)
    with pytest.raises(port.Unavailable):  # nobody listens there: it was tried
        await getattr(open_, method)(*(READS | WRITES)[method])
    await open_.close()
