"""How far to trust a fit: whole runs are drawn anew, and the floor's profile likelihood.

Checkpoints of one run share its luck. So a resample draws new luck for every run and new noise for every checkpoint,
with variances that are themselves drawn (noise.py), and fits the law again. Resampling single points or residuals
would pretend to know more than the data do. Shapes: K resamples, N points, P parameters.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from fitscale.scaling.fit.fitting import Fit, exp, in_order, refit
from fitscale.scaling.fit.noise import Noise, estimate
from fitscale.scaling.fit.solver import Array

LEVELS = (0.5, 0.9)
FEW_RUNS = 4  # with fewer the luck of a run is hardly known, and intervals are wide for it


@dataclass(frozen=True)
class Resamples:
    """Laws refitted to whole runs drawn anew, with the variances that each was drawn from."""

    theta_KP: Array
    run_K: Array
    point_K: Array
    noise: Noise
    runs: int

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


def resample(fit: Fit, used: pd.DataFrame, count: int, seed: int) -> Resamples:
    """`count` refits of the law to the fitted rows with every run's luck drawn anew."""
    rows = in_order(fit.law, used)
    x_NF, _ = fit.law.centred(rows, fit.centre_F)
    rng = np.random.default_rng(seed)
    noise = fit_noise(fit, used)
    run_K, point_K = noise.draw(rng, count)
    names, group_N = np.unique(rows["run"].to_numpy(dtype=str), return_inverse=True)
    luck_KN = rng.normal(size=(count, len(names)))[:, group_N] * np.sqrt(run_K)[:, None]
    y_KN = fit.log_metric(rows) + luck_KN + rng.normal(size=luck_KN.shape) * np.sqrt(point_K)[:, None]
    theta_KP, _ = refit(fit.law, x_NF, y_KN, np.repeat(fit.theta_P[None], count, axis=0), fit.loss)
    return Resamples(theta_KP, run_K, point_K, noise, len(names))


def covariance(fit: Fit, used: pd.DataFrame) -> Array:
    """Covariance of the parameters (P, P) to first order, with the correlation of checkpoints within runs."""
    rows = in_order(fit.law, used)
    x_NF, _ = fit.law.centred(rows, fit.centre_F)
    inverse_PN = np.linalg.pinv(fit.law.evaluate(fit.theta_P[None], x_NF)[1][0])
    run_N = rows["run"].to_numpy(dtype=str)
    noise = fit_noise(fit, used)
    errors_NN = noise.run * (run_N[:, None] == run_N[None]) + noise.point * np.eye(len(run_N))
    return inverse_PN @ errors_NN @ inverse_PN.T


def fit_noise(fit: Fit, used: pd.DataFrame) -> Noise:
    """The noise around a fitted law."""
    rows = in_order(fit.law, used)
    x_NF, _ = fit.law.centred(rows, fit.centre_F)
    log_KN, jacobian_KNP = fit.law.evaluate(fit.theta_P[None], x_NF)
    residual_N = np.log(rows["value"].to_numpy(dtype=float)) - log_KN[0]
    return estimate(residual_N, jacobian_KNP[0], rows["run"].to_numpy(dtype=str))


def new_run_KN(fit: Fit, resamples: Resamples, rows: pd.DataFrame, seed: int) -> Array:
    """Draws of what a new run would measure at every row: the law's uncertainty and a replicate's noise together."""
    spread_K = np.sqrt(resamples.run_K + resamples.point_K)
    noise_K = np.random.default_rng([seed, 1]).normal(size=len(spread_K)) * spread_K
    return exp(fit.log_metric(rows, resamples.theta_KP) + noise_K[:, None])


def floor_profile(fit: Fit, used: pd.DataFrame, level: float = 0.9) -> FloorProfile:
    """Profile likelihood of the last parameter, the floor e, with an F threshold.

    The threshold is widened by the design effect of correlated checkpoints (Kish): 1 + (points per run - 1) x their
    correlation.
    """
    rows = in_order(fit.law, used)
    x_NF, _ = fit.law.centred(rows, fit.centre_F)
    y_N = np.log(rows["value"].to_numpy(dtype=float))
    floors_K = np.concatenate([[0.0], np.exp(y_N.min()) * np.linspace(0.01, 0.999, 100)])
    objective_K = _at_floors(fit, x_NF, y_N, floors_K)
    freedom = max(len(y_N) - len(fit.theta_P), 1)
    effect = 1 + (len(y_N) / rows["run"].nunique() - 1) * fit_noise(fit, used).correlation
    allowed = stats.f.ppf(level, 1, freedom) / freedom * effect
    fine_K = objective_K <= fit.objective * (1 + allowed)
    inside = floors_K[fine_K] if fine_K.any() else fit.theta_P[-1:]
    high = None if fine_K[-1] else float(inside.max())
    return FloorProfile(float(inside.min()), high, level, identified=not fine_K[0])


def _at_floors(fit: Fit, x_NF: Array, y_N: Array, floors_K: Array) -> Array:
    """The best objective with the floor held at each of `floors_K`."""
    count = len(floors_K)
    start_KP = np.repeat(fit.theta_P[None], count, axis=0)
    start_KP[:, -1] = floors_K
    lower, upper = (np.repeat(bound[None], count, axis=0) for bound in (fit.law.lower, fit.law.upper))
    lower[:, -1] = upper[:, -1] = floors_K
    return refit(fit.law, x_NF, y_N, start_KP, fit.loss, bounds=(lower, upper))[1]
