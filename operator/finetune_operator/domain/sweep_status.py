"""Computes the status of a sweep whole. Pure, and bounded: nothing in it grows with the number of trials."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime

from finetune_api import names
from finetune_api.names import Condition, Reason, State
from finetune_api.sweep import HyperparameterSweep
from finetune_api.sweep_rules import cells
from finetune_api.sweep_status import TOP
from finetune_operator.domain import trials as t
from finetune_operator.domain.closing import Closed
from finetune_operator.domain.status import Conditions, find_condition, is_finished, stamp
from finetune_operator.domain.sweep_types import SweepAction, SweepDecision
from finetune_operator.domain.types import Event, Object
from finetune_operator.search.finished import best
from finetune_operator.search.importance import importance
from finetune_operator.search.suggest import algorithm_of
from finetune_operator.search.types import Finished, Outcome, Spent, Study, Trial

Runs = Sequence[tuple[Trial, Sequence[Object]]]
"""Each of the best trials with its jobs: its own first, then those with other seeds."""


class SweepDraft(Conditions):
    """The status being computed."""

    def __init__(self, old: Object, generation: int, now: datetime) -> None:
        super().__init__(
            old,
            generation,
            now,
            {
                Condition.RUNNING: ("False", Reason.WAITING_FOR_TRIALS, ""),
                Condition.SUSPENDED: ("False", Reason.NOT_SUSPENDED, ""),
                Condition.COMPLETE: ("False", Reason.NOT_FINISHED, ""),
                Condition.FAILED: ("False", Reason.NOT_FAILED, ""),
            },
        )

    # --------------------------------------------------------------------------------------------------------- ends ----
    def fail(self, reason: Reason, message: str, actions: Sequence[SweepAction] = ()) -> SweepDecision:
        """The sweep has failed."""
        self.set(Condition.FAILED, True, reason, message)
        return self._end(State.FAILED, [*actions, Event("Warning", str(reason), message)])

    def complete(self, over: Finished, actions: Sequence[SweepAction], more: str = "") -> SweepDecision:
        """The sweep has found what it could."""
        self.set(Condition.COMPLETE, True, str(over.why), over.message + more)
        return self._end(State.COMPLETE, [*actions, Event("Normal", "SweepComplete", over.message + more)])

    def _end(self, state: State, actions: Sequence[SweepAction]) -> SweepDecision:
        self.state(state)
        self.new["completionTime"] = stamp(self.now)
        self.new.pop("estimatedRemainingSeconds", None)
        self.set(Condition.RUNNING, False, Reason.FINISHED)
        return SweepDecision(self.done(), tuple(actions), finished=True)

    # ------------------------------------------------------------------------------------------------------ content ----
    def describe(
        self, sweep: HyperparameterSweep, study: Study, trials: Sequence[Trial], jobs: Mapping[int, Object], costs: Spent
    ) -> None:
        """Everything that follows from the trials."""
        before, new = self.old, self.new
        counts = self._counts(trials, jobs)
        new["trials"] = counts
        new["activeSeconds"], new["gpuSeconds"] = costs.active_seconds, costs.gpu_seconds
        new["gpuSecondsSaved"] = sum(_saved(trial, jobs[trial.index]) for trial in trials if trial.index in jobs)
        ended = len(trials) - counts["pending"] - counts["running"]
        there = [jobs[trial.index] for trial in trials if trial.index in jobs]
        new["plan"] = self._plan(sweep, [job["status"] for job in there if is_finished(job.get("status") or {})])
        new["progress"] = f"{ended}/{new['plan']['trials']}"
        self._remaining(sweep, ended, there)
        ranked = best(study, trials)
        new["top"] = _bounded([_summary(sweep, trial, jobs.get(trial.index)) for trial in ranked[:TOP]])
        if not ranked:  # none yet, or the only one was deleted
            for field in ("best", "metrics"):
                new.pop(field, None)
        else:
            new["best"] = new["top"][0]
            found = t.final_metrics(jobs[ranked[0].index]) if ranked[0].index in jobs else {}
            new["metrics"] = [{"name": name, "value": f"{value:.6g}"} for name, value in sorted(found.items())[:64]]
        new["rungs"] = [_rung(study, trials, examples) for examples in sweep.spec.prune_algorithm.rungs]
        # The only part that costs more than a pass over the trials.
        if counts["complete"] != (before.get("trials") or {}).get("complete"):
            new["importance"] = [{"name": name, "share": f"{share:.3f}"} for name, share in importance(study, trials)]

    @staticmethod
    def _counts(trials: Sequence[Trial], jobs: Mapping[int, Object]) -> dict[str, int]:
        counts = dict.fromkeys(("created", "pending", "running", "complete", "pruned", "stopped", "failed", "lost", "deleted"), 0)
        counts["created"] = len(trials)
        for trial in trials:
            counts[_fate(trial, jobs.get(trial.index))] += 1
        return counts

    @staticmethod
    def _plan(sweep: HyperparameterSweep, over: Sequence[Object]) -> Object:
        """`over` are the statuses of the trials that have ended."""
        spec = sweep.spec
        plan: Object = {
            "trials": spec.num_trials,
            "algorithm": algorithm_of(spec),
            "rungs": list(spec.prune_algorithm.rungs),
        }
        if spec.search_algorithm.grid is not None:
            plan["cells"] = sum(1 for _ in cells(spec.parameters, spec.search_algorithm.grid.points))
            plan["trials"] = min(plan["cells"], spec.num_trials)
        for field in ("activeSeconds", "gpuSeconds") if over else ():
            mean = statistics.fmean(int(status.get(field) or 0) for status in over)
            plan[f"expected{field[0].upper()}{field[1:]}"] = round(mean * plan["trials"])
        return plan

    def _remaining(self, sweep: HyperparameterSweep, ended: int, jobs: Sequence[Object]) -> None:
        """At the pace of the trials that have ended; those that run count as half done."""
        took = [int(job["status"].get("activeSeconds") or 0) for job in jobs if is_finished(job.get("status") or {})]
        if not took:
            return
        left = self.new["plan"]["trials"] - ended - (len(jobs) - len(took)) / 2
        self.new["estimatedRemainingSeconds"] = max(0, round(statistics.fmean(took) * left / sweep.spec.parallel_trials))

    def repetitions(self, study: Study, rows: Runs, *, whole: bool) -> None:
        """How the best fare with other seeds."""
        metric = study.spec.objective.metric
        told = []
        for trial, runs in rows:
            values = [value for run in runs if (value := t.score(run, metric)) is not None]
            row: Object = {
                "trial": t.trial_name(runs[0]["metadata"]["labels"][names.LABEL_SWEEP], trial.index),
                "values": [f"{value:.6g}" for value in values],
            }
            if whole and values:
                row["mean"] = f"{statistics.fmean(values):.6g}"
            told.append(row)
        self.new["repetitions"] = told

    @staticmethod
    def winner(study: Study, rows: Runs) -> tuple[Trial, Object]:
        """The trial with the best mean, and of its jobs the one with the best value. Both by validation."""
        metric, sign = study.spec.objective.metric, study.sign

        def scores(runs: Sequence[Object]) -> list[tuple[float, Object]]:
            return [(sign * value, run) for run in runs if (value := t.score(run, metric)) is not None]

        trial, runs = min(rows, key=lambda row: statistics.fmean(score for score, _ in scores(row[1])))
        return trial, min(scores(runs), key=lambda pair: pair[0])[1]

    def closed(self, sweep: HyperparameterSweep, end: Closed) -> None:
        """What the last Job has written."""
        if end.well and sweep.spec.trial_template.spec.output is not None:
            folder = sweep.spec.trial_template.spec.output.storage_uri.rstrip("/")
            self.new["historyUri"] = f"{folder}/{names.HISTORY_FILE}"
        if end.result:
            self.new["result"] = end.result


def _fate(trial: Trial, job: Object | None) -> str:
    """The counter that the trial belongs to."""
    if job is None:
        return "pending" if trial.outcome is Outcome.OPEN else "deleted"
    if trial.outcome is Outcome.OPEN:
        return "running" if (job.get("status") or {}).get("state") in _RUNNING else "pending"
    if trial.outcome is Outcome.IGNORED:
        failed = (find_condition(job.get("status") or {}, Condition.FAILED) or {}).get("status") == "True"
        return "lost" if failed else "stopped"
    return {Outcome.COMPLETE: "complete", Outcome.PRUNED: "pruned", Outcome.FAILED: "failed"}[trial.outcome]


_RUNNING = (State.RUNNING, State.RESTARTING, State.SUSPENDING, State.STOPPING)


def _saved(trial: Trial, job: Object) -> int:
    """GPU-seconds that a pruned trial would still have taken, by its own pace."""
    status = job.get("status") or {}
    done = int((status.get("trainerStatus") or {}).get("progressPercentage") or 0)
    if trial.outcome is not Outcome.PRUNED or not 0 < done < 100:
        return 0
    return round(int(status.get("gpuSeconds") or 0) * (100 - done) / done)


def _summary(sweep: HyperparameterSweep, trial: Trial, job: Object | None) -> Object:
    summary: Object = {
        "trial": t.trial_name(sweep.metadata["name"], trial.index),
        "value": f"{trial.value:.6g}",
        "parameters": [{"name": k, "value": _shown(v)} for k, v in trial.parameters.items()],
    }
    if uri := (((job or {}).get("status") or {}).get("result") or {}).get("modelUri"):
        summary["modelUri"] = uri
    return summary


def _bounded(top: list[Object]) -> list[Object]:
    """The parameters of the best in any case, and of as many others as there is room for: their own objects have them as well."""
    room, bounded = TOP_BYTES, list[Object]()
    for number, summary in enumerate(top):
        room -= len(json.dumps(summary)) if number else 0
        bounded.append(summary if room > 0 else {key: value for key, value in summary.items() if key in ("trial", "value")})
    return bounded


TOP_BYTES = 12 * 1024
"""Of `status.top` beside its first."""


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else t.compact(value).strip('"')[:256]


def _rung(study: Study, trials: Sequence[Trial], examples: int) -> Object:
    here = [(trial, reading.value) for trial in trials for reading in trial.readings if reading.examples == examples]
    stopped = sum(trial.outcome is Outcome.PRUNED and trial.readings[-1].examples == examples for trial, _ in here)
    rung: Object = {"examples": examples, "reached": len(here), "stopped": stopped}
    if finite := [value for _, value in here if math.isfinite(value)]:
        rung["best"] = f"{min(finite, key=lambda v: study.sign * v):.6g}"
    return rung
