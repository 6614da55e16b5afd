"""Constants at N = D = 1 and compute-optimal frontiers: against Hoffmann et al. 2022 and scipy's minimum."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from fitscale.scaling.fit.approaches import approaches, envelope
from fitscale.scaling.fit.fitting import ResidualLoss, fit_law
from fitscale.scaling.fit.frontier import Cost, at_unity, compute_law, frontier_of
from fitscale.scaling.fit.laws import LAWS
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.quoted import constants
from fitscale.scaling.fit.study import study
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.table import validate
from tests.programs import run_tool

A, B, E, ALPHA, BETA = 406.4, 410.7, 1.69, 0.34, 0.28  # Hoffmann et al. 2022, equation 10


def loss(parameters, data):
    return A * parameters**-ALPHA + B * data**-BETA + E


def surface(kappa=6.0, power=1.0, run_noise=0.0, noise=0.0, seed=0, sizes=6, points=6):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            {"run": f"r{index}", "size": f"s{index}", "parameters": float(round(n)), "images": float(round(d))}
            | {"train_flops": kappa * n**power * d, "metric": "loss", "step": 1 + step}
            | {"value": loss(n, d) * np.exp(of_run + rng.normal(0, noise))}
            for index, (n, of_run) in enumerate(
                zip(np.geomspace(1e8, 3e10, sizes), rng.normal(0, run_noise, sizes), strict=True)
            )
            for step, d in enumerate(np.geomspace(1e9, 1e12, points))
        ]
    )


def test_constants_at_one_are_those_that_made_the_data():
    fit = fit_law(LAWS["additive"], surface())
    unity = {name: float(values[0]) for name, values in at_unity(fit, fit.theta_P[None]).items()}
    assert np.exp(unity["ln_A"]) == pytest.approx(A, rel=1e-6) and np.exp(unity["ln_B"]) == pytest.approx(B, rel=1e-6)
    assert [unity[name] for name in ("alpha", "beta", "E")] == pytest.approx([ALPHA, BETA, E], rel=1e-6)


def test_the_published_allocation():
    """Equation 4 of Hoffmann et al. 2022 with their equation 10, whose rounded exponents give .45 for table 2's .46."""
    fit = fit_law(LAWS["additive"], surface())
    best = frontier_of(fit, fit.theta_P[None], Cost.of(surface()))
    assert (round(float(best.a_K[0]), 2), round(float(best.b_K[0]), 2)) == (0.45, 0.55)
    assert best.a_K[0] == pytest.approx(BETA / (ALPHA + BETA)) and best.b_K[0] == pytest.approx(ALPHA / (ALPHA + BETA))
    factor = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    assert best.parameters(5.76e23)[0] == pytest.approx(factor * (5.76e23 / 6) ** best.a_K[0], rel=1e-6)
    assert best.images(5.76e23)[0] == pytest.approx((5.76e23 / 6) ** best.b_K[0] / factor, rel=1e-6)


@pytest.mark.parametrize(("kappa", "power"), [(6.0, 1.0), (1500.0, 0.93), (0.2, 1.2)])
@pytest.mark.parametrize("law", ["additive", "tied"])
def test_the_frontier_is_the_minimum_that_scipy_finds(law, kappa, power):
    rows = surface(kappa, power)
    fit = fit_law(LAWS[law], rows)
    cost = Cost.of(rows)
    assert (cost.kappa, cost.power) == (pytest.approx(kappa, rel=1e-4), pytest.approx(power, rel=1e-6))
    best = frontier_of(fit, fit.theta_P[None], cost)
    for flops in (1e17, 1e21, 1e26):

        def along(ln_size, flops=flops):
            size = np.exp(ln_size)
            line = pd.DataFrame({"parameters": [size], "images": [flops / cost.per_image(size)]})
            return float(fit.metric(line)[0])

        found = minimize_scalar(along, bounds=(5, 60), method="bounded", options={"xatol": 1e-10})
        assert np.log(best.parameters(flops)[0]) == pytest.approx(found.x, abs=1e-4)
        assert best.law.metric(flops)[0] == pytest.approx(found.fun, rel=1e-9)
        assert best.law.ln_compute(found.fun)[0] == pytest.approx(np.log(flops), rel=1e-6)
        assert cost.per_image(best.parameters(flops)[0]) * best.images(flops)[0] == pytest.approx(flops, rel=1e-9)
    assert best.law.ln_compute(0.5 * E)[0] == np.inf, "below the floor no compute is enough"


def test_laws_without_a_best_size_are_refused():
    fit = fit_law(LAWS["separable"], surface())
    with pytest.raises(Refusal, match="no compute-optimal size"):
        frontier_of(fit, fit.theta_P[None], Cost.of(surface()))
    with pytest.raises(Refusal, match="costs no more compute"):
        Cost.of(surface(power=-0.1))
    with pytest.raises(Refusal, match="two sizes are needed"):
        Cost.of(surface(sizes=1))


def test_a_law_of_compute_is_itself():
    fit = fit_law(LAWS["power"], surface())
    law = compute_law(fit, fit.theta_P[None], surface())
    for flops in (1e18, 1e22):
        assert law.metric(flops)[0] == pytest.approx(fit.metric(pd.DataFrame({"train_flops": [flops]}))[0], rel=1e-12)


def test_intervals_of_constants_hold_the_truth():
    truth = {"A": A, "B": B, "E": E, "alpha": ALPHA, "beta": BETA, "a": BETA / (ALPHA + BETA), "G": None}
    truth["G"] = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    inside = {name: [] for name in truth}
    for seed in range(20):
        rows = validate(surface(run_noise=0.004, noise=0.002, seed=seed))
        asked = Question(metric="loss", laws=("additive",), resamples=100, hold_out=(), seed=seed)
        for result in study(rows, asked).results:
            found = constants(result)
            for name, true in truth.items():
                if found[name].value is not None:
                    inside[name].append(found[name].low <= true <= found[name].high)
    for name, each in inside.items():
        assert len(each) > 15 and np.mean(each) >= 0.7, (name, np.mean(each))  # .90 less 3 standard errors of 20


def test_the_three_approaches_agree_where_the_data_are_good():
    rows = validate(surface(sizes=14, points=40)).assign(tokens_per_image=256.0)
    asked = Question(metric="loss", laws=("additive", "isoflop"), resamples=50, hold_out=())
    answer = study(rows, asked)
    found = {each.name[0]: each for each in approaches(answer.rows, answer.isoflops, answer.results, answer.question)}
    best = frontier_of(answer.results[0].fit, answer.results[0].fit.theta_P[None], Cost.of(rows))
    for number, close in (("1", 0.04), ("2", 0.03), ("3", 1e-6)):
        size, data = found[number].parameters, found[number].data
        assert size.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=close)
        assert data.exponent == pytest.approx(ALPHA / (ALPHA + BETA), abs=close)
        for flops in (1e21, 1e22):
            at = {"rel": 0.5 if number == "1" else 0.2}
            assert size.coefficient * flops**size.exponent == pytest.approx(best.parameters(flops)[0], **at)
            assert data.coefficient * flops**data.exponent == pytest.approx(256 * best.images(flops)[0], **at)
    low, high = found["1"].parameters.exponent_interval
    assert low < BETA / (ALPHA + BETA) < high and high - low < 0.4


def test_an_envelope_without_inner_sizes_is_refused():
    with pytest.raises(Refusal, match="fewer than 3 sizes are the best"):
        envelope(surface(sizes=3), seed=0)
    with pytest.raises(Refusal, match="no training curves"):
        envelope(surface(points=1), seed=0)


def test_a_floor_held_at_its_value(tmp_path):
    rows = surface(noise=0.003)
    held = fit_law(LAWS["additive"].with_floor(E), rows)
    assert "e" not in held.named() and at_unity(held, held.theta_P[None])["E"][0] == E
    free = fit_law(LAWS["additive"], rows)
    assert held.objective >= free.objective
    assert held.named()["alpha"] == pytest.approx(ALPHA, abs=0.02)
    shifted = rows.assign(value=rows["value"] - E)
    plain = fit_law(LAWS["additive"].with_floor(0.0), shifted, ResidualLoss("linear"))
    same = fit_law(LAWS["additive"].with_floor(E), rows, ResidualLoss("linear"))
    assert plain.named()["alpha"] == pytest.approx(same.named()["alpha"], rel=1e-4)
    with pytest.raises(Refusal, match=r"held at 3, but 1\.\d+ was measured"):
        fit_law(LAWS["additive"].with_floor(3.0), rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--floor", "1", "--law", "power"), "no law of --law has a floor"),
        (("--floor", "-1"), "--floor: -1 must be"),
        (("--floor", "nan"), "--floor: nan must be"),
        (("--above", "1.5"), "--above: 1.5 is outside"),
        (("--compare", "nothing"), "--compare nothing: no such column"),
        (("--compare", "size", "--hold-out", "none"), "--compare: compares fitted laws of all sizes"),
    ],
)
def test_options_that_make_no_sense_are_one_message(tmp_path, options, message):
    surface().to_csv(tmp_path / "runs.csv", index=False)
    done = run_tool("fit_scaling", tmp_path / "runs.csv", "--metric", "loss", *options, "-o", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_answers_reach_report_and_terminal(tmp_path):
    surface(noise=0.002, sizes=8, points=12).to_csv(tmp_path / "runs.csv", index=False)
    command = ("fit_scaling", tmp_path / "runs.csv", "--metric", "loss", "--law", "additive", "isoflop")
    done = run_tool(*command, "--hold-out", "none", "--optimum", "tokens", "--resamples", "100", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "isoFLOP by akima: D* = " in done.stdout and "isoFLOP by parabola: D* = " in done.stdout
    report = (tmp_path / "report.md").read_text()
    for text in (
        "Approaches 1, 2 and 3",
        "in the field's form",
        "frontier by the additive law",
        "images per parameter",
    ):
        assert text in report
    record = json.loads((tmp_path / "fit.json").read_text())
    (law,) = record["quoted"]["laws"]
    assert law["constants"]["alpha"]["value"] == record["laws"][0]["parameters"]["alpha"]
    beyond = law["frontier"][-1]
    assert beyond["compute_ratio"] == pytest.approx(10) and beyond["metric"]["low"] < beyond["metric"]["high"]
    assert {iso["of"] for iso in record["isoflop"]} == {"images"}
    assert [each["name"][:2] for each in record["quoted"]["approaches"]] == ["1:", "2:", "3:"]
