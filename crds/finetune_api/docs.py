"""Writes the reference pages from the same schema that the API server gets, and from the table of failure classes.

People read them in docs/reference/; what they say is what the API server enforces, because both are made from one schema.
"""

import json
from collections.abc import Iterator
from typing import Any

from finetune_api.crd import Schema, crd, schema, sweep_crd, sweep_schema
from finetune_api.failures import DISRUPTIONS_IN_A_ROW, FAILURES
from finetune_api.finetunejob import ALWAYS_MUTABLE, MUTABLE_WHILE_SUSPENDED
from finetune_api.names import API_VERSION, KIND_JOB, KIND_SWEEP, MAX_NAME_LENGTH, MAX_SWEEP_NAME_LENGTH
from finetune_api.placement import Placement
from finetune_api.recipe import Recipe
from finetune_api.sweep import MUTABLE

_GENERATED = "<!-- Generated from crds/finetune_api by `make generate`; do not edit. -->\n"


def resource_page() -> str:
    """docs/reference/finetunejob.md."""
    root = schema()["properties"]
    spec, status = root["spec"], root["status"]
    names = crd()["spec"]["names"]
    order = [*(_alias(Recipe, n) for n in Recipe.model_fields), *(_alias(Placement, n) for n in Placement.model_fields)]
    lines = [
        _GENERATED,
        f"# {KIND_JOB} ({API_VERSION})\n",
        f"{schema()['description']} Short name `{names['shortNames'][0]}`, category `{names['categories'][0]}`.",
        "`kubectl explain finetunejob.spec` says the same.\n",
        f"The name has at most {MAX_NAME_LENGTH} characters: lower-case letters, digits and `-`, beginning with a letter.\n",
        "## What may change\n",
        f"- at any time: {_listed(ALWAYS_MUTABLE)} (`stop` only from false to true);",
        f"- while `suspend` is true before and after the edit: {_listed(MUTABLE_WHILE_SUSPENDED)} (the next attempt uses it);",
        f"- never: {_listed(n for n in order if n not in (*ALWAYS_MUTABLE, *MUTABLE_WHILE_SUSPENDED))}.\n",
        "## spec\n",
        *_table({**spec, "properties": {n: spec["properties"][n] for n in order}}),
        "\n## Rules across fields\n",
        *(f"- `{path}`: {message}" for path, message in _rules(spec, "")),
        "\n## status\n",
        *_table(status),
    ]
    return "\n".join(lines) + "\n"


def sweep_page() -> str:
    """docs/reference/hyperparametersweep.md."""
    root = sweep_schema()["properties"]
    spec, status = root["spec"], root["status"]
    names = sweep_crd()["spec"]["names"]
    # The trial's template is a FineTuneJob, which has a page of its own.
    template = dict(spec["properties"]["trialTemplate"]["properties"]["spec"])
    template.pop("properties")
    shown = {
        **spec["properties"]["trialTemplate"],
        "properties": {**spec["properties"]["trialTemplate"]["properties"], "spec": template},
    }
    fields = {**spec["properties"], "trialTemplate": shown}
    rules = (rule for rule in _rules(spec, "") if not rule[0].startswith(".trialTemplate.spec."))
    lines = [
        _GENERATED,
        f"# {KIND_SWEEP} ({API_VERSION})\n",
        f"{sweep_schema()['description']} Short name `{names['shortNames'][0]}`, category `{names['categories'][0]}`.",
        "`kubectl explain hyperparametersweep.spec` says the same. How it is used: [sweeps](../sweeps.md).\n",
        f"The name has at most {MAX_SWEEP_NAME_LENGTH} characters: lower-case letters, digits and `-`, beginning with a letter.\n",
        "## What may change\n",
        f"- at any time: {_listed(MUTABLE)};",
        f"- never: {_listed(n for n in spec['properties'] if n not in MUTABLE)}.\n",
        "## spec\n",
        "The fields of `trialTemplate.spec` are those of a [FineTuneJob](finetunejob.md).\n",
        *_table({**spec, "properties": fields}),
        "\n## Rules across fields\n",
        *(f"- `{path or '.'}`: {message}" for path, message in rules),
        "\n## status\n",
        *_table(status),
    ]
    return "\n".join(lines) + "\n"


def failures_page() -> str:
    """docs/reference/failures.md."""
    lines = [
        _GENERATED,
        "# Why a job failed\n",
        "The reason of the condition `Failed` is one of these classes; its message says what to change. A restart continues from",
        "the newest durable checkpoint. Only counted restarts use up `failurePolicy.maxRestarts`.\n",
        "Those that are restarted and not counted are disruptions: the cluster ended the pod, not the training. From number",
        f"{DISRUPTIONS_IN_A_ROW} in a row on, without a checkpoint of a new step in between (`status.disruptionsInARow`), they are counted",
        "too. A script of yours that reports no checkpoint is excepted: how far it is cannot be told.\n",
        "| Reason | Meaning | Restarted | Counted | Exit code |",
        "|---|---|---|---|---|",
    ]
    for f in FAILURES:
        counted = ("yes" if f.counted else "no") if f.retriable else "-"
        code = "-" if f.exit_code is None else str(f.exit_code)
        lines.append(f"| `{f.reason}` | {f.meaning} | {'yes' if f.retriable else 'no'} | {counted} | {code} |")
    return "\n".join(lines) + "\n"


def _alias(model: type[Recipe | Placement], name: str) -> str:
    return model.model_fields[name].alias or name


def _listed(names: Any) -> str:
    return ", ".join(f"`{n}`" for n in names)


def _table(top: Schema) -> list[str]:
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for path, node, required in _fields(top, ""):
        default = "**required**" if required else _default(node)
        cells = (f"`{path}`", _type(node), default, node.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _fields(node: Schema, path: str) -> Iterator[tuple[str, Schema, bool]]:
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        yield here, child, name in node.get("required", [])
        yield from _fields(child, here)
        if child.get("type") == "array":
            yield from _fields(child["items"], f"{here}[]")


def _default(node: Schema) -> str:
    # The default of a struct follows from its fields, which have rows of their own.
    return f"`{json.dumps(node['default'])}`" if "default" in node and node.get("type") != "object" else ""


def _type(node: Schema) -> str:
    if "enum" in node:
        return " or ".join(f"`{v}`" for v in node["enum"])
    if node.get("x-kubernetes-int-or-string"):
        return "quantity"
    kind: str = node.get("type", "value")
    if kind == "array":
        once = ", each once" if node.get("x-kubernetes-list-type") == "set" else ""
        return f"list of {_type(node['items'])}{_count(node, 'Items', 'items')}{once}"
    if kind == "object" and "additionalProperties" in node:
        return f"map of {_type(node['additionalProperties'])}{_count(node, 'Properties', 'keys')}"
    if node.get("format") == "date-time":
        return "time"
    if kind == "string":
        return kind + _count(node, "Length", "characters")
    return kind + _range(node)


def _count(node: Schema, what: str, unit: str) -> str:
    low, high = node.get(f"min{what}"), node.get(f"max{what}")
    if high is None:
        return ""
    return f", {low} to {high} {unit}" if low else f", at most {high} {unit}"


def _range(node: Schema) -> str:
    parts = []
    if "minimum" in node:
        parts.append(f"{'>' if node.get('exclusiveMinimum') else '≥'} {node['minimum']}")
    if "maximum" in node:
        parts.append(f"{'<' if node.get('exclusiveMaximum') else '≤'} {node['maximum']}")
    return "".join(f", {part}" for part in parts)


def _rules(node: Schema, path: str) -> Iterator[tuple[str, str]]:
    for rule in node.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"]:
            yield path + rule.get("fieldPath", ""), rule["message"]
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        yield from _rules(child, here)
        if child.get("type") == "array":
            yield from _rules(child["items"], f"{here}[]")
