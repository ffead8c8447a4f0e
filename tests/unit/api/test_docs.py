"""The reference pages say what the schema and the tables say."""

from finetune_api import crd, docs
from finetune_api.failures import FAILURES


def rows(page: str) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in page.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row for row in cells}


def test_every_field_has_a_row_with_type_and_meaning() -> None:
    table = rows(docs.resource_page())
    for top in ("spec", "status"):
        for name in crd.schema()["properties"][top]["properties"]:
            assert name in table
    assert table["hyperparameters.batchSize"][1:3] == ["integer, ≥ 1, ≤ 65536", "`32`"]
    assert table["hyperparameters.learningRate"][1] == "number, > 0, ≤ 10"
    assert table["dataset.labels"][1] == "list of string, 1 to 128 characters, 2 to 1000 items, each once"
    assert table["model.uri"][2] == "**required**"
    assert table["trainer.resourcesPerNode.limits"][1].startswith("map of quantity")
    assert all(row[-1] for row in table.values())


def test_the_recipe_comes_before_the_placement() -> None:
    names = list(rows(docs.resource_page()))
    assert names.index("task") < names.index("output") < names.index("trainer") < names.index("suspend")


def test_the_page_says_what_may_change() -> None:
    page = docs.resource_page()
    assert "- at any time: `suspend`, `stop`, `failurePolicy`" in page
    assert "- never: `task`, `model`, `dataset`, `hyperparameters`, `evaluation`, `output`." in page


def test_every_failure_class_has_a_row() -> None:
    table = rows(docs.failures_page())
    assert set(table) == {f.reason for f in FAILURES}
    assert table["OOMKilled"][2:] == ["yes", "yes", "-"]
    assert table["DataInvalid"][2:] == ["no", "-", "11"]
    assert table["Interrupted"][2:] == ["yes", "no", "20"]
