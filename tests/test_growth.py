"""Noise that grows with the size of runs: found where it is, not invented where it is not."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from fitscale.scaling.fit.coverage import POWER
from fitscale.scaling.fit.fitting import fit_law
from fitscale.scaling.fit.growth import SHARES, _log_likelihoods
from fitscale.scaling.fit.laws import POWER as POWER_LAW
from fitscale.scaling.fit.uncertainty import new_run_KN, resample

STEADY = replace(POWER, run_noise=0.01, point_noise=0.0075)
GROWING = replace(STEADY, growth=4.0)


def fitted(design, seed):
    rows = design.sweep(np.random.default_rng(seed))
    return rows, fit_law(POWER_LAW, rows[rows["size"] != "z5"])


def test_growing_noise_is_found_and_steady_noise_is_not():
    factors = {}
    for design in (STEADY, GROWING):
        fits = [fitted(design, seed)[1] for seed in range(30)]
        factors[design.growth] = [fit.growth * np.ptp(fit._size_N) for fit in fits]
    assert np.mean(np.array(factors[1.0]) == 0.0) > 0.8
    assert np.mean(np.array(factors[4.0]) > 0.0) > 0.7
    assert np.mean(factors[4.0]) == pytest.approx(np.log(4), abs=0.5)


def test_intervals_cover_a_new_run_whose_noise_has_grown():
    hits = []
    for seed in range(120):
        rows, fit = fitted(GROWING, seed)
        goal = rows.iloc[[-1]]
        draws = new_run_KN(fit, resample(fit, 200, seed), goal, seed)[:, 0]
        low, high = np.quantile(draws, [0.05, 0.95])
        hits.append(low <= goal["value"].item() <= high)
    assert 0.84 <= np.mean(hits) <= 0.96


def test_the_restricted_likelihood_is_that_of_contrasts():
    """REML is the likelihood of A'y for any basis A of what the parameters cannot move: the same but for a constant."""
    rng = np.random.default_rng(0)
    jacobian = np.stack([np.ones(9), np.linspace(-1, 1, 9)], axis=1)
    run = np.repeat(list("abc"), 3)
    residual, size = rng.normal(size=9), np.repeat([-1.0, 0.0, 1.0], 3)
    contrasts = np.linalg.svd(jacobian)[0][:, 2:]
    scales = np.exp(np.array([[0.0], [0.7]]) * size)
    expected = []
    for scale in scales:
        found = []
        for share in SHARES:
            unit = scale[:, None] * (share * (run[:, None] == run) + (1 - share) * np.eye(9)) * scale
            inner = contrasts.T @ unit @ contrasts
            seen = contrasts.T @ residual
            variance = seen @ np.linalg.solve(inner, seen) / 7  # the likelihood is profiled over s^2
            found.append(multivariate_normal(np.zeros(7), variance * inner).logpdf(seen))
        expected.append(np.logaddexp.reduce(found))
    ours = _log_likelihoods(residual, jacobian, run, scales)
    assert ours[1] - ours[0] == pytest.approx(expected[1] - expected[0], rel=1e-6)
