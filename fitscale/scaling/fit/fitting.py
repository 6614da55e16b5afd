"""How a law is fitted to the rows of a runs table.

1. Residuals are those of ln(metric), all weighted alike: noise is proportional to the metric, so relative weights.
   (Residuals of the metric itself, and Huber's loss, serve to repeat published fits.)
2. Many starting points run to their minimum at once (solver.py); the best is polished by scipy's least_squares.
3. What is not a fit is refused: at a bound, at its start, reached from under 5 % of the starts, no improvement, or a
   valley of parameters that fit alike.

Shapes: K parameter sets, N points, P parameters, F inputs.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from fitscale.scaling.fit.laws import Law
from fitscale.scaling.fit.solver import Array, solve
from fitscale.scaling.rows.refusals import Refusal

LEAST_REACHED = 0.05
SAME_DIRECTION = 1e-10  # a smaller singular value of the scaled Jacobian is a direction that changes nothing


@dataclass(frozen=True)
class Loss:
    """What is minimised: squares, or Huber's function with `huber` as its corner, of residuals in `space`."""

    space: str = "log"  # log: ln(metric); linear: the metric
    huber: float | None = None


@dataclass(frozen=True)
class Fit:
    """A law with its parameters, at x = ln(input) - centre."""

    law: Law
    loss: Loss
    theta_P: Array
    centre_F: Array
    objective: float  # mean loss of a residual
    starts: int
    reached: float  # share of the starts that end in this minimum
    points: int

    def metric(self, rows: pd.DataFrame, theta_KP: Array | None = None) -> Array:
        """The metric at the inputs in `rows`: (N,), or (K, N) for other parameter sets."""
        return exp(self.log_metric(rows, theta_KP))

    def log_metric(self, rows: pd.DataFrame, theta_KP: Array | None = None) -> Array:
        """ln(metric), shaped like `metric`."""
        x_NF, _ = self.law.centred(rows, self.centre_F)
        log_KN, _ = self.law.evaluate(self.theta_P[None] if theta_KP is None else theta_KP, x_NF)
        return log_KN[0] if theta_KP is None else log_KN

    def named(self, theta_P: Array | None = None) -> dict[str, float]:
        """Parameters by name, with `ln_a` replaced by `a`: the term's value at the reference inputs."""
        values = dict(zip(self.law.parameters, (self.theta_P if theta_P is None else theta_P).tolist(), strict=True))
        return {
            name.removeprefix("ln_"): float(np.exp(value)) if name.startswith("ln_") else value
            for name, value in values.items()
        }

    def reference(self) -> dict[str, float]:
        """The inputs at which x = 0."""
        return dict(zip(self.law.inputs, np.exp(self.centre_F).tolist(), strict=True))


def exp(log: Array) -> Array:
    """e^log, held within what a float holds."""
    return np.exp(np.clip(log, -700.0, 700.0))


def fit_law(law: Law, rows: pd.DataFrame, loss: Loss = Loss(), spare: int = 1) -> Fit:
    """Fit `law` to the `value` of `rows`, whatever their order, with at least `spare` points more than parameters.

    Raises:
        Refusal: too few points, missing inputs, no improvement with compute, or a minimum that is not one.
    """
    _refuse_inputs(law, rows, spare)
    rows = in_order(law, rows)
    x_NF, centre_F = law.centred(rows)
    y_N = np.log(rows["value"].to_numpy(dtype=float))
    start_KP = law.starts(x_NF, y_N)
    theta_P, objective, reached = best_of(law, x_NF, y_N, start_KP, loss)
    return Fit(law, loss, theta_P, centre_F, objective, len(start_KP), reached, len(y_N))


def best_of(law: Law, x_NF: Array, y_N: Array, start_KP: Array, loss: Loss) -> tuple[Array, float, float]:
    """The best minimum from `start_KP`: parameters, objective, and the share of the starts that reach it.

    Raises:
        Refusal: the best minimum is no fit.
    """
    end_KP, objective_K = refit(law, x_NF, y_N, start_KP, loss)
    best = int(np.nanargmin(objective_K))
    tolerance = 1e-4 * objective_K[best] + 1e-10 * float(np.var(y_N))
    reached = float(np.mean(objective_K <= objective_K[best] + tolerance))
    theta_P, objective = _polish(law, x_NF, y_N, end_KP[best], float(objective_K[best]), loss)
    _refuse_no_fit(law, start_KP[best], theta_P, reached)
    _refuse_valley(law, theta_P, x_NF)
    return theta_P, objective, reached


def refit(
    law: Law,
    x_NF: Array,
    y: Array,
    start_KP: Array,
    loss: Loss,
    weight_KN: Array | None = None,
    bounds: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """K fits at once, each from its own start: theta_KP, objective_K.

    `y` is ln(metric), (N,) or (K, N); weights are 1 by default, bounds the law's own.
    """
    lower, upper = bounds or (law.lower, law.upper)
    weights = np.ones((len(start_KP), len(x_NF))) if weight_KN is None else weight_KN

    def model(theta_KP: Array) -> tuple[Array, Array]:
        return in_space(loss, *law.evaluate(theta_KP, x_NF))

    target = y if loss.space == "log" else np.exp(y)
    return solve(model, start_KP, target, weights, lower, upper, loss.huber)


def in_space(loss: Loss, log_KN: Array, jacobian_KNP: Array) -> tuple[Array, Array]:
    """ln(metric) and its derivatives, or the metric and its derivatives, as the loss asks."""
    if loss.space == "log":
        return log_KN, jacobian_KNP
    metric_KN = np.exp(log_KN)
    return metric_KN, metric_KN[:, :, None] * jacobian_KNP


def in_order(law: Law, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows in an order of their own, so that no result depends on how they were given."""
    return rows.sort_values([*law.inputs, "value", "run"], kind="stable")


def at_bound(law: Law, theta_P: Array) -> list[str]:
    """Names of the parameters that lie at an edge of their range."""
    edge = 1e-9
    return [
        name
        for name, value, low, high in zip(law.parameters, theta_P, law.lower, law.upper, strict=True)
        if value <= low + edge or value >= high - edge
    ]


def _polish(law: Law, x_NF: Array, y_N: Array, theta_P: Array, objective: float, loss: Loss) -> tuple[Array, float]:
    """scipy's answer from there, if it is better; on a bound its interior method cannot start."""
    if at_bound(law, theta_P):
        return theta_P, objective
    target = y_N if loss.space == "log" else np.exp(y_N)

    def model(theta: Array) -> tuple[Array, Array]:
        value, jacobian = in_space(loss, *law.evaluate(theta[None], x_NF))
        return value[0] - target, jacobian[0]

    result = least_squares(
        lambda theta: model(theta)[0],
        theta_P,
        jac=lambda theta: model(theta)[1],
        bounds=(law.lower, law.upper),
        x_scale="jac",
        loss="linear" if loss.huber is None else "huber",
        f_scale=loss.huber or 1.0,
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
    )
    polished = 2 * float(result.cost) / len(y_N)
    return (result.x, polished) if polished < objective else (theta_P, objective)


def _refuse_inputs(law: Law, rows: pd.DataFrame, spare: int) -> None:
    least = len(law.parameters) + spare
    if len(rows) < least:
        raise Refusal(
            "too_few_points",
            f"{law.name} law: {len(rows)} points cannot fit {len(law.parameters)} parameters; "
            f"at least {least} are needed",
        )
    for name in law.inputs:
        if not (rows[name] > 0).fillna(False).all():
            raise Refusal("missing_values", f"{law.name} law: column {name} is missing or not above 0 in some rows")


def _refuse_no_fit(law: Law, start_P: Array, theta_P: Array, reached: float) -> None:
    bounds = at_bound(law, theta_P)
    if bounds == ["e"]:
        raise Refusal(
            "at_bound",
            f"{law.name} law: the best floor e is 0, so these data show no floor; a law without one says the same "
            "with one parameter less",
        )
    if bounds:
        raise Refusal("at_bound", f"{law.name} law: {', '.join(bounds)} ended at the edge of the range searched")
    for index in law.exponents:
        if theta_P[index] <= 0:
            name = law.parameters[index]
            raise Refusal("no_improvement", f"{law.name} law: exponent {name} is not above 0: the metric does not fall")
    if np.allclose(start_P, theta_P, rtol=1e-9, atol=0):
        raise Refusal("at_start", f"{law.name} law: the fit ended at its starting point, so nothing was fitted")
    if reached < LEAST_REACHED:
        raise Refusal(
            "unstable_fit",
            f"{law.name} law: only {reached:.1%} of the starting points lead to the best fit (least: 5 %)",
        )


def _refuse_valley(law: Law, theta_P: Array, x_NF: Array) -> None:
    """Refuse parameters that could move without any change to the fit, as with two sizes for a law of three."""
    jacobian_NP = law.evaluate(theta_P[None], x_NF)[1][0]
    scaled_NP = jacobian_NP / np.maximum(np.linalg.norm(jacobian_NP, axis=0), 1e-300)
    told_apart = int(np.linalg.matrix_rank(scaled_NP, tol=SAME_DIRECTION))
    if told_apart < len(theta_P):
        different = ", ".join(f"{len(np.unique(x_N))} of {name}" for name, x_N in zip(law.inputs, x_NF.T, strict=True))
        raise Refusal(
            "not_identified",
            f"{law.name} law: other parameters fit these points exactly as well (different values: {different}), so "
            f"what it says elsewhere is arbitrary; the points tell {told_apart} of {len(theta_P)} parameters apart",
        )
