"""How far to trust a fit: resampling of whole runs, and the profile likelihood of the floor.

Checkpoints of one run share its luck, so the run is what is resampled: resampling points or residuals would pretend to
know more than the data do. Shapes: K resamples, N points, P parameters.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from fitscale.scaling.laws import Fit, refit
from fitscale.scaling.points import chosen_KN
from fitscale.scaling.solver import Array

LEVELS = (0.5, 0.9)
FEW_RUNS = 6


@dataclass(frozen=True)
class Bootstrap:
    """Parameter sets of the law, refitted to resampled runs."""

    theta_KP: Array
    attempted: int  # resamples drawn; those with one size or too few points could not be fitted and are left out
    runs: int
    noise: float  # standard deviation of one new ln(metric) around the law

    def interval(self, values_K: Array, level: float) -> tuple[float, float]:
        """The central interval that holds `level` of the values."""
        low, high = np.quantile(values_K, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


@dataclass(frozen=True)
class FloorProfile:
    """What the data say about the floor e: all floors in [low, high] fit acceptably at `level`."""

    low: float
    high: float | None  # None: no floor below the best metric is excluded
    level: float
    identified: bool  # zero is excluded


def bootstrap(fit: Fit, rows: pd.DataFrame, points: str, resamples: int, seed: int) -> Bootstrap:
    """Refit to `resamples` draws (with replacement) of as many whole runs as there are.

    `rows` are all rows that could be used; the choice of points (frontier ...) is made anew in every resample.
    """
    rows = rows.sort_values(["train_flops", "value", "run"], kind="stable")
    names, run_N = np.unique(rows["run"].to_numpy(dtype=str), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    used_KN = draws[:, run_N].astype(float) * chosen_KN(rows, draws[:, run_N] > 0, points)
    x_NF, _ = fit.law.centred(rows, fit.centre_F)
    y_N = np.log(rows["value"].to_numpy(dtype=float))
    usable_K = _usable(used_KN, rows["size"].to_numpy(dtype=str), len(fit.law.parameters))
    weight_KN = used_KN[usable_K]
    start_KP = np.repeat(fit.theta_P[None], len(weight_KN), axis=0)
    theta_KP, _ = refit(fit.law, x_NF, y_N, start_KP, weight_KN) if len(weight_KN) else (start_KP, np.zeros(0))
    return Bootstrap(theta_KP, resamples, len(names), scatter(fit))


def scatter(fit: Fit) -> float:
    """Standard deviation of the residuals of ln(metric), for the degrees of freedom that the fit left."""
    return float(np.sqrt(fit.objective * fit.points / max(fit.points - len(fit.theta_P), 1)))


def predicted_KN(fit: Fit, boot: Bootstrap, rows: pd.DataFrame, seed: int) -> Array:
    """Draws of a new measurement at every row: the law's uncertainty and the scatter of one point together."""
    metric_KN = fit.metric(rows, boot.theta_KP)
    noise_KN = np.random.default_rng([seed, 1]).normal(0.0, boot.noise, metric_KN.shape)
    return metric_KN * np.exp(noise_KN)


def floor_profile(fit: Fit, used: pd.DataFrame, level: float = 0.9) -> FloorProfile:
    """Profile likelihood of the last parameter, the floor e, with an F threshold.

    The threshold is widened by the design effect of correlated residuals: 1 + (points per run - 1) x their
    correlation within runs.
    """
    rows = used.sort_values(["train_flops", "value", "run"], kind="stable")
    x_NF, _ = fit.law.centred(rows, fit.centre_F)
    y_N = np.log(rows["value"].to_numpy(dtype=float))
    floors_K = np.concatenate([[0.0], np.exp(y_N.min()) * np.linspace(0.01, 0.999, 100)])
    start_KP = np.repeat(fit.theta_P[None], len(floors_K), axis=0)
    start_KP[:, -1] = floors_K
    start_KP[:, 0] = np.log(np.maximum(np.exp(y_N).mean() - floors_K, 1e-12))
    lower = np.repeat(np.array(fit.law.lower)[None], len(floors_K), axis=0)
    upper = np.repeat(np.array(fit.law.upper)[None], len(floors_K), axis=0)
    lower[:, -1] = upper[:, -1] = floors_K
    objective_K = refit(fit.law, x_NF, y_N, start_KP, np.ones((len(floors_K), len(y_N))), bounds=(lower, upper))[1]
    residual_N = y_N - np.log(fit.metric(rows))
    freedom = max(len(y_N) - len(fit.theta_P), 1)
    allowed = stats.f.ppf(level, 1, freedom) / freedom * design_effect(residual_N, rows["run"].to_numpy(dtype=str))
    fine = objective_K <= fit.objective * (1 + allowed)
    low = float(floors_K[fine].min()) if fine.any() else float(fit.theta_P[-1])
    high = None if fine[-1] else float(floors_K[fine].max()) if fine.any() else float(fit.theta_P[-1])
    return FloorProfile(low, high, level, identified=not fine[0])


def design_effect(residual_N: Array, run_N: NDArray[np.str_]) -> float:
    """1 + (m - 1) * rho: how much less m correlated points of a run say than m independent ones (Kish)."""
    names, group_N = np.unique(run_N, return_inverse=True)
    counts = np.bincount(group_N)
    if len(names) < 2 or len(residual_N) == len(names):
        return 1.0
    means = np.bincount(group_N, residual_N) / counts
    within = np.sum((residual_N - means[group_N]) ** 2) / (len(residual_N) - len(names))
    between = np.sum(counts * (means - residual_N.mean()) ** 2) / (len(names) - 1)
    typical = (counts.sum() - np.sum(counts**2) / counts.sum()) / (len(names) - 1)
    correlation = max(0.0, (between - within) / (between + (typical - 1) * within)) if between + within > 0 else 0.0
    return 1 + (counts.mean() - 1) * correlation


def _usable(used_KN: Array, size_N: NDArray[np.str_], parameters: int) -> NDArray[np.bool_]:
    """Resamples with at least two sizes and one point more than the law has parameters."""
    sizes = np.stack([(used_KN[:, size_N == size] > 0).any(axis=1) for size in np.unique(size_N)])
    return (sizes.sum(axis=0) >= 2) & ((used_KN > 0).sum(axis=1) > parameters)
