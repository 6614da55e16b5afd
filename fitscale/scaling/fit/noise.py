"""How far measurements scatter around a law: the variance between runs, and that between checkpoints of a run.

Residuals of ln(metric) are taken as  r = u[run] + v[point]. Both variances come from the scatter between and within
runs, corrected for what the fit absorbed (method of moments); few runs say little about u, so every resample draws the
variances anew: the observed sums of squares over chi-squared draws, with Satterthwaite's degrees of freedom (1946), and
no variance below 0 (generalized inference, Weerahandi 1993). Where noise grows with size (growth.py), all of this is of
residuals divided by their `scale_N`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fitscale.scaling.fit.solver import Array

SINGULAR = 1e8  # two sums of squares whose expectations are this close to proportional hold one variance, not two
LEAST_VARIANCE, LARGEST_VARIANCE = 1e-14, 100.0  # a factor of e^10 from run to run says nothing of a metric


@dataclass(frozen=True)
class Noise:
    """Variances of ln(metric), and what they come from: sums of squares between and within runs.

    `sums_22` are their expectations per unit of (run, point) variance, `squares_2` what was observed.
    """

    run: float
    point: float
    sums_22: Array  # rows: between runs, within runs
    squares_2: Array
    freedom: tuple[float, float]  # degrees of freedom between and within runs

    @property
    def total(self) -> float:
        """Standard deviation of one new measurement of a new run."""
        return float(np.sqrt(self.run + self.point))

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """`count` plausible pairs of variances (run_K, point_K), given how little the data say of them."""
        scale_2K = np.stack([freedom / rng.chisquare(freedom, count) for freedom in self.freedom])
        squares_2K = self.squares_2[:, None] * scale_2K
        if not self.sums_22[1].any():  # the two cannot be told apart
            return np.minimum(squares_2K[0] / self.sums_22[0, 0], LARGEST_VARIANCE), np.zeros(count)
        run_K, point_K = np.linalg.solve(self.sums_22, squares_2K)
        return np.clip(run_K, 0.0, LARGEST_VARIANCE), np.clip(point_K, LEAST_VARIANCE, LARGEST_VARIANCE)


def estimate(residual_N: Array, jacobian_NP: Array, run_N: NDArray[np.str_]) -> Noise:
    """Variances from the residuals of a fit whose prediction has `jacobian_NP`; `run_N` names each point's run.

    Where the points do not tell the two apart (one checkpoint a run, a single run, one point more than parameters), all
    scatter is taken for that between runs.
    """
    names, group_N = np.unique(run_N, return_inverse=True)
    member_NG = np.eye(len(names))[group_N]
    unit_NN = np.eye(len(run_N))
    left_NN = unit_NN - jacobian_NP @ np.linalg.pinv(jacobian_NP)
    shared_NN = member_NG @ member_NG.T
    between_NN = member_NG / member_NG.sum(axis=0) @ member_NG.T
    parts = [left_NN @ between_NN @ left_NN, left_NN @ (unit_NN - between_NN) @ left_NN]
    sums_22 = np.array([[np.sum(part * shared_NN), np.trace(part)] for part in parts])
    if np.linalg.cond(sums_22) > SINGULAR:
        return _of_runs_alone(residual_N, left_NN, shared_NN)
    squares_2 = np.array([residual_N @ part @ residual_N for part in parts])
    run, point = np.linalg.solve(sums_22, squares_2).tolist()
    if run < 0:  # both sums are explained best by one variance alone
        run, point = 0.0, float(squares_2.sum() / sums_22[:, 1].sum())
    if point < 0:
        run, point = float(squares_2.sum() / sums_22[:, 0].sum()), 0.0
    point = max(point, LEAST_VARIANCE)
    covariance_NN = run * shared_NN + point * unit_NN
    degrees = (_freedom(parts[0], covariance_NN), _freedom(parts[1], covariance_NN))
    return Noise(run, point, sums_22, squares_2, degrees)


def scattered(
    rng: np.random.Generator,
    log_N: Array,
    run_N: NDArray[np.str_],
    run_K: Array,
    point_K: Array,
    scale: Array | float = 1.0,
) -> Array:
    """ln(metric)_KN of K measurements of points at `log_N`: a deviation for every run, and one for every point.

    `run_K` and `point_K` are the variances of each measurement, `scale` (K, N) a factor to its standard deviations.
    """
    names, group_N = np.unique(run_N, return_inverse=True)
    of_runs_KN = rng.normal(size=(len(run_K), len(names)))[:, group_N] * np.sqrt(run_K)[:, None]
    return log_N + scale * (of_runs_KN + rng.normal(size=of_runs_KN.shape) * np.sqrt(point_K)[:, None])


def _of_runs_alone(residual_N: Array, left_NN: Array, shared_NN: Array) -> Noise:
    freedom = max(float(np.trace(left_NN)), 1.0)
    seen = float(np.sum(left_NN * shared_NN))  # how much of a run's deviation the fit leaves in the residuals
    seen = seen if seen * SINGULAR > freedom else freedom  # nothing of it: a single run
    squares = max(float(residual_N @ residual_N), LEAST_VARIANCE * seen)
    sums_22, squares_2 = np.array([[seen, freedom], [0.0, 0.0]]), np.array([squares, 0.0])
    return Noise(squares / seen, 0.0, sums_22, squares_2, (freedom, 1.0))


def _freedom(part_NN: Array, covariance_NN: Array) -> float:
    """Degrees of freedom of the chi-squared law with the mean and the variance of this quadratic form."""
    product_NN = part_NN @ covariance_NN
    return max(float(np.trace(product_NN) ** 2 / np.sum(product_NN * product_NN.T)), 1.0)
