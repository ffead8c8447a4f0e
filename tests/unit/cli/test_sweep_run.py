"""A real sweep on this machine: real trainers, a host that is killed and one that is interrupted, and everything accounted for."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from sweep_kit import QUIET, Place, finetune, play

from finetune_api import names
from finetune_cli.sweep_objects import read
from finetune_cli.sweep_process import Attempt, ProgressServer
from finetune_cli.sweep_run import SETTINGS, Host, Places, run_sweep
from finetune_cli.sweep_show import Board
from finetune_operator.domain.sweep import decide_sweep
from finetune_operator.domain.sweep_types import SweepObserved

TO_ITS_END = "it is restored"
"""What the trainer says once the last step is done."""


def wait_for(what: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)
    return found


def _objects(place: Place) -> dict[str, Any]:
    return read(place.work / "objects")


def _steps(place: Place) -> set[str]:
    """Checkpoints that are whole."""
    return {str(manifest.parent) for manifest in place.bucket.glob("out/*/checkpoints/*/MANIFEST.json")}


def _trainers() -> list[int]:
    """Processes that train."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"finetune_trainer" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _of(place: Place) -> list[int]:
    """Those that train for this sweep."""
    mine = []
    for pid in _trainers():
        try:
            if f"FINETUNE_WORKDIR={place.work}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                mine.append(pid)
        except OSError:
            continue
    return mine


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_that_is_killed_and_interrupted_comes_to_its_end(tmp_path: Path) -> None:
    place = Place(tmp_path).fill()
    file = place.manifest(promote={"storageUri": "s3://bucket/best", "topK": 1, "seeds": 1})

    def judged() -> bool:
        return any("finetune.dev/rung-" in json.dumps(job) for job in _objects(place).values())

    with place.start(file) as host:  # killed, where a trial has been judged and another has saved
        wait_for(lambda: host.poll() is not None or (_steps(place) and judged()))
        assert host.poll() is None, host.communicate()
        assert len(_of(place)) >= 1
        host.send_signal(signal.SIGKILL)
    wait_for(lambda: not _of(place), 10)
    killed = _objects(place)
    assert any(job["kind"] == "FineTuneJob" and not job["status"].get("completionTime") for job in killed.values())

    before = _steps(place)
    with place.start(file) as host:  # interrupted, once a trainer is at work again
        wait_for(lambda: _steps(place) - before)
        host.send_signal(signal.SIGINT)
        said, _ = host.communicate(timeout=120)
    assert host.returncode == 20, said
    assert "run the same command again" in said
    assert not _of(place)
    assert any('"Interrupted"' in log.read_text() for log in place.work.glob("*/termination-log"))
    states = {job["status"]["state"] for job in _objects(place).values() if job["kind"] == "FineTuneJob"}
    assert "Suspended" in states
    assert "Running" not in states

    done = subprocess.run(place.arguments(file), env=QUIET, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the best of 4 trials" in done.stdout
    assert "going on" in "".join(p.read_text() for p in place.work.glob("*/log.txt"))

    found = _objects(place)
    status = found["tiny"]["status"]
    assert status["state"] == "Complete"
    assert status["trials"]["created"] == 4
    assert status["trials"]["complete"] + status["trials"]["pruned"] == 4, status["trials"]
    # What was decided before the kill stands as it was: no trial was lost, and none was chosen twice.
    for name, job in killed.items():
        if job["kind"] == "FineTuneJob":
            kept = found[name]["metadata"]
            assert kept["uid"] == job["metadata"]["uid"]
            assert kept["annotations"].items() >= job["metadata"]["annotations"].items()
            # Neither the kill nor the interruption is a failure of the trial.
            assert found[name]["status"]["restarts"] == 0
    for number in range(4):
        log = (place.work / f"tiny-t{number:04d}" / "log.txt").read_text()
        assert log.count(TO_ITS_END) <= 1, log
    assert "test/macro_f1" in {m["name"] for m in status["result"]["metrics"]}
    assert len(status["repetitions"][0]["values"]) == 2
    assert (place.bucket / "best/model/config.json").exists()
    assert json.loads((place.bucket / "out/sweep.json").read_text())["kind"] == "SweepHistory"
    assert (place.work / "report.html").exists()

    for source in (place.work, place.work / "sweep.json"):
        replayed = finetune("sweep", "replay", source)
        assert replayed.returncode == 0, replayed.stdout
        assert replayed.stdout.startswith("tiny: 4 suggestions and ")
    again = subprocess.run(place.arguments(file), env=QUIET, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0
    assert "has ended already" in again.stdout


@pytest.mark.slow
def test_a_sweep_without_a_result_fails_with_a_sentence(tmp_path: Path) -> None:
    """The data is not there: each trial fails for good, and that is said."""
    place = Place(tmp_path)
    (place.bucket / "out").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    done = subprocess.run(place.arguments(place.manifest(numTrials=2)), env=QUIET, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the sweep failed with TooManyFailed" in done.stderr
    assert "Each of the first 2 trials failed" in done.stderr
    assert "tiny-t0000: Failed (" in done.stdout


@pytest.mark.slow
def test_the_plan_is_shown(tmp_path: Path) -> None:
    place = Place(tmp_path).fill()
    done = finetune("validate", "-f", place.manifest(), "--s3-root", tmp_path / "s3")
    assert done.returncode == 0, done.stderr
    assert "4 trials, 2 at a time, chosen by tpe" in done.stdout
    assert "judged at 480, 960, 1920 training examples seen" in done.stdout
    assert "a trial sees 3600 examples (30 epochs of 120); a tenth of that, a usual minExamples, is 360" in done.stdout


SCRIPT = """
import json, os, sys, time, urllib.request
rate, attempt = float(os.environ["RATE"]), os.environ["FINETUNE_ATTEMPT"]
with open(sys.argv[1], "a") as file:
    file.write(json.dumps([os.environ["FINETUNE_JOB_NAME"], attempt, rate]) + "\\n")
time.sleep(1)
body = json.dumps({"trainerStatus": {"metrics": [{"name": "score", "value": repr(rate)}]}}).encode()
url = os.environ["KUBEFLOW_TRAINER_SERVER_URL"]
urllib.request.urlopen(urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})).read()
"""


def _scripts(place: Place, told: Path, trials: int) -> Path:
    """A sweep of scripts instead of trainers; each start of one is a line in `told`."""
    place.bucket.mkdir(parents=True)
    return place.manifest(
        objective={"metric": "score", "direction": "Minimize"},
        parameters=[{"name": "rate", "env": "RATE", "searchSpace": {"logUniform": {"min": 1e-6, "max": 1e-2}}}],
        pruneAlgorithm={"none": {}},
        numTrials=trials,
        trialTemplate={"spec": {"trainer": {"command": [sys.executable, "-c", SCRIPT, str(told)]}}},
    )


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """Scripts instead of trainers, so that there are many deaths: no trial is lost or chosen again, no attempt has the number of another."""
    place, told = Place(tmp_path), tmp_path / "told.jsonl"
    file = _scripts(place, told, 14)
    chance, kept = random.Random(1), dict[str, Any]()
    for death in range(6):
        with place.start(file) as host:
            if death % 2:  # while trials run
                before = len(_lines(told))
                wait_for(lambda: host.poll() is not None or len(_lines(told)) > before)  # noqa: B023
                time.sleep(chance.uniform(0, 1))
            else:  # at its start, or soon after
                time.sleep(chance.uniform(0.2, 2.5))
            assert host.poll() is None, host.communicate()
            host.kill()
        found = _objects(place) if (place.work / "objects").exists() else {}
        assert all(found[name]["metadata"]["uid"] == uid for name, uid in kept.items())
        kept = {name: thing["metadata"]["uid"] for name, thing in found.items()}
    done = subprocess.run(place.arguments(file), env=QUIET, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = _objects(place)
    assert found["tiny"]["status"]["trials"]["complete"] == 14
    attempts = [json.loads(line) for line in _lines(told)]
    assert len({(name, attempt) for name, attempt, _ in attempts}) == len(attempts)
    assert len({(name, rate) for name, _, rate in attempts}) == 14
    assert finetune("sweep", "replay", place.work).stdout.startswith("tiny: 14 suggestions and 0 verdicts")


def test_what_a_script_says_just_before_its_end_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports and ends between two looks of the host: in the time that the host takes to write its files down."""
    place = Place(tmp_path)
    file = _scripts(place, tmp_path / "told.jsonl", 2)
    take = ProgressServer.take

    def slow(server: ProgressServer, uids: dict[str, str]) -> dict[str, Any]:
        taken = take(server, uids)
        time.sleep(3)
        return taken

    monkeypatch.setattr(ProgressServer, "take", slow)
    places: dict[str, Any] = {"workdir": place.work, "s3_root": tmp_path / "s3", "model_mirror": None, "dataset_mirror": None}
    assert run_sweep(file, [], **places) == 0
    assert _objects(place)["tiny"]["status"]["trials"]["complete"] == 2


def test_the_table_marks_the_best(tmp_path: Path) -> None:
    board = Board(play(tmp_path), "tiny")
    best = board.objects.need("tiny")["status"]["best"]["trial"]
    with board.console.capture() as captured:
        board.console.print(board.table())
    shown = captured.get()
    assert f"{best} *" in shown
    assert shown.count(" *") == 1
    assert "lr=" in shown


def test_loss_before_the_first_evaluation_does_not_mean_that_the_metric_is_missing(tmp_path: Path) -> None:
    """A trainer tells its loss every few seconds, and its metrics at the first evaluation."""
    objects = play(tmp_path)
    sweep, trial = objects.need("tiny"), objects.need("tiny-t0000")
    fresh = {"metadata": sweep["metadata"], "kind": sweep["kind"], "apiVersion": sweep["apiVersion"], "spec": sweep["spec"]}
    meta = trial["metadata"]
    judged = {k: v for k, v in meta["annotations"].items() if k == names.ANNOTATION_TRIAL}
    early = {"state": "Running", "trainerStatus": {"metrics": [{"name": "loss", "value": "1.1"}]}}
    spec = {**trial["spec"], "stop": False}
    for evaluations, state in (
        ([], "Running"),
        ([{"examples": 480, "step": 60, "metrics": [{"name": "f2", "value": "1"}]}], "Stopping"),
    ):
        job = {
            **trial,
            "spec": spec,
            "metadata": {**meta, "annotations": judged},
            "status": {**early, "evaluations": evaluations},
        }
        decision = decide_sweep(SweepObserved(fresh, {0: job}), datetime.now(UTC), SETTINGS)
        assert decision.status["state"] == state


# ----------------------------------------------------------------------------------------------------------- parts ----
def _report(url: str, body: bytes) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body, method="POST"), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_progress_is_taken_from_who_knows_the_token(tmp_path: Path) -> None:
    wake = Event()
    with ProgressServer(wake) as server:
        url = server.url("tiny-t0000", 2)
        body = b'{"evaluations": [{"examples": 480, "step": 60, "metrics": [{"name": "validation/loss", "value": "nan"}]}]}'
        assert _report(url.replace("/tiny", "x/tiny"), body) == 404
        assert _report(url, b"{") == 400
        assert _report(url, b" " * (64 * 1024 + 1)) == 413
        assert not wake.is_set()
        assert server.take({"tiny-t0000": "u"}) == {}
        assert _report(url, body) == 200
        assert wake.is_set()
        [taken] = server.take({"tiny-t0000": "u"}).values()
        assert (taken.attempt, taken.job_uid, taken.report.evaluations[0].examples) == (2, "u", 480)
        assert server.take({"tiny-t0000": "u"}) == {}


def _attempt(folder: Path, program: str) -> Attempt:
    attempt = Attempt("t-1", "owner", folder, [sys.executable, "-c", program])
    attempt.start({}, os.open(folder, os.O_RDONLY), ours=True)
    wait_for(attempt.ended, 30)
    return attempt


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit(18)", "CudaOutOfMemory"),
        ("raise SystemExit(3)", "UserCodeError"),
        ("import os; os.kill(os.getpid(), 9)", "OOMKilled"),
    ],
)
def test_an_end_without_words_is_told_by_its_code(tmp_path: Path, program: str, reason: str) -> None:
    attempt = _attempt(tmp_path, program)
    told = json.loads(attempt.pod()["status"]["containerStatuses"][0]["state"]["terminated"]["message"])
    assert told["reason"] == reason
    assert attempt.child()["status"]["conditions"][0]["type"] == "Failed"


HOST = """
import sys
from pathlib import Path
from finetune_cli.sweep_process import Attempt
attempt = Attempt("t-1", "owner", Path(sys.argv[1]), ["sleep", "600"])
attempt.start({}, 1, ours=True)
print(attempt._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_trainer_dies_with_its_host(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOST, str(tmp_path)]
    with subprocess.Popen(command, env=QUIET, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        trainer = Path(f"/proc/{int(host.stdout.readline())}")
        wait_for(lambda: (trainer / "cmdline").read_bytes().startswith(b"sleep"), 30)
        host.kill()
    wait_for(lambda: not trainer.exists() or b"Z" in (trainer / "stat").read_bytes().split()[2:3], 10)


def test_a_signal_waits_for_no_lock(tmp_path: Path) -> None:
    """Handlers run in the main thread, between any two instructions of what waits there for news."""
    objects = play(tmp_path)
    host = Host(objects, objects.need("tiny"), Places(tmp_path), 0)
    with host.wake._cond:
        handler = Thread(target=host._signalled, args=(signal.SIGINT, None), daemon=True)
        handler.start()
        handler.join(5)
        assert not handler.is_alive()
    assert host.asked == 1
