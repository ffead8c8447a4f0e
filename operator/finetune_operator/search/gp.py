"""Bayesian optimisation with a Gaussian process: where the objective may still improve most.

The acquisition is the logarithm of expected improvement (Ament et al., "Unexpected Improvements to Expected Improvement", NeurIPS 2023):
its gradient does not vanish where the improvement is tiny. Trials that run count with the value that is expected of them. It is
maximised over points of the space, not of the cube: whole numbers and categories are rounded before they are looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_api.sweep_space import Parameter, Scalar
from finetune_operator.search import space
from finetune_operator.search.regression import Process, fit
from finetune_operator.search.types import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CANDIDATES = 1024
"""Points of a Sobol sequence among which the search for the best one begins (a power of 2)."""
NEARBY = 32
"""Points around each of the best trials."""
STARTS = 8
"""Candidates that are improved by their gradient."""
FAR = 3.0
"""Values are cut off so far above the median, in distances from the best to the median."""
FEW = 16
"""A parameter with no more values than this is tried with all of them."""


def gp(parameters: Sequence[Parameter], views: Sequence[View], seed: int) -> dict[str, Scalar]:
    """The point of the space whose improvement is expected to be largest. At least one view has a value."""
    import numpy as np

    cube = Cube(parameters)
    told = [v for v in views if v.value is not None]
    points = np.array([space.units(parameters, v.parameters) for v in told])
    values = np.array([v.value for v in told])
    running = np.array([space.units(parameters, v.parameters) for v in views if v.value is None])
    violations = _worst_violations(told)
    feasible = violations <= 0
    scaled = _standardised(values)
    process = fit(points, scaled, cube.categorical)
    threshold = float(scaled[feasible].min()) if feasible.any() else float(scaled.max())
    keeping = None
    if not feasible.all():
        # Of the constraints only whether the worst one is kept matters: one model, however many there are.
        spread = float(np.std(violations)) or 1.0
        keeping = fit(points, violations / spread, cube.categorical)
    if len(running):
        process = process.believing(running)
        keeping = keeping and keeping.believing(running)
    acquisition = Acquisition(process, threshold, keeping)
    good = points[np.argsort(np.where(feasible, scaled, np.inf), kind="stable")[:4]]
    return space.point(parameters, [float(u) for u in _maximised(cube, acquisition, good, seed)])


def _standardised(values: "Floats") -> "Floats":
    """Mean 0 and variance 1. What is far above the median is cut off there: one loss that exploded would make all others look equal."""
    import numpy as np

    middle = float(np.median(values))
    reach = middle - float(values.min())
    if reach > 0:  # else half of all are the best, and cutting there would make all others as good
        values = np.minimum(values, middle + FAR * reach)
    scaled: Floats = (values - values.mean()) / (float(np.std(values)) or 1.0)
    return scaled


def _worst_violations(views: Sequence[View]) -> "Floats":
    """The largest violation of each trial, each constraint on its own scale; 0 of trials without any."""
    import numpy as np

    count = max((len(v.violations) for v in views), default=0)
    if not count:
        return np.zeros(len(views))
    table = np.array([v.violations or (0.0,) * count for v in views], dtype=float)
    spread = np.std(table, axis=0)
    worst: Floats = np.max(table / np.where(spread > 0, spread, 1.0), axis=1)
    return worst


# ------------------------------------------------------------------------------------------------------- acquisition ----
@dataclass(frozen=True)
class Acquisition:
    """Log of the expected improvement below a threshold, times the probability that the constraints are kept."""

    process: Process
    threshold: float
    keeping: Process | None

    def __call__(self, at: "Floats") -> "Floats":
        """At each of these points (m, d)."""
        import numpy as np
        from scipy.special import log_ndtr

        mean, variance = self.process.posterior(at)
        sigma = np.sqrt(variance)
        value: Floats = log_improvement((self.threshold - mean) / sigma) + np.log(sigma)
        if self.keeping is not None:
            mean, variance = self.keeping.posterior(at)
            value = value + log_ndtr(-mean / np.sqrt(variance))
        return value

    def slope(self, at: "Floats") -> tuple[float, "Floats"]:
        """At one point (d), and its gradient (d)."""
        import numpy as np
        from scipy.special import log_ndtr

        mean, variance, d_mean, d_variance = self.process.posterior_slope(at)
        sigma = variance**0.5
        d_sigma = d_variance / (2 * sigma)
        z = (self.threshold - mean) / sigma
        log_h = float(log_improvement(np.array([z]))[0])
        value = log_h + np.log(sigma)
        gradient = np.exp(log_ndtr(z) - log_h) * (-d_mean - z * d_sigma) / sigma + d_sigma / sigma
        if self.keeping is not None:
            mean, variance, d_mean, d_variance = self.keeping.posterior_slope(at)
            sigma = variance**0.5
            z = -mean / sigma
            log_p = float(log_ndtr(z))
            value += log_p
            density = np.exp(-0.5 * z * z - 0.5 * np.log(2 * np.pi) - log_p)
            gradient = gradient + density * (-d_mean - z * d_variance / (2 * sigma)) / sigma
        return float(value), gradient


def log_improvement(z: "Floats") -> "Floats":
    """log(φ(z) + z Φ(z)), for any z."""
    import numpy as np
    from scipy.special import erfcx, ndtr

    z = np.asarray(z, dtype=float)
    near = np.maximum(z, -1.0)
    direct = np.log(np.exp(-0.5 * near**2) / np.sqrt(2 * np.pi) + near * ndtr(near))
    far = np.clip(z, -1e5, -1.0)
    # Far below, φ and zΦ cancel: what is left is taken as a factor of φ; from 1e3 on it is 1/z².
    left = np.where(
        far > -1e3, np.log1p(np.maximum(far, -1e3) * np.sqrt(np.pi / 2) * erfcx(-far / np.sqrt(2))), -2 * np.log(-far)
    )
    value: Floats = np.where(z > -1.0, direct, -0.5 * z**2 - 0.5 * np.log(2 * np.pi) + left)
    return value


# ----------------------------------------------------------------------------------------------------------- maximum ----
class Cube:
    """The space as columns of numbers, many points at a time; it agrees with space.point and space.units."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        import numpy as np

        self.parameters = parameters
        self.categorical = np.array([p.search_space.categorical is not None for p in parameters])
        # Every number between 0 and 1 is a value of its own.
        self.smooth = np.array([bool(p.search_space.uniform or p.search_space.log_uniform) for p in parameters])
        self._column = {p.name: k for k, p in enumerate(parameters)}

    def snap(self, at: "Floats") -> "Floats":
        """Each point (m, d) as the space has it: what is not smooth in the middle of its part, what is not in use at a half."""
        import numpy as np

        at = np.clip(at, 0.0, 1.0)
        used = np.ones(at.shape, dtype=bool)
        for k, parameter in enumerate(self.parameters):
            if not self.smooth[k]:
                at[:, k] = self._snapped(parameter, at[:, k])
            if parameter.when is not None:
                parent = self._column[parameter.when.parameter]
                suits = [space.to_unit(self.parameters[parent], value) for value in parameter.when.values]
                used[:, k] = used[:, parent] & np.isin(at[:, parent], suits)
        return np.where(used, at, 0.5)

    @staticmethod
    def _snapped(parameter: Parameter, units: "Floats") -> "Floats":
        import numpy as np

        values = parameter.search_space
        if values.int_log_uniform is not None:
            low, high = np.log(values.int_log_uniform.min - 0.5), np.log(values.int_log_uniform.max + 0.5)
            whole = np.round(np.exp(low + (high - low) * units))
            return (np.log(np.clip(whole, values.int_log_uniform.min, values.int_log_uniform.max)) - low) / (high - low)  # type: ignore[no-any-return]
        count = _count(parameter)
        return (np.minimum(np.floor(units * count), count - 1) + 0.5) / count

    def steps(self, column: int, unit: float) -> list[float]:
        """Other places of a column that is not smooth: all, if they are few, else those beside this one."""
        values = self.parameters[column].search_space
        if values.int_log_uniform is not None:
            low, high = values.int_log_uniform.min, values.int_log_uniform.max
            here = space.from_unit(self.parameters[column], unit)
            assert isinstance(here, int)
            around = range(low, high + 1) if high - low < FEW else range(max(low, here - 2), min(high, here + 2) + 1)
            return [space.to_unit(self.parameters[column], value) for value in around if value != here]
        count = _count(self.parameters[column])
        here = min(int(unit * count), count - 1)
        few = values.categorical is not None or count <= FEW
        around = range(count) if few else range(max(0, here - 2), min(count, here + 3))
        return [(place + 0.5) / count for place in around if place != here]


def _count(parameter: Parameter) -> int:
    values = parameter.search_space
    return len(values.categorical.values) if values.categorical else len(values.int_uniform.values)  # type: ignore[union-attr]


def _maximised(cube: Cube, acquisition: Acquisition, good: "Floats", seed: int) -> "Floats":
    import numpy as np
    from scipy.stats import qmc

    random = np.random.default_rng(seed)
    columns = len(cube.parameters)
    spread = qmc.Sobol(columns, scramble=True, rng=random).random(CANDIDATES)
    scale = np.minimum(0.3, 1 / np.sqrt(acquisition.process.precision)) * 10 ** random.uniform(-3, 0, (len(good), NEARBY, 1))
    nearby = good[:, None, :] + scale * random.standard_normal((len(good), NEARBY, columns))
    candidates = cube.snap(np.clip(np.vstack([spread, nearby.reshape(-1, columns)]), 0.0, 1.0))
    values = acquisition(candidates)
    order = np.argsort(-values, kind="stable")
    # Half of the starts are the best candidates, half the best of those from the sequence: the latter are far apart.
    far = [i for i in order if i < CANDIDATES]
    starts = list(dict.fromkeys([*order[: STARTS // 2], *far[: STARTS // 2]]))
    ends = [_climbed(cube, acquisition, candidates[i], float(values[i])) for i in starts]
    return max(ends, key=lambda end: end[1])[0]


def _climbed(cube: Cube, acquisition: Acquisition, start: "Floats", value: float) -> tuple["Floats", float]:
    """Uphill from a point of the space to a better one: by the gradient, then by steps in what has no gradient, in turns."""
    import numpy as np

    here = start
    for _ in range(4):
        moved = _uphill(cube, acquisition, here)
        moved_value = float(acquisition(moved[None])[0])
        if moved_value > value:
            here, value = moved, moved_value
        improved = False
        for column in np.flatnonzero(~cube.smooth):
            others = np.repeat(here[None], len(steps := cube.steps(int(column), float(here[column]))), axis=0)
            if not steps:
                continue
            others[:, column] = steps
            others = cube.snap(others)
            found = acquisition(others)
            if float(found.max()) > value:
                here, value, improved = others[int(found.argmax())], float(found.max()), True
        if not improved:
            break
    return here, value


def _uphill(cube: Cube, acquisition: Acquisition, start: "Floats") -> "Floats":
    import numpy as np
    from scipy.optimize import minimize

    free = ~cube.categorical
    if not free.any():
        return start
    length = 1 / np.sqrt(acquisition.process.precision[free])

    def loss(scaled: "Floats") -> tuple[float, "Floats"]:
        at = start.copy()
        at[free] = scaled * length
        value, gradient = acquisition.slope(at)
        return -value, -gradient[free] * length

    bounds = [(0.0, 1 / each) for each in length]
    found = minimize(loss, start[free] / length, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 100})
    end = start.copy()
    end[free] = np.clip(found.x * length, 0.0, 1.0)
    snapped: Floats = cube.snap(end[None])[0]
    return snapped
