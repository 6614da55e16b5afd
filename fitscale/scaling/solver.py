"""Many small weighted least-squares problems at once: Levenberg-Marquardt, batched over K starts or resamples.

scipy solves one problem at a time; a bootstrap or a multi-start of thousands of fits with few parameters is one
array computation here, and takes seconds. Shapes: K problems, N points, P parameters.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Model = Callable[[Array], tuple[Array, Array]]  # theta_KP -> prediction_KN, jacobian_KNP

MAX_DAMPING = 1e12


def solve(
    model: Model, theta_KP: Array, y_N: Array, weight_KN: Array, lower: Array, upper: Array, huber: float | None = None
) -> tuple[Array, Array]:
    """Minimise the weighted mean of rho(y - prediction) inside the box [lower, upper], for every k on its own.

    `lower` and `upper` are (P,), or (K, P) for boxes that differ; where they are equal the parameter is held fixed.

    rho(r) is r^2, or with `huber` = d: r^2 up to |r| = d, then 2 d |r| - d^2.

    Returns:
        theta_KP at the minimum, and its objective_K (in units of y^2).
    """
    lower_KP, upper_KP = (np.broadcast_to(bound, theta_KP.shape) for bound in (lower, upper))
    theta_KP = np.clip(theta_KP, lower_KP, upper_KP)
    objective_K = np.full(len(theta_KP), np.nan)
    damping_K = np.full(len(theta_KP), 1e-2)
    active = np.arange(len(theta_KP))
    for _ in range(500):
        theta, objective, damping, done = _iterate(
            model,
            theta_KP[active],
            y_N,
            weight_KN[active],
            damping_K[active],
            lower_KP[active],
            upper_KP[active],
            huber,
        )
        theta_KP[active], objective_K[active], damping_K[active] = theta, objective, damping
        active = active[~done]
        if not len(active):
            break
    return theta_KP, objective_K


def objective(residual_KN: Array, weight_KN: Array, huber: float | None) -> Array:
    """Weighted mean of rho over the points, for every problem."""
    size = np.abs(residual_KN)
    rho = size**2 if huber is None else np.where(size <= huber, size**2, huber * (2 * size - huber))
    return np.sum(weight_KN * rho, axis=1) / np.sum(weight_KN, axis=1)


def _iterate(
    model: Model,
    theta_KP: Array,
    y_N: Array,
    weight_KN: Array,
    damping_K: Array,
    lower_KP: Array,
    upper_KP: Array,
    huber: float | None,
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """One damped Gauss-Newton step of every problem; kept where it improves, else only the damping grows."""
    prediction, jacobian = model(theta_KP)
    residual = y_N - prediction
    before = objective(residual, weight_KN, huber)
    step = _step(theta_KP, residual, jacobian, weight_KN, damping_K, lower_KP, upper_KP, huber)
    candidate = np.clip(theta_KP + step, lower_KP, upper_KP)
    with np.errstate(all="ignore"):
        after = objective(y_N - model(candidate)[0], weight_KN, huber)
    better = after <= before
    done = (better & (before - after <= 1e-15 * before)) | (damping_K > MAX_DAMPING) | (before < 1e-28)
    damping = np.where(better, np.maximum(damping_K / 5, 1e-12), damping_K * 4)
    return np.where(better[:, None], candidate, theta_KP), np.where(better, after, before), damping, done


def _step(
    theta_KP: Array,
    residual_KN: Array,
    jacobian_KNP: Array,
    weight_KN: Array,
    damping_K: Array,
    lower_KP: Array,
    upper_KP: Array,
    huber: float | None,
) -> Array:
    if huber is not None:
        weight_KN = weight_KN * np.minimum(1.0, huber / np.maximum(np.abs(residual_KN), 1e-300))
    weighted_KPN = np.swapaxes(jacobian_KNP, 1, 2) * weight_KN[:, None, :]
    gradient_KP = np.einsum("kpn,kn->kp", weighted_KPN, residual_KN)
    hessian_KPP = weighted_KPN @ jacobian_KNP
    stuck_KP = ((theta_KP <= lower_KP) & (gradient_KP < 0)) | ((theta_KP >= upper_KP) & (gradient_KP > 0))
    scale_KP = np.sqrt(np.maximum(np.einsum("kpp->kp", hessian_KPP), 1e-300))
    scaled = hessian_KPP / scale_KP[:, :, None] / scale_KP[:, None, :]
    scaled = np.where(stuck_KP[:, :, None] | stuck_KP[:, None, :], 0.0, scaled)
    identity = np.eye(theta_KP.shape[1])
    scaled = scaled + identity * (damping_K[:, None, None] + stuck_KP[:, :, None] + 1e-14)
    right = np.where(stuck_KP, 0.0, gradient_KP / scale_KP)
    return np.linalg.solve(scaled, right[:, :, None])[:, :, 0] / scale_KP
