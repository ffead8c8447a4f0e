"""A sweep as one document: what outlives the objects in storage, what the report is made of, and what can be replayed. Pure."""

import base64
import gzip
from collections.abc import Mapping, Sequence

from finetune_api import names
from finetune_api.failures import BY_REASON
from finetune_api.names import Condition
from finetune_api.sweep import HyperparameterSweep
from finetune_operator.domain import trials as t
from finetune_operator.domain.status import find_condition
from finetune_operator.domain.types import Object
from finetune_operator.search.types import Study, Trial, Verdict

KIND = "SweepHistory"
ROOM = 1_000_000
"""Characters in all: an object of the API server has up to 1.5 MiB, and a process up to 2 MiB of environment."""
PIECE = 96 * 1024
"""Characters of one environment variable: the kernel takes no string of more than 128 KiB (MAX_ARG_STRLEN)."""


def history(
    study: Study, sweep: HyperparameterSweep, status: Object, trials: Sequence[Trial], jobs: Mapping[int, Object]
) -> Object:
    """The document."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": KIND,
        "sweep": {
            "name": sweep.metadata["name"],
            "namespace": sweep.metadata.get("namespace") or "default",
            "uid": sweep.metadata.get("uid", ""),
            "spec": sweep.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        },
        "status": {k: v for k, v in status.items() if k != "conditions"},
        "trials": [_trial(study, sweep, trial, jobs.get(trial.index)) for trial in trials],
    }


def _trial(study: Study, sweep: HyperparameterSweep, trial: Trial, job: Object | None) -> Object:
    row: Object = {
        "index": trial.index,
        "name": t.trial_name(sweep.metadata["name"], trial.index),
        "outcome": str(trial.outcome),
        "parameters": dict(trial.parameters),
    }
    if job is None:
        return row
    status, said = job.get("status") or {}, t.chosen(job)
    if said is not None:
        row |= {"algorithm": said.algorithm, "engine": said.engine, "prior": said.prior, "asOf": said.as_of.to_json()}
    if trial.value is not None:
        row["value"] = trial.value
    for kind in (Condition.FAILED, Condition.COMPLETE):
        condition = find_condition(status, kind) or {}
        if condition.get("status") == "True":
            row["reason"] = condition["reason"]
    row["metrics"] = t.final_metrics(job)
    row["evaluations"] = [list(pair) for pair in t.evaluations(job, study.spec.objective.metric)]
    row["verdicts"] = [
        {"examples": j.examples, "value": j.value, "stop": j.stop, "rank": j.rank, "of": j.of, "asOf": j.as_of.to_json()}
        for j in t.judgements(job)
    ]
    row |= {"activeSeconds": int(status.get("activeSeconds") or 0), "gpuSeconds": int(status.get("gpuSeconds") or 0)}
    row |= {"created": job["metadata"].get("creationTimestamp"), "finished": status.get("completionTime")}
    return row


def objects(document: Object) -> tuple[Object, list[Object]]:
    """The sweep and its trials out of a history: as much of the objects as `trials.py` reads. Raises KeyError, TypeError or AttributeError
    where the document is none. Of trials that were deleted there is nothing."""
    if document["kind"] != KIND:
        raise TypeError(f"kind is {document['kind']!r} and not {KIND}")
    told = document["sweep"]
    meta = {key: told[key] for key in ("name", "namespace", "uid")}
    sweep = {"apiVersion": names.API_VERSION, "kind": names.KIND_SWEEP, "metadata": meta, "spec": told["spec"]}
    rows = [_object(sweep, row) for row in document["trials"] if "engine" in row]
    return {**sweep, "status": document["status"]}, rows


def _object(sweep: Object, row: Object) -> Object:
    metric = sweep["spec"]["objective"]["metric"]
    said = {key: row[key] for key in ("index", "parameters", "algorithm", "engine")}
    said |= {"prior": row.get("prior", 0), "asOf": row.get("asOf", {"trials": row["index"]})}
    annotations = {names.ANNOTATION_TRIAL: t.compact(said)}
    for told in row["verdicts"]:
        verdict = Verdict(told["stop"], told["rank"], told["of"])
        known = t.AsOf.from_json(told.get("asOf", {"trials": 0}))
        patch = t.verdict_patch(told["examples"], told["value"], verdict, known)
        annotations |= patch["metadata"]["annotations"]
    conditions = []
    if reason := row.get("reason"):
        kind = Condition.FAILED if reason in BY_REASON else Condition.COMPLETE
        conditions.append({"type": str(kind), "status": "True", "reason": reason})
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND_JOB,
        "metadata": {
            "name": row["name"],
            "namespace": sweep["metadata"]["namespace"],
            "labels": {names.LABEL_SWEEP: sweep["metadata"]["name"], names.LABEL_ROLE: t.ROLE_TRIAL},
            "annotations": annotations,
            "creationTimestamp": row.get("created"),
        },
        "spec": {},
        "status": {
            "conditions": conditions,
            "evaluations": [{"examples": at, "metrics": [_metric(metric, value)]} for at, value in row.get("evaluations", ())],
            "result": {"metrics": [_metric(name, value) for name, value in row["metrics"].items()]},
            "activeSeconds": row["activeSeconds"],
            "gpuSeconds": row["gpuSeconds"],
            "completionTime": row.get("finished"),
        },
    }


def _metric(name: str, value: float) -> Object:
    return {"name": name, "value": repr(value)}


def pack(document: Object) -> list[str]:
    """As pieces of text that fit into environment variables: base64 of gzip of JSON. The same document gives the same pieces.

    Of thousands of trials what has no room is left out, and named in `leftOut`: the curves, then what decisions knew (a replay needs it)."""
    for left_out in ((), ("evaluations",), ("evaluations", "asOf")):
        packed = base64.b64encode(gzip.compress(t.compact(_without(document, left_out)).encode(), mtime=0)).decode()
        if len(packed) <= ROOM:
            break
    return [packed[at : at + PIECE] for at in range(0, len(packed), PIECE)]


def _without(document: Object, keys: Sequence[str]) -> Object:
    if not keys:
        return document

    def cut(row: Object) -> Object:
        return {key: value for key, value in row.items() if key not in keys}

    rows = [
        cut(row) | ({"verdicts": [cut(v) for v in row["verdicts"]]} if "verdicts" in row else {}) for row in document["trials"]
    ]
    return {**document, "leftOut": list(keys), "trials": rows}
