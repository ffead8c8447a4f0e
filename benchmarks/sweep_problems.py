"""What the sweep benchmark searches: functions with known minima, spaces with categories and conditions, learning curves, failing regions.

All are code, none needs data. Every function gives its regret: 0 is the best there is.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune_api.sweep import HyperparameterSweepSpec
from finetune_api.sweep_space import Scalar
from finetune_operator.search import space

Chosen = Mapping[str, Scalar]


@dataclass(frozen=True)
class Problem:
    """A space, and what is to be minimised in it."""

    name: str
    parameters: tuple[dict[str, Any], ...]
    """As in a manifest."""
    regret: Callable[[Chosen], float]
    fails: Callable[[Chosen], bool] = lambda _: False
    """Whether a trial with these parameters ends in a failure that they cause."""

    def spec(self, seed: int, **fields: Any) -> HyperparameterSweepSpec:
        """The sweep over it; without an algorithm it is `auto`."""
        return HyperparameterSweepSpec.model_validate(
            {
                "objective": {"metric": "loss", "direction": "Minimize"},
                "numTrials": 10_000,
                "parallelTrials": 32,
                "seed": seed,
                "parameters": self.parameters,
                "trialTemplate": {"spec": {"trainer": {"image": "none", "command": ["none"]}}},
                **fields,
            }
        )


def parameter(name: str, kind: str, when: dict[str, Any] | None = None, **bounds: Any) -> dict[str, Any]:
    """One entry of spec.parameters."""
    return {"name": name, "env": name.upper(), "searchSpace": {kind: bounds}, **({"when": when} if when else {})}


def cube(dimensions: int, low: float, high: float) -> tuple[dict[str, Any], ...]:
    """x0, x1, ..., each between low and high."""
    return tuple(parameter(f"x{k}", "uniform", min=low, max=high) for k in range(dimensions))


def vector(chosen: Chosen) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """x0, x1, ... as an array."""
    return np.array([float(chosen[f"x{k}"]) for k in range(len(chosen))])


# -------------------------------------------------------------------------------------------------------- functions ----
def branin(chosen: Chosen) -> float:
    """Three minima, all global."""
    x, y = vector(chosen)
    bowl = (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2
    return float(bowl + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10 - 0.39788735772973816)


_HEIGHT = np.array([1.0, 1.2, 3.0, 3.2])
_WIDTH = np.array([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]])
_PLACE = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def hartmann6(chosen: Chosen) -> float:
    """Six local minima; the second best is 0.119 above the best."""
    return float(3.322368011415515 - _HEIGHT @ np.exp(-(_WIDTH * (vector(chosen) - _PLACE) ** 2).sum(axis=1)))


def ackley(chosen: Chosen) -> float:
    """Flat, with a hole in the middle and ripples everywhere."""
    x = vector(chosen)
    far, ripples = math.sqrt(float(np.mean(x * x))), float(np.mean(np.cos(2 * math.pi * x)))
    return -20 * math.exp(-0.2 * far) - math.exp(ripples) + 20 + math.e


def levy(chosen: Chosen) -> float:
    """Waves on a slope."""
    w = 1 + (vector(chosen) - 1) / 4
    body = float(np.sum((w[:-1] - 1) ** 2 * (1 + 10 * np.sin(math.pi * w[:-1] + 1) ** 2)))
    return math.sin(math.pi * w[0]) ** 2 + body + float((w[-1] - 1) ** 2 * (1 + math.sin(2 * math.pi * w[-1]) ** 2))


def mixed(chosen: Chosen) -> float:
    """Like a fine-tuning: the best learning rate depends on optimizer and batch size."""
    rate, loss = {"adamw": (-4.5, 0.0), "sgd": (-2.0, 0.15), "lion": (-5.2, 0.05)}[str(chosen["optimizer"])]
    batch, log_rate = math.log2(float(chosen["batch"])), math.log10(float(chosen["rate"]))
    loss += 0.35 * (log_rate - rate - 0.25 * (batch - 5)) ** 2 + 0.02 * (batch - 5) ** 2
    loss += 0.01 * (float(chosen["frozen"]) - 4) ** 2 + 2 * (float(chosen["dropout"]) - 0.12) ** 2
    return loss + (0.04 if chosen["schedule"] == "linear" else 0.0)


def conditional(chosen: Chosen) -> float:
    """Two ways to train, each with parameters of its own; the less likely one is better."""
    log_rate = math.log10(float(chosen["rate"]))
    if chosen["method"] == "lora":
        rank, alpha = math.log2(float(chosen["rank"])), float(chosen["alpha"])
        return 0.3 * (log_rate + 3.2) ** 2 + 0.02 * (rank - 4) ** 2 + 0.6 * (alpha - 0.4) ** 2
    frozen, decay = float(chosen["frozen"]), float(chosen["decay"])
    return 0.1 + 0.3 * (log_rate + 4.7) ** 2 + 0.01 * (frozen - 3) ** 2 + 0.5 * (decay - 0.7) ** 2


def _beside_the_minimum(chosen: Chosen) -> bool:
    """72 % of Hartmann's cube, and what a model without failures takes for the best of it."""
    return float(chosen["x0"]) > 0.4 or float(chosen["x5"]) > 0.7


_LORA, _FULL = ({"parameter": "method", "values": [method]} for method in ("lora", "full"))
_RATE = parameter("rate", "logUniform", min=1e-6, max=1e-1)
PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("branin", (parameter("x0", "uniform", min=-5, max=10), parameter("x1", "uniform", min=0, max=15)), branin),
        Problem("hartmann6", cube(6, 0, 1), hartmann6),
        Problem("ackley5", cube(5, -32.8, 32.8), ackley),
        Problem("levy4", cube(4, -10, 10), levy),
        Problem(
            "mixed",
            (
                parameter("optimizer", "categorical", values=["adamw", "sgd", "lion"]),
                _RATE,
                parameter("batch", "intLogUniform", min=4, max=256),
                parameter("frozen", "intUniform", min=0, max=12),
                parameter("dropout", "uniform", min=0, max=0.5),
                parameter("schedule", "categorical", values=["cosine", "linear"]),
            ),
            mixed,
        ),
        Problem(
            "conditional",
            (
                parameter("method", "categorical", values=["lora", "full"]),
                _RATE,
                parameter("rank", "intLogUniform", _LORA, min=1, max=128),
                parameter("alpha", "uniform", _LORA, min=0, max=1),
                parameter("frozen", "intUniform", _FULL, min=0, max=12),
                parameter("decay", "uniform", _FULL, min=0, max=1),
            ),
            conditional,
        ),
        Problem("failing", cube(6, 0, 1), hartmann6, _beside_the_minimum),
    )
}


# ------------------------------------------------------------------------------------------------------------ curves ----
@dataclass(frozen=True)
class Curves:
    """Learning curves that end at the problem's own value: f + a (t^-b - R^-b) + noise, t from 1 to R."""

    problem: Problem
    strong: bool
    """Whether trials keep their order from early on; else how fast and from how high they come down differs much."""
    seed: int
    end: int = 81

    def value(self, chosen: Chosen, trial: int, time: int) -> float:
        """What trial number `trial` would report at this time; the same whenever it is asked."""
        units = np.array(space.units(self.problem.spec(0).parameters, chosen))
        waves = 0.5 + 0.5 * np.sin(np.arange(1, len(units) + 1) @ units * 3 + np.array([0.0, 2.0]))
        height, speed = (1.0, 0.5) if self.strong else (0.2 + 2 * waves[0], 0.3 + 0.9 * waves[1])
        size = SPREAD[self.problem.name]
        noise = np.random.default_rng((self.seed, trial, time)).normal(scale=0.01 * size) if time < self.end else 0.0
        return float(self.problem.regret(chosen) + size * height * (time**-speed - self.end**-speed) + noise)


SPREAD = {"branin": 52.0, "hartmann6": 0.38, "ackley5": 0.6, "levy4": 26.0}
"""Standard deviation of each function over its space."""
