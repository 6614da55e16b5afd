"""An asymmetric loss against scipy's expectiles and against the share of points below (a quantile)."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fitscale.scaling.fit.fitting import ResidualLoss, fit_law
from fitscale.scaling.fit.laws import LAWS
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.solver import solve
from fitscale.scaling.fit.study import study
from fitscale.scaling.fit.uncertainty import central, new_run_KN, resample
from fitscale.scaling.report.content import report_content
from fitscale.scaling.rows.table import validate

NOISE = 0.05


def rows(count=300):
    flops = np.geomspace(1e15, 1e19, count)
    noise = np.random.default_rng(0).normal(0, NOISE, count)
    names = {"run": [f"r{index}" for index in range(count)], "size": [f"s{index % 3}" for index in range(count)]}
    return pd.DataFrame({**names, "train_flops": flops, "value": 10 * (flops / 1e17) ** -0.1 * np.exp(noise)})


@pytest.mark.parametrize("above", [0.05, 0.3, 0.5, 0.8])
def test_a_constant_is_scipys_expectile(above):
    y_N = np.random.default_rng(1).gamma(2.0, size=50)

    def constant(theta_KP):
        return np.tile(theta_KP, (1, 50)), np.ones((len(theta_KP), 50, 1))

    theta_KP, _ = solve(constant, np.array([[1.0]]), y_N, np.array([-9.0]), np.array([9.0]), above=above)
    assert theta_KP[0, 0] == pytest.approx(stats.expectile(y_N, above), rel=1e-7)


@pytest.mark.parametrize("above", [0.1, 0.5, 0.9])
def test_with_a_small_corner_it_is_a_quantile(above):
    table = rows()
    fit = fit_law(LAWS["power"], table, ResidualLoss(huber=1e-4, above=above))
    assert np.mean(table["value"] < fit.metric(table)) == pytest.approx(above, abs=0.01)


@pytest.mark.parametrize("above", [0.1, 0.9])
def test_its_intervals_lie_around_it_and_a_new_run_where_runs_are(above):
    table = rows()
    fit = fit_law(LAWS["power"], table, ResidualLoss(above=above))
    draws = resample(fit, 200, seed=0)
    low, high = central(fit.named(draws.theta_KP)["a"])
    assert low < fit.named()["a"] < high
    low, high = central(new_run_KN(fit, draws, table, seed=0))
    assert 0.85 < np.mean((low < table["value"]) & (table["value"] < high)) < 0.95


def test_it_is_said_in_the_report():
    table = validate(rows(60).assign(metric="fd", parameters=1e6, images=1e6))
    said = {}
    for above in (0.1, 0.5):
        asked = Question(laws=("power",), points="all", hold_out=(), resamples=50, loss=ResidualLoss(above=above))
        (law,) = report_content(study(table, asked))["laws"]
        said[above] = law["fitted"]
    assert "asymmetric least squares, what is above the law counting 0.111 times" in said[0.1]
    assert "Fitted by least squares on ln(fd)" in said[0.5]
