"""Compute-optimal sizes from known surfaces, and their refusals."""

import numpy as np
import pandas as pd
import pytest

from fitscale.scaling.fit.compute_optimal import by_every_method, fit_exponent, isoflop, isoflop_cautions
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.slices import slices_of_runs
from fitscale.scaling.fit.study import study
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.table import validate

BUDGETS = np.geomspace(1e18, 1e21, 7)
ALPHA, BETA = 0.34, 0.28


def loss(parameters, flops):
    return 400 * parameters**-ALPHA + 410 * (flops / 6 / parameters) ** -BETA + 1.7


def best(flops):
    """Minimum of the law above on 6 N D = C (Hoffmann et al. 2022, eq. 4)."""
    return (ALPHA * 400 / (BETA * 410)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))


def curves(sizes=15, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {"budget": budget, "parameters": n, "value": loss(n, budget) * np.exp(rng.normal(0, noise))}
        | {"images": budget / 6 / n, "tokens": 256 * budget / 6 / n}
        for budget in BUDGETS
        for n in best(budget) * np.geomspace(0.1, 9, sizes)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("method", ["akima", "parabola"])
def test_the_exponent_of_a_known_surface(method):
    found = isoflop(curves(), method)
    assert found.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.002)
    for optimum in found.optima:
        assert optimum.best == pytest.approx(best(optimum.budget), rel=0.1)


def test_noise_widens_the_interval_which_covers_the_truth():
    quiet, noisy = isoflop(curves(noise=0.0001)), isoflop(curves(noise=0.002))
    assert np.ptp(noisy.interval) > 2 * np.ptp(quiet.interval)
    assert noisy.interval[0] < BETA / (ALPHA + BETA) < noisy.interval[1]


def test_four_sizes_do_not_tell_noise_from_shape():
    four, five = isoflop(curves(sizes=4, noise=0.002)), isoflop(curves(sizes=5, noise=0.002))
    assert four.interval is None and "no budget has more than 4 sizes" in four.no_interval
    assert np.ptp(five.interval) > 0 and five.no_interval is None


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
    assert by_every_method(rows, "parameters", 0)[0] == []
    with pytest.raises(Refusal, match="0 budgets have an optimum, two are needed"):
        isoflop(rows, "akima")
    with pytest.raises(Refusal, match="opens downward, no optimum"):
        isoflop(rows, "parabola")


def ladder(sizes, images):
    """One run a size, evaluated at the same images."""
    return pd.DataFrame(
        [
            {"run": f"r{n:.0f}", "size": f"s{n:.0f}", "parameters": n, "train_flops": flops, "value": loss(n, flops)}
            | {"images": flops / 6 / n}
            for n in sizes
            for flops in 6 * n * images
        ]
    )


def test_slices_through_the_curves_of_runs():
    found = isoflop(slices_of_runs(ladder(np.geomspace(1e8, 8e9, 9), np.geomspace(0.02, 60, 30) * 1e10)))
    assert found.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.03)
    assert found.interval is None and "the budgets share runs" in found.no_interval


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
    assert np.ptp(isoflop(slices).interval) > 0


def test_runs_that_do_not_overlap_cannot_be_sliced():
    rows = pd.DataFrame(
        {
            "run": list("aabb"),
            "size": list("aabb"),
            "parameters": [1e6] * 2 + [1e7] * 2,
            "train_flops": [1, 2, 30, 60],
            "images": [1.0, 2.0, 3.0, 6.0],
            "value": 1.0,
        }
    )
    with pytest.raises(Refusal, match="no compute is reached by 4 sizes"):
        slices_of_runs(rows)


def test_the_regression_is_that_of_statsmodels():
    from statsmodels.api import WLS, add_constant

    optima = isoflop(curves(noise=0.003)).optima
    budgets, sizes, spreads = (
        np.array([getattr(optimum, name) for optimum in optima]) for name in ("budget", "best", "spread")
    )
    theirs = WLS(np.log(sizes), add_constant(np.log(budgets)), weights=spreads**-2).fit().params
    exponent, constant = fit_exponent(optima)
    assert (constant, exponent) == (pytest.approx(theirs[0], rel=1e-8), pytest.approx(theirs[1], rel=1e-8))


def doubled(rows, gap):
    """Every size again, larger by `gap`, and measured a little differently."""
    again = rows.assign(parameters=rows["parameters"] * (1 + gap), value=rows["value"] * 1.003)
    return pd.concat([rows, again])


@pytest.mark.parametrize("gap", [1e-9, 1e-4, 9e-4, 5e-3])
@pytest.mark.parametrize("method", ["akima", "parabola"])
def test_sizes_that_are_almost_equal_count_as_one(gap, method):
    rows = doubled(curves(sizes=7), gap)
    found = isoflop(rows, method)
    assert found.merged == 7 * len(BUDGETS)
    assert found.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.002)
    for optimum in found.optima:
        here = rows.loc[rows["budget"] == optimum.budget, "value"]
        assert optimum.sizes == 7 and 0.99 * here.min() < optimum.metric < here.max()
    assert "merged_sizes" in [caution.code for caution in isoflop_cautions([found])]


@pytest.mark.parametrize(("cliff", "said", "refused"), [(0, False, False), (1, True, False), (400, False, True)])
def test_an_optimum_that_leaves_the_measurements_is_said_or_refused(cliff, said, refused):
    """A cliff at either side: a parabola through all sizes dips below everything measured between."""
    rows = curves(sizes=7)
    steep = rows.assign(value=rows["value"] + cliff * (np.log(rows["parameters"] / best(rows["budget"])).abs() > 2))
    found, refusals = by_every_method(steep, "parameters", 0)
    assert any("the curve through the sizes falls to" in refusal.message for refusal in refusals) == refused
    assert ("outside_range" in [caution.code for caution in isoflop_cautions(found)]) == said
    for optimum in [optimum for iso in found for optimum in iso.optima]:
        lowest = steep.loc[steep["budget"] == optimum.budget, "value"].min()
        assert optimum.measured == pytest.approx(lowest)
        assert optimum.beyond == pytest.approx(max(0.0, np.log(lowest / optimum.metric)))


def test_the_method_is_chosen_by_the_sizes_that_it_predicts():
    """Few sizes with noise: a parabola. Many, wide and without noise: the interpolation."""
    errors = {"akima": [], "parabola": [], "chosen": []}
    for seed in range(20):
        found, _ = by_every_method(curves(sizes=7, noise=0.003, seed=seed), "parameters", 0)
        for iso in found:
            errors[iso.method].append(iso.exponent - BETA / (ALPHA + BETA))
        errors["chosen"].append(found[0].exponent - BETA / (ALPHA + BETA))
    size = {name: np.sqrt(np.mean(np.square(values))) for name, values in errors.items()}
    assert size["akima"] > 3 * size["parabola"] and size["chosen"] < 2 * size["parabola"]
    wide = [
        {"budget": budget, "parameters": n, "value": loss(n, budget)}
        for budget in BUDGETS
        for n in best(budget) * np.geomspace(1e-3, 1e3, 60)
    ]
    assert by_every_method(pd.DataFrame(wide), "parameters", 0)[0][0].method != "parabola"


def test_the_interval_of_the_exponent_holds_the_truth():
    inside = []
    for seed in range(60):
        found = isoflop(curves(sizes=7, noise=0.003, seed=seed), "parabola")
        low, high = found.coefficient_interval
        assert low < found.coefficient < high
        inside.append(found.interval[0] < BETA / (ALPHA + BETA) < found.interval[1])
    assert 0.82 <= np.mean(inside) <= 0.99  # .90 within two standard errors of 60 draws


@pytest.mark.parametrize(("of", "per"), [("tokens", 256.0), ("images", 1.0)])
def test_optimal_data(of, per):
    found = isoflop(curves(), "akima", of=of)
    assert found.exponent == pytest.approx(ALPHA / (ALPHA + BETA), abs=0.002)
    for optimum in found.optima:
        assert optimum.best == pytest.approx(per * optimum.budget / 6 / best(optimum.budget), rel=0.1)
    at_one = per / 6 / best(1.0)  # D*(C) = h C^b
    assert found.coefficient == pytest.approx(at_one, rel=0.1)


def test_held_out_sizes_take_no_part():
    sizes = np.geomspace(1e8, 8e9, 9)
    rows = ladder(sizes, np.geomspace(0.02, 60, 30) * 1e10).assign(metric="loss", step=1)
    rows = validate(rows.assign(parameters=rows["parameters"].round(), images=rows["images"].round()))
    spoiled = rows.assign(value=rows["value"].where(rows["parameters"] < 7e9, rows["value"] * 0.2))
    asked = Question(metric="loss", laws=("isoflop",), extrapolate=True)
    clean, bad = (study(table, asked).isoflops for table in (rows, spoiled))
    assert clean and clean[0].optima == bad[0].optima
    assert study(spoiled, Question(metric="loss", laws=("isoflop",), hold_out=())).isoflops != clean
