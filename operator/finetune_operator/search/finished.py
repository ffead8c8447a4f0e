"""Whether a sweep needs no further trial, and which of its trials are the best."""

import math
from collections.abc import Sequence
from itertools import islice

from finetune_api import sweep_rules
from finetune_operator.search.types import Finish, Finished, Outcome, Spent, Study, Trial


def best(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """Complete trials that keep all constraints, the best first; of equals the earlier one."""
    found = [(study.sign * t.value, t.index, t) for t in trials if _counts(t) and t.value is not None]
    return [trial for _, _, trial in sorted(found, key=lambda entry: entry[:2])]


def finished(study: Study, trials: Sequence[Trial], spent: Spent, created: int) -> Finished | None:
    """Why no further trial is begun, in a sentence that says what to change to go on; None while the search goes on.

    `trials` are all that are known, `created` is how many there ever were: their numbers are 0 to created - 1.
    """
    for check in (_goal, _failures, _spent, _no_improvement, _done):
        if (found := check(study, trials, spent, created)) is not None:
            return found
    return None


def _counts(trial: Trial) -> bool:
    return trial.outcome is Outcome.COMPLETE and trial.feasible and trial.value is not None and math.isfinite(trial.value)


def _goal(study: Study, trials: Sequence[Trial], _spent: Spent, _created: int) -> Finished | None:
    goal, ranked = study.spec.objective.goal, best(study, trials)
    if goal is None or not ranked or ranked[0].value is None or study.sign * ranked[0].value > study.sign * goal:
        return None
    first = ranked[0]
    return Finished(
        Finish.GOAL_REACHED,
        f"trial {first.index} has {study.spec.objective.metric} {first.value:.6g}, and objective.goal is {goal:g}",
    )


def _failures(study: Study, trials: Sequence[Trial], spent: Spent, created: int) -> Finished | None:
    allowed = study.spec.failures_allowed
    if spent.failed > allowed:
        return Finished(
            Finish.TOO_MANY_FAILED,
            f"{spent.failed} trials failed, and maxFailedTrials is {allowed}: see why in the trials' own status; "
            "then narrow the parameters or raise maxFailedTrials",
        )
    first = min(max(3, study.spec.parallel_trials), study.spec.num_trials)
    bad = {t.index for t in trials if t.outcome in (Outcome.FAILED, Outcome.IGNORED)}
    worked = any(t.outcome in (Outcome.COMPLETE, Outcome.PRUNED) for t in trials)
    if not worked and spent.failed >= first and created >= first and bad.issuperset(range(first)):
        return Finished(
            Finish.TOO_MANY_FAILED,
            f"each of the first {first} trials failed, and none is complete: see why in the trials' own status; the template itself "
            "may not work, so run it alone as a FineTuneJob",
        )
    return None


def _spent(study: Study, _trials: Sequence[Trial], spent: Spent, _created: int) -> Finished | None:
    budget = study.spec.budget
    for field, used, limit in (
        ("gpuSeconds", spent.gpu_seconds, budget.gpu_seconds),
        ("activeSeconds", spent.active_seconds, budget.active_seconds),
    ):
        if limit is not None and used >= limit:
            return Finished(
                Finish.BUDGET_SPENT, f"the trials have used {used} of budget.{field} {limit}: raise it for further trials"
            )
    return None


def _no_improvement(study: Study, trials: Sequence[Trial], _spent: Spent, _created: int) -> Finished | None:
    patience = study.spec.stop_when.no_improvement_trials
    if patience is None:
        return None
    record: Trial | None = None
    since = 0
    for trial in sorted(trials, key=lambda t: t.index):
        if trial.outcome is Outcome.OPEN:
            break  # It may still be the best: under pruning those that run long are the good ones.
        if trial.outcome is Outcome.IGNORED:
            continue
        if record is None or best(study, [record, trial])[0] is trial:
            record, since = (trial if _counts(trial) else None), 0
        else:
            since += 1
        if record is not None and since >= patience:
            return Finished(
                Finish.NO_IMPROVEMENT,
                f"{since} trials in a row are not better than trial {record.index} ({study.spec.objective.metric} {record.value:.6g}): "
                "raise or remove stopWhen.noImprovementTrials to go on",
            )
    return None


def _done(study: Study, trials: Sequence[Trial], _spent: Spent, created: int) -> Finished | None:
    spec = study.spec
    if any(trial.outcome is Outcome.OPEN for trial in trials):
        return None
    if created >= spec.num_trials:
        return Finished(Finish.TRIALS_DONE, f"all {spec.num_trials} trials have ended: raise numTrials for further ones")
    grid = spec.search_algorithm.grid
    if grid is not None and next(islice(sweep_rules.cells(study.parameters, grid.points), created, None), None) is None:
        return Finished(
            Finish.TRIALS_DONE, f"all {created} cells of the grid have been tried: another algorithm can try other values"
        )
    return None
