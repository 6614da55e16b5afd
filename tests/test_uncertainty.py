"""Intervals: do they cover what they say they cover, and what would not."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from fitscale.scaling.fit.fitting import ResidualLoss, fit_law
from fitscale.scaling.fit.laws import OFFSET, POWER
from fitscale.scaling.fit.noise import estimate
from fitscale.scaling.fit.uncertainty import covariance, new_run_KN, resample
from fitscale.scaling.rows.fitted_points import chosen

RUN_NOISE, POINT_NOISE = 0.02, 0.015
TARGET = pd.DataFrame({"train_flops": [4.5e20]})


def truth(flops):
    return 18 * (flops / 1e19) ** -0.35


def sweep(rng, sizes=4, points=6, run_noise=RUN_NOISE, point_noise=POINT_NOISE):
    """One run per size, each with its own deviation; sizes span a factor of 100 in compute."""
    rows = [
        {"run": f"r{size}", "train_flops": last * share, "value": deviation * truth(last * share) * np.exp(noise)}
        for size, last in enumerate(np.geomspace(1e18, 1e20, sizes))
        for deviation in [np.exp(rng.normal(0, run_noise))]
        for share, noise in zip(np.geomspace(0.1, 1, points), rng.normal(0, point_noise, points), strict=True)
    ]
    return pd.DataFrame(rows)


def residual_draws(fit, rows, rng, count=200):
    """The usual bootstrap: residuals of single points, drawn with replacement."""
    log = fit.at_points()[0]
    residual = (fit.points.y_N - log) * np.sqrt(len(rows) / (len(rows) - len(fit.theta_P)))
    y = log + rng.choice(residual, (count, len(rows)))
    return fit.again(y, np.tile(fit.theta_P, (count, 1)))[0]


def covers(draws, value):
    low, high = np.quantile(draws, [0.05, 0.95])
    return low <= value <= high


def test_ninety_percent_intervals_cover_a_new_run_and_those_of_residuals_do_not():
    rng = np.random.default_rng(7)
    hits = []
    for index in range(200):
        rows = sweep(rng)
        fit = fit_law(POWER, rows)
        draws = resample(fit, 200, index)
        new = truth(TARGET["train_flops"].item()) * np.exp(rng.normal(0, RUN_NOISE) + rng.normal(0, POINT_NOISE))
        naive = fit.metric(TARGET, residual_draws(fit, rows, rng))[:, 0]
        curve = truth(TARGET["train_flops"].item())
        law = fit.metric(TARGET, draws.theta_KP)[:, 0]
        hits.append(
            (covers(new_run_KN(fit, draws, TARGET, index)[:, 0], new), covers(law, curve), covers(naive, curve))
        )
    new_run, law, residuals = np.mean(hits, axis=0)
    assert 0.85 <= new_run <= 0.95
    assert 0.85 <= law <= 0.95
    assert residuals < 0.6


@pytest.mark.parametrize("sizes", [2, 3])
def test_intervals_of_two_or_three_runs_are_no_wider_than_they_must_be(sizes):
    """So few runs leave a degree of freedom or none for the variance between them: .936 and .938 of 1,000 sweeps."""
    hits = []
    for index in range(300):
        rng = np.random.default_rng([index, 5])
        rows = sweep(rng, sizes=sizes)
        fit = fit_law(POWER, rows)
        new = truth(TARGET["train_flops"].item()) * np.exp(rng.normal(0, RUN_NOISE) + rng.normal(0, POINT_NOISE))
        hits.append(covers(new_run_KN(fit, resample(fit, 200, index), TARGET, index)[:, 0], new))
    assert 0.88 <= np.mean(hits) <= 0.98  # three standard errors of 300 from .94


def test_variances_between_and_within_runs_are_found_on_average():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        rows = sweep(rng, sizes=6)
        noise = fit_law(POWER, rows).noise
        found.append((noise.run, noise.point))
    run, point = np.sqrt(np.mean(found, axis=0))
    assert run == pytest.approx(RUN_NOISE, rel=0.15)
    assert point == pytest.approx(POINT_NOISE, rel=0.05)


def test_without_a_difference_between_runs_none_is_invented():
    rng = np.random.default_rng(1)
    noises = [fit_law(POWER, sweep(rng, run_noise=0.0)).noise for _ in range(50)]
    assert np.mean([noise.run for noise in noises]) < 0.3 * POINT_NOISE**2
    assert min(noise.run for noise in noises) == 0.0


def test_one_checkpoint_per_run_is_noise_of_runs():
    rng = np.random.default_rng(2)
    jacobian = np.stack([np.ones(8), np.arange(8.0)], axis=1)
    residual = rng.normal(0, 0.1, 8)
    noise = estimate(residual, jacobian, np.array(list("abcdefgh")))
    assert noise.point == 0.0 and noise.freedom[0] == pytest.approx(6)
    assert noise.run == pytest.approx(residual @ residual / 6)


def test_variances_that_the_points_do_not_tell_apart_are_those_of_runs():
    """One point more than parameters leaves one residual: it holds no two variances, however the runs share it."""
    rng = np.random.default_rng(3)
    hits, widths = [], []
    for index in range(100):
        rows = sweep(rng, sizes=2, points=2).iloc[1:]
        fit = fit_law(POWER, rows)
        draws = resample(fit, 200, index)
        assert fit.noise.point == 0.0 and fit.noise.freedom[0] == pytest.approx(1)
        new = truth(TARGET["train_flops"].item()) * np.exp(rng.normal(0, RUN_NOISE) + rng.normal(0, POINT_NOISE))
        new_K = new_run_KN(fit, draws, TARGET, index)[:, 0]
        hits.append(covers(new_K, new))
        widths.append(np.ptp(np.quantile(np.log(new_K), [0.05, 0.95])))
    assert 0.85 <= np.mean(hits) <= 0.99 and np.median(widths) < 2
    one = sweep(rng, sizes=1)
    assert 0.2 < fit_law(POWER, one).noise.total / POINT_NOISE < 3


def test_resamples_repeat_with_their_seed_and_agree_with_the_covariance():
    rows = sweep(np.random.default_rng(3), sizes=12)
    fit = fit_law(POWER, rows)
    first, again, other = (resample(fit, 4000, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.theta_KP, again.theta_KP)
    assert not np.array_equal(first.theta_KP, other.theta_KP)
    spread = np.diff(np.quantile(first.theta_KP, [0.25, 0.75], axis=0), axis=0)[0] / 1.349
    np.testing.assert_allclose(spread, np.sqrt(np.diag(covariance(fit))), rtol=0.15)


def test_few_runs_give_wide_intervals():
    rng = np.random.default_rng(4)
    widths = []
    for sizes in (3, 8):
        rows = sweep(rng, sizes=sizes)
        fit = fit_law(POWER, rows)
        draws = new_run_KN(fit, resample(fit, 500, 0), TARGET, 0)[:, 0]
        widths.append(np.ptp(np.quantile(np.log(draws), [0.05, 0.95])))
    assert widths[0] > 1.5 * widths[1]


def test_floors_are_resampled_too():
    rng = np.random.default_rng(5)
    rows = sweep(rng, sizes=5, points=8)
    rows["value"] += 4
    fit = fit_law(OFFSET, rows)
    floors = resample(fit, 300, 0).theta_KP[:, -1]
    assert (floors >= 0).all() and np.quantile(floors, 0.05) < 4 < np.quantile(floors, 0.95)


def test_a_variance_that_is_hardly_known_stays_within_floats():
    """Three runs leave one degree of freedom: some resamples draw factors beyond any measurement."""
    rng = np.random.default_rng(6)
    for index in range(10):
        rows = sweep(rng, sizes=3, points=2, run_noise=0.2)
        rows["value"] **= 4
        far = pd.DataFrame({"train_flops": [rows["train_flops"].max() * 1e9]})
        with np.errstate(all="raise", under="ignore"):
            fit = fit_law(POWER, rows)
            draws = new_run_KN(fit, resample(fit, 1000, index), far, index)
        assert np.isfinite(draws).all() and (draws > 0).all()


def replicated(rng, run_noise, seeds=2):
    """The sweep with `seeds` runs of every size, whose compute differs by the tokens that each happens to see."""
    sweeps = [sweep(rng, run_noise=run_noise) for _ in range(seeds)]
    rows = pd.concat(
        rows.assign(size=rows["run"], run=rows["run"] + f"-seed{seed}", train_flops=rows["train_flops"] * (1 + jitter))
        for seed, (rows, jitter) in enumerate(zip(sweeps, rng.uniform(0, 0.003, seeds), strict=True))
    )
    return rows.reset_index(drop=True)


@pytest.mark.parametrize("seeds", [2, 3])
def test_repeated_seeds_leave_the_frontier_unbiased_and_its_intervals_honest(seeds):
    rng = np.random.default_rng(7)
    hits, errors = [], []
    for index in range(150):
        rows = replicated(rng, RUN_NOISE, seeds)
        used = rows[chosen(rows, "frontier")]
        assert (used.groupby("size")["run"].nunique() == seeds).all()
        fit = fit_law(POWER, used)
        curve = truth(TARGET["train_flops"].item())
        new = curve * np.exp(rng.normal(0, RUN_NOISE) + rng.normal(0, POINT_NOISE))
        draws = resample(fit, 200, index)
        law = fit.metric(TARGET, draws.theta_KP)[:, 0]
        hits.append((covers(new_run_KN(fit, draws, TARGET, index)[:, 0], new), covers(law, curve)))
        errors.append(np.log(fit.metric(TARGET)[0] / curve))
    new_run, law = np.mean(hits, axis=0)
    assert 0.85 <= new_run <= 0.96
    assert 0.8 <= law <= 0.96
    assert abs(np.mean(errors)) < 0.005


def single_checkpoints(rng, runs=240, growth=0.0):
    """Runs with one measurement each, whose noise grows with compute."""
    flops = np.exp(rng.uniform(np.log(1e17), np.log(1e20), runs))
    noise = 0.02 * (flops / 1e17) ** growth * rng.normal(size=runs)
    return pd.DataFrame(
        {"run": [f"r{i}" for i in range(runs)], "train_flops": flops, "value": truth(flops) * np.exp(noise)}
    )


def test_many_runs_are_drawn_with_replacement_and_spread_as_the_sandwich_says():
    """White's covariance (1980), in closed form for a law that is a line in logarithms."""
    rows = single_checkpoints(np.random.default_rng(0), growth=0.4)
    fit = fit_law(POWER, rows)
    draws = resample(fit, 2000, 0)
    assert draws.how == "runs" and resample(fit, 20, 0, "parametric").how == "parametric"
    log, jacobian = fit.at_points()
    inverse = np.linalg.pinv(jacobian)
    white = inverse @ np.diag((fit.points.y_N - log) ** 2) @ inverse.T
    np.testing.assert_allclose(draws.theta_KP.std(axis=0), np.sqrt(np.diag(white)), rtol=0.06)
    assert resample(fit_law(POWER, rows.iloc[:29]), 20, 0).how == "parametric"


def test_the_covariance_under_hubers_loss_is_that_of_refits_and_of_theory():
    rng = np.random.default_rng(1)
    corner, variances = POINT_NOISE / 3, []
    for index in range(20):
        rows = sweep(rng, sizes=12, run_noise=0.0)
        fit, squares = fit_law(POWER, rows, ResidualLoss(huber=corner)), fit_law(POWER, rows)
        spread = resample(fit, 200, index).theta_KP.var(axis=0)
        variances.append((np.diag(covariance(fit)), np.diag(covariance(squares)), spread))
    huber, squares, refitted = np.mean(variances, axis=0)
    np.testing.assert_allclose(huber, refitted, rtol=0.25)
    inner = 2 * norm.cdf(1 / 3) - 1  # Huber (1964): E psi^2 / (E psi')^2 of a normal law with its corner at sigma / 3
    clipped = inner - 2 / 3 * norm.pdf(1 / 3) + 2 * norm.sf(1 / 3) / 9
    np.testing.assert_allclose(huber / squares, clipped / inner**2, rtol=0.15)


def test_stored_standard_errors_weigh_points():
    """With errors that are the whole noise the fit is the weighted least squares of numpy."""
    rng = np.random.default_rng(2)
    rows = single_checkpoints(rng, runs=40)
    error = np.where(np.arange(40) % 2, 0.3, 0.01)
    rows["value"] = truth(rows["train_flops"]) * np.exp(rng.normal(size=40) * error)
    alike, weighed = (fit_law(POWER, each) for each in (rows, rows.assign(standard_error=error * rows["value"])))
    x, y = np.log(rows["train_flops"]), np.log(rows["value"])
    slope = np.polyfit(x, y, 1, w=1 / error)[0]
    assert weighed.named()["b"] == pytest.approx(-slope, abs=0.1 * abs(alike.named()["b"] + slope))
    assert abs(weighed.named()["b"] - 0.35) < abs(alike.named()["b"] - 0.35)
    same = fit_law(POWER, rows.assign(standard_error=0.1 * rows["value"]))
    np.testing.assert_array_equal(same.theta_P, alike.theta_P)
