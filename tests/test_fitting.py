"""Fits of laws against known truths and against scipy, and what is refused as no fit."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from fitscale.scaling.fit.fitting import ResidualLoss, _refuse_no_fit, fit_law
from fitscale.scaling.fit.laws import LAWS, OFFSET, POWER
from fitscale.scaling.fit.uncertainty import floor_profile
from fitscale.scaling.rows.refusals import Refusal

COMPUTE = np.geomspace(2e17, 6e19, 12)
TRUTH = {"power": lambda c: 40 * (c / 1e18) ** -0.31, "offset": lambda c: 30 * (c / 1e18) ** -0.42 + 5.5}


def rows(values, compute=COMPUTE, runs=3):
    labels = [f"r{i % runs}" for i in range(len(compute))]
    return pd.DataFrame({"run": labels, "size": labels, "train_flops": compute, "value": values})


def noisy(name="offset", sigma=0.03, seed=0):
    return rows(TRUTH[name](COMPUTE) * np.exp(np.random.default_rng(seed).normal(0, sigma, len(COMPUTE))))


@pytest.mark.parametrize("name", TRUTH)
def test_noise_free_data_give_the_truth(name):
    fit = fit_law(LAWS[name], rows(TRUTH[name](COMPUTE)))
    named = fit.named()
    assert named["b"] == pytest.approx({"power": 0.31, "offset": 0.42}[name], abs=1e-6)
    assert named["a"] * (1e18 / fit.reference()["train_flops"]) ** -named["b"] == pytest.approx(
        {"power": 40, "offset": 30}[name], rel=1e-6
    )
    if name == "offset":
        assert named["e"] == pytest.approx(5.5, rel=1e-6)
    assert fit.objective < 1e-20 and fit.reached > 0.5


SURFACES = {
    "additive": ([3.0, 0.34, 2.0, 0.28, 1.7], lambda n, d: 400 * n**-0.34 + 410 * d**-0.28 + 1.7),
    "tied": ([3.0, 0.3, 2.0, 1.7], lambda n, d: 400 * n**-0.3 + 700 * d**-0.3 + 1.7),
    "separable": ([3.0, 0.2, 0.15, 1.7], lambda n, d: 900 * n**-0.2 * d**-0.15 + 1.7),
}


@pytest.mark.parametrize("name", SURFACES)
def test_noise_free_surfaces_give_the_truth(name):
    theta, law = SURFACES[name]
    parameters, images = (
        values.ravel() for values in np.meshgrid(np.geomspace(1e7, 3e9, 6), np.geomspace(1e8, 1e11, 7))
    )
    data = pd.DataFrame({"run": "r", "parameters": parameters, "images": images, "value": law(parameters, images)})
    fit = fit_law(LAWS[name], data)
    exponents = LAWS[name].exponents
    np.testing.assert_allclose(fit.theta_P[exponents], np.array(theta)[exponents], atol=1e-6)
    assert fit.named()["e"] == pytest.approx(1.7, rel=1e-5)
    shuffled = data.sample(frac=1, random_state=0).assign(images=lambda rows: rows["images"] * 1e3)
    assert fit_law(LAWS[name], shuffled).named()["e"] == pytest.approx(1.7, rel=1e-5)


@pytest.mark.parametrize("name", SURFACES)
def test_order_and_units_do_not_matter_to_surfaces(name):
    _, law = SURFACES[name]
    rng = np.random.default_rng(0)
    parameters, images = np.exp(rng.uniform(15, 21, 60)), np.exp(rng.uniform(18, 25, 60))
    value = law(parameters, images) * np.exp(rng.normal(0, 0.01, 60))
    data = pd.DataFrame({"run": "r", "parameters": parameters, "images": images, "value": value})
    fit = fit_law(LAWS[name], data)
    changed = data.sample(frac=1, random_state=0).assign(
        images=lambda rows: rows["images"] * 256,
        parameters=lambda rows: rows["parameters"] / 1e6,
        value=lambda rows: rows["value"] * 3,
    )
    assert fit_law(LAWS[name], changed).objective == pytest.approx(fit.objective, rel=1e-8)


@pytest.mark.parametrize("huber", [None, 0.02])
def test_the_minimum_is_scipys(huber):
    data = noisy()
    fit = fit_law(OFFSET, data, ResidualLoss(huber=huber))
    x, _ = OFFSET.centred(data)
    y = np.log(data["value"].to_numpy())
    theirs = least_squares(
        lambda t: np.log(np.exp(t[0] - t[1] * x[:, 0]) + t[2]) - y,
        [2.0, 0.3, 3.0],
        loss="linear" if huber is None else "huber",
        f_scale=huber or 1.0,
        ftol=1e-14,
        xtol=1e-14,
    )
    np.testing.assert_allclose(fit.theta_P, theirs.x, rtol=1e-4)
    assert fit.objective == pytest.approx(2 * theirs.cost / len(y), rel=1e-9)


@pytest.mark.parametrize("name", TRUTH)
def test_order_and_units_do_not_matter(name):
    data = noisy(name)
    fit = fit_law(LAWS[name], data)
    shuffled = fit_law(LAWS[name], data.sample(frac=1, random_state=1))
    scaled = fit_law(LAWS[name], data.assign(train_flops=data["train_flops"] / 3e21, value=data["value"] * 17.3))
    for other in (shuffled, scaled):
        assert other.objective == pytest.approx(fit.objective, rel=1e-8)
        assert other.named()["b"] == pytest.approx(fit.named()["b"], rel=1e-5)


def test_refusals_of_fits():
    with pytest.raises(Refusal, match="3 points cannot fit 3 parameters") as caught:
        fit_law(OFFSET, noisy().iloc[:3])
    assert caught.value.code == "too_few_points"
    with pytest.raises(Refusal, match="does not fall") as caught:
        fit_law(POWER, rows(1 / TRUTH["power"](COMPUTE)))
    assert caught.value.code == "no_improvement"
    concave = rows(np.exp(3 - 0.2 * np.log(COMPUTE / 1e18) - 0.05 * np.log(COMPUTE / 1e18) ** 2))
    with pytest.raises(Refusal, match="floor e is 0") as caught:
        fit_law(OFFSET, concave)
    assert caught.value.code == "at_bound"
    with pytest.raises(Refusal, match="b ended at the edge") as caught:
        fit_law(OFFSET, rows(np.where(np.arange(12) == 0, 9.0, 4.0)))
    assert caught.value.code == "at_bound"


def test_two_sizes_leave_a_law_of_size_and_data_a_valley():
    parameters, images = (values.ravel() for values in np.meshgrid([1e8, 1e9], np.geomspace(1e8, 1e11, 7)))
    noise = np.exp(np.random.default_rng(0).normal(0, 0.01, len(images)))
    value = SURFACES["additive"][1](parameters, images) * noise
    data = pd.DataFrame({"run": "r", "parameters": parameters, "images": images, "value": value})
    with pytest.raises(Refusal, match=r"2 of parameters, 7 of images.*4 of 5 parameters apart") as caught:
        fit_law(LAWS["additive"], data)
    assert caught.value.code == "not_identified"
    assert fit_law(LAWS["separable"], data).named()["alpha"] > 0


def test_a_fit_that_is_its_start_or_is_hardly_reached_is_refused():
    theta = np.array([3.0, 0.4, 2.0])
    cases = (
        (theta, 1.0, "at_start", "offset law: the fit ended at its starting point, so nothing was fitted"),
        (theta * 1.1, 0.04, "unstable_fit", "offset law: only 4.0% of the starting points lead to the best fit"),
    )
    for start, reached, code, message in cases:
        with pytest.raises(Refusal) as caught:
            _refuse_no_fit(OFFSET, start, theta, reached)
        assert caught.value.code == code and caught.value.message.startswith(message)


def test_floor_profile_says_when_the_floor_is_not_identified():
    clear = fit_law(OFFSET, noisy(sigma=0.005))
    profile = floor_profile(clear)
    assert profile.identified and profile.low < 5.5 < profile.high
    short = rows(TRUTH["offset"](COMPUTE[:5]) * np.exp(np.random.default_rng(3).normal(0, 0.02, 5)), COMPUTE[:5])
    vague = floor_profile(fit_law(OFFSET, short))
    assert not vague.identified and vague.low == 0.0


def test_the_floors_profile_is_that_of_lmfit():
    import lmfit

    data = noisy(sigma=0.004, seed=1).assign(run=[f"r{i}" for i in range(12)])  # no correlation: the plain F profile
    fit = fit_law(OFFSET, data)
    profile = floor_profile(fit)
    x = OFFSET.centred(data)[0][:, 0]
    y = np.log(data["value"].to_numpy())
    values = dict(zip(("ln_a", "b", "e"), fit.theta_P, strict=True))

    def residual(p):
        return np.log(np.exp(p["ln_a"] - p["b"] * x) + p["e"]) - y

    minimizer = lmfit.Minimizer(residual, lmfit.create_params(**values))
    intervals = lmfit.conf_interval(minimizer, minimizer.minimize(), p_names=["e"], sigmas=[0.9])["e"]
    assert profile.low == pytest.approx(intervals[0][1], rel=0.03)
    assert profile.high == pytest.approx(intervals[-1][1], rel=0.03)
