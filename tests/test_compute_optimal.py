"""Compute-optimal sizes from known surfaces, and their refusals."""

import numpy as np
import pandas as pd
import pytest

from fitscale.scaling.fit.compute_optimal import fit_exponent, isoflop, optimal_sizes, slices_of_runs
from fitscale.scaling.fit.fitting import fit_law
from fitscale.scaling.fit.laws import ADDITIVE
from fitscale.scaling.rows.refusals import Refusal

BUDGETS = np.geomspace(1e18, 1e21, 7)
ALPHA, BETA = 0.34, 0.28


def loss(parameters, flops):
    return 400 * parameters**-ALPHA + 410 * (flops / 6 / parameters) ** -BETA + 1.7


def best(flops):
    """Minimum of the law above on 6 N D = C (Hoffmann et al. 2022, eq. 4)."""
    return (ALPHA * 400 / (BETA * 410)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))


def curves(sizes=15, noise=0.0):
    rng = np.random.default_rng(0)
    rows = [
        {"budget": budget, "parameters": n, "value": loss(n, budget) * np.exp(rng.normal(0, noise))}
        for budget in BUDGETS
        for n in best(budget) * np.geomspace(0.1, 9, sizes)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("method", ["akima", "parabola"])
def test_the_exponent_of_a_known_surface(method):
    found = isoflop(curves(), method)
    assert found.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.002)
    for optimum in found.optima:
        assert optimum.parameters == pytest.approx(best(optimum.budget), rel=0.1)


def test_noise_widens_the_interval_which_covers_the_truth():
    quiet, noisy = isoflop(curves(noise=0.0001)), isoflop(curves(noise=0.002))
    assert np.ptp(noisy.interval_90) > 2 * np.ptp(quiet.interval_90)
    assert noisy.interval_90[0] < BETA / (ALPHA + BETA) < noisy.interval_90[1]


def test_four_sizes_do_not_tell_noise_from_shape():
    four, five = isoflop(curves(sizes=4, noise=0.002)), isoflop(curves(sizes=5, noise=0.002))
    assert four.interval_90 is None and "no budget has more than 4 sizes" in four.no_interval
    assert np.ptp(five.interval_90) > 0 and five.no_interval is None


def test_order_and_seed():
    rows = curves(noise=0.003)
    assert isoflop(rows, seed=3) == isoflop(rows.sample(frac=1, random_state=1), seed=3)


def test_budgets_without_an_optimum_are_refused_by_name():
    rows = curves()
    edge = rows[(rows["budget"] != BUDGETS[0]) | (rows["parameters"] > best(BUDGETS[0]))]
    found = isoflop(edge)
    assert [refusal.code for refusal in found.refusals] == ["edge_optimum"]
    assert "budget 1e+18: the smallest size is the best" in found.refusals[0].message
    few = rows[(rows["budget"] != BUDGETS[1]) | (rows["parameters"] > 4.5 * best(BUDGETS[1]))]
    assert [refusal.code for refusal in isoflop(few).refusals] == ["too_few_points"]


def test_a_concave_curve_is_refused():
    rows = curves().assign(value=lambda rows: 10 - rows["value"])
    with pytest.raises(Refusal, match="0 budgets have an optimum, two are needed"):
        isoflop(rows, "akima")
    with pytest.raises(Refusal, match="opens downward, no optimum"):
        isoflop(rows, "parabola")


def ladder(sizes, images):
    """One run a size, evaluated at the same images."""
    return pd.DataFrame(
        [
            {"run": f"r{n:.0f}", "size": f"s{n:.0f}", "parameters": n, "train_flops": flops, "value": loss(n, flops)}
            for n in sizes
            for flops in 6 * n * images
        ]
    )


def test_slices_through_the_curves_of_runs():
    found = isoflop(slices_of_runs(ladder(np.geomspace(1e8, 8e9, 9), np.geomspace(0.02, 60, 30) * 1e10)))
    assert found.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.03)
    assert found.interval_90 is None and "the budgets share runs" in found.no_interval


@pytest.mark.parametrize(("sizes", "points"), [(5, 16), (6, 12), (7, 14), (8, 16)])
def test_dense_checkpoints_do_not_chain_into_one_budget(sizes, points):
    rows = ladder(np.geomspace(1e8, 3e9, sizes), np.geomspace(2e9, 2e11, points))
    slices = slices_of_runs(rows)
    assert slices["budget"].nunique() == 6 and not slices.duplicated(["budget", "run"]).any()
    assert isoflop(slices).exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.05)


def test_runs_made_for_common_budgets_are_taken_as_they_are():
    rows = curves(sizes=7, noise=0.001)
    rows = rows.assign(run=[f"r{index}" for index in range(len(rows))], size="any")
    rows["train_flops"] = rows["budget"] * np.random.default_rng(0).uniform(0.99, 1.01, len(rows))
    slices = slices_of_runs(rows)
    assert len(slices) == len(rows) and slices["budget"].nunique() == len(BUDGETS)
    assert np.ptp(isoflop(slices).interval_90) > 0


def test_runs_that_do_not_overlap_cannot_be_sliced():
    rows = pd.DataFrame(
        {
            "run": list("aabb"),
            "size": list("aabb"),
            "parameters": [1e6] * 2 + [1e7] * 2,
            "train_flops": [1, 2, 30, 60],
            "value": 1.0,
        }
    )
    with pytest.raises(Refusal, match="no compute is reached by 4 sizes"):
        slices_of_runs(rows)


def test_optimal_sizes_of_a_fitted_surface():
    rows = pd.DataFrame(
        [
            {"run": f"{n}", "parameters": n, "images": d, "train_flops": 6 * n * d, "value": loss(n, 6 * n * d)}
            for n in np.geomspace(1e8, 3e10, 6)
            for d in np.geomspace(1e9, 1e12, 6)
        ]
    )
    fit = fit_law(ADDITIVE, rows)
    optima, refusals = optimal_sizes(fit, rows, fit.theta_P[None], np.array([1e16, 1e20, 1e21]))
    found = [optimum.parameters for optimum in optima]
    assert found == [pytest.approx(best(budget), rel=0.01) for budget in (1e20, 1e21)]
    assert [refusal.code for refusal in refusals] == ["edge_optimum"]
    assert "the smallest trained size" in refusals[0].message


def test_the_regression_is_that_of_statsmodels():
    from statsmodels.api import WLS, add_constant

    optima = isoflop(curves(noise=0.003)).optima
    budgets, sizes, spreads = (
        np.array([getattr(optimum, name) for optimum in optima]) for name in ("budget", "parameters", "spread")
    )
    theirs = WLS(np.log(sizes), add_constant(np.log(budgets)), weights=spreads**-2).fit().params
    exponent, constant = fit_exponent(optima)
    assert (constant, exponent) == (pytest.approx(theirs[0], rel=1e-8), pytest.approx(theirs[1], rel=1e-8))
