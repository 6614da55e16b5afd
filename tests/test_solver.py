"""The batched solver against closed forms and scipy, with bounds and Huber's loss."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from fitscale.scaling.fit.solver import solve

X_N = np.linspace(10, 11, 30)  # far from 0: level and slope are strongly correlated
FREE = np.array([np.inf, np.inf])


def line(theta_KP):
    jacobian_NP = np.stack([np.ones_like(X_N), X_N], axis=1)
    return theta_KP @ jacobian_NP.T, np.repeat(jacobian_NP[None], len(theta_KP), axis=0)


def data(seed=0, slope=-2.0):
    return 5 + slope * X_N + np.random.default_rng(seed).normal(0, 0.1, len(X_N))


def test_problems_with_their_own_data():
    y_KN = np.stack([data(seed) for seed in range(4)])
    theta_KP, objective_K = solve(line, np.zeros((4, 2)), y_KN, -FREE, FREE)
    for theta, objective, y in zip(theta_KP, objective_K, y_KN, strict=True):
        slope, level = np.polyfit(X_N, y, 1)
        np.testing.assert_allclose(theta, [level, slope], rtol=1e-6)
        assert objective == pytest.approx(np.mean((y - level - slope * X_N) ** 2), rel=1e-10)


def test_a_parameter_at_its_bound_leaves_the_others_at_their_best():
    y = data()
    theta_KP, _ = solve(line, np.array([[0.0, 3.0]]), y, np.array([-np.inf, 0.0]), FREE)
    np.testing.assert_allclose(theta_KP, [[y.mean(), 0.0]], rtol=1e-9)


def test_a_box_without_width_holds_a_parameter():
    y = data()
    held = np.array([[-np.inf, slope] for slope in (-3.0, -2.0, 1.0)])
    theta_KP, _ = solve(line, np.zeros((3, 2)), y, held, np.where(np.isinf(held), np.inf, held))
    np.testing.assert_allclose(theta_KP, [[(y - slope * X_N).mean(), slope] for slope in held[:, 1]], rtol=1e-9)


def test_hubers_loss_is_scipys():
    y = data()
    y[::7] += 5
    (theta,), (objective,) = solve(line, np.zeros((1, 2)), y, -FREE, FREE, huber=0.1)
    theirs = least_squares(
        lambda t: t[0] + t[1] * X_N - y,
        [0, 0],
        loss="huber",
        f_scale=0.1,
        x_scale="jac",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-12,
    )
    np.testing.assert_allclose(theta, theirs.x, rtol=1e-4)
    assert objective == pytest.approx(2 * theirs.cost / 30, rel=1e-8)
