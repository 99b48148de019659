"""Logistic regression on sparse rows with a prior mean: a small deterministic L-BFGS on numpy.

Minimises ``Σ wᵢ log(1 + exp(−sᵢ(xᵢ·β + b))) + ‖β − β₀‖² / (2C)`` with sᵢ = ±1; b is not penalised. With β₀ = 0 this is
the usual L2 penalty; with a β₀ the weights move away from it only where the data say so.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Sparse:
    """Rows of (column, value) pairs: row i is ``columns[starts[i]:starts[i + 1]]``."""

    starts: Array
    columns: Array
    values: Array
    width: int

    @classmethod
    def of(cls, rows: list[dict[int, float]], width: int) -> "Sparse":
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        columns = np.fromiter((c for row in rows for c in row), dtype=np.int64, count=int(starts[-1]))
        values = np.fromiter((v for row in rows for v in row.values()), dtype=np.float64, count=int(starts[-1]))
        return cls(starts, columns, values, width)

    @property
    def row_of(self) -> Array:
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def take(self, which: Array) -> "Sparse":
        """The rows ``which`` (indices), in that order."""
        lengths = np.diff(self.starts)[which]
        starts = np.zeros(len(which) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        places = np.arange(starts[-1]) + np.repeat(self.starts[which] - starts[:-1], lengths)
        return Sparse(starts, self.columns[places], self.values[places], self.width)


def fit_logistic(
    rows: Sparse,
    target: Array,
    weight: Array,
    prior: Array,
    *,
    c: float = 1.0,
    tolerance: float = 1e-2,
    most_steps: int = 200,
) -> tuple[Array, float]:
    """Weights β and intercept b.

    Args:
        rows: n rows of features.
        target: n values, 1 or 0.
        weight: n weights of the rows.
        prior: β₀, as wide as the rows.
        c: inverse strength of the pull to the prior.
        tolerance: the largest entry of the gradient at which the search ends.
        most_steps: steps after which it ends in any case.

    Raises:
        ValueError: the lengths disagree, or one of the two classes is missing.
    """  # fmt: skip
    n = len(rows.starts) - 1
    if not (len(target) == len(weight) == n and len(prior) == rows.width):
        raise ValueError(
            f"expected {n} targets and weights and {rows.width} prior weights, "
            f"given {len(target)}, {len(weight)} and {len(prior)}"
        )
    if len(np.unique(target)) < 2:
        raise ValueError("target: expected rows of both classes, given one")
    sign = np.where(np.asarray(target) > 0, 1.0, -1.0)
    row_of = rows.row_of

    def loss_and_gradient(theta: Array) -> tuple[float, Array]:
        beta, b = theta[:-1], theta[-1]
        margin = sign * (np.bincount(row_of, rows.values * beta[rows.columns], minlength=n) + b)
        loss = float(weight @ np.logaddexp(0.0, -margin))
        pull = -sign * weight * np.exp(-np.logaddexp(0.0, margin))  # −s w σ(−m)
        away = beta - prior
        gradient = np.append(
            np.bincount(rows.columns, rows.values * pull[row_of], minlength=rows.width) + away / c, pull.sum()
        )
        return loss + float(away @ away) / (2 * c), gradient

    theta = _lbfgs(loss_and_gradient, np.append(prior, 0.0), tolerance, most_steps)
    return theta[:-1], float(theta[-1])


def _lbfgs(function: Any, start: Array, tolerance: float, most_steps: int, memory: int = 10) -> Array:
    """Limited-memory BFGS with backtracking to the Armijo condition. The function is convex and smooth."""
    theta = start.astype(np.float64)
    value, gradient = function(theta)
    pairs: deque[tuple[Array, Array, float]] = deque(maxlen=memory)
    for _ in range(most_steps):
        if np.abs(gradient).max() < tolerance:
            break
        direction = _two_loops(gradient, pairs)
        slope = float(gradient @ direction)
        step = 1.0 if pairs else min(1.0, 1.0 / float(np.abs(gradient).sum()))
        while True:
            new_theta = theta + step * direction
            new_value, new_gradient = function(new_theta)
            if new_value <= value + 1e-4 * step * slope or step < 1e-12:
                break
            step /= 2
        s, y = new_theta - theta, new_gradient - gradient
        if float(s @ y) > 1e-12:
            pairs.append((s, y, 1.0 / float(s @ y)))
        if step < 1e-12:
            break
        theta, value, gradient = new_theta, new_value, new_gradient
    return theta


def _two_loops(gradient: Array, pairs: deque[tuple[Array, Array, float]]) -> Array:
    direction = -gradient
    kept = []
    for s, y, rho in reversed(pairs):
        alpha = rho * float(s @ direction)
        direction = direction - alpha * y
        kept.append(alpha)
    if pairs:
        s, y, rho = pairs[-1]
        direction = direction / (rho * float(y @ y))
    for (s, y, rho), alpha in zip(pairs, reversed(kept), strict=True):
        direction = direction + (alpha - rho * float(y @ direction)) * s
    return direction
