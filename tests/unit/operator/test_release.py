"""Giving the Lease back, over HTTP, when the last renewal was cut off after it had been written."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import Configuration

from finetune_operator.domain.election import Candidate
from finetune_operator.kube.aio import AioCluster
from finetune_operator.kube.lease import Elector
from unit.operator.test_election import Store

ME = Candidate("me", "10.0.0.1:8443", 1)


class Leases:
    """One Lease. While `silent`, what is written is kept and the answer is not given."""

    def __init__(self) -> None:
        self.store = Store()
        self.silent = False
        self.written = asyncio.Event()

    async def read(self, _: web.Request) -> web.Response:
        return web.json_response(self.store.lease or {}, status=200 if self.store.lease else 404)

    async def write(self, request: web.Request) -> web.Response:
        made = self.store.write(await request.json())
        if self.silent:
            self.written.set()
            await asyncio.sleep(5)
        return web.json_response(
            made or {"reason": "Conflict", "message": "not the version that was read"}, status=200 if made else 409
        )

    @property
    def holder(self) -> str | None:
        assert self.store.lease is not None
        holder: str | None = self.store.lease["spec"].get("holderIdentity")
        return holder


@pytest.fixture
async def leases() -> Leases:
    return Leases()


@pytest.fixture
async def elector(leases: Leases) -> AsyncIterator[Elector]:
    app = web.Application()
    app.router.add_get("/{path:.*}", leases.read)
    app.router.add_post("/{path:.*}", leases.write)
    app.router.add_patch("/{path:.*}", leases.write)
    server = TestServer(app)
    await server.start_server()
    cluster = AioCluster(Configuration(host=f"http://127.0.0.1:{server.port}"))
    elector = Elector(cluster, "ns", "operator", ME)
    await elector.acquire()
    assert leases.holder == "me"
    yield elector
    await cluster.close()
    await server.close()


async def cut_off(elector: Elector, leases: Leases) -> None:
    """The task that renews is cancelled while the API server answers."""
    leases.silent = True
    keeping = asyncio.create_task(elector.keep())
    await leases.written.wait()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    leases.silent = False


async def test_a_renewal_that_was_cut_off_does_not_keep_the_lease(elector: Elector, leases: Leases) -> None:
    await cut_off(elector, leases)
    await elector.release()
    assert leases.holder is None


async def test_a_lease_that_another_has_taken_is_left_to_it(elector: Elector, leases: Leases) -> None:
    await cut_off(elector, leases)
    assert leases.store.lease is not None
    leases.store.write({"metadata": leases.store.lease["metadata"], "spec": {"holderIdentity": "other"}})
    await elector.release()
    assert leases.holder == "other"
