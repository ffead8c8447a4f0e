"""The end-to-end tests against a cluster of yours say at once what they need, before they touch anything."""

from pathlib import Path

import pytest

from e2e.world import OF_YOURS, world

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("given", [[], ["OPERATOR_IMAGE", "AWS_REGION"], [name for name in OF_YOURS if name != "AWS_REGION"]])
def test_all_that_is_missing_is_named_in_one_sentence(given: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    for name in OF_YOURS:
        monkeypatch.setenv(name, "x" if name in given else "")
    with pytest.raises(RuntimeError, match="not set") as error, world():
        pytest.fail("no cluster must be asked")
    said = str(error.value)
    assert [name for name in OF_YOURS if f"{name} (" in said] == [name for name in OF_YOURS if name not in given]


def test_contributors_are_told_of_each() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [name for name in OF_YOURS if f"`{name}`" not in text] == []
