"""How far to trust a fit: whole runs are drawn anew, and the floor's profile likelihood.

Checkpoints of one run share its deviation from the law. So a resample draws a new deviation for every run and new
noise for every checkpoint, with variances that are themselves drawn (noise.py), and fits the law again. Resampling
single points or residuals would pretend to know more than the data do. Shapes: K resamples, N points, P parameters.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fitscale.scaling.fit.fitting import Fit, exp
from fitscale.scaling.fit.noise import LARGEST_VARIANCE, estimate, scattered
from fitscale.scaling.fit.solver import Array

MANY_RUNS = 30  # from here on a bootstrap of runs says how they scatter
MAD_TO_SIGMA = 1.4826  # of a normal law
GRID, GRID_START = 150, 1e-3  # floors profiled, the highest that far below the best metric, of its range
FEW_RUNS = 4  # with fewer the variance between runs is hardly known, and intervals are wide for it


@dataclass(frozen=True)
class Resamples:
    """Laws refitted to whole runs drawn anew, with the variances and the growth of the noise of each draw."""

    theta_KP: Array
    run_K: Array
    point_K: Array
    growth_K: Array
    how: str  # `parametric`, or `runs`: a bootstrap of runs


@dataclass(frozen=True)
class FloorProfile:
    """What the data say about the floor e: all floors in [low, high] fit acceptably at `level`."""

    low: float
    high: float | None  # None: no floor below the best metric is excluded
    level: float
    identified: bool  # zero is excluded


def central(values: Array, level: float = 0.9) -> tuple[Any, Any]:
    """The central interval that holds `level` of the values (K,); of (K, N) one for every column."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def resample(fit: Fit, count: int, seed: int, how: str = "auto") -> Resamples:
    """`count` refits of the law to the fitted points, every run's deviation drawn anew.

    Args:
        how: `parametric`; `runs`, the runs themselves drawn with replacement (Efron 1979; Cameron, Gelbach and Miller
            2008 for clusters), which asks nothing of how they scatter; or `auto`: `runs` where there are `MANY_RUNS`.
    """
    rng = np.random.default_rng(seed)
    run_K, point_K, growth_K = _noises(fit, rng, count)
    if how == "auto":
        how = "runs" if fit.points.runs >= MANY_RUNS else "parametric"
    if how == "parametric":
        return Resamples(refits(fit, rng, run_K, point_K, growth_K), run_K, point_K, growth_K, how)
    names, group_N = np.unique(fit.points.run_N, return_inverse=True)
    counts_KN = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), count)[:, group_N].astype(float)
    theta_KP, _ = fit.again(fit.points.y_N, np.tile(fit.theta_P, (count, 1)), counts=counts_KN)
    return Resamples(theta_KP, run_K, point_K, growth_K, how)


def _noises(fit: Fit, rng: np.random.Generator, count: int) -> tuple[Array, Array, Array]:
    """`count` plausible variances between runs and between checkpoints, and growths of the noise with size."""
    growth_G, probability_G = fit.growths
    growth_K = rng.choice(growth_G, count, p=probability_G)
    run_K, point_K = np.zeros(count), np.zeros(count)
    for growth in np.unique(growth_K):
        drawn_K = growth_K == growth
        run_K[drawn_K], point_K[drawn_K] = fit.noise_at(growth).draw(rng, int(drawn_K.sum()))
    return run_K, point_K, growth_K


def refits(fit: Fit, rng: np.random.Generator, run_K: Array, point_K: Array, growth_K: Array) -> Array:
    """theta_KP of the law fitted to K draws of what its points would measure, with such noise of ln(metric)."""
    scale_KN = np.clip(fit.scale(growth_K), None, LARGEST_VARIANCE)
    y_KN = scattered(rng, fit.at_points()[0] + fit.offset, fit.points.run_N, run_K, point_K, scale_KN)
    return fit.again(y_KN, np.tile(fit.theta_P, (len(run_K), 1)))[0]


def covariance(fit: Fit) -> Array:
    """Covariance of the parameters (P, P) to first order, with the correlation of checkpoints within runs.

    With Huber's loss it is the sandwich of an M-estimator (Huber 1964): residuals count up to the corner, over the
    share of them that a normal law with the residuals' own spread has within it.
    """
    weight_N = fit.points.weight_N
    log_N, jacobian_NP = fit.at_points()
    if fit.loss.space == "linear":
        weight_N = weight_N * np.exp(log_N)
    inverse_PN = np.linalg.pinv(jacobian_NP * weight_N[:, None])
    run_N, noise, scale_N = fit.points.run_N, fit.noise, fit.scale(fit.growth)[0] * weight_N
    if fit.loss.huber is not None:
        target_N, met_N = (fit.loss.target(values) for values in (fit.points.y_N, log_N))
        residual_N = (target_N - met_N) * fit.points.weight_N
        spread = MAD_TO_SIGMA * float(np.median(np.abs(residual_N)))
        inner = 2 * float(stats.norm.cdf(fit.loss.huber / max(spread, 1e-300))) - 1
        clipped_N = np.clip(residual_N, -fit.loss.huber, fit.loss.huber)
        noise = estimate(clipped_N, jacobian_NP * weight_N[:, None], run_N)
        scale_N = np.full(len(run_N), 1 / inner)
    errors_NN = noise.run * (run_N[:, None] == run_N[None]) + noise.point * np.eye(len(run_N))
    return inverse_PN @ (scale_N[:, None] * errors_NN * scale_N) @ inverse_PN.T


def new_run_KN(fit: Fit, resamples: Resamples, rows: pd.DataFrame, seed: int) -> Array:
    """Draws of what a new run would measure at every row: the law's uncertainty and a replicate's noise together."""
    spread_K = np.sqrt(resamples.run_K + resamples.point_K)
    noise_K = np.random.default_rng([seed, 1]).normal(size=len(spread_K)) * spread_K
    noise_KN = noise_K[:, None] * fit.scale(resamples.growth_K, rows)
    return exp(fit.log_metric(rows, resamples.theta_KP) + fit.offset + noise_KN)


def floor_profile(fit: Fit, level: float = 0.9) -> FloorProfile:
    """Profile likelihood of the last parameter, the floor e, with an F threshold.

    The threshold is widened by the design effect of correlated checkpoints (Kish): 1 + (points per run - 1) x their
    correlation.
    """
    y_N = fit.points.y_N
    freedom = max(len(y_N) - len(fit.theta_P), 1)
    correlation = fit.noise.run / (fit.noise.run + fit.noise.point)
    effect = 1 + (len(y_N) / fit.points.runs - 1) * correlation
    limit = fit.objective * (1 + stats.f.ppf(level, 1, freedom) / freedom * effect)
    best = float(np.exp(y_N.min()))
    nearest = GRID_START * min(best, float(np.exp(y_N.max())) - best)
    coarse_K = best - np.geomspace(best, nearest, GRID)  # as fine as the metric's own range, however high it lies
    fine_K = _objectives(fit, coarse_K) <= limit
    inside = coarse_K[fine_K] if fine_K.any() else fit.theta_P[-1:]
    low, high = float(inside.min()), float(inside.max())
    edges = (coarse_K[coarse_K < low].max(initial=0.0), coarse_K[coarse_K > high].min(initial=best))
    closer_K = np.linspace(*edges, GRID)[:-1]
    inside = np.append(inside, closer_K[_objectives(fit, closer_K) <= limit])
    return FloorProfile(float(inside.min()), None if fine_K[-1] else float(inside.max()), level, not fine_K[0])


def _objectives(fit: Fit, floors_K: Array) -> Array:
    """objective_K of the law fitted with its floor held at each of these."""
    start_KP, *bounds = (np.tile(row_P, (len(floors_K), 1)) for row_P in (fit.theta_P, *fit.law.bounds))
    for held_KP in (start_KP, *bounds):
        held_KP[:, -1] = floors_K
    return fit.again(fit.points.y_N, start_KP, bounds=(bounds[0], bounds[1]))[1]
