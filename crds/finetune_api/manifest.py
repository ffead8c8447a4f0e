"""Reads manifests the way the API server does, and says what is wrong with them in sentences.

One loader for both hosts (kubeyaml.py), one set of models, and the API server's strictness about types: "3" is not a number.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune_api.finetunejob import FineTuneJob
from finetune_api.kubeyaml import KubeLoader
from finetune_api.names import API_VERSION, KIND_JOB, KIND_SWEEP
from finetune_api.sentences import explain
from finetune_api.sweep import HyperparameterSweep


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
    return parse_job(_one(text, KIND_JOB, overrides or []))


def load_sweep(text: str, overrides: list[str] | None = None) -> HyperparameterSweep:
    """The same for the one HyperparameterSweep of a manifest."""
    return parse_sweep(_one(text, KIND_SWEEP, overrides or []))


def _one(text: str, kind: str, overrides: list[str]) -> dict[str, Any]:
    docs = [d for d in load_yaml(text) if isinstance(d, dict) and d.get("kind") == kind]
    if len(docs) != 1:
        raise ManifestError([f"the manifest must hold exactly one {kind}; found {len(docs)}"])
    doc: dict[str, Any] = docs[0]
    if doc.get("apiVersion") != API_VERSION:
        raise ManifestError([f"apiVersion: {doc.get('apiVersion')!r} is not allowed: must be {API_VERSION}"])
    for override in overrides:
        _apply(doc, override)
    return doc


def load_job_file(path: Path, overrides: list[str] | None = None) -> FineTuneJob:
    return load_job(read_file(path), overrides)


def read_file(path: Path) -> str:
    """The text of a manifest. Raises ManifestError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError([f"{path}: cannot be read: {error}"]) from error


def parse_job(doc: dict[str, Any]) -> FineTuneJob:
    """A FineTuneJob from a decoded object; ManifestError collects every problem at once."""
    try:
        # Through JSON, as kubectl does: a key is a string there, and pydantic's strict mode knows that a time is written as one.
        return FineTuneJob.model_validate_json(json.dumps(doc), strict=True)
    except ValidationError as error:
        raise ManifestError(explain(error)) from error


def parse_sweep(doc: dict[str, Any]) -> HyperparameterSweep:
    """The same for a HyperparameterSweep."""
    try:
        return HyperparameterSweep.model_validate_json(json.dumps(doc), strict=True)
    except ValidationError as error:
        raise ManifestError(explain(error)) from error


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
