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
from fitscale.scaling.fit.noise import scattered
from fitscale.scaling.fit.solver import Array

LEVELS = (0.5, 0.9)
GRID, GRID_START = 150, 1e-3  # floors profiled, the highest that far below the best metric, of its range
FEW_RUNS = 4  # with fewer the variance between runs is hardly known, and intervals are wide for it


@dataclass(frozen=True)
class Resamples:
    """Laws refitted to whole runs drawn anew, with the variances that each was drawn from."""

    theta_KP: Array
    run_K: Array
    point_K: Array


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


def resample(fit: Fit, count: int, seed: int) -> Resamples:
    """`count` refits of the law to the fitted points with every run's deviation drawn anew."""
    rng = np.random.default_rng(seed)
    run_K, point_K = fit.noise.draw(rng, count)
    return Resamples(refits(fit, rng, run_K, point_K), run_K, point_K)


def refits(fit: Fit, rng: np.random.Generator, run_K: Array, point_K: Array) -> Array:
    """theta_KP of the law fitted to K draws of what its points would measure, with these variances of ln(metric)."""
    y_KN = scattered(rng, fit.at_points()[0], fit.points.run_N, run_K, point_K)
    return fit.again(y_KN, np.tile(fit.theta_P, (len(run_K), 1)))[0]


def covariance(fit: Fit) -> Array:
    """Covariance of the parameters (P, P) to first order, with the correlation of checkpoints within runs."""
    inverse_PN = np.linalg.pinv(fit.at_points()[1])
    run_N = fit.points.run_N
    errors_NN = fit.noise.run * (run_N[:, None] == run_N[None]) + fit.noise.point * np.eye(len(run_N))
    return inverse_PN @ errors_NN @ inverse_PN.T


def new_run_KN(fit: Fit, resamples: Resamples, rows: pd.DataFrame, seed: int) -> Array:
    """Draws of what a new run would measure at every row: the law's uncertainty and a replicate's noise together."""
    spread_K = np.sqrt(resamples.run_K + resamples.point_K)
    noise_K = np.random.default_rng([seed, 1]).normal(size=len(spread_K)) * spread_K
    return exp(fit.log_metric(rows, resamples.theta_KP) + noise_K[:, None])


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
