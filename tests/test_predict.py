"""Predictions for runs that were never made, against the law that made the data."""

import json

import numpy as np
import pytest

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.model import flops
from fitscale.scaling.predict import batch_of, describe, predict, target, tokens_of
from fitscale.scaling.refusal import Refusal
from fitscale.scaling.runs import collect
from fitscale.scaling.study import Question
from tests.programs import run_tool
from tests.synthetic_runs import TOKENS, write_sweep

XXL = load_config(["configs/model/xxl.yaml"]).model
QUESTION = Question(laws=("offset", "power"), points="all", resamples=200, extrapolate=True)


def law(train_flops, parameters=0):
    return 30 * (train_flops / 1e13) ** -0.4 + 6


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, law, run_noise=0.01, point_noise=0.01)
    return folder


@pytest.fixture(scope="module")
def table(sweep):
    return collect([sweep])


def test_the_target_costs_what_training_it_would():
    goal = target(XXL, steps=1000, batch=256, tokens=256, squared_tokens=256**2)
    assert goal.train_flops == pytest.approx(flops.train_flops(XXL, 256) * 256_000, rel=1e-12)
    assert goal.parameters == 2_971_928_080 and goal.images == 256_000


def test_tokens_and_batch_come_from_the_runs(table):
    assert tokens_of(table) == pytest.approx((TOKENS, TOKENS**2))
    assert batch_of(table) == 64
    with pytest.raises(UserError, match="give --tokens"):
        tokens_of(table.assign(tokens_per_image=np.nan))
    with pytest.raises(UserError, match="2 different batch sizes; give --batch"):
        batch_of(table.assign(batch=[32] + [64] * (len(table) - 1)))


def test_prediction_of_a_larger_run(table):
    goal = target(XXL, steps=4, batch=64, tokens=TOKENS, squared_tokens=TOKENS**2)
    predictions, _ = predict(table, QUESTION, goal)
    offset = next(prediction for prediction in predictions if prediction.law == "offset")
    low, high = offset.intervals[0.9]
    inner_low, inner_high = offset.intervals[0.5]
    assert low < inner_low < offset.median < inner_high < high
    assert low < law(goal.train_flops) < high
    fd = table[table["metric"] == "fd"]
    assert offset.compute_ratio == pytest.approx(goal.train_flops / fd["train_flops"].max())
    assert offset.parameter_ratio == pytest.approx(goal.parameters / fd["parameters"].max())
    assert offset.held_out == "l" and abs(offset.held_out_error) < 0.2
    assert set(offset.without_a_run) == set(fd["run"])
    assert "with l held out it erred by" in describe(offset, "fd")


def test_far_predictions_must_be_asked_for(table):
    goal = target(XXL, steps=4000, batch=64, tokens=TOKENS, squared_tokens=TOKENS**2)
    with pytest.raises(Refusal, match="say so with --extrapolate"):
        predict(table, Question(resamples=10), goal)


def test_predict_from_the_shell(sweep, tmp_path):
    command = ["predict", str(sweep), "--size", "xxl", "--steps", "40", "--points", "all"]
    refused = run_tool(*command)
    assert refused.returncode == 2 and "--extrapolate" in refused.stderr
    done = run_tool(*command, "--extrapolate", "-o", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    assert "the choice of law alone moves fd" in done.stdout
    assert len(json.loads((tmp_path / "p.json").read_text())["predictions"]) == 2
