"""Generates the CustomResourceDefinition from the pydantic models: one truth for CLI, trainer, operator and API server.

Sits beside the models and reads nothing else. The API server takes only a structural schema (no $ref, no unions, no
additionalProperties beside properties), so `structural` rewrites what pydantic makes, or raises with the path of what cannot be
said: a field never becomes weaker silently. CEL rules come from each model's `cel`; the rules for fields that may not change come
from the two tables in finetunejob.py. `python -m finetune_api.crd` prints the result.
"""

import sys
from collections.abc import Callable
from typing import Any

import yaml
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from finetune_api.base import Cel, Model
from finetune_api.finetunejob import ALWAYS_MUTABLE, MUTABLE_WHILE_SUSPENDED, FineTuneJob
from finetune_api.names import GROUP, KIND_JOB, KIND_SWEEP, PLURAL_JOB, PLURAL_SWEEP, VERSION
from finetune_api.sweep import MUTABLE, HyperparameterSweep

Schema = dict[str, Any]

CRD_NAME = f"{PLURAL_JOB}.{GROUP}"
SWEEP_CRD_NAME = f"{PLURAL_SWEEP}.{GROUP}"
HEADER = "# Generated from crds/finetune_api by `make generate`; do not edit.\n"

PRINTER_COLUMNS: tuple[Schema, ...] = (
    {"name": "State", "type": "string", "jsonPath": ".status.state", "description": "What the job does now."},
    {
        "name": "Progress%",
        "type": "integer",
        "jsonPath": ".status.trainerStatus.progressPercentage",
        "description": "Share of the planned steps that is done, in percent.",
    },
    {
        "name": "Checkpoint",
        "type": "integer",
        "jsonPath": ".status.checkpoint.step",
        "description": "Optimizer step of the newest durable checkpoint.",
    },
    {"name": "Restarts", "type": "integer", "jsonPath": ".status.restarts", "description": "Restarts of the training."},
    # Conditions are selected by type: their order in the list means nothing.
    {
        "name": "Complete",
        "type": "string",
        "priority": 1,
        "jsonPath": '.status.conditions[?(@.type=="Complete")].status',
        "description": "Whether the job ended well.",
    },
    {
        "name": "Failed",
        "type": "string",
        "priority": 1,
        "jsonPath": '.status.conditions[?(@.type=="Failed")].status',
        "description": "Whether the job ended badly.",
    },
    {
        "name": "Why",
        "type": "string",
        "priority": 1,
        "jsonPath": '.status.conditions[?(@.type=="Failed")].reason',
        "description": "The failure class, once the job failed.",
    },
    {
        "name": "Model",
        "type": "string",
        "priority": 1,
        "jsonPath": ".status.result.modelUri",
        "description": "Where the trained model is.",
    },
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
)
SELECTABLE_FIELDS = (".spec.model.uri", ".status.state")

SWEEP_PRINTER_COLUMNS: tuple[Schema, ...] = (
    {"name": "State", "type": "string", "jsonPath": ".status.state", "description": "What the sweep does now."},
    {"name": "Trials", "type": "string", "jsonPath": ".status.progress", "description": "Trials that have ended, of all."},
    {"name": "Pruned", "type": "integer", "jsonPath": ".status.trials.pruned", "description": "Trials that were stopped early."},
    {"name": "Best", "type": "string", "jsonPath": ".status.best.value", "description": "The best objective so far."},
    {"name": "Best-Trial", "type": "string", "jsonPath": ".status.best.trial", "description": "The trial that has it."},
    {
        "name": "Failed",
        "type": "string",
        "priority": 1,
        "jsonPath": '.status.conditions[?(@.type=="Failed")].reason',
        "description": "Why the sweep failed.",
    },
    {"name": "GPU-s", "type": "integer", "priority": 1, "jsonPath": ".status.gpuSeconds", "description": "GPU-seconds so far."},
    {
        "name": "Algorithm",
        "type": "string",
        "priority": 1,
        "jsonPath": ".status.plan.algorithm",
        "description": "The search algorithm.",
    },
    {
        "name": "Model",
        "type": "string",
        "priority": 1,
        "jsonPath": ".status.result.modelUri",
        "description": "The promoted model.",
    },
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
)
SWEEP_SELECTABLE_FIELDS = (".status.state",)

_TYPES = ("object", "array", "string", "integer", "number", "boolean")
# Every key that a structural schema may carry and pydantic makes in the same meaning; any other key is an error.
_SAME_MEANING = (
    "format", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties",
    "maxProperties", "required", "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys", "x-kubernetes-validations",
)  # fmt: skip


class NotStructuralError(ValueError):
    """A model says something that a structural schema cannot say; the message begins with the field's path."""


class _Generator(GenerateJsonSchema):
    """pydantic's schema with the models' CEL rules in it, and `T | None` as plain T: absent is how Kubernetes says null."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  (the signature is pydantic's)
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        out = super().model_schema(schema)
        out.pop("title", None)
        cls = schema["cls"]
        if issubclass(cls, Model) and cls.cel:
            out["x-kubernetes-validations"] = [_validation(rule) for rule in cls.cel]
        return out


def _validation(rule: Cel) -> Schema:
    out = {"rule": rule.rule, "message": rule.message}
    if rule.field_path:
        out["fieldPath"] = rule.field_path
    return out


# ------------------------------------------------------------------------------------------------ structural schema --
def structural(node: Schema, defs: dict[str, Schema], path: str, seen: tuple[str, ...] = ()) -> Schema:
    """The same schema without references and pydantic's dialect; NotStructuralError where that would lose something."""
    if "$ref" in node:
        name = node["$ref"].removeprefix("#/$defs/")
        if name in seen:
            raise NotStructuralError(f"{path}: {name} contains itself")
        # What stands beside the reference (a field's own description, its default) wins over the model's.
        beside = {k: v for k, v in node.items() if k != "$ref"}
        return structural({**defs[name], **beside}, defs, path, (*seen, name))

    node = dict(node)
    out: Schema = {}
    node.pop("title", None)
    if text := node.pop("description", None):
        out["description"] = " ".join(text.split())
    kind = node.pop("type", None)
    if kind in _TYPES:
        out["type"] = kind
    elif not node.get("x-kubernetes-int-or-string") and not node.get("x-kubernetes-preserve-unknown-fields"):
        raise NotStructuralError(f"{path}: type {kind!r} is not one type; unions become optional sibling fields with a CEL rule")
    if "const" in node:
        out["enum"] = [node.pop("const")]
    _numbers(node, out)
    _members(node, out, path, lambda child, where: structural(child, defs, where, seen))
    _default(node, out, path)
    for key in _SAME_MEANING:
        if key in node:
            out[key] = node.pop(key)
    if node:
        raise NotStructuralError(f"{path}: {', '.join(sorted(node))} cannot be said in a structural schema")
    return out


def _members(node: Schema, out: Schema, path: str, inner: Callable[[Schema, str], Schema]) -> None:
    """Fields of an object, values of a map, items of a list."""
    properties = node.pop("properties", None)
    extra = node.pop("additionalProperties", None)
    items = node.pop("items", None)
    if properties is not None:
        # pydantic's `forbid` is what the API server does anyway: unknown fields are refused (strict) or pruned.
        if extra not in (None, False):
            raise NotStructuralError(f"{path}: has named and free keys; one of the two is possible")
        out["properties"] = {k: inner(v, f"{path}.{k}") for k, v in properties.items()}
    elif isinstance(extra, dict):
        out["additionalProperties"] = inner(extra, f"{path}.*")
    elif out.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
        raise NotStructuralError(f"{path}: an object without known fields would be pruned to nothing")
    if out.get("type") == "array":
        if items is None:
            raise NotStructuralError(f"{path}: a list must say what it holds")
        out["items"] = inner(items, f"{path}[]")


def _numbers(node: Schema, out: Schema) -> None:
    # JSON schema 2020 writes the bound into exclusiveMinimum; Kubernetes' OpenAPI 3.0 has a flag beside minimum.
    for bound in ("Minimum", "Maximum"):
        if (value := node.pop(f"exclusive{bound}", None)) is not None:
            out[bound.lower()] = value
            out[f"exclusive{bound}"] = True
    if out.get("type") == "integer":
        out["format"] = "int64"


def _default(node: Schema, out: Schema, path: str) -> None:
    """Defaults that the API server shall store. Empty ones are left out: absent means the same, and objects stay readable."""
    default = node.pop("default", None)
    if default is None or default in ([], {}, ""):
        return
    if not isinstance(default, dict):
        out["default"] = default
        return
    # The default of an absent struct must be what the defaults of its fields make of an empty one. It is written out ({} would do
    # for the stored object) because the API server runs the struct's CEL rules on the default as it stands here.
    filled = {name: child["default"] for name, child in out.get("properties", {}).items() if "default" in child}
    if default_without_empty(default) != filled:
        raise NotStructuralError(f"{path}: absent and {{}} would mean different things: {default} and {filled}")
    if filled:
        out["default"] = filled


def default_without_empty(value: Schema) -> Schema:
    """The dict without nulls and without what is empty, at every depth."""
    out = {k: default_without_empty(v) if isinstance(v, dict) else v for k, v in value.items()}
    return {k: v for k, v in out.items() if v is not None and v not in ([], {}, "")}


# ----------------------------------------------------------------------------------------------------- immutability --
def immutability(spec: Schema) -> list[Cel]:
    """One transition rule for each field of spec that may not change, or not while the job runs.

    `spec` is the structural schema of the spec: it says which fields are always there and which lists ignore their order.
    """
    return [_transition(name, spec) for name in spec["properties"] if name not in ALWAYS_MUTABLE]


def _transition(name: str, spec: Schema, kind: str = KIND_JOB) -> Cel:
    field = spec["properties"][name]
    parts = [f"self.{name} == oldSelf.{name}"]
    # A set equals another one with the same members in another order; where order has a meaning, compare it as a list.
    # What the objects equal each other in is there on both sides or on none.
    parts += [
        " || ".join([*(f"!has(self.{o})" for o in optional), f"self.{path}.map(x, x) == oldSelf.{path}.map(x, x)"])
        for path, optional in _sets(field, name)
    ]
    parts = [f"({part})" if " || " in part else part for part in parts]
    same = " && ".join(parts)
    if name not in spec.get("required", ()) and "default" not in field:
        # An optional field could otherwise be added or removed: `==` runs only where both sides are there.
        same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || ({same}))"
    if kind == KIND_JOB and name in MUTABLE_WHILE_SUSPENDED:
        rule = f"(self.suspend && oldSelf.suspend) || ({same})"
        return Cel(rule, f"spec.{name} may change only while spec.suspend is true before and after the edit", f".{name}")
    return Cel(same, f"spec.{name} is immutable: create a new {kind}", f".{name}")


def _sets(schema: Schema, path: str, optional: tuple[str, ...] = ()) -> list[tuple[str, tuple[str, ...]]]:
    """Paths of the set lists below, without those inside other lists; each with what of its path may be absent."""
    found = [(path, optional)] if schema.get("x-kubernetes-list-type") == "set" else []
    for name, child in schema.get("properties", {}).items():
        absent = () if name in schema.get("required", ()) or "default" in child else (f"{path}.{name}",)
        found += _sets(child, f"{path}.{name}", (*optional, *absent))
    return found


# --------------------------------------------------------------------------------------------------------- the CRD --
def structural_schema(model: type[Model]) -> Schema:
    """The structural schema of a model that is no resource by itself."""
    raw = model.model_json_schema(by_alias=True, mode="validation", schema_generator=_Generator)
    return structural(raw, raw.pop("$defs", {}), model.__name__)


def schema() -> Schema:
    """The structural schema of FineTuneJob."""
    out = _resource_schema(FineTuneJob, KIND_JOB)
    spec = out["properties"]["spec"]
    spec["x-kubernetes-validations"] += [_validation(rule) for rule in immutability(spec)]
    return out


def sweep_schema() -> Schema:
    """The structural schema of HyperparameterSweep."""
    out = _resource_schema(HyperparameterSweep, KIND_SWEEP)
    spec = out["properties"]["spec"]
    spec["x-kubernetes-validations"] += [
        _validation(_transition(name, spec, kind=KIND_SWEEP)) for name in spec["properties"] if name not in MUTABLE
    ]
    return out


def _resource_schema(model: type[Model], kind: str) -> Schema:
    raw = model.model_json_schema(by_alias=True, mode="validation", schema_generator=_Generator)
    defs = raw.pop("$defs")
    fields = raw["properties"]
    # These three are the API server's own: it has their schema and descriptions, and refuses ours of metadata.
    for name in _SERVERS:
        fields.pop(name)
    raw["required"] = ["spec"]
    out = structural(raw, defs, kind)
    out["properties"] = {**{name: {"type": kind} for name, kind in _SERVERS.items()}, **out["properties"]}
    return out


_SERVERS = {"apiVersion": "string", "kind": "string", "metadata": "object"}


def crd() -> Schema:
    """The CustomResourceDefinition of FineTuneJob."""
    return _definition(KIND_JOB, PLURAL_JOB, "ftj", schema(), PRINTER_COLUMNS, SELECTABLE_FIELDS)


def sweep_crd() -> Schema:
    """The CustomResourceDefinition of HyperparameterSweep."""
    return _definition(KIND_SWEEP, PLURAL_SWEEP, "hps", sweep_schema(), SWEEP_PRINTER_COLUMNS, SWEEP_SELECTABLE_FIELDS)


def crds() -> tuple[Schema, ...]:
    """All of them."""
    return crd(), sweep_crd()


def _definition(
    kind: str, plural: str, short: str, root: Schema, columns: tuple[Schema, ...], selectable: tuple[str, ...]
) -> Schema:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                "categories": ["finetune"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "selectableFields": [{"jsonPath": p} for p in selectable],
                    "additionalPrinterColumns": [dict(c) for c in columns],
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Writes repeated parts in full: the API server's YAML has anchors, but people read this file."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def to_yaml(document: Schema) -> str:
    """The document as YAML with the header that says where it comes from."""
    return HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    sys.stdout.write("---\n".join(to_yaml(document) for document in crds()))
