"""The reconcile decision for one HyperparameterSweep. Pure: (observed, now) in, status and actions out; both hosts apply them.

Level-triggered like decide.py, with four invariants more:

- A trial's parameters and what was known when they were chosen are written by the create that makes the trial.
- That the search is over is recorded before anything follows from it.
- A verdict is given once, and the write that records it is the write that stops the trial.
- What was decided is never computed again from what is known later: it is read from the objects (trials.py).
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_api import names
from finetune_api.manifest import ManifestError, parse_job, parse_sweep
from finetune_api.names import Condition, Reason, State
from finetune_api.sweep import HyperparameterSweep
from finetune_api.sweep_rules import check_start
from finetune_operator.domain import trials as t
from finetune_operator.domain.closing import build_closing, closing_end
from finetune_operator.domain.history import history
from finetune_operator.domain.outcome import parse_time
from finetune_operator.domain.status import is_finished, is_true, stamp
from finetune_operator.domain.sweep_status import SweepDraft
from finetune_operator.domain.sweep_types import CreateTrial, DeleteSweep, PatchTrial, SweepAction, SweepDecision, SweepObserved
from finetune_operator.domain.types import CreateJob, Event, Object, Settings
from finetune_operator.search.finished import best, finished
from finetune_operator.search.judge import judge
from finetune_operator.search.suggest import suggest
from finetune_operator.search.types import Finish, Finished, Outcome, Reading, Spent, Study, Trial

WAIT_SECONDS = 30.0
"""For what somebody else has to do first: another sweep's end, a quota, a name that is taken."""
BAD = (Finish.TOO_MANY_FAILED,)


def decide_sweep(observed: SweepObserved, now: datetime, settings: Settings) -> SweepDecision:
    """What to do about one HyperparameterSweep now."""
    raw = observed.sweep
    old = raw.get("status") or {}
    if raw["metadata"].get("deletionTimestamp") or raw["spec"].get("managedBy") not in (None, names.MANAGER):
        return SweepDecision(old)
    if is_finished(old):
        return _expire(raw, old, now)
    draft = SweepDraft(old, raw["metadata"].get("generation", 1), now)
    begun = bool(observed.trials or (old.get("trials") or {}).get("created"))
    try:
        sweep = parse_sweep({k: raw[k] for k in ("apiVersion", "kind", "metadata", "spec")})
        if not begun:
            check_start(sweep.spec)
    except ValueError as error:
        said = "; ".join(error.problems) if isinstance(error, ManifestError) else f"spec.{error}"
        if begun:
            # It was understood when it began: this operator is older than the one that began it. What trains goes on.
            return SweepDecision(old, (Event("Warning", "NotUnderstood", f"Upgrade the operator. It knows no: {said}"),))
        return draft.fail(Reason.SWEEP_INVALID, said)
    return _Reconcile(sweep, observed, now, settings, draft).decide()


def _expire(raw: Object, old: Object, now: datetime) -> SweepDecision:
    ttl, ended = raw["spec"].get("ttlSecondsAfterFinished"), parse_time(old.get("completionTime"))
    if ttl is None or ended is None:
        return SweepDecision(old, finished=True)
    left = (ended + timedelta(seconds=ttl) - now).total_seconds()
    if left > 0:
        return SweepDecision(old, requeue_after=left, finished=True)
    return SweepDecision(old, (DeleteSweep(raw["metadata"]["name"], raw["metadata"]["uid"]),), finished=True)


class _Reconcile:
    """One decision in the making; the methods read in the order in which a sweep lives."""

    def __init__(
        self, sweep: HyperparameterSweep, observed: SweepObserved, now: datetime, settings: Settings, draft: SweepDraft
    ) -> None:
        self.sweep, self.spec, self.observed, self.now, self.settings, self.draft = (
            sweep,
            sweep.spec,
            observed,
            now,
            settings,
            draft,
        )
        self.actions: list[SweepAction] = []
        self.study = Study(self.spec)
        # The number of a trial is never used again, also not when the last one was deleted.
        counted = int((draft.old.get("trials") or {}).get("created") or 0)
        self.created = max([counted, *(index + 1 for index in observed.trials)])
        self.trials: list[Trial] = []
        self.cold = ""
        """Why the search goes on without the trials that it started warm from."""

    def decide(self) -> SweepDecision:
        if waiting := self._warm_start():
            return waiting
        self.trials = t.read_trials(self.study, self.observed.trials, self.created)
        if unknown := self._unknown_metric():
            return self._end_badly(Reason.METRIC_NOT_FOUND, unknown)
        self._judge()
        jobs = [*self.observed.trials.values(), *self.observed.repeats.values()]
        costs = t.spent(jobs, self.now)
        over = self._over(costs)
        suspended = self._suspend()
        if over is None and not suspended:
            try:
                over = self._create(costs)
            except ManifestError as error:
                said = f"parameters: values that the recipe takes alone are not taken together: {'; '.join(error.problems)}"
                return self._end_badly(Reason.SWEEP_INVALID, f"{said}. Create a sweep with another space, or with `when`.")
        # Without what runs: a status that grows by the second would be written by the second.
        self.draft.describe(self.sweep, self.study, self.trials, self.observed.trials, t.spent(jobs))
        if suspended:
            return self._wait(*suspended)
        if over is not None:
            return self._wind_up(over)
        return self._running()

    # ------------------------------------------------------------------------------------------------------ before ------
    def _warm_start(self) -> SweepDecision | None:
        """Takes over the trials of the sweep that this one starts warm from; what to do while that cannot be done. Once trials run, nothing
        waits for it any more: a sweep that is deleted meanwhile is missed by the search alone."""
        if self.spec.warm_start_from is None:
            return None
        name, other = self.spec.warm_start_from.name, None
        if self.observed.warm is None:
            wrong, reason = f"there is no sweep {name}", Reason.WARM_START_WAITING
        else:
            try:
                other = parse_sweep({k: self.observed.warm[k] for k in ("apiVersion", "kind", "metadata", "spec")})
            except ManifestError as error:
                wrong, reason = f"{name} cannot be read: {'; '.join(error.problems)}", Reason.SWEEP_INVALID
        if other is not None:
            if other.spec.parameters != self.spec.parameters or other.spec.objective.metric != self.spec.objective.metric:
                wrong = f"{name} has other parameters or another objective: leave warmStartFrom out"
                reason = Reason.SWEEP_INVALID
            elif not is_finished((self.observed.warm or {}).get("status") or {}):
                wrong, reason = f"{name} has not ended", Reason.WARM_START_WAITING
            else:
                self.study = warm_study(self.sweep, other, self.observed.warm_trials)
                return None
        if self.created:
            self.cold = f" warmStartFrom: {wrong}; the search goes on without its trials."
            return None
        if reason is Reason.SWEEP_INVALID:
            return self.draft.fail(reason, f"warmStartFrom: {wrong}")
        return self._wait(State.PENDING, reason, f"warmStartFrom: {wrong} yet.")

    def _unknown_metric(self) -> str | None:
        """The sentence about an objective that no trial reports, once one has evaluated."""
        told = set[str]()
        for job in self.observed.trials.values():
            status = job.get("status") or {}
            # Our own trainer tells loss and rate long before it evaluates for the first time: that says nothing yet.
            if status.get("evaluations") or status.get("result") or not self.spec.trial_template.spec.has_recipe:
                told |= t.reported_metrics(job)
        asked = [("objective.metric", self.spec.objective.metric)]
        if not self.spec.trial_template.spec.has_recipe:  # what our own trainer tells is known, and checked, beforehand
            # Of a script of the user's the metrics come with its progress: only its end shows that one does not come.
            if not any(is_true(job.get("status") or {}, Condition.COMPLETE) for job in self.observed.trials.values()):
                return None
            asked += [(f"constraints[{number}].metric", c.metric) for number, c in enumerate(self.spec.constraints)]
        for field, metric in asked if told else ():
            if metric not in told:
                return f"{field}: no trial has reported {metric}; there are {', '.join(sorted(told))}. Create a sweep with one of these."
        return None

    # ------------------------------------------------------------------------------------------------------- judge ------
    def _judge(self) -> None:
        """Verdicts on all readings that are new, each with those before it in view."""
        rungs = self.spec.prune_algorithm.rungs
        for trial in list(self.trials):
            job = self.observed.trials.get(trial.index)
            if job is None or trial.outcome is not Outcome.OPEN or not rungs:
                continue
            for reading in t.readings_of(self.study, job)[len(trial.readings) :]:
                if not self._give(trial.index, job, reading):
                    break

    def _give(self, index: int, job: Object, reading: Reading) -> bool:
        """One verdict; whether the trial goes on."""
        known = t.AsOf.now(self.trials)
        verdict = judge(self.study, self.trials, index, reading.examples, reading.value)
        patch = t.verdict_patch(reading.examples, reading.value, verdict, known)
        self.actions.append(PatchTrial(job["metadata"]["name"], job["metadata"]["uid"], patch))
        before = self.trials[index]
        outcome = Outcome.PRUNED if verdict.stop else Outcome.OPEN
        self.trials[index] = Trial(index, before.parameters, outcome, (*before.readings, reading))
        if verdict.stop:
            said = f"Stopped {job['metadata']['name']} at {reading.examples} examples: rank {verdict.rank} of {verdict.of}."
            self.actions.append(Event("Normal", "TrialPruned", said))
        return not verdict.stop

    # ------------------------------------------------------------------------------------------------------ create ------
    def _over(self, costs: Spent) -> Finished | None:
        """Why no trial is begun any more. Once decided it stays so."""
        if why := self.draft.old.get("finished"):
            return Finished(Finish(why), self.draft.old.get("finishedMessage", ""))
        return self._finished(costs)

    def _finished(self, costs: Spent) -> Finished | None:
        over = finished(self.study, self.trials, costs, self.created)
        return over and Finished(over.why, f"{over.message[0].upper()}{over.message[1:]}.")

    def _create(self, costs: Spent) -> Finished | None:
        """Trials for the free places; why there are no more, if that shows here. Raises ManifestError where the recipe takes none of the
        combinations that were drawn."""
        if self.observed.refused:
            return None
        busy = sum(not is_finished(job.get("status") or {}) for job in self.observed.trials.values())
        for _ in range(min(self.spec.parallel_trials - busy, self.spec.num_trials - self.created)):
            suggestion = suggest(self.study, self.trials, self.created)
            if suggestion is None:
                break
            known = t.AsOf.now(self.trials)
            manifest = t.build_trial(self.sweep, self.created, suggestion, known, len(self.study.prior))
            parse_job(manifest)
            self.actions.append(CreateTrial(manifest))
            self.trials.append(Trial(self.created, suggestion.parameters))
            self.created += 1
        return self._finished(costs)

    def _running(self) -> SweepDecision:
        new, spec = self.draft.new, self.spec
        if self.created:
            new.setdefault("startTime", stamp(self.now))
        if self.observed.refused:
            return self._wait(State.RUNNING if self.created else State.PENDING, Reason.CREATE_REFUSED, self.observed.refused)
        message = f"{new['progress']} trials have ended."
        if spec.parallel_trials * 10 > spec.num_trials and new["plan"]["algorithm"] in ("tpe", "gp"):
            message += f" A search that learns does best with parallelTrials of {max(1, spec.num_trials // 10)} or less."
        self.draft.state(State.RUNNING)
        self.draft.set(Condition.RUNNING, True, Reason.TRIALS_RUNNING, message + self.cold)
        return SweepDecision(self.draft.done(), tuple(self.actions), self._budget_alarm())

    def _budget_alarm(self) -> float | None:
        """When to look again without an event: trials that run spend the budget while nobody tells."""
        budget = self.spec.budget
        return 10.0 if budget.active_seconds is not None or budget.gpu_seconds is not None else None

    # ----------------------------------------------------------------------------------------------------- suspend ------
    def _suspend(self) -> tuple[State, Reason, str] | None:
        """Suspends or resumes what is open; what to say while it is suspended."""
        jobs = [job for job in (*self.observed.trials.values(), *self.observed.repeats.values()) if self._open(job)]
        if self.spec.suspend:
            for job in jobs:
                if not job["spec"].get("suspend"):
                    self._patch(job, {"spec": {"suspend": True}})
            still = sum(not is_true(job.get("status") or {}, Condition.SUSPENDED) for job in jobs)
            if still:
                return State.SUSPENDING, Reason.SUSPENDING, f"Waiting until {still} trials are suspended."
            return State.SUSPENDED, Reason.SUSPENDED, "Suspended by spec.suspend; no trials are running."
        if self.draft.old.get("state") in (State.SUSPENDED, State.SUSPENDING):
            for job in jobs:
                if job["spec"].get("suspend"):
                    self._patch(job, {"spec": {"suspend": False}})
        return None

    @staticmethod
    def _open(job: Object) -> bool:
        return not is_finished(job.get("status") or {}) and not job["spec"].get("stop")

    def _patch(self, job: Object, patch: Object) -> None:
        self.actions.append(PatchTrial(job["metadata"]["name"], job["metadata"]["uid"], patch))

    # --------------------------------------------------------------------------------------------------------- end ------
    def _wind_up(self, over: Finished) -> SweepDecision:
        """No trial is begun any more: end those that run, repeat the best, promote, and say so."""
        if not self.draft.old.get("finished"):
            self.draft.new["finished"], self.draft.new["finishedMessage"] = str(over.why), over.message
            self.actions.append(Event("Normal", str(over.why), over.message))
            # Acted on once it is recorded: if numTrials is raised meanwhile, the write fails, and the search goes on with nothing stopped.
            return self._wait(State.STOPPING, Reason.STOPPING, over.message, seconds=0.0)
        waiting = self._end_trials(stop=self.spec.on_complete.value == "StopTrials" or over.why in BAD)
        if waiting:
            return waiting
        if over.why in BAD:
            return self.draft.fail(Reason.TOO_MANY_FAILED, over.message, self.actions)
        ranked = best(self.study, self.trials)
        if not ranked:
            return self.draft.fail(Reason.NO_RESULT, self._why_no_result(over), self.actions)
        if self.spec.promote is None:
            return self._close(over, None, None)
        return self._promote(over, ranked)

    def _end_trials(self, *, stop: bool) -> SweepDecision | None:
        open_jobs = [job for job in self.observed.trials.values() if not is_finished(job.get("status") or {})]
        if not open_jobs:
            return None
        for job in open_jobs if stop else ():
            if not job["spec"].get("stop"):
                self._patch(job, {"spec": {"stop": True}})
        return self._wait(State.STOPPING, Reason.STOPPING, f"Waiting for the end of {len(open_jobs)} trials.", seconds=None)

    def _why_no_result(self, over: Finished) -> str:
        complete = sum(trial.outcome is Outcome.COMPLETE for trial in self.trials)
        if complete:
            bounds = ", ".join(c.metric for c in self.spec.constraints)
            return f"{over.message} None of the {complete} complete trials keeps all constraints ({bounds}): loosen them."
        return f"{over.message} No trial ran to its end."

    def _promote(self, over: Finished, ranked: Sequence[Trial]) -> SweepDecision:
        """The best are repeated with other seeds; the best mean wins."""
        promote = self.spec.promote
        if promote is None:
            raise ValueError("there is nothing to promote to")
        rows, waiting = [], False
        for trial in ranked[: promote.top_k]:
            runs = [self.observed.trials[trial.index]]
            for number in range(1, promote.seeds + 1):
                name = t.repeat_name(self.sweep.metadata["name"], trial.index, number)
                job = self.observed.repeats.get(name)
                if job is None and not self.observed.refused:
                    self.actions.append(CreateTrial(t.build_repeat(self.sweep, trial, number)))
                waiting = waiting or job is None or not is_finished(job.get("status") or {})
                if job is not None:
                    runs.append(job)
            rows.append((trial, runs))
        # One whose repetition failed has a mean of those that did not: the failure is seen in the list of values.
        self.draft.repetitions(self.study, rows, whole=not waiting)
        if waiting:
            said = self.observed.refused or "Repeating the best trials with other seeds."
            return self._wait(State.PROMOTING, Reason.REPEATING, said, seconds=WAIT_SECONDS if self.observed.refused else None)
        return self._close(over, *self.draft.winner(self.study, rows))

    def _close(self, over: Finished, winner: Trial | None, run: Object | None) -> SweepDecision:
        """The last Job: writes the history, and scores and copies the winner."""
        if self.observed.closing is None:
            job = build_closing(self.sweep, self.history(), winner, run, self.settings)
            if job is None:
                return self.draft.complete(over, self.actions)
            if not self.observed.refused:
                self.actions.append(CreateJob(job))
            said = self.observed.refused or "Writing the history."
            return self._wait(State.PROMOTING, Reason.PROMOTING, said)
        end = closing_end(self.observed.closing, self.observed.closing_pods)
        if end is None:
            return self._wait(State.PROMOTING, Reason.PROMOTING, "Writing the history and promoting the best.", seconds=None)
        if not end.well and winner is not None:
            return self.draft.fail(Reason.PROMOTION_FAILED, f"The best model could not be promoted: {end.message}", self.actions)
        self.draft.closed(self.sweep, end)
        return self.draft.complete(over, self.actions, "" if end.well else f" The history could not be written: {end.message}")

    def history(self) -> Object:
        """All trials, as they are exported."""
        return history(self.study, self.sweep, self.draft.new, self.trials, self.observed.trials)

    # ----------------------------------------------------------------------------------------------------- helpers ------
    def _wait(self, state: State, reason: Reason, message: str, seconds: float | None = WAIT_SECONDS) -> SweepDecision:
        self.draft.state(state)
        running = state in (State.RUNNING, State.STOPPING, State.PROMOTING, State.SUSPENDING)
        self.draft.set(Condition.RUNNING, running, reason, message)
        if state is State.SUSPENDED:
            self.draft.set(Condition.SUSPENDED, True, reason, message)
        return SweepDecision(self.draft.done(), tuple(self.actions), seconds)

    def _end_badly(self, reason: Reason, message: str) -> SweepDecision:
        """Fails once nothing runs any more."""
        costs = t.spent(self.observed.trials.values())
        self.draft.describe(self.sweep, self.study, self.trials, self.observed.trials, costs)
        waiting = self._end_trials(stop=True)
        return waiting or self.draft.fail(reason, message, self.actions)


def warm_study(sweep: HyperparameterSweep, other: HyperparameterSweep, objects: Sequence[Object]) -> Study:
    """The study of a sweep that learns from another one's complete trials first."""
    by_index = {said.index: job for job in objects if (said := t.chosen(job))}
    records = t.read_trials(Study(other.spec), by_index, max(by_index, default=-1) + 1)
    return Study(sweep.spec, tuple(trial for trial in records if trial.outcome is Outcome.COMPLETE))
