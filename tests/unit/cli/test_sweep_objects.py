"""The folder of objects: merge patches, writes that are whole or not there, and a manifest that changes between runs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_kit import QUIET, Place, play

from finetune_api.manifest import load_sweep
from finetune_cli.errors import UserError
from finetune_cli.sweep_objects import PART, Objects, merge, read
from finetune_cli.sweep_run import take_over
from finetune_operator.kube.port import merge_patch

JSON = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
)
OBJECTS = st.dictionaries(st.text(max_size=2), JSON, max_size=4)


@pytest.mark.parametrize(
    ("target", "patch", "merged"),
    [  # RFC 7386, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patches_of_the_standard(target: Any, patch: Any, merged: Any) -> None:
    before = json.dumps(target)
    assert merge(target, patch) == merged
    assert json.dumps(target) == before


@given(OBJECTS, OBJECTS)
def test_the_patch_of_a_difference_makes_it(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert merge(old, merge_patch(old, new)) == new


def _trial(name: str = "s-t0000", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}


def test_a_patch_is_for_one_object_and_counts_changes_of_the_spec(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    objects.load()
    made = objects.create(_trial())
    uid = made["metadata"]["uid"]
    assert objects.patch("s-t0000", "another", {"spec": {"stop": True}}) is None
    annotated = objects.patch("s-t0000", uid, {"metadata": {"annotations": {"a": "b"}}})
    stopped = objects.patch("s-t0000", uid, {"spec": {"stop": True}})
    assert annotated is not None
    assert stopped is not None
    assert [o["metadata"]["generation"] for o in (made, annotated, stopped)] == [1, 1, 2]
    again = Objects(tmp_path)
    again.load()
    assert again.get("s-t0000") == stopped


WRITER = """
import sys
from pathlib import Path
from finetune_cli.sweep_objects import Objects
objects = Objects(Path(sys.argv[1]))
objects.load()
made = objects.create({"kind": "FineTuneJob", "metadata": {"name": "s-t0000"}, "spec": {"text": "x" * 3_000_000}, "status": {"n": 0}})
print("ready", flush=True)
while True:
    made = objects.put({**made, "status": {"n": made["status"]["n"] + 1}})
"""


def test_a_writer_that_is_killed_leaves_a_whole_object(tmp_path: Path) -> None:
    """Killed until a death was in the middle of a write: then the object is the one before, and the half is swept away."""
    middle = 0
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], env=QUIET, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            seen = int(read(tmp_path / "objects")["s-t0000"]["status"]["n"])
            time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
        middle += bool(list((tmp_path / "objects").glob(f"*{PART}")))
        objects = Objects(tmp_path)
        objects.load()
        kept = objects.need("s-t0000")
        assert len(kept["spec"]["text"]) == 3_000_000
        assert kept["status"]["n"] >= seen
        assert not list((tmp_path / "objects").glob(f"*{PART}"))
        if middle:
            return
    raise AssertionError("no death was in the middle of a write")


def test_what_is_no_object_is_told(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects/x.json").write_text('{"kind": "FineTu')
    with pytest.raises(UserError, match=r"x\.json cannot be read"):
        Objects(tmp_path).load()


# ------------------------------------------------------------------------------------------ a manifest that changes ----
def _kept(tmp_path: Path, **spec: Any) -> tuple[Objects, dict[str, Any]]:
    objects = Objects(tmp_path)
    objects.load()
    return objects, take_over(objects, load_sweep(Place(tmp_path).manifest(**spec).read_text()))


def test_what_may_change_is_taken_over(tmp_path: Path) -> None:
    _, first = _kept(tmp_path, budget={"activeSeconds": 100})
    _, same = _kept(tmp_path, budget={"activeSeconds": 100})
    assert same == first
    objects, changed = _kept(tmp_path, numTrials=6)
    assert changed["spec"]["numTrials"] == 6
    assert changed["spec"]["budget"] == {}
    assert changed["metadata"] == {**first["metadata"], "generation": 2}
    assert objects.get("tiny") == changed


def test_what_may_not_change_is_told(tmp_path: Path) -> None:
    _kept(tmp_path)
    with pytest.raises(UserError, match=r"spec\.seed differs .* numTrials, parallelTrials"):
        _kept(tmp_path, seed=43)
    other = load_sweep(Place(tmp_path).manifest().read_text().replace("name: tiny", "name: other"))
    objects = Objects(tmp_path)
    objects.load()
    with pytest.raises(UserError, match="holds the sweep tiny"):
        take_over(objects, other)


def test_a_sweep_is_read_before_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends while it is read: with its end go the last words of its trials."""
    objects = play(tmp_path)
    order, read_text = list[str](), Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda file, **more: order.append(file.name) or read_text(file, **more))
    read(objects.folder)
    assert order[0] == "tiny.json"
    assert len(order) == 15
