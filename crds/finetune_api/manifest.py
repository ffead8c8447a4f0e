"""Reads manifests the way the API server does, and says what is wrong with them in sentences.

One loader for both hosts (kubeyaml.py), one set of models, and the API server's strictness about types: "3" is not a number.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune_api.finetunejob import FineTuneJob
from finetune_api.kubeyaml import KubeLoader
from finetune_api.names import API_VERSION, KIND_JOB


class ManifestError(ValueError):
    """A manifest that cannot be used. `problems` are sentences, each beginning with the field's path."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load_yaml(text: str) -> list[Any]:
    """All documents of a YAML text; ManifestError with line and column where it is not YAML."""
    try:
        return [doc for doc in yaml.load_all(text, Loader=KubeLoader) if doc is not None]
    except yaml.YAMLError as error:
        raise ManifestError([f"not valid YAML: {error}"]) from error


def load_job(text: str, overrides: list[str] | None = None) -> FineTuneJob:
    """The one FineTuneJob of a manifest, with `path=value` overrides (relative to spec) applied. Raises ManifestError."""
    docs = [d for d in load_yaml(text) if isinstance(d, dict) and d.get("kind") == KIND_JOB]
    if len(docs) != 1:
        raise ManifestError([f"the manifest must hold exactly one {KIND_JOB}; found {len(docs)}"])
    doc = docs[0]
    if doc.get("apiVersion") != API_VERSION:
        raise ManifestError([f"apiVersion: {doc.get('apiVersion')!r} is not allowed: must be {API_VERSION}"])
    for override in overrides or []:
        _apply(doc, override)
    return parse_job(doc)


def load_job_file(path: Path, overrides: list[str] | None = None) -> FineTuneJob:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError([f"{path}: cannot be read: {error}"]) from error
    return load_job(text, overrides)


def parse_job(doc: dict[str, Any]) -> FineTuneJob:
    """A FineTuneJob from a decoded object; ManifestError collects every problem at once."""
    try:
        # Through JSON, as kubectl does: a key is a string there, and pydantic's strict mode knows that a time is written as one.
        return FineTuneJob.model_validate_json(json.dumps(doc), strict=True)
    except ValidationError as error:
        raise ManifestError(explain(error)) from error


def explain(error: ValidationError) -> list[str]:
    """One sentence per problem: field path, value, what is allowed."""
    problems = []
    for e in error.errors():
        path = _path(e["loc"])
        if e["type"] == "extra_forbidden":
            problems.append(f"{path}: unknown field")
        elif e["type"] == "missing":
            problems.append(f"{path}: required, but not set")
        elif e["type"] == "core_fields":
            problems.append(f"{path}{'.' if path else ''}{e['msg']}")
        elif e["type"] in ("each_once", "volume"):
            # The input is a whole list or volume: the sentence says which part, and a value may be a secret.
            problems.append(f"{path}: {e['msg']}")
        elif e["type"] == "value_error":
            problems.append(f"{path}{_join(path, str(e['ctx']['error']))}")
        else:
            said = e["msg"][0].lower() + e["msg"][1:]
            if e["type"] == "string_type" and isinstance(e["input"], bool):
                said += "; YAML reads yes, no, on, off, y and n as booleans: put the word in quotes"
            problems.append(f"{path}: {_short(e['input'])} is not allowed: {said}")
    return problems


def _join(path: str, sentence: str) -> str:
    # A model's own sentence begins with the field's name where it is about one field: `labels: each label ...`.
    field, colon, rest = sentence.partition(": ")
    if colon and re.fullmatch(r"[A-Za-z]+", field):
        return f"{'.' if path else ''}{field}: {rest}"
    return f": {sentence}"


def _path(loc: tuple[int | str, ...]) -> str:
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f"{'.' if out else ''}{part}"
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _apply(doc: dict[str, Any], override: str) -> None:
    path, sep, raw = override.partition("=")
    if not sep or not path:
        raise ManifestError([f"--set {override!r}: must be path=value, for example hyperparameters.epochs=5"])
    keys = path.removeprefix("spec.").split(".")
    if doc.get("spec") is None:
        doc["spec"] = {}
    node = doc["spec"]
    if not isinstance(node, dict):
        raise ManifestError([f"--set {path}: spec is not an object"])
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ManifestError([f"--set {path}: {key} is not an object"])
    values = load_yaml(raw)
    node[keys[-1]] = values[0] if values else None
