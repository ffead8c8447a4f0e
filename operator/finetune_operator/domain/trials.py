"""Between the sweep engine's records and the FineTuneJobs that are its trials: builds the one of the other, and reads it back. Pure.

The objects are the study. A trial's parameters stand in its annotation before any pod of it exists; so does what was known when they were
chosen (`AsOf`, a logical clock), and with each verdict what was known when it was given. From that any decision can be made once more.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from string import ascii_lowercase
from typing import Any

from finetune_api import names
from finetune_api.failures import PARAMETERS_AT_FAULT
from finetune_api.names import Condition, Reason
from finetune_api.recipe import OnSuspend
from finetune_api.sweep import HyperparameterSweep
from finetune_api.sweep_rules import put
from finetune_api.sweep_space import Scalar
from finetune_operator.domain.outcome import parse_time
from finetune_operator.domain.status import find_condition, is_finished, is_true
from finetune_operator.domain.types import Object
from finetune_operator.search import engine
from finetune_operator.search.judge import rungs_of
from finetune_operator.search.types import Outcome, Reading, Spent, Study, Suggestion, Trial, Verdict

ROLE_TRIAL = "trial"
ROLE_REPEAT = "repeat"
MISSING_CONSTRAINT = 1.0
"""By how much a constraint counts as broken whose metric was not reported."""


def trial_name(sweep: str, index: int) -> str:
    """Name of the FineTuneJob that is this trial."""
    return f"{sweep}-t{index:04d}"


def repeat_name(sweep: str, index: int, number: int) -> str:
    """Name of the FineTuneJob that repeats this trial with another seed; `number` from 1 to 20: a letter, because the name has little room."""
    return f"{sweep}-r{index:04d}{ascii_lowercase[number - 1]}"


# ----------------------------------------------------------------------------------------------------- logical clock ----
@dataclass(frozen=True)
class AsOf:
    """What was known when something was decided: of the trials below `trials` everything, but of the open ones so many readings.

    Readings and ends are written once, so that these few numbers name a state of the study exactly.
    """

    trials: int
    open: Mapping[int, int] = field(default_factory=dict)
    """Readings known of each trial that was open."""
    gone: tuple[int, ...] = ()
    """Trials that somebody had deleted by then."""

    @classmethod
    def now(cls, trials: Sequence[Trial]) -> "AsOf":
        """Of records in the order of their numbers, none left out."""
        return cls(
            len(trials),
            {t.index: len(t.readings) for t in trials if t.outcome is Outcome.OPEN},
            tuple(t.index for t in trials if not t.parameters),
        )

    def of(self, trials: Sequence[Trial]) -> list[Trial]:
        """These records as they were then. Raises LookupError where one is gone by now that was not then."""
        if lost := [t.index for t in trials[: self.trials] if not t.parameters and t.index not in self.gone]:
            raise LookupError(f"trial {lost[0]} has been deleted since")
        if len(trials) < self.trials:
            raise LookupError(f"trial {self.trials - 1} is not there")
        return [self._then(trial) for trial in trials[: self.trials]]

    def _then(self, trial: Trial) -> Trial:
        if trial.index in self.gone:
            return Trial(trial.index, {}, Outcome.IGNORED)
        if trial.index not in self.open:
            return trial
        readings = trial.readings[: self.open[trial.index]]
        return replace(trial, outcome=Outcome.OPEN, readings=readings, value=None, violations=())

    def to_json(self) -> Object:
        """As it stands in annotations."""
        out: Object = {"trials": self.trials}
        if self.open:
            out["open"] = {str(index): count for index, count in self.open.items()}
        if self.gone:
            out["gone"] = list(self.gone)
        return out

    @classmethod
    def from_json(cls, data: Object) -> "AsOf":
        """Raises ValueError, KeyError, TypeError or AttributeError where it is none."""
        return cls(
            int(data["trials"]),
            {int(index): int(count) for index, count in (data.get("open") or {}).items()},
            tuple(int(index) for index in data.get("gone") or ()),
        )


# ------------------------------------------------------------------------------------------------------------- build ----
def build_trial(sweep: HyperparameterSweep, index: int, suggestion: Suggestion, known: AsOf, prior: int = 0) -> Object:
    """The FineTuneJob of a trial, ready to be created. `prior` is how many trials of the sweep that it started warm from were known."""
    said = {
        "index": index,
        "parameters": dict(suggestion.parameters),
        "algorithm": suggestion.algorithm,
        "engine": engine(),
        "asOf": known.to_json(),
    }
    if sweep.spec.warm_start_from is not None:
        said["prior"] = prior
    return _build(sweep, trial_name(sweep.metadata["name"], index), ROLE_TRIAL, said)


def build_repeat(sweep: HyperparameterSweep, trial: Trial, number: int) -> Object:
    """The FineTuneJob that repeats a trial with another seed, to its end; `number` from 1 counts the seeds."""
    seed = sweep.spec.trial_template.spec.hyperparameters.seed + number
    said = {"index": trial.index, "parameters": dict(trial.parameters), "seed": seed}
    manifest = _build(sweep, repeat_name(sweep.metadata["name"], trial.index, number), ROLE_REPEAT, said)
    put(manifest["spec"], "hyperparameters.seed", seed)
    manifest["spec"]["evaluation"].pop("atExamples", None)
    return manifest


def _build(sweep: HyperparameterSweep, name: str, role: str, said: Object) -> Object:
    meta, template = sweep.metadata, sweep.spec.trial_template
    queue = {k: v for k, v in (meta.get("labels") or {}).items() if k in names.QUEUE_LABELS}
    ours = {names.LABEL_MANAGED_BY: names.MANAGER, names.LABEL_SWEEP: meta["name"], names.LABEL_ROLE: role}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND_JOB,
        "metadata": {
            "name": name,
            "namespace": meta.get("namespace") or "default",
            "labels": {**queue, **template.metadata.labels, **ours},
            "annotations": {**template.metadata.annotations, names.ANNOTATION_TRIAL: compact(said)},
            "ownerReferences": [owner(sweep)],
        },
        "spec": trial_spec(sweep, name, said["parameters"]),
    }


def owner(sweep: HyperparameterSweep) -> Object:
    """The owner reference of everything that a sweep makes."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND_SWEEP,
        "name": sweep.metadata["name"],
        "uid": sweep.metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def trial_spec(sweep: HyperparameterSweep, name: str, parameters: Mapping[str, Scalar]) -> Object:
    """The template's spec with the parameters set, and what every trial has: an output of its own, the rungs, and no test split."""
    spec: Object = sweep.spec.trial_template.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    by_name = {parameter.name: parameter for parameter in sweep.spec.parameters}
    for key, value in parameters.items():
        if path := by_name[key].path:
            put(spec, path, value)
        else:
            variable = {"name": by_name[key].env, "value": _as_text(value)}
            env = [v for v in spec["trainer"].get("env", []) if v["name"] != variable["name"]]
            spec["trainer"]["env"] = [*env, variable]
    if "output" in spec:
        spec["output"]["storageUri"] = f"{spec['output']['storageUri'].rstrip('/')}/{name}"
    spec.get("dataset", {}).pop("test", None)
    if rungs := sweep.spec.prune_algorithm.rungs:
        spec["evaluation"]["atExamples"] = list(rungs)
    # What is stopped for being bad gives its accelerator back at once.
    spec["checkpoint"]["onStop"] = OnSuspend.DISCARD.value
    return spec


def _as_text(value: Scalar) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def compact(data: Any) -> str:
    """JSON without spaces, keys in order."""
    return json.dumps(data, separators=(",", ":"), sort_keys=True)


def verdict_patch(examples: int, value: float, verdict: Verdict, known: AsOf) -> Object:
    """Records a verdict and, in the same write, acts on it: there is no moment at which one is true without the other."""
    said = {
        # A value that is no number is told as a word: JSON has none.
        "value": value if math.isfinite(value) else repr(value),
        "verdict": "Stop" if verdict.stop else "Continue",
        "rank": verdict.rank,
        "of": verdict.of,
        "asOf": known.to_json(),
    }
    patch: Object = {"metadata": {"annotations": {f"{names.ANNOTATION_RUNG}{examples}": compact(said)}}}
    if verdict.stop:
        patch["spec"] = {"stop": True}
    return patch


# -------------------------------------------------------------------------------------------------------------- read ----
@dataclass(frozen=True)
class Judged:
    """A verdict as it was recorded."""

    examples: int
    value: float
    stop: bool
    rank: int
    of: int
    as_of: AsOf


@dataclass(frozen=True)
class Chosen:
    """What a trial's annotation says."""

    index: int
    parameters: Mapping[str, Scalar]
    algorithm: str
    as_of: AsOf
    engine: str = ""
    """Version of what decided."""
    prior: int = 0
    """Trials of the sweep that it started warm from."""


def chosen(job: Object) -> Chosen | None:
    """How the trial's parameters were chosen; None where the annotation is gone or spoiled."""
    try:
        said = json.loads((job["metadata"].get("annotations") or {})[names.ANNOTATION_TRIAL])
        known = AsOf.from_json(said["asOf"])
        engine_then, prior = str(said.get("engine", "")), int(said.get("prior", 0))
        return Chosen(int(said["index"]), dict(said["parameters"]), str(said["algorithm"]), known, engine_then, prior)
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def judgements(job: Object) -> list[Judged]:
    """All verdicts on the trial, by rung. One that cannot be read is left out: it is given anew."""
    found = []
    for key, text in (job["metadata"].get("annotations") or {}).items():
        if key.startswith(names.ANNOTATION_RUNG):
            try:
                examples, said = int(key.removeprefix(names.ANNOTATION_RUNG)), json.loads(text)
                stop = said["verdict"] == "Stop"
                rank, of, known = int(said["rank"]), int(said["of"]), AsOf.from_json(said["asOf"])
                found.append(Judged(examples, float(said["value"]), stop, rank, of, known))
            except (KeyError, ValueError, TypeError, AttributeError):
                continue
    return sorted(found, key=lambda j: j.examples)


def evaluations(job: Object, metric: str) -> list[tuple[int, float]]:
    """(examples seen, value) of each evaluation that has the metric."""
    found = []
    for evaluation in (job.get("status") or {}).get("evaluations") or []:
        value = _named(evaluation.get("metrics"), metric)
        if value is not None:
            found.append((int(evaluation["examples"]), value))
    return sorted(found)


def final_metrics(job: Object) -> dict[str, float]:
    """Metrics of the trial's model. A script of the user's has no result: what it reported last."""
    status = job.get("status") or {}
    reported = (status.get("result") or {}).get("metrics") or (status.get("trainerStatus") or {}).get("metrics") or []
    return {m["name"]: value for m in reported if (value := _number(m.get("value"))) is not None}


def score(job: Object, metric: str) -> float | None:
    """The objective of a run that has a model: one that failed or was stopped has last words, and they do not count."""
    status = job.get("status") or {}
    complete = find_condition(status, Condition.COMPLETE) or {}
    if complete.get("status") != "True" or complete.get("reason") == Reason.STOPPED:
        return None
    value = final_metrics(job).get(metric)
    return value if value is not None and math.isfinite(value) else None


def reported_metrics(job: Object) -> set[str]:
    """Names of all metrics that the trial has told of, at an evaluation or at its end. Our own trainer's progress has none of them before its
    first evaluation: what it tells until then (the loss, the learning rate) says nothing about what it will tell."""
    status = job.get("status") or {}
    lists = [e.get("metrics") or [] for e in status.get("evaluations") or []]
    told = {m["name"] for some in lists for m in some}
    finished = bool(status.get("result")) or bool((job["spec"].get("trainer") or {}).get("command"))
    return told | set(final_metrics(job)) if finished else told


def readings_of(study: Study, job: Object, *, complete: bool = False) -> tuple[Reading, ...]:
    """What the trial had at each rung that it has reached."""
    spec = study.spec
    return rungs_of(
        evaluations(job, spec.objective.metric), spec.prune_algorithm.rungs, spec.objective.direction, complete=complete
    )


def _named(metrics: Iterable[Object] | None, name: str) -> float | None:
    return next((_number(m.get("value")) for m in metrics or [] if m.get("name") == name), None)


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def read_trials(study: Study, objects: Mapping[int, Object], created: int) -> list[Trial]:
    """Records of trials 0 to created - 1, in order; one that is gone has no parameters."""
    return [read_trial(study, index, objects.get(index)) for index in range(created)]


def read_trial(study: Study, index: int, job: Object | None) -> Trial:
    """The record of one trial, as far as it has been judged and has ended."""
    said = chosen(job) if job is not None else None
    if job is None or said is None:
        return Trial(index, {}, Outcome.IGNORED)
    judged = judgements(job)
    readings = tuple(Reading(j.examples, j.value) for j in judged)
    trial = Trial(index, said.parameters, Outcome.OPEN, readings)
    if any(j.stop for j in judged):
        return replace(trial, outcome=Outcome.PRUNED)
    status = job.get("status") or {}
    if not is_finished(status):
        return trial
    if is_true(status, Condition.FAILED):
        return replace(trial, outcome=Outcome.FAILED if failure_reason(job) in PARAMETERS_AT_FAULT else Outcome.IGNORED)
    if (find_condition(status, Condition.COMPLETE) or {}).get("reason") == Reason.STOPPED:
        return replace(trial, outcome=Outcome.IGNORED)
    return _complete(study, trial, job)


def failure_reason(job: Object) -> str:
    """The failure class of a failed job."""
    return str((find_condition(job.get("status") or {}, Condition.FAILED) or {}).get("reason", ""))


def _complete(study: Study, trial: Trial, job: Object) -> Trial:
    metrics = final_metrics(job)
    value = metrics.get(study.spec.objective.metric)
    if value is None or not math.isfinite(value):
        # A metric that is not defined for this model, such as the correlation with a constant.
        return replace(trial, outcome=Outcome.FAILED)
    broken = []
    for constraint in study.spec.constraints:
        found = metrics.get(constraint.metric)
        if found is None or not math.isfinite(found):
            broken.append(MISSING_CONSTRAINT)
        else:
            bounds = (
                constraint.min is not None and constraint.min - found,
                constraint.max is not None and found - constraint.max,
            )
            broken.append(max(float(b) for b in bounds if b is not False))
    told = readings_of(study, job, complete=True)
    # What was judged while it ran is what others were compared with.
    readings = {**{r.examples: r for r in told}, **{r.examples: r for r in trial.readings}}
    in_order = tuple(readings[k] for k in sorted(readings))
    return replace(trial, outcome=Outcome.COMPLETE, readings=in_order, value=value, violations=tuple(broken))


# --------------------------------------------------------------------------------------------------------------- cost ----
def spent(objects: Iterable[Object], now: datetime | None = None) -> Spent:
    """What the jobs have cost so far; with `now` also what those that run have cost since they began to."""
    active = gpu = failed = 0
    for job in objects:
        seconds, gpus = running_seconds(job, now) if now else 0, gpus_of(job)
        status = job.get("status") or {}
        active += int(status.get("activeSeconds") or 0) + seconds
        gpu += int(status.get("gpuSeconds") or 0) + seconds * gpus
        failed += is_true(status, Condition.FAILED)
    return Spent(active, gpu, failed)


def running_seconds(job: Object, now: datetime) -> int:
    """Since when its pods run, if they do; the attempts before are in status.activeSeconds."""
    running = find_condition(job.get("status") or {}, Condition.RUNNING) or {}
    begun = parse_time(running.get("lastTransitionTime")) if running.get("status") == "True" else None
    return max(0, round((now - begun).total_seconds())) if begun else 0


def gpus_of(job: Object) -> int:
    """GPUs of all its pods."""
    trainer = job["spec"].get("trainer") or {}
    resources = trainer.get("resourcesPerNode") or {}
    asked = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    each = sum(int(n) for name, n in asked.items() if name.endswith("/gpu") and str(n).isdigit())
    return each * int(trainer.get("numNodes") or 1)
