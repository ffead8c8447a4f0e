"""Gated models: the pod's HF_TOKEN is what the hub is shown. The hub is a local server that gives the model only for the right token.

In processes of their own, because the hub's client reads its settings once, when it is imported.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune_api import names

TOKEN = "hf_of-the-secret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "bert"}'
FETCH = """
import sys
from pathlib import Path
from finetune_trainer import config, errors, model
try:
    print((model.fetch("hf://team/gated", config.load_runtime()) / "config.json").read_text())
except errors.TrainingFailure as error:
    sys.exit(f"{error.failure.reason}: {error.message}")
"""


class Hub(ThreadingHTTPServer):
    """As much of the hub as one small model needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.seen: list[tuple[str, str | None]] = []
        """Path and Authorization of every request for the model."""


class Answer(BaseHTTPRequestHandler):
    """Everything below team/gated, for the token."""

    server: Hub

    def do_GET(self) -> None:
        said = self.headers.get("Authorization")
        if "team/gated" not in self.path:  # what the client asks for itself
            self._send(404, b"{}")
            return
        self.server.seen.append((self.path, said))
        if said != f"Bearer {TOKEN}":
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model team/gated is restricted."})
        elif self.path.startswith("/api/models/team/gated/tree/"):
            self._send(200, json.dumps([{"type": "file", "path": "config.json", "size": len(CONFIG), "oid": COMMIT}]).encode())
        elif self.path.startswith("/api/models/team/gated"):
            body = {"id": "team/gated", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
            self._send(200, json.dumps(body).encode())
        else:
            self._send(200, CONFIG, {"ETag": f'"{COMMIT}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(hub: Hub, folder: Path, token: str | None) -> "subprocess.CompletedProcess[str]":
    """As in a pod whose Secret `hub` holds HF_TOKEN (envFrom): nothing else of this machine's settings is there."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "FINETUNE_"))}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder / "hf"), names.ENV_WORKDIR: str(folder)}
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | ({"HF_TOKEN": token} if token else {})
    return subprocess.run([sys.executable, "-c", FETCH], env=env, capture_output=True, text=True, check=False, timeout=120)


def test_the_token_of_the_pods_environment_opens_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == CONFIG.decode()
    assert {said for _, said in hub.seen} == {f"Bearer {TOKEN}"}
    assert any(path.endswith("/config.json") for path, _ in hub.seen)
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_it_the_sentence_says_that_a_token_is_needed(hub: Hub, tmp_path: Path, token: str | None) -> None:
    done = fetch(hub, tmp_path, token)
    assert done.returncode == 1
    assert "ModelNotFound: model.uri hf://team/gated: the hub has no such model or revision, or it needs a token" in done.stderr
    assert {said for _, said in hub.seen} == {f"Bearer {token}" if token else None}
    assert "hf_" not in done.stderr
