"""What the search engine's tests share: spaces, studies and records of trials. All of it is the real contract; nothing is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from finetune_api.sweep import Asha, HyperparameterSweepSpec, Median, PruneAlgorithm
from finetune_api.sweep_space import Scalar
from finetune_operator.search.suggest import suggest
from finetune_operator.search.types import Outcome, Reading, Study, Trial


def parameter(name: str, kind: str, when: dict[str, Any] | None = None, **bounds: Any) -> dict[str, Any]:
    return {"name": name, "env": name.upper(), "searchSpace": {kind: bounds}, **({"when": when} if when else {})}


LINE = [parameter("x", "uniform", min=0, max=1), parameter("y", "uniform", min=-5, max=5)]
ALL_KINDS = [
    parameter("x", "uniform", min=-1, max=1),
    parameter("rate", "logUniform", min=1e-6, max=1e-1),
    parameter("layers", "intUniform", min=0, max=10, step=3),
    parameter("batch", "intLogUniform", min=4, max=256),
    parameter("kind", "categorical", values=[8, "8", True, 1, "true", 0.5]),
]
CONDITIONAL = [
    parameter("method", "categorical", values=["lora", "full"]),
    parameter("rank", "intLogUniform", {"parameter": "method", "values": ["lora"]}, min=1, max=64),
    parameter("merge", "categorical", {"parameter": "method", "values": ["lora"]}, values=[True, False]),
    parameter("how", "uniform", {"parameter": "merge", "values": [True]}, min=0, max=1),
    parameter("frozen", "intUniform", {"parameter": "method", "values": ["full"]}, min=0, max=12),
]
CHOICES = [parameter("a", "categorical", values=[1, 2, 3]), parameter("b", "intUniform", min=1, max=3)]
LEARNERS = ("tpe", "gp")


def study(space: Sequence[dict[str, Any]] = LINE, algorithm: str = "random", prior: Sequence[Trial] = (), **fields: Any) -> Study:
    document = {
        "objective": {"metric": "loss", "direction": "Minimize"},
        "numTrials": 1000,
        "parallelTrials": 2,
        "searchAlgorithm": {algorithm: {}},
        "parameters": list(space),
        "trialTemplate": {"spec": {"trainer": {"image": "none", "command": ["none"]}}},
        **fields,
    }
    return Study(HyperparameterSweepSpec.model_validate(document), tuple(prior))


def pruned_by(of: Study, rule: Asha | Median) -> Study:
    """With pruning, which the contract has for our own trainer alone."""
    rules = PruneAlgorithm(asha=rule) if isinstance(rule, Asha) else PruneAlgorithm(median=rule)
    return replace(of, spec=of.spec.model_copy(update={"prune_algorithm": rules}))


def complete(index: int, parameters: Mapping[str, Scalar], value: float, *violations: float) -> Trial:
    return Trial(index, parameters, Outcome.COMPLETE, (), value, violations)


def at(index: int, *values: float, outcome: Outcome = Outcome.OPEN, parameters: Mapping[str, Scalar] | None = None) -> Trial:
    """A trial with readings at 10, 30, 90, ... examples; complete with its last one."""
    readings = tuple(Reading(10 * 3**k, value) for k, value in enumerate(values))
    return Trial(index, parameters or {}, outcome, readings, values[-1] if outcome is Outcome.COMPLETE else None)


def drawn(of: Study, index: int) -> Mapping[str, Scalar]:
    """The random draw of this number, in the space of a study."""
    found = suggest(study([p.model_dump(by_alias=True, exclude_unset=True) for p in of.parameters], seed=of.spec.seed), [], index)
    assert found is not None
    return found.parameters


def history(of: Study, count: int, objective: Callable[[Mapping[str, Scalar]], float]) -> list[Trial]:
    """Complete trials, drawn at random."""
    return [complete(i, parameters := drawn(of, i), objective(parameters)) for i in range(count)]


def bowl(parameters: Mapping[str, Scalar]) -> float:
    """Best where x is 0.3 and y is 1."""
    return (float(parameters["x"]) - 0.3) ** 2 + (float(parameters["y"]) - 1) ** 2 / 25


OUTCOMES = st.sampled_from(list(Outcome))
VALUES = st.floats(-1e6, 1e6) | st.sampled_from([0.0, float("nan"), float("inf"), -float("inf")])


@st.composite
def histories(draw: st.DrawFn, of: Study, most: int = 25) -> list[Trial]:
    """Trials with anything that may have become of them; some numbers are missing."""
    found = []
    for index in range(draw(st.integers(0, most))):
        outcome = draw(OUTCOMES)
        if draw(st.integers(0, 9)) == 0:
            continue
        done = outcome is Outcome.COMPLETE
        rungs = of.spec.prune_algorithm.rungs
        reached = len(rungs) if done else draw(st.integers(0, len(rungs)))
        readings = tuple(Reading(rung, draw(VALUES)) for rung in rungs[:reached])
        violations = tuple(draw(st.floats(-1, 1)) for _ in of.spec.constraints) if done else ()
        found.append(Trial(index, drawn(of, index), outcome, readings, draw(VALUES) if done else None, violations))
    return found
