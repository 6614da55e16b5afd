"""The Frechet distance against closed forms and scipy's matrix root."""

import numpy as np
import pytest
from scipy import linalg

from fitscale.config.errors import UserError
from fitscale.eval.frechet import Moments, Statistics, frechet_distance


def covariance(rng, size, rank):
    factors = rng.normal(size=(size, rank))
    return factors @ factors.T / rank


def test_one_dimension():
    """Two normals on a line: (m1 - m2)^2 + (s1 - s2)^2."""
    first, second = Statistics(np.array([1.0]), np.array([[4.0]])), Statistics(np.array([3.5]), np.array([[0.25]]))
    assert frechet_distance(first, second) == pytest.approx(2.5**2 + 1.5**2)


def test_commuting_covariances():
    rng = np.random.default_rng(0)
    turn = linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b, gap = rng.uniform(0.1, 2, 6), rng.uniform(0.1, 2, 6), rng.normal(size=6)
    first = Statistics(np.zeros(6), turn @ np.diag(a) @ turn.T)
    second = Statistics(gap, turn @ np.diag(b) @ turn.T)
    assert frechet_distance(first, second) == pytest.approx(gap @ gap + ((a**0.5 - b**0.5) ** 2).sum())


def test_matrix_root_of_scipy():
    rng = np.random.default_rng(1)
    a, b, gap = covariance(rng, 12, 40), covariance(rng, 12, 40), rng.normal(size=12)
    expected = gap @ gap + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(Statistics(gap, a), Statistics(np.zeros(12), b)) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances():
    """Fewer images than features: still symmetric, and zero for the same set."""
    rng = np.random.default_rng(2)
    a = Statistics(np.zeros(30), covariance(rng, 30, 5))
    b = Statistics(np.zeros(30), covariance(rng, 30, 7))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    nothing = Statistics(np.zeros(30), np.zeros((30, 30)))
    assert frechet_distance(a, nothing) == pytest.approx(np.trace(a.cov_FF))


def test_moments_in_batches_equal_numpy():
    values = np.random.default_rng(3).normal(1e4, 1, size=(101, 5))
    moments = Moments()
    for batch in np.split(values, [1, 40, 47]):
        moments.add(batch)
    statistics = moments.statistics()
    assert moments.count == 101
    np.testing.assert_allclose(statistics.mean_F, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.cov_FF, np.cov(values.T), rtol=1e-9)


def test_impossible_comparisons():
    with pytest.raises(UserError, match="same feature network"):
        frechet_distance(Statistics(np.zeros(2), np.eye(2)), Statistics(np.zeros(3), np.eye(3)))
    moments = Moments()
    moments.add(np.zeros((1, 3)))
    with pytest.raises(UserError, match="2 or more"):
        moments.statistics()
