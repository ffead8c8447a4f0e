"""A Gaussian process on the unit cube: Matérn 5/2 with a length for each parameter, fitted by its marginal likelihood and priors.

Small and exact (a few hundred points), with the gradients that the fit and the acquisition need; NumPy and SciPy only.
Rasmussen and Williams, "Gaussian Processes for Machine Learning", chapters 2 and 5, has all formulas.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

MIN_NOISE = 1e-7
"""Variance, of values with variance 1. It keeps the covariance matrix regular."""
_ROOT5 = 5**0.5


@dataclass(frozen=True)
class Process:
    """A process given its observations: `points` (n, d) with values of mean 0 and variance 1."""

    points: "Floats"
    values: "Floats"
    categorical: "Bools"
    """Of each column, whether values are either equal or not (d)."""
    precision: "Floats"
    """1 / length² of each column (d)."""
    scale: float
    """Variance of the process."""
    noise: float
    """Variance of the noise."""

    def __post_init__(self) -> None:
        import numpy as np
        from scipy.linalg import cho_factor, cho_solve

        covariance = self._covariance(self.points)
        covariance[np.diag_indices_from(covariance)] += self.noise
        factor = cho_factor(covariance, lower=True)
        object.__setattr__(self, "_inverse", cho_solve(factor, np.eye(len(self.points))))
        object.__setattr__(self, "_weights", cho_solve(factor, self.values))

    _inverse: Any = None
    _weights: Any = None

    def believing(self, points: "Floats") -> "Process":
        """Given also that these points (m, d) will come out as predicted: there is little left to learn near them (kriging believer;
        Ginsbourger et al., 2010)."""
        import numpy as np

        mean = self.posterior(points)[0]
        return Process(
            np.vstack([self.points, points]),
            np.concatenate([self.values, mean]),
            self.categorical,
            self.precision,
            self.scale,
            self.noise,
        )

    def posterior(self, at: "Floats") -> tuple["Floats", "Floats"]:
        """Mean and variance (without noise) at these points (m, d)."""
        import numpy as np

        k = self._covariance(at)
        variance = self.scale - np.einsum("mn,nk,mk->m", k, self._inverse, k, optimize=True)
        return k @ self._weights, np.maximum(variance, 1e-12 * self.scale)

    def posterior_slope(self, at: "Floats") -> tuple[float, float, "Floats", "Floats"]:
        """Mean and variance at one point (d), and their gradients (d); 0 in categorical columns."""
        import numpy as np

        difference = np.where(self.categorical, 0.0, at - self.points)
        squared = np.where(self.categorical, at != self.points, difference**2)
        root = _ROOT5 * np.sqrt(squared @ self.precision)
        decay = self.scale * np.exp(-root)
        k = decay * (1 + root + root**2 / 3)
        slope = -(5 / 3) * (decay * (1 + root))[:, None] * difference * self.precision
        solved = self._inverse @ k
        variance = max(self.scale - float(k @ solved), 1e-12 * self.scale)
        return float(k @ self._weights), variance, slope.T @ self._weights, -2 * slope.T @ solved

    def _covariance(self, at: "Floats") -> "Floats":
        import numpy as np

        squared = squared_differences(at, self.points, self.categorical)
        root = _ROOT5 * np.sqrt(np.tensordot(self.precision, squared, axes=1))
        return self.scale * (1 + root + root**2 / 3) * np.exp(-root)


def squared_differences(a: "Floats", b: "Floats", categorical: "Bools") -> "Floats":
    """Of each column (d, n, m); of a categorical one 0 where values are equal, else 1."""
    import numpy as np

    difference = a.T[:, :, None] - b.T[:, None, :]
    return np.where(categorical[:, None, None], difference != 0, difference**2)


def fit(points: "Floats", values: "Floats", categorical: "Bools") -> Process:
    """The process that explains the values (mean 0, variance 1) best."""
    import numpy as np
    from scipy.optimize import minimize

    squared = squared_differences(points, points, categorical)
    columns = points.shape[1]
    starts = [np.concatenate([np.full(columns, guess), [0.0, np.log(1e-3)]]) for guess in STARTS]
    bounds = [(np.log(1e-3), np.log(1e4))] * columns + [(np.log(1e-2), np.log(1e2)), (np.log(MIN_NOISE), np.log(1.0))]
    found = [
        minimize(_loss, s, (squared, values), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 100})
        for s in starts
    ]
    best = np.exp(min(found, key=lambda result: float(result.fun)).x)
    return Process(points, values, categorical, best[:columns], float(best[columns]), float(best[columns + 1]))


STARTS = (0.0, 2.0)


def _loss(theta: "Floats", squared: "Floats", values: "Floats") -> tuple[float, "Floats"]:
    """Minus the log of marginal likelihood and priors, and its gradient. `theta`: logs of precision (d), scale and noise."""
    import numpy as np
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    precision, scale, noise = np.exp(theta[:-2]), float(np.exp(theta[-2])), float(np.exp(theta[-1]))
    root = _ROOT5 * np.sqrt(np.tensordot(precision, squared, axes=1))
    decay = scale * np.exp(-root)
    signal = decay * (1 + root + root**2 / 3)
    try:
        factor = cho_factor(signal + noise * np.eye(len(values)), lower=True)
    except LinAlgError:
        return 1e10, np.zeros_like(theta)
    weights = cho_solve(factor, values)
    inner = np.outer(weights, weights) - cho_solve(factor, np.eye(len(values)))
    gradient = np.empty_like(theta)
    gradient[:-2] = (5 / 12) * precision * np.tensordot(squared, inner * decay * (1 + root), axes=2)
    gradient[:-2] *= -1  # a larger precision lowers the covariance
    gradient[-2] = 0.5 * np.sum(inner * signal)
    gradient[-1] = 0.5 * noise * np.trace(inner)
    likelihood = -0.5 * float(values @ weights) - float(np.log(np.diag(factor[0])).sum())
    prior, slope = _log_prior(theta)
    return -(likelihood + prior), -(gradient + slope)


def _log_prior(theta: "Floats") -> tuple[float, "Floats"]:
    """Of the logs, and its gradient. Lengths are about that of the cube; the process has about the values' variance; noise is small."""
    import numpy as np

    x = np.exp(theta)
    precision, scale, noise = x[:-2], x[-2], x[-1]
    value = -0.1 * float(np.sum(1 / precision + precision)) + float(theta[-2] - scale) + float(0.1 * theta[-1] - 30 * noise)
    slope = np.concatenate([0.1 * (1 / precision - precision), [1 - scale, 0.1 - 30 * noise]])
    return value, slope
