"""How a law is fitted to the rows of a runs table.

1. Residuals are those of ln(metric), weighted alike: noise is proportional to the metric, so relative weights. Where
   the table holds standard errors that differ, a point weighs by them and by the scatter beyond them.
   (Residuals of the metric itself, and Huber's loss, serve to repeat published fits.)
2. Many starting points run to their minimum at once (solver.py); the best is polished by scipy's least_squares.
3. What is not a fit is refused: at a bound, at its start, reached from under 5 % of the starts, no improvement, or a
   valley of parameters that fit alike.

Shapes: K parameter sets, N points, P parameters, F inputs.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares

from fitscale.scaling.fit.growth import plausible_growths, size_of_runs
from fitscale.scaling.fit.laws import Law
from fitscale.scaling.fit.noise import Noise, estimate
from fitscale.scaling.fit.solver import Array, Model, solve
from fitscale.scaling.rows.refusals import OfAFit, Refusal

LEAST_REACHED = 0.05
STANDARD_ERROR = "standard_error"
SAME_ERRORS = 1.1  # standard errors that differ by less weigh alike
MOST_WEIGHT = 100.0  # of a residual over another
LARGEST_GROWTH = 7.0  # ln of a factor between the noise of runs: beyond, the data say nothing
SAME_DIRECTION = 1e-10  # a smaller singular value of the scaled Jacobian is a direction that changes nothing


@dataclass(frozen=True)
class ResidualLoss:
    """What is minimised: squares, or Huber's function with `huber` as its corner, of residuals in `space`.

    Residuals above the law count `above` / (1 - `above`) times those below: below 1/2 the law leans to the lowest
    measurements. Of squares that is the expectile of Newey and Powell 1987 (asymmetric least squares); with Huber's
    function the quantile Huber loss of Dabney et al. 2018, with a small corner the quantile (pinball loss).
    """

    space: str = "log"  # log: ln(metric); linear: the metric
    huber: float | None = None
    above: float = 0.5

    def __str__(self) -> str:
        how = "least squares" if self.huber is None else f"Huber's loss with its corner at {self.huber:g}"
        if self.above == 0.5:
            return how
        return f"asymmetric {how}, what is above the law counting {self.above / (1 - self.above):.3g} times"

    def target(self, log: Array) -> Array:
        """What is to be met, from ln(metric)."""
        return log if self.space == "log" else np.exp(log)

    def model(self, law: Law, x_NF: Array, weight_N: Array) -> Model:
        """What meets it, with its derivatives, times the points' weights, as a function of the law's parameters."""

        def prediction(theta_KP: Array) -> tuple[Array, Array]:
            log_KN, jacobian_KNP = law.evaluate(theta_KP, x_NF)
            if self.space == "log":
                return log_KN * weight_N, jacobian_KNP * weight_N[:, None]
            metric_KN = np.exp(log_KN) * weight_N
            return metric_KN, metric_KN[:, :, None] * jacobian_KNP

        return prediction


def order(law: Law, rows: pd.DataFrame) -> NDArray[np.int64]:
    """An order of the rows that does not depend on how they were given: by the law's inputs, value and run."""
    numbers = [rows[name].to_numpy(dtype=float) for name in (*law.inputs, "value")]
    return np.lexsort((rows["run"].to_numpy(dtype=str), *numbers[::-1]))


@dataclass(frozen=True)
class FittedPoints:
    """What a law is fitted to, in an order of its own: no result depends on how the rows were given."""

    x_NF: Array  # ln(input) - centre
    y_N: Array  # ln(metric)
    run_N: NDArray[np.str_]
    centre_F: Array
    error_N: Array  # standard error of ln(metric), as the table has it
    weight_N: Array  # what a residual is multiplied by; the mean square is 1

    @classmethod
    def of(cls, law: Law, rows: pd.DataFrame, centre_F: Array | None = None) -> "FittedPoints":
        """The points of `rows`, around their own centre by default."""
        rows = rows.iloc[order(law, rows)]
        x_NF, centre_F = law.centred(rows, centre_F)
        value_N = rows["value"].to_numpy(dtype=float)
        error_N = rows.get(STANDARD_ERROR, pd.Series(0.0, rows.index)).to_numpy(dtype=float) / value_N
        error_N = np.where(np.isfinite(error_N).all() & (error_N >= 0), error_N, 0.0)  # of every point, or of none
        run_N, one_N = rows["run"].to_numpy(dtype=str), np.ones(len(rows))
        return cls(x_NF, np.log(value_N), run_N, centre_F, error_N, one_N)

    @property
    def runs(self) -> int:
        return len(np.unique(self.run_N))


@dataclass(frozen=True)
class Fit:
    """A law with its parameters, and the points that it is fitted to."""

    law: Law
    loss: ResidualLoss
    points: FittedPoints
    theta_P: Array
    objective: float  # mean loss of a residual
    starts: int
    reached: float  # share of the starts that end in this minimum

    def metric(self, rows: pd.DataFrame, theta_KP: Array | None = None) -> Array:
        """The metric at the inputs in `rows`: (N,), or (K, N) for other parameter sets."""
        return exp(self.log_metric(rows, theta_KP))

    def log_metric(self, rows: pd.DataFrame, theta_KP: Array | None = None) -> Array:
        """ln(metric), shaped like `metric`."""
        x_NF, _ = self.law.centred(rows, self.points.centre_F)
        log_KN, _ = self.law.evaluate(self.theta_P[None] if theta_KP is None else theta_KP, x_NF)
        return log_KN[0] if theta_KP is None else log_KN

    def at_points(self) -> tuple[Array, Array]:
        """ln(metric)_N of the law at the fitted points, and its derivatives by the parameters, _NP."""
        log_KN, jacobian_KNP = self.law.evaluate(self.theta_P[None], self.points.x_NF)
        return log_KN[0], jacobian_KNP[0]

    @cached_property
    def noise(self) -> Noise:
        """How far the fitted points scatter around the law: runs of middling size, at the most plausible growth."""
        return self.noise_at(self.growth)

    @property
    def offset(self) -> float:
        """How far the points' middle lies above the law in ln(metric): not at all, but for an asymmetric loss."""
        return 0.0 if self.loss.above == 0.5 else float(np.mean(self.points.y_N - self.at_points()[0]))

    @property
    def growth(self) -> float:
        """Of the noise, the most plausible: its standard deviation goes as exp(growth x ln(size of the run))."""
        growth_G, probability_G = self.growths
        return float(growth_G[np.argmax(probability_G)])

    @cached_property
    def growths(self) -> tuple[Array, Array]:
        """Growths of the noise with the runs' size, and how plausible each is."""
        log_N, jacobian_NP = self.at_points()
        weight_N = self.points.weight_N
        residual_N = (self.points.y_N - log_N - self.offset) * weight_N
        return plausible_growths(residual_N, jacobian_NP * weight_N[:, None], self.points.run_N, self._size_N)

    def noise_at(self, growth: float) -> Noise:
        """The scatter, if the noise grows so."""
        log_N, jacobian_NP = self.at_points()
        scale_N = self.scale(growth)[0]
        return estimate(
            (self.points.y_N - log_N - self.offset) / scale_N, jacobian_NP / scale_N[:, None], self.points.run_N
        )

    def scale(self, growth: Array | float, rows: pd.DataFrame | None = None) -> Array:
        """Noise of the fitted points, or of a new run at every row, over that of a run of middling size: (K, N).

        A row's run is as large as the largest of its rows; a row of no run stands for a run that ends there.
        """
        growth_K = np.atleast_1d(np.asarray(growth, dtype=float))
        if rows is None:
            return np.exp(growth_K[:, None] * self._size_N) / self.points.weight_N
        x_NF, _ = self.law.centred(rows, self.points.centre_F)
        run_N = rows["run"].to_numpy(dtype=str) if "run" in rows else np.arange(len(rows)).astype(str)
        size_N = size_of_runs(x_NF, run_N) - self._middle
        return np.exp(np.clip(growth_K[:, None] * size_N, -LARGEST_GROWTH, LARGEST_GROWTH))

    @property
    def _middle(self) -> float:
        return float(size_of_runs(self.points.x_NF, self.points.run_N).mean())

    @property
    def _size_N(self) -> Array:
        return size_of_runs(self.points.x_NF, self.points.run_N) - self._middle

    def again(
        self,
        y: Array,
        theta_KP: Array,
        bounds: tuple[Array, Array] | None = None,
        counts: Array | float = 1.0,
    ) -> tuple[Array, Array]:
        """K fits of the law to other ln(metric), (N,) or (K, N), at the same inputs: see `refit`."""
        return refit(self.law, self.points, y, theta_KP, self.loss, bounds, counts)

    def named(self, theta: Array | None = None) -> dict[str, Any]:
        """Parameters by name, (K,) of each for theta_KP; for `ln_a` stands `a`: the term's value at the reference."""
        columns = (self.theta_P if theta is None else theta).T
        return {
            name.removeprefix("ln_"): np.exp(values) if name.startswith("ln_") else values
            for name, values in zip(self.law.parameters, columns, strict=True)
        }

    def reference(self) -> dict[str, float]:
        """The inputs at which x = 0."""
        return dict(zip(self.law.inputs, np.exp(self.points.centre_F).tolist(), strict=True))


def exp(log: Array) -> Array:
    """e^log, held within what a float holds."""
    return np.exp(np.clip(log, -700.0, 700.0))


def fit_law(law: Law, rows: pd.DataFrame, loss: ResidualLoss = ResidualLoss(), spare: int = 1) -> Fit:
    """Fit `law` to the `value` of `rows`, whatever their order, with at least `spare` points more than parameters.

    Raises:
        Refusal: too few points, missing inputs, no improvement with compute, or a minimum that is not one.
    """
    least = len(law.parameters) + spare
    if len(rows) < least:
        count = f"{len(rows)} points cannot fit {len(law.parameters)} parameters"
        raise _refusal(law, "too_few_points", f"{count}; at least {least} are needed")
    for name in law.inputs:
        if not (rows[name] > 0).fillna(False).all():
            text = f"{law.name} law: column {name} is missing or not above 0 in some rows"
            raise Refusal("missing_values", text)
    if law.fixed_floor is not None and law.fixed_floor >= (best := float(rows["value"].min())):
        raise _refusal(law, "at_bound", f"the floor is held at {law.fixed_floor:g}, but {best:.4g} was measured")
    points = FittedPoints.of(law, rows)
    start_KP = law.starts(points.x_NF, points.y_N)
    fit = best_of(law, points, start_KP, loss)
    if points.error_N.max() <= SAME_ERRORS * points.error_N.min():
        return fit
    return best_of(law, replace(points, weight_N=_weights(fit)), start_KP, loss)


def _weights(fit: Fit) -> Array:
    """What residuals weigh by their stored standard errors and by the scatter that those do not explain."""
    error_N = fit.points.error_N
    beyond = max(fit.noise_at(0.0).total ** 2 - float(np.mean(error_N**2)), 0.0)
    variance_N = beyond + np.maximum(error_N, error_N.max() / MOST_WEIGHT) ** 2
    return np.sqrt(1 / variance_N / np.mean(1 / variance_N))


def best_of(law: Law, points: FittedPoints, start_KP: Array, loss: ResidualLoss) -> Fit:
    """The best minimum from `start_KP`.

    Raises:
        Refusal: the best minimum is no fit.
    """
    end_KP, objective_K = refit(law, points, points.y_N, start_KP, loss)
    best = int(np.nanargmin(objective_K))
    tolerance = 1e-4 * objective_K[best] + 1e-10 * float(np.var(points.y_N))
    reached = float(np.mean(objective_K <= objective_K[best] + tolerance))
    theta_P, objective = _polish(law, points, end_KP[best], float(objective_K[best]), loss)
    _refuse_no_fit(law, start_KP[best], theta_P, reached)
    _refuse_valley(law, theta_P, points.x_NF)
    return Fit(law, loss, points, theta_P, objective, len(start_KP), reached)


def refit(
    law: Law,
    points: FittedPoints,
    y: Array,
    start_KP: Array,
    loss: ResidualLoss,
    bounds: tuple[Array, Array] | None = None,
    counts: Array | float = 1.0,
) -> tuple[Array, Array]:
    """K fits at the inputs of `points`, each from its own start: theta_KP, objective_K.

    `y` is ln(metric), (N,) or (K, N); bounds are by default the law's own; `counts` (K, N): how often a
    point counts.
    """
    model = loss.model(law, points.x_NF, points.weight_N)
    target = loss.target(y) * points.weight_N
    return solve(model, start_KP, target, *(bounds or law.bounds), loss.huber, loss.above, counts)


def at_bound(law: Law, theta_P: Array) -> list[str]:
    """Names of the parameters that lie at an edge of their range."""
    lower, upper = law.bounds
    edge = (theta_P <= lower + 1e-9) | (theta_P >= upper - 1e-9)
    return [name for name, stuck in zip(law.parameters, edge, strict=True) if stuck]


def _polish(
    law: Law, points: FittedPoints, theta_P: Array, objective: float, loss: ResidualLoss
) -> tuple[Array, float]:
    """scipy's answer from there, if it is better; on a bound its interior method cannot start.

    It knows no asymmetric loss. A step of its that overflows or divides by zero is no better.
    """
    if at_bound(law, theta_P) or loss.above != 0.5:
        return theta_P, objective
    target, model = loss.target(points.y_N) * points.weight_N, loss.model(law, points.x_NF, points.weight_N)
    with np.errstate(all="ignore"):
        result = least_squares(
            lambda theta: model(theta[None])[0][0] - target,
            theta_P,
            jac=lambda theta: model(theta[None])[1][0],
            bounds=law.bounds,
            x_scale="jac",
            loss="linear" if loss.huber is None else "huber",
            f_scale=loss.huber or 1.0,
            **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15),
        )
    polished = 2 * float(result.cost) / len(target)
    return (result.x, polished) if polished < objective else (theta_P, objective)


def _refuse_no_fit(law: Law, start_P: Array, theta_P: Array, reached: float) -> None:
    bounds = at_bound(law, theta_P)
    if bounds == ["e"]:
        advice = "a law without one says the same with one parameter less"
        raise _refusal(law, "at_bound", f"the best floor e is 0, so these data show no floor; {advice}")
    if bounds:
        raise _refusal(law, "at_bound", f"{', '.join(bounds)} ended at the edge of the range searched")
    for index in law.exponents:
        if theta_P[index] <= 0:
            text = f"exponent {law.parameters[index]} is not above 0: the metric does not fall"
            raise _refusal(law, "no_improvement", text)
    if np.allclose(start_P, theta_P, rtol=1e-9, atol=0):
        raise _refusal(law, "at_start", "the fit ended at its starting point, so nothing was fitted")
    if reached < LEAST_REACHED:
        text = f"only {reached:.1%} of the starting points lead to the best fit (least: {LEAST_REACHED:.0%})"
        raise _refusal(law, "unstable_fit", text)


def _refuse_valley(law: Law, theta_P: Array, x_NF: Array) -> None:
    """Refuse parameters that could move without any change to the fit, as with two sizes for a law of three."""
    rank = told_apart(law.evaluate(theta_P[None], x_NF)[1][0])
    if rank < len(theta_P):
        different = ", ".join(f"{len(np.unique(x_N))} of {name}" for name, x_N in zip(law.inputs, x_NF.T, strict=True))
        what = f"other parameters fit these points exactly as well (different values: {different})"
        left = f"the points tell {rank} of {len(theta_P)} parameters apart"
        raise _refusal(law, "not_identified", f"{what}, so what it says elsewhere is arbitrary; {left}")


def told_apart(jacobian_NP: Array) -> int:
    """How many parameters the points tell apart."""
    scaled_NP = jacobian_NP / np.maximum(np.linalg.norm(jacobian_NP, axis=0), 1e-300)
    return int(np.linalg.matrix_rank(scaled_NP, tol=SAME_DIRECTION))


def _refusal(law: Law, code: OfAFit, text: str) -> Refusal:
    return Refusal(code, f"{law.name} law: {text}")
