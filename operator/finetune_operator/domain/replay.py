"""Makes every decision of a sweep once more, from what was known when it was made, and compares it with what was kept. Pure.

Whether a search did what its spec says cannot be seen from its result. It can be seen from its objects: each parameter and each verdict stands
there with the state of the study that it was decided on (trials.AsOf), and the engine is a function of that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune_api import names
from finetune_api.manifest import parse_sweep
from finetune_api.sweep import HyperparameterSweep
from finetune_operator.domain import trials as t
from finetune_operator.domain.sweep import warm_study
from finetune_operator.domain.types import Object
from finetune_operator.search import engine
from finetune_operator.search.judge import judge
from finetune_operator.search.suggest import suggest
from finetune_operator.search.types import Outcome, Study, Trial, Verdict


@dataclass(frozen=True)
class Mismatch:
    """A decision that does not come out as it was kept."""

    trial: str
    """Name of the trial's FineTuneJob."""
    about: str
    """parameters, or the verdict at so many examples."""
    message: str
    """A sentence."""
    replayed: bool = True
    """False: it could not be made again, so that nothing is known about it."""


@dataclass(frozen=True)
class Replayed:
    """What came of it."""

    suggestions: int
    """Trials whose parameters came out the same."""
    verdicts: int
    """Verdicts that came out the same."""
    mismatches: tuple[Mismatch, ...]
    """All others."""


def replay(sweep: Object, jobs: Iterable[Object], warm: tuple[Object, Sequence[Object]] | None = None) -> Replayed:
    """Of a HyperparameterSweep and the FineTuneJobs of its trials (its repetitions may be among them); `warm` are those of the sweep that it
    started warm from. Raises ManifestError where a sweep cannot be read, LookupError where `warm` is needed and not given."""
    parsed = _parsed(sweep)
    study = Study(parsed.spec)
    if parsed.spec.warm_start_from is not None:
        if warm is None:
            raise LookupError(f"it started warm from {parsed.spec.warm_start_from.name}, whose trials are not there")
        study = warm_study(parsed, _parsed(warm[0]), warm[1])
    trials = [job for job in jobs if (job["metadata"].get("labels") or {}).get(names.LABEL_ROLE) != t.ROLE_REPEAT]
    by_index = {said.index: job for job in trials if (said := t.chosen(job))}
    counted = int(((sweep.get("status") or {}).get("trials") or {}).get("created") or 0)
    records = t.read_trials(study, by_index, max([counted, *(index + 1 for index in by_index)]))
    unread = [Mismatch(job["metadata"]["name"], "parameters", _UNREAD, False) for job in trials if t.chosen(job) is None]
    suggestions = [_suggestion(study, records, by_index[index]) for index in sorted(by_index)]
    verdicts = [found for index in sorted(by_index) for found in _verdicts(study, records, by_index[index])]
    wrong = [mismatch for mismatch in (*unread, *suggestions, *verdicts) if mismatch is not None]
    return Replayed(suggestions.count(None), verdicts.count(None), tuple(wrong))


_UNREAD = f"its annotation {names.ANNOTATION_TRIAL} is gone or spoiled"


def _parsed(sweep: Object) -> HyperparameterSweep:
    return parse_sweep({key: sweep[key] for key in ("apiVersion", "kind", "metadata", "spec")})


def _suggestion(study: Study, records: Sequence[Trial], job: Object) -> Mismatch | None:
    """Nothing where it is the same."""
    name, said = job["metadata"]["name"], t.chosen(job)
    if said is None:
        return Mismatch(name, "parameters", _UNREAD, False)
    if said.as_of.trials != said.index:
        message = f"trial {said.index} was chosen when there were {said.index} trials; it says {said.as_of.trials}"
        return Mismatch(name, "parameters", message)
    then = _then(records, said.as_of, name, "parameters")
    if isinstance(then, Mismatch):
        return then
    if said.engine != engine():
        message = f"cannot be replayed: it was chosen by engine {said.engine}, and this is {engine()}"
        return Mismatch(name, "parameters", message, False)
    if said.prior != len(study.prior):
        message = f"cannot be replayed: it knew {said.prior} trials of the sweep that it started warm from; there are {len(study.prior)}"
        return Mismatch(name, "parameters", message, False)
    again = suggest(study, then, said.index)
    if again is None:
        return Mismatch(name, "parameters", f"the grid has no cell {said.index}")
    if dict(again.parameters) != dict(said.parameters) or again.algorithm != said.algorithm:
        kept = f"{t.compact(dict(said.parameters))} by {said.algorithm}"
        return Mismatch(
            name, "parameters", f"{kept} was kept, {t.compact(dict(again.parameters))} by {again.algorithm} comes out"
        )
    return None


def _verdicts(study: Study, records: Sequence[Trial], job: Object) -> Iterable[Mismatch | None]:
    """One for each verdict on the trial."""
    name, said = job["metadata"]["name"], t.chosen(job)
    for number, kept in enumerate(t.judgements(job)):
        about = f"the verdict at {kept.examples} examples"
        then = _then(records, kept.as_of, name, about)
        if isinstance(then, Mismatch) or said is None:
            yield then if isinstance(then, Mismatch) else None
            continue
        if said.engine != engine():
            yield Mismatch(
                name, about, f"cannot be replayed: it was given by engine {said.engine}, and this is {engine()}", False
            )
            continue
        if kept.as_of.open.get(said.index) != number:
            knew = kept.as_of.open.get(said.index, "no")
            yield Mismatch(name, about, f"it knew {knew} verdicts on the trial itself; {number} came before it")
            continue
        again = judge(study, then, said.index, kept.examples, kept.value)
        if (again.stop, again.rank, again.of) == (kept.stop, kept.rank, kept.of):
            yield None
        else:
            yield Mismatch(name, about, f"{_shown(kept)} was kept, {_shown(again)} comes out")


def _then(records: Sequence[Trial], known: t.AsOf, name: str, about: str) -> list[Trial] | Mismatch:
    """The records as they were; a mismatch where they cannot be had, or never were so."""
    try:
        then = known.of(records)
    except LookupError as error:
        return Mismatch(name, about, f"cannot be replayed: {error.args[0]}", False)
    for trial in then:
        if trial.outcome is Outcome.OPEN and len(trial.readings) != known.open[trial.index]:
            message = f"it knew {known.open[trial.index]} verdicts on trial {trial.index}; there are {len(trial.readings)}"
            return Mismatch(name, about, message)
    return then


def _shown(verdict: t.Judged | Verdict) -> str:
    return f"{'Stop' if verdict.stop else 'Continue'}, rank {verdict.rank} of {verdict.of},"
