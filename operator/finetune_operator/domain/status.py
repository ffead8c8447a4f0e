"""Computes the status whole: conditions, progress, accounting. Pure.

`StatusDraft` starts from the stored status and is changed by `decide`; times of conditions are kept where nothing changed, so
that an unchanged world gives an equal status and no write.
"""

import copy
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from finetune_api.finetunejob import CheckpointStatus
from finetune_api.names import Condition, Reason, State
from finetune_api.report import EndReport, Outcome, ProgressReport, Refused, Saving
from finetune_operator.domain.outcome import Ended, parse_time
from finetune_operator.domain.types import Object, Progress

MAX_EVALUATIONS = 64
PROGRESS_FIELDS = ("trainerStatus", "evaluations", "checkpoint", "resumedFrom")


def stamp(time: datetime) -> str:
    """A metav1.Time: UTC, whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def find_condition(status: Object, kind: str) -> Object | None:
    """The condition of this type."""
    return next((c for c in status.get("conditions") or [] if c.get("type") == kind), None)


def is_true(status: Object, kind: str) -> bool:
    """Whether the condition holds."""
    return (find_condition(status, kind) or {}).get("status") == "True"


def is_finished(status: Object) -> bool:
    """Complete or Failed. Final: a finished job never runs again."""
    return is_true(status, Condition.COMPLETE) or is_true(status, Condition.FAILED)


def recorded_uid(status: Object, child: str) -> str | None:
    """The uid that the Job of the current attempt has or had, if that is its name."""
    return next((c.get("uid") for c in status.get("jobsStatus") or [] if c["name"] == child), None)


def unsaved_since(status: Object) -> datetime | None:
    """From when on a crash would lose the work: the newest checkpoint or, where that was later, the begin; None while nothing runs."""
    running = find_condition(status, Condition.RUNNING) or {}
    if running.get("status") != "True":
        return None
    begun = datetime.fromisoformat(running["lastTransitionTime"])
    saved = parse_time((status.get("checkpoint") or {}).get("time"))
    return max(begun, saved) if saved else begun


def only_progress_differs(old: Object | None, new: Object) -> bool:
    """Whether a write of `new` could wait: all that differs is what trainers report every few seconds."""
    return old is not None and _without_progress(old) == _without_progress(new)


def _without_progress(status: Object) -> Object:
    rest = {k: v for k, v in status.items() if k not in PROGRESS_FIELDS}
    rest["conditions"] = [
        {k: v for k, v in c.items() if not (k == "message" and c["type"] == Condition.CHECKPOINTED)}
        for c in status.get("conditions") or []
    ]
    return rest


class Conditions:
    """A status being computed: what all kinds have in common. Conditions that nobody sets are as given at the start."""

    def __init__(self, old: Object, generation: int, now: datetime, conditions: dict[str, tuple[str, str, str]]) -> None:
        self.old = old
        self.now = now
        self.generation = generation
        self.new: Object = copy.deepcopy(old)
        self.new["observedGeneration"] = generation
        self._conditions = conditions

    def set(self, kind: Condition, value: bool | None, reason: str, message: str = "") -> None:
        """Sets one condition; None is Unknown."""
        word = "Unknown" if value is None else str(bool(value))
        self._conditions[kind] = (word, str(reason), message)

    def state(self, word: State) -> None:
        """Sets the word for people."""
        self.new["state"] = str(word)

    def done(self) -> Object:
        """The finished status."""
        self.new["conditions"] = [self._condition(kind, *value) for kind, value in self._conditions.items()]
        return self.new

    def _condition(self, kind: str, word: str, reason: str, message: str) -> Object:
        before = find_condition(self.old, kind)
        kept = before is not None and before.get("status") == word
        return {
            "type": str(kind),
            "status": word,
            "reason": reason,
            "message": message,
            "observedGeneration": self.generation,
            "lastTransitionTime": before["lastTransitionTime"] if before and kept else stamp(self.now),
        }


class StatusDraft(Conditions):
    """The status being computed."""

    def __init__(self, old: Object, generation: int, now: datetime) -> None:
        resumed = (find_condition(old, Condition.SUSPENDED) or {}).get("reason") == Reason.RESUMED
        super().__init__(
            old,
            generation,
            now,
            {
                Condition.RUNNING: ("False", Reason.WAITING_FOR_PODS, ""),
                Condition.PROGRESSING: ("False", Reason.NOT_RUNNING, ""),
                Condition.CHECKPOINTED: ("False", Reason.NO_CHECKPOINT_YET, ""),
                Condition.SUSPENDED: ("False", Reason.RESUMED if resumed else Reason.NOT_SUSPENDED, ""),
                Condition.COMPLETE: ("False", Reason.NOT_FINISHED, ""),
                Condition.FAILED: ("False", Reason.NOT_FAILED, ""),
            },
        )
        self.saving: Saving | None = None
        for name in (
            "activeSeconds",
            "gpuSeconds",
            "attempt",
            "restarts",
            "restartsCountTowardsMax",
            "lostWorkSeconds",
            "disruptionsInARow",
        ):
            self.new.setdefault(name, 0)

    def count(self, name: str, by: int = 1) -> None:
        """Adds to a counter."""
        self.new[name] = int(self.new.get(name) or 0) + by

    def done(self) -> Object:
        """The finished status."""
        if checkpoint := self.new.get("checkpoint"):
            self.set(Condition.CHECKPOINTED, True, Reason.CHECKPOINT_COMMITTED, f"Step {checkpoint['step']} is durable.")
        return super().done()

    # ------------------------------------------------------------------------------------------ facts from the trainer --
    def merge_progress(self, progress: Progress | None) -> None:
        """Takes over the newest report of the current attempt."""
        if progress is None:
            return
        report = progress.report
        if report.trainer_status:
            self.new["trainerStatus"] = _json(report.trainer_status)
            self.new["trainerStatus"]["lastUpdatedTime"] = stamp(report.trainer_status.last_updated_time or progress.received)
        self.merge_facts(report)

    def merge_facts(self, report: ProgressReport | EndReport) -> None:
        """Takes over what a progress report and a termination message have in common."""
        # Of several pods one saves, and the others tell zeros; and what was told first may be read last.
        if report.saving and (self.saving is None or report.saving.saves >= self.saving.saves):
            self.saving = report.saving
        if report.evaluations:
            self.new["evaluations"] = merge_evaluations(self.new.get("evaluations") or [], [_json(e) for e in report.evaluations])
        checkpoint, known = report.checkpoint, self.new.get("checkpoint") or {"step": -1}
        if checkpoint and (
            _is_one_of(known, report.corrupt)
            or checkpoint.step > known["step"]  # whatever the clocks of two nodes say
            or checkpoint.time >= (parse_time(known.get("time")) or checkpoint.time)
        ):
            if checkpoint.step > known["step"]:
                self.new["disruptionsInARow"] = 0
            self.new["checkpoint"] = _checkpoint(checkpoint)
        if report.resumed_from:
            self.new["resumedFrom"] = _checkpoint(report.resumed_from)

    # --------------------------------------------------------------------------------------------------- accounting ----
    def account(self, ended: Ended | None, gpus: int) -> None:
        """Adds the running time of the attempt that is over, once per attempt (the caller sees to that)."""
        running = find_condition(self.old, Condition.RUNNING) or {}
        seen = parse_time(running["lastTransitionTime"]) if running.get("status") == "True" else None
        begun = (ended.started or seen or ended.admitted) if ended else seen
        if begun is None:
            return
        over = (ended.finished if ended else None) or self.now
        seconds = max(0, round((over - begun).total_seconds()))
        self.count("activeSeconds", seconds)
        self.count("gpuSeconds", seconds * gpus)
        saved_all = ended is not None and ended.report is not None and ended.report.outcome is Outcome.INTERRUPTED
        if (ended is None or ended.failure is not None) and not saved_all:
            saved = parse_time((self.new.get("checkpoint") or {}).get("time"))
            safe = max(begun, saved) if saved else begun
            self.count("lostWorkSeconds", max(0, round((over - safe).total_seconds())))


def merge_evaluations(old: list[Object], new: list[Object]) -> list[Object]:
    """Keyed by examples seen, write-once, at most MAX_EVALUATIONS: when full, every second one goes, first and last stay."""
    by_examples = {e["examples"]: e for e in [*new, *old]}
    merged = [by_examples[key] for key in sorted(by_examples)]
    while len(merged) > MAX_EVALUATIONS:
        merged = [*merged[:-1:2], merged[-1]]
    return merged


def _json(model: Any) -> Object:
    dumped: Object = model.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dumped


def _is_one_of(known: Object, refused: Sequence[Refused]) -> bool:
    return known.get("uri", "").rpartition("/")[2] in {r.checkpoint for r in refused}


def _checkpoint(checkpoint: CheckpointStatus) -> Object:
    return {**_json(checkpoint), "time": stamp(checkpoint.time)}
