"""A sweep made again from its objects: all comes out as it was kept, and whatever is changed in them shows."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from sweep_kit import RUNGS, play

from finetune_api import names
from finetune_api.manifest import load_sweep
from finetune_cli.errors import UserError
from finetune_cli.sweep_objects import Objects
from finetune_cli.sweep_replay import document, load, replay_sweep
from finetune_operator.domain import history
from finetune_operator.domain import trials as t
from finetune_operator.domain.replay import Mismatch, replay
from finetune_operator.search.types import Study

Object = dict[str, Any]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    return play(tmp_path_factory.mktemp("played"))


def _parts(objects: Objects) -> tuple[Object, list[Object]]:
    return copy.deepcopy(objects.need("tiny")), copy.deepcopy(objects.all(names.KIND_JOB))


def _change(job: Object, annotation: str, **changes: Any) -> None:
    kept = job["metadata"]["annotations"]
    kept[annotation] = t.compact({**json.loads(kept[annotation]), **changes})


def _rung(job: Object, examples: int = RUNGS[0]) -> str:
    name = f"{names.ANNOTATION_RUNG}{examples}"
    assert name in job["metadata"]["annotations"]
    return name


def _only(sweep: Object, jobs: list[Object]) -> Mismatch:
    [found] = replay(sweep, jobs).mismatches
    return found


def test_all_comes_out_as_it_was_kept(played: Objects) -> None:
    sweep, jobs = _parts(played)
    study = Study(load_sweep(json.dumps({**sweep, "status": None})).spec)
    outcomes = {trial.outcome for trial in t.read_trials(study, dict(enumerate(jobs)), 14)}
    assert {str(o) for o in outcomes} == {"Complete", "Pruned", "Failed"}
    found = replay(sweep, jobs)
    assert found.mismatches == ()
    assert (found.suggestions, found.verdicts) == (14, sum(len(t.judgements(job)) for job in jobs))
    assert found.verdicts > 20


def test_a_history_is_replayed_as_the_objects_are(played: Objects) -> None:
    sweep, jobs = _parts(played)
    exported = json.loads(json.dumps(document(sweep, jobs)))
    again, rows = history.objects(exported)
    assert replay(again, rows) == replay(sweep, jobs)
    assert json.dumps(document(again, rows)["trials"]) == json.dumps(exported["trials"])


def test_a_changed_parameter_is_found(played: Objects) -> None:
    sweep, jobs = _parts(played)
    _change(jobs[13], names.ANNOTATION_TRIAL, parameters={"lr": 0.001})
    found = _only(sweep, jobs)
    assert (found.trial, found.about, found.replayed) == ("tiny-t0013", "parameters", True)
    assert '{"lr":0.001} by tpe was kept' in found.message


def test_a_changed_verdict_is_found(played: Objects) -> None:
    sweep, jobs = _parts(played)
    job = next(job for job in jobs if [j.stop for j in t.judgements(job)] == [True])
    _change(job, _rung(job), rank=1)
    assert "Stop, rank 1 of" in _only(sweep, jobs).message


def test_a_verdict_that_let_a_trial_go_on_is_found(played: Objects) -> None:
    """Whatever else it changes: what the trial was judged to is not what comes out."""
    sweep, jobs = _parts(played)
    job = next(job for job in jobs if [j.stop for j in t.judgements(job)] == [True])
    _change(job, _rung(job), verdict="Continue")
    found = replay(sweep, jobs).mismatches
    assert any(m.trial == job["metadata"]["name"] and "Continue" in m.message and "Stop" in m.message for m in found)


@pytest.mark.parametrize("what", ["trials", "open"])
def test_a_changed_clock_of_a_verdict_is_found(played: Objects, what: str) -> None:
    sweep, jobs = _parts(played)
    job = next(job for job in jobs[8:] if t.judgements(job))
    known = t.judgements(job)[0].as_of.to_json()
    index = str(t.chosen(job).index)  # type: ignore[union-attr]
    changed = {**known, "trials": 2, "open": {}} if what == "trials" else {**known, "open": {**known["open"], index: 1}}
    _change(job, _rung(job), asOf=changed)
    assert _only(sweep, jobs).trial == job["metadata"]["name"]


def test_a_changed_clock_of_a_suggestion_is_found(played: Objects) -> None:
    sweep, jobs = _parts(played)
    _change(jobs[12], names.ANNOTATION_TRIAL, asOf={"trials": 11})
    assert "when there were 12 trials; it says 11" in _only(sweep, jobs).message


def test_a_trial_that_is_gone_is_no_match(played: Objects) -> None:
    sweep, jobs = _parts(played)
    del jobs[2]
    found = replay(sweep, jobs)
    assert found.suggestions == 2  # those before it
    assert found.mismatches
    assert not any(m.replayed for m in found.mismatches)
    assert "cannot be replayed: trial 2 has been deleted since" in found.mismatches[0].message


def test_a_spoiled_annotation_is_no_match(played: Objects) -> None:
    sweep, jobs = _parts(played)
    jobs[13]["metadata"]["annotations"][names.ANNOTATION_TRIAL] = "{"
    found = replay(sweep, jobs).mismatches  # its own, and those of who was compared with it
    assert "gone or spoiled" in found[0].message
    assert not any(m.replayed for m in found)


# ----------------------------------------------------------------------------------------------------- the command ----
def test_the_command_says_how_many_match(played: Objects, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = played.folder.parent
    assert replay_sweep(folder, None, None, None) == 0
    assert "14 suggestions and" in capsys.readouterr().out
    sweep, jobs = load(folder)
    _change(jobs[13], names.ANNOTATION_TRIAL, parameters={"lr": 0.001})
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(document(sweep, jobs)))
    assert replay_sweep(file, None, None, None) == 1
    assert "tiny-t0013, parameters" in capsys.readouterr().out


def test_a_warm_start_is_replayed_with_the_trials_that_it_learned_from(played: Objects, tmp_path: Path) -> None:
    sweep, jobs = _parts(played)
    sweep["spec"]["warmStartFrom"] = {"name": "other"}
    with pytest.raises(LookupError, match="started warm from other"):
        replay(sweep, jobs)
    assert replay(sweep, jobs, _parts(played)).suggestions < 14  # it learned nothing from them then


def test_what_is_no_sweep_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no sweep"):
        load(tmp_path)
    (tmp_path / "x.json").write_text('{"kind": "SweepHistory"}')
    with pytest.raises(UserError, match="no history"):
        load(tmp_path / "x.json")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="kubectl is not installed"):
        replay_sweep(None, "tiny", None, None)


def test_a_history_that_left_out_what_was_known_is_not_replayed(played: Objects, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(document(*_parts(played)) | {"leftOut": ["evaluations", "asOf"]}))
    with pytest.raises(UserError, match="does not hold what each decision knew"):
        replay_sweep(file, None, None, None)
