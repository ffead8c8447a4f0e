"""A standby's answers to progress posts, between two real servers: what is passed on, what is not, and what comes back."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from finetune_api import names
from finetune_api.report import MAX_PROGRESS_BYTES
from finetune_operator.control import tls
from finetune_operator.control.standby import FORWARDED, Forwarder
from finetune_operator.kube.lease import Alone
from finetune_operator.observe.metrics import Metrics

PATH = f"/v1/namespaces/ns/{names.PLURAL_JOB}/a/attempts/1/progress"
HOST = "finetune-operator.finetune-system.svc"


class Standing(Alone):
    """A standby that knows a leader, or none."""

    address: str | None = None
    seconds = 0.0

    def remaining(self) -> float:
        return self.seconds

    def leader(self) -> str | None:
        return self.address


@dataclass
class Pair:
    """A standby in front of a leader that is busy, and what the leader heard."""

    leadership: Standing = field(default_factory=Standing)
    heard: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    async def busy(self, request: web.Request) -> web.Response:
        self.heard.append((request.raw_path, dict(request.headers), await request.read()))
        return web.json_response({"message": "busy"}, status=429, headers={"Retry-After": "7"})

    async def here(self, _: web.Request) -> web.Response:
        return web.json_response({"message": "here"})

    async def post(self, path: str = PATH, data: bytes = b"{}", **headers: str) -> tuple[int, str | None, str]:
        """Status, Retry-After and text."""
        async with ClientSession() as client, client.post(f"{self.url}{path}", data=data, headers=headers) as answer:
            return answer.status, answer.headers.get("Retry-After"), await answer.text()


@asynccontextmanager
async def pair(leaders_name: str = HOST, *, other_ca: bool = False) -> AsyncIterator[Pair]:
    certificate, key = tls.make_ca()
    made = Pair()
    leader, standby = web.Application(), web.Application(client_max_size=MAX_PROGRESS_BYTES)
    leader.router.add_post("/{path:.*}", made.busy)
    forwarder = Forwarder(made.leadership, certificate, HOST, Metrics())
    standby.middlewares.append(forwarder.middleware)
    standby.cleanup_ctx.append(forwarder.session)
    standby.router.add_post("/v1/namespaces/{path:.*}", made.here)
    behind, front = TestServer(leader, scheme="https"), TestServer(standby)
    await behind.start_server(ssl=tls.own_identity(*(tls.make_ca() if other_ca else (certificate, key)), [leaders_name]).context)
    await front.start_server()
    made.leadership.address, made.url = f"127.0.0.1:{behind.port}", f"http://127.0.0.1:{front.port}"
    try:
        yield made
    finally:
        await front.close()
        await behind.close()


async def test_path_token_and_body_go_to_the_leader_and_its_answer_comes_back() -> None:
    async with pair() as two:
        path = f"{PATH}/a%2Fb?x=%20"
        answer = await two.post(path, b'{"a": 1}', Authorization="Bearer t", Cookie="no")
        assert answer == (429, "7", '{"message": "busy"}')
        [(raw_path, headers, body)] = two.heard
        assert (raw_path, body) == (path, b'{"a": 1}')
        assert headers["Authorization"] == "Bearer t"
        assert "Cookie" not in headers
        assert headers[FORWARDED] == "1"


async def test_a_post_is_passed_on_once_at_most() -> None:
    async with pair() as two:
        status, later, _ = await two.post(**{FORWARDED: "1"})
        assert (status, later is not None, two.heard) == (503, True, [])


async def test_without_a_leader_the_trainer_is_told_to_come_back() -> None:
    async with pair() as two:
        two.leadership.address = None
        status, later, text = await two.post()
        assert (status, later is not None) == (503, True)
        assert "no operator leads now" in text


@pytest.mark.parametrize(("name", "other_ca"), [("elsewhere.ns.svc", False), (HOST, True)], ids=["name", "ca"])
async def test_the_token_is_given_to_nobody_without_our_certificate(name: str, other_ca: bool) -> None:
    async with pair(name, other_ca=other_ca) as two:
        status, later, text = await two.post(Authorization="Bearer t")
        assert (status, later is not None, two.heard) == (503, True, [])
        assert "does not answer" in text


async def test_a_leader_that_is_not_there_is_no_leader() -> None:
    async with pair() as two:
        two.leadership.address = "127.0.0.1:1"
        status, later, _ = await two.post()
        assert (status, later is not None) == (503, True)


async def test_a_leader_keeps_what_it_gets() -> None:
    async with pair() as two:
        two.leadership.seconds = 1.0
        assert (await two.post(**{FORWARDED: "1"}))[0] == 200
        assert (await two.post())[0] == 200
        assert two.heard == []


async def test_what_no_server_would_take_is_not_passed_on() -> None:
    async with pair() as two:
        assert (await two.post("/elsewhere"))[0] == 404
        assert (await two.post(data=b"x" * (MAX_PROGRESS_BYTES + 1)))[0] == 413
        assert two.heard == []
