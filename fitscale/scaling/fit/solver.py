"""Many small least-squares problems at once: Levenberg-Marquardt, batched over K starts or resamples.

scipy solves one problem at a time; a bootstrap or a multi-start of thousands of fits with few parameters is one array
computation here, and takes seconds. Shapes: K problems, N points, P parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Model = Callable[[Array], tuple[Array, Array]]  # theta_KP -> prediction_KN, jacobian_KNP

MAX_DAMPING = 1e12
ROUNDS = 500


@dataclass(frozen=True)
class Problems:
    """K problems that share a model: data, and the box that holds the parameters.

    Where the box has no width the parameter is held fixed. The loss rho(r) is Huber's with its corner at d: r^2 up to
    |r| = d, then 2 d |r| - d^2; with an infinite d it is r^2. It counts 2 t times where y is above the prediction, and
    2 (1 - t) times where it is below: with t = 1/2 both alike. `count_KN` is how often each point
    counts.
    """

    y_KN: Array
    count_KN: Array
    lower_KP: Array
    upper_KP: Array
    corner: float
    above: float  # t

    def take(self, indices: NDArray[np.bool_]) -> "Problems":
        """Those of the problems."""
        bounds = self.lower_KP[indices], self.upper_KP[indices]
        return Problems(self.y_KN[indices], self.count_KN[indices], *bounds, self.corner, self.above)

    def objective(self, prediction_KN: Array) -> Array:
        """Mean of rho over the points, for every problem."""
        residual_KN = self.y_KN - prediction_KN
        size = np.abs(residual_KN)
        inner = np.minimum(size, self.corner)
        return np.mean(self.count_KN * self.side(residual_KN) * inner * (2 * size - inner), axis=1)

    def side(self, residual_KN: Array) -> Array:
        """How often a residual counts for its sign."""
        return np.ones(1) if self.above == 0.5 else np.where(residual_KN > 0, 2 * self.above, 2 * (1 - self.above))


def solve(
    model: Model,
    theta_KP: Array,
    y: Array,
    lower: Array,
    upper: Array,
    huber: float | None = None,
    above: float = 0.5,
    counts: Array | float = 1.0,
) -> tuple[Array, Array]:
    """Minimise the mean of count x rho(y - prediction) inside the box [lower, upper], for every k on its own.

    `y` is (N,) or (K, N), `counts` that or one number; `lower` and `upper` are (P,) or (K, P); `huber` is the corner of
    rho, `above` its t.

    Returns:
        theta_KP at the minimum, and its objective_K (in units of y^2).
    """
    count, corner = len(theta_KP), np.inf if huber is None else huber
    lower_KP, upper_KP = (np.broadcast_to(bound, theta_KP.shape) for bound in (lower, upper))
    y_KN, count_KN = (np.broadcast_to(values, (count, y.shape[-1])) for values in (y, np.asarray(counts, dtype=float)))
    problems = Problems(y_KN, count_KN, lower_KP, upper_KP, corner, above)
    theta_KP = np.clip(theta_KP, lower_KP, upper_KP)
    objective_K, active = np.full(count, np.nan), np.arange(count)
    state = _at(model, problems, theta_KP, np.full(count, 1e-2))
    for _ in range(ROUNDS):
        state, done = _iterate(model, problems, state)
        if done.any():
            theta_KP[active], objective_K[active] = state.theta_KP, state.objective_K
            active, problems, state = active[~done], problems.take(~done), state.take(~done)
        if not len(active):
            return theta_KP, objective_K
    theta_KP[active], objective_K[active] = state.theta_KP, state.objective_K
    return theta_KP, objective_K


@dataclass(frozen=True)
class _State:
    """Where K problems are, and what the model says there."""

    theta_KP: Array
    damping_K: Array
    prediction_KN: Array
    jacobian_KNP: Array
    objective_K: Array

    def take(self, indices: NDArray[np.bool_]) -> "_State":
        """Those of the problems."""
        return _State(*(getattr(self, each.name)[indices] for each in fields(self)))

    def where(self, chosen_K: NDArray[np.bool_], other: "_State") -> "_State":
        """The chosen problems as they are, the others as they are in `other`."""
        pairs = ((getattr(self, each.name), getattr(other, each.name)) for each in fields(self))
        return _State(*(np.where(chosen_K.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs) for ours, theirs in pairs))


def _at(model: Model, problems: Problems, theta_KP: Array, damping_K: Array) -> _State:
    with np.errstate(all="ignore"):
        prediction_KN, jacobian_KNP = model(theta_KP)
        objective_K = problems.objective(prediction_KN)
    return _State(theta_KP, damping_K, prediction_KN, jacobian_KNP, objective_K)


def _iterate(model: Model, problems: Problems, state: _State) -> tuple[_State, NDArray[np.bool_]]:
    """One damped Gauss-Newton step of every problem, kept where it improves, else only the damping grows; and which
    problems are done."""
    candidate_KP = np.clip(state.theta_KP + _step(problems, state), problems.lower_KP, problems.upper_KP)
    candidate = _at(model, problems, candidate_KP, np.maximum(state.damping_K / 5, 1e-12))
    before, after = state.objective_K, candidate.objective_K
    better = after <= before
    done = (better & (before - after <= 1e-15 * before)) | (state.damping_K > MAX_DAMPING) | (before < 1e-28)
    return candidate.where(better, replace(state, damping_K=state.damping_K * 4)), done


def _step(problems: Problems, state: _State) -> Array:
    """Solve the damped normal equations, scaled to a unit diagonal; parameters pushed against a bound stay."""
    theta_KP, jacobian_KNP = state.theta_KP, state.jacobian_KNP
    residual_KN = problems.y_KN - state.prediction_KN
    slope_KN = np.minimum(1.0, problems.corner / np.maximum(np.abs(residual_KN), 1e-300))  # r's: the gradient of rho(r)
    slope_KN = slope_KN * problems.side(residual_KN)
    weighted_KPN = np.swapaxes(jacobian_KNP, 1, 2) * (slope_KN * problems.count_KN)[:, None, :]
    gradient_KP = np.einsum("kpn,kn->kp", weighted_KPN, residual_KN)
    hessian_KPP = weighted_KPN @ jacobian_KNP
    below_KP = (theta_KP <= problems.lower_KP) & (gradient_KP < 0)
    stuck_KP = below_KP | ((theta_KP >= problems.upper_KP) & (gradient_KP > 0))
    scale_KP = np.sqrt(np.maximum(np.einsum("kpp->kp", hessian_KPP), 1e-300))
    scaled = hessian_KPP / scale_KP[:, :, None] / scale_KP[:, None, :]
    scaled = np.where(stuck_KP[:, :, None] | stuck_KP[:, None, :], 0.0, scaled)
    diagonal_KP = state.damping_K[:, None] + stuck_KP + 1e-14
    scaled = scaled + np.eye(theta_KP.shape[1]) * diagonal_KP[:, None, :]
    right_KP = np.where(stuck_KP, 0.0, gradient_KP / scale_KP)
    return np.linalg.solve(scaled, right_KP[:, :, None])[:, :, 0] / scale_KP
