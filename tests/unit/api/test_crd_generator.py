"""The generator of the CRD: nothing is lost on the way from model to schema, and what is checked in is what the models say."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field

import generate
from finetune_api import crd
from finetune_api.base import Cel, EachOnce, Model, Shape
from finetune_api.finetunejob import ALWAYS_MUTABLE, MUTABLE_WHILE_SUSPENDED, FineTuneJobSpec
from finetune_api.names import Condition

ROOT = Path(__file__).parents[3]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key, part in (("items", "[]"), ("additionalProperties", ".*")):
        if key in schema:
            yield from nodes(schema[key], path + part)


def structural(model: type[Model]) -> dict[str, Any]:
    raw = model.model_json_schema(by_alias=True, schema_generator=crd._Generator)
    return crd.structural(raw, raw.pop("$defs", {}), model.__name__)


# ------------------------------------------------------------------------------------------------------ checked in --
def test_generated_files_are_what_the_models_say() -> None:
    assert generate.stale(ROOT) == []


def test_check_names_the_file_that_is_out_of_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("values.yaml", "values.schema.json"):
        (tmp_path / generate.CHART).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / generate.CHART / name, tmp_path / generate.CHART / name)
    assert generate.main(["--root", str(tmp_path)]) == 0
    assert generate.main(["--root", str(tmp_path), "--check"]) == 0
    file = Path("crds") / f"{crd.CRD_NAME}.yaml"
    (tmp_path / file).write_text("old")
    capsys.readouterr()
    assert generate.main(["--root", str(tmp_path), "--check"]) == 1
    assert str(file) in capsys.readouterr().err
    assert (tmp_path / file).read_text() == "old"


def test_generating_elsewhere_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--root", str(tmp_path)])
    assert "is not a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("name", [crd.CRD_NAME, crd.SWEEP_CRD_NAME])
def test_chart_copy_differs_only_in_the_annotation_that_keeps_the_jobs(name: str) -> None:
    ours = yaml.safe_load((ROOT / "crds" / f"{name}.yaml").read_text())
    charts = yaml.safe_load((ROOT / generate.CHART / "files/crds" / f"{name}.yaml").read_text())
    assert charts["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert charts == ours


# ----------------------------------------------------------------------------------------------------- what it says --
def test_every_field_is_described() -> None:
    root = crd.schema()
    fields = [
        (path, node)
        for part in ("spec", "status")
        for path, node in nodes(root["properties"][part], part)
        if not path.endswith(("[]", ".*"))
    ]
    assert len(fields) > 120
    assert [path for path, node in fields if len(node.get("description", "")) < 8] == []


def test_every_list_map_and_string_of_spec_is_bounded() -> None:
    """The API server refuses rules whose worst case costs too much; and nobody needs a label of a megabyte."""
    spec = crd.schema()["properties"]["spec"]
    free = [
        path
        for path, node in nodes(spec, "spec")
        if (node.get("type") == "array" and "maxItems" not in node)
        or (node.get("type") == "string" and "maxLength" not in node and "enum" not in node)
        or ("additionalProperties" in node and "maxProperties" not in node)
    ]
    assert free == []


def test_every_list_says_how_it_merges_or_is_one_whole() -> None:
    root = crd.schema()["properties"]
    kinds = {
        path: (node.get("x-kubernetes-list-type"), *node.get("x-kubernetes-list-map-keys", []))
        for part in ("spec", "status")
        for path, node in nodes(root[part], part)
        if node.get("type") == "array"
    }
    assert kinds["spec.dataset.labels"] == ("set",)
    assert kinds["spec.trainer.env"] == ("map", "name")
    assert kinds["spec.trainer.podTemplate.spec.volumes"] == ("map", "name")
    assert kinds["status.conditions"] == ("map", "type")
    assert kinds["status.evaluations"] == ("map", "examples")
    assert kinds["status.jobsStatus"] == ("map", "name")


def test_every_field_of_spec_is_in_one_of_the_three_classes_of_mutability() -> None:
    spec = crd.schema()["properties"]["spec"]
    rules = {r["fieldPath"][1:]: r for r in spec["x-kubernetes-validations"] if "oldSelf" in r["rule"]}
    fields = {field.alias for field in FineTuneJobSpec.model_fields.values()}
    assert set(rules) == fields - {"suspend", "failurePolicy"}  # `stop` has its own one-way rule
    assert set(ALWAYS_MUTABLE) | set(MUTABLE_WHILE_SUSPENDED) <= fields
    assert rules["dataset"]["message"] == "spec.dataset is immutable: create a new FineTuneJob"
    assert "only while spec.suspend is true" in rules["trainer"]["message"]
    assert "has(oldSelf.dataset)" in rules["dataset"]["rule"]  # adding it is a change too
    assert "labels.map(" in rules["dataset"]["rule"]  # a set ignores its order, but the order gives the ids


def test_printer_columns_select_conditions_by_type() -> None:
    version = crd.crd()["spec"]["versions"][0]
    paths = [c["jsonPath"] for c in version["additionalPrinterColumns"]]
    about_conditions = [p for p in paths if "conditions" in p]
    assert about_conditions
    assert all(any(f'@.type=="{c}"' in p for c in Condition) for p in about_conditions)
    assert ".status.state" in paths
    assert version["subresources"] == {"status": {}}


def test_defaults_follow_from_the_fields_own_defaults() -> None:
    spec = crd.schema()["properties"]["spec"]["properties"]
    assert spec["hyperparameters"]["default"]["schedule"] == {"type": "Linear", "warmup": 0.06}
    assert spec["suspend"]["default"] is False
    # An empty struct is not stored: `kubectl get -o yaml` shows what the user wrote and what has a value.
    assert "default" not in spec["trainer"]["properties"]["podTemplate"]


# ----------------------------------------------------------------------------------------------- what it refuses to say --
class Union(Model):
    field: int | str


class Node(Model):
    children: list["Node"]


class Anything(Model):
    field: dict[str, Any]


class Inner(Model):
    size: int = 1


class OwnDefault(Model):
    inner: Inner = Inner(size=2)


class Multiple(Model):
    field: Annotated[int, Field(multiple_of=2)]


@pytest.mark.parametrize(
    ("model", "path", "why"),
    [
        (Union, "Union.field", "not one type"),
        (Node, "Node.children[]", "contains itself"),
        (Anything, "Anything.field", "pruned"),
        (OwnDefault, "OwnDefault.inner", "absent"),
        (Multiple, "Multiple.field", "multipleOf"),
    ],
)
def test_what_a_structural_schema_cannot_say_is_an_error_with_its_path(model: type[Model], path: str, why: str) -> None:
    with pytest.raises(crd.NotStructuralError) as error:
        structural(model)
    assert str(error.value).startswith(f"{path}: ")
    assert why in str(error.value)


class Everything(Model):
    """The model."""

    cel = (Cel("self.a < self.b", "a must be less than b", ".a"),)

    a: Annotated[float, Field(gt=0, lt=5)] | None = None
    """A number
    over two lines."""
    b: int = 7
    """A whole number."""
    c: Annotated[list[Annotated[str, Shape(r"^a\.'b$", "must be a.'b")]], EachOnce()]
    """A set."""
    d: Inner | None = None
    """A struct of its own meaning."""


def test_translation_of_pydantic_into_structural_schema() -> None:
    assert structural(Everything) == {
        "type": "object",
        "description": "The model.",
        "properties": {
            "a": {
                "type": "number",
                "description": "A number over two lines.",
                "minimum": 0,
                "exclusiveMinimum": True,
                "maximum": 5,
                "exclusiveMaximum": True,
            },
            "b": {"type": "integer", "format": "int64", "description": "A whole number.", "default": 7},
            "c": {
                "type": "array",
                "description": "A set.",
                "items": {
                    "type": "string",
                    "x-kubernetes-validations": [{"rule": r"self.matches('^a\\.\'b$')", "message": "must be a.'b"}],
                },
                "x-kubernetes-list-type": "set",
            },
            "d": {
                "type": "object",
                "description": "A struct of its own meaning.",
                "properties": {"size": {"type": "integer", "format": "int64", "default": 1}},
            },
        },
        "required": ["c"],
        "x-kubernetes-validations": [{"rule": "self.a < self.b", "message": "a must be less than b", "fieldPath": ".a"}],
    }
