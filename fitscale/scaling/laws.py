"""Laws of ln(metric), and how one is fitted to the rows of a runs table.

1. A law takes the logarithms of its inputs (training FLOPs ...), centred on their mean, so units do not matter.
2. Residuals are those of ln(metric), all weighted alike: noise is proportional to the metric, so relative weights.
3. Many starting points run to their minimum at once (solver.py); the best is polished by scipy's least_squares.
4. What is not a fit is refused: at a bound, at its start, reached from under 5 % of the starts, or no improvement.

Shapes: K parameter sets, N points, P parameters, F inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from fitscale.scaling.refusal import Refusal
from fitscale.scaling.solver import Array, objective, solve

LEAST_REACHED = 0.05
STEEPEST = 10.0  # bound of every exponent


@dataclass(frozen=True)
class Law:
    """A parametric law. `evaluate(theta_KP, x_NF)` gives ln(metric)_KN and its derivatives_KNP."""

    name: str
    formula: str
    inputs: tuple[str, ...]  # columns of the runs table
    parameters: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    falling: tuple[str, ...]  # exponents that must be above zero for the metric to improve
    evaluate: Callable[[Array, Array], tuple[Array, Array]]
    starts: Callable[[Array, Array], Array]  # x_NF, y_N -> theta_KP

    def centred(self, rows: pd.DataFrame, centre_F: Array | None = None) -> tuple[Array, Array]:
        """The law's inputs as x_NF = ln(input) - centre, and the centre (by default the mean over the rows)."""
        logs = np.log(rows[list(self.inputs)].to_numpy(dtype=float))
        centre = logs.mean(axis=0) if centre_F is None else centre_F
        return logs - centre, centre


@dataclass(frozen=True)
class Fit:
    """A law with its parameters, at x = ln(input) - centre."""

    law: Law
    theta_P: Array
    centre_F: Array
    objective: float  # mean squared residual of ln(metric)
    starts: int
    reached: float  # share of the starts that end in this minimum
    points: int

    def metric(self, rows: pd.DataFrame, theta_KP: Array | None = None) -> Array:
        """The metric at the inputs in `rows`: (N,), or (K, N) for other parameter sets."""
        x_NF, _ = self.law.centred(rows, self.centre_F)
        if theta_KP is not None:
            return np.exp(self.law.evaluate(theta_KP, x_NF)[0])
        return np.exp(self.law.evaluate(self.theta_P[None], x_NF)[0][0])

    def named(self, theta_P: Array | None = None) -> dict[str, float]:
        """Parameters by name, with `ln_a` replaced by `a`: the metric (less its floor) at the reference inputs."""
        values = dict(zip(self.law.parameters, (self.theta_P if theta_P is None else theta_P).tolist(), strict=True))
        return {
            name.removeprefix("ln_"): float(np.exp(v)) if name.startswith("ln_") else v for name, v in values.items()
        }

    def reference(self) -> dict[str, float]:
        """The inputs at which x = 0."""
        return dict(zip(self.law.inputs, np.exp(self.centre_F).tolist(), strict=True))


def _power(theta_KP: Array, x_NF: Array) -> tuple[Array, Array]:
    u_N = x_NF[:, 0]
    ones = np.ones((len(theta_KP), len(u_N)))
    return theta_KP[:, :1] - theta_KP[:, 1:2] * u_N, np.stack([ones, -u_N * ones], axis=-1)


def _power_starts(x_NF: Array, y_N: Array) -> Array:
    return np.array([[y_N.mean(), b] for b in np.geomspace(0.01, 3.0, 12)])


def _offset(theta_KP: Array, x_NF: Array) -> tuple[Array, Array]:
    u_N = x_NF[:, 0]
    decay = np.exp(np.minimum(theta_KP[:, :1] - theta_KP[:, 1:2] * u_N, 700.0))
    total = decay + theta_KP[:, 2:3]
    share = decay / total
    return np.log(total), np.stack([share, -u_N * share, 1 / total], axis=-1)


def _offset_starts(x_NF: Array, y_N: Array) -> Array:
    """A grid of exponents and floors, with the amplitude that makes the mean residual zero."""
    floors = np.exp(y_N.min()) * np.array([0.02, 0.2, 0.4, 0.6, 0.75, 0.88, 0.95, 0.99])
    grid = [(b, e) for b in np.geomspace(0.03, 3.0, 10) for e in floors]
    return np.array([[np.mean(np.log(np.exp(y_N) - e) + b * x_NF[:, 0]), b, e] for b, e in grid])


POWER = Law(
    name="power",
    formula="metric = a (C / C0)^-b",
    inputs=("train_flops",),
    parameters=("ln_a", "b"),
    lower=(-np.inf, -STEEPEST),
    upper=(np.inf, STEEPEST),
    falling=("b",),
    evaluate=_power,
    starts=_power_starts,
)
OFFSET = Law(
    name="offset",
    formula="metric = a (C / C0)^-b + e",
    inputs=("train_flops",),
    parameters=("ln_a", "b", "e"),
    lower=(-np.inf, 1e-4, 0.0),
    upper=(np.inf, STEEPEST, np.inf),
    falling=("b",),
    evaluate=_offset,
    starts=_offset_starts,
)
LAWS = {law.name: law for law in (POWER, OFFSET)}


def fit_law(law: Law, rows: pd.DataFrame, huber: float | None = None) -> Fit:
    """Fit `law` to the `value` of `rows`, whatever their order.

    Raises:
        Refusal: too few points, no improvement with compute, or a minimum that is not one.
    """
    if len(rows) < len(law.parameters) + 1:
        raise Refusal(
            "too_few_points",
            f"{law.name} law: {len(rows)} points cannot fit {len(law.parameters)} parameters; "
            f"at least {len(law.parameters) + 1} are needed",
        )
    rows = rows.sort_values([*law.inputs, "value", "run"], kind="stable")
    x_NF, centre_F = law.centred(rows)
    y_N = np.log(rows["value"].to_numpy(dtype=float))
    start_KP = law.starts(x_NF, y_N)
    end_KP, objective_K = refit(law, x_NF, y_N, start_KP, np.ones((len(start_KP), len(y_N))), huber)
    best = int(np.argmin(objective_K))
    tolerance = 1e-4 * objective_K[best] + 1e-10 * float(np.var(y_N))
    reached = float(np.mean(objective_K <= objective_K[best] + tolerance))
    theta_P = _polish(law, x_NF, y_N, end_KP[best], huber)
    _refuse_no_fit(law, start_KP[best], theta_P, reached)
    final = objective(y_N - law.evaluate(theta_P[None], x_NF)[0], np.ones((1, len(y_N))), huber)
    return Fit(law, theta_P, centre_F, float(final[0]), len(start_KP), reached, len(y_N))


def refit(
    law: Law,
    x_NF: Array,
    y_N: Array,
    start_KP: Array,
    weight_KN: Array,
    huber: float | None = None,
    bounds: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """K fits at once, each from its own start, with its own weights and, if given, bounds: theta_KP, objective_K."""
    lower, upper = bounds or (np.array(law.lower), np.array(law.upper))
    return solve(lambda theta_KP: law.evaluate(theta_KP, x_NF), start_KP, y_N, weight_KN, lower, upper, huber)


def _polish(law: Law, x_NF: Array, y_N: Array, theta_P: Array, huber: float | None) -> Array:
    """scipy's answer from there, if it is at least as good: on a bound its interior method cannot start."""
    if at_bound(law, theta_P):
        return theta_P

    def residual(theta: Array) -> Array:
        return law.evaluate(theta[None], x_NF)[0][0] - y_N

    result = least_squares(
        residual,
        theta_P,
        jac=lambda theta: law.evaluate(theta[None], x_NF)[1][0],
        bounds=(law.lower, law.upper),
        x_scale="jac",
        loss="linear" if huber is None else "huber",
        f_scale=huber or 1.0,
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
    )
    ones = np.ones((1, len(y_N)))
    ours, theirs = (objective(residual(theta)[None], ones, huber)[0] for theta in (theta_P, result.x))
    return result.x if theirs <= ours else theta_P


def at_bound(law: Law, theta_P: Array) -> list[str]:
    """Names of the parameters that lie at an edge of their range."""
    names = []
    for name, value, low, high in zip(law.parameters, theta_P, law.lower, law.upper, strict=True):
        edge = 1e-9 * max(1.0, abs(low) if np.isfinite(low) else 1.0)
        if value <= low + edge or value >= high - edge:
            names.append(name)
    return names


def _refuse_no_fit(law: Law, start_P: Array, theta_P: Array, reached: float) -> None:
    bounds = at_bound(law, theta_P)
    if bounds == ["e"]:
        raise Refusal(
            "at_bound",
            f"{law.name} law: the best floor e is 0, so these data show no floor; the power law says the same "
            "with one parameter less",
        )
    if bounds:
        raise Refusal("at_bound", f"{law.name} law: {', '.join(bounds)} ended at the edge of the range searched")
    for name in law.falling:
        if theta_P[law.parameters.index(name)] <= 0:
            raise Refusal("no_improvement", f"{law.name} law: exponent {name} is not above 0: the metric does not fall")
    if np.allclose(start_P, theta_P, rtol=1e-9, atol=0):
        raise Refusal("at_start", f"{law.name} law: the fit ended at its starting point, so nothing was fitted")
    if reached < LEAST_REACHED:
        raise Refusal(
            "unstable_fit",
            f"{law.name} law: only {reached:.1%} of the starting points lead to the best fit (least: 5 %)",
        )
