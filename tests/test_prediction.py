"""Predictions for runs that were never made, against the law that made the data."""

import json

import numpy as np
import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.model import flops
from fitscale.scaling.fit.prediction import batch_of, describe, predict, target, tokens_of
from fitscale.scaling.fit.question import Question
from fitscale.scaling.rows.files import write_table
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.runs import collect
from tests.programs import run_tool
from tests.synthetic_runs import TOKENS, write_sweep

PATCH_1 = ("model.patch_size=1", "model.in_channels=1")
XXL = load_config(["configs/model/xxl.yaml"]).model
LARGE = load_config(["configs/model/xxl.yaml", *PATCH_1]).model  # of the same patches as the runs
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
    goal = target(LARGE, steps=4, batch=64, tokens=TOKENS, squared_tokens=TOKENS**2)
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
    goal = target(LARGE, steps=4000, batch=64, tokens=TOKENS, squared_tokens=TOKENS**2)
    with pytest.raises(Refusal, match="say so with --extrapolate"):
        predict(table, Question(resamples=10), goal)


def test_predict_from_the_shell(sweep, tmp_path):
    command = ["predict", str(sweep), "--size", "configs/model/xxl.yaml", *PATCH_1, "--steps", "40", "--points", "all"]
    refused = run_tool(*command)
    assert refused.returncode == 2 and "--extrapolate" in refused.stderr
    done = run_tool(*command, "--extrapolate", "-o", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    assert "the choice of law alone moves fd" in done.stdout
    assert len(json.loads((tmp_path / "p.json").read_text())["predictions"]) == 2


def of_two_datasets(table):
    """The runs, and again with four times the tokens and another reference."""
    other = table.assign(
        run="large-" + table["run"],
        tokens_per_image=4 * TOKENS,
        batch=128,
        attention_macs=16 * table["attention_macs"],
        key_reference="sha256:abcd",
    )
    return pd.concat([table, other], ignore_index=True)


def test_the_target_is_like_the_rows_that_were_chosen(table, tmp_path):
    write_table(table, tmp_path / "one.csv")
    write_table(of_two_datasets(table), tmp_path / "two.csv")
    options = ("--size", "configs/model/xxl.yaml", *PATCH_1, "--steps", "4", "--law", "power", "--where")
    alone, chosen = (
        run_tool("predict", tmp_path / f"{name}.csv", *options, "key_reference=sha256:beef") for name in ("one", "two")
    )
    assert alone.returncode == 0 and alone.stdout == chosen.stdout


def test_runs_on_images_of_different_sizes_need_tokens_to_be_given(table):
    mixed = of_two_datasets(table).assign(key_reference="sha256:beef", batch=64)
    with pytest.raises(UserError, match="images of 40 to 160 tokens; give --tokens"):
        tokens_of(mixed)


@pytest.mark.parametrize(("column", "value"), [("patch", 4), ("family", "fit")])
def test_a_target_of_another_kind_than_the_runs_is_refused(table, column, value):
    goal = target(LARGE, steps=4, batch=64, tokens=TOKENS, squared_tokens=TOKENS**2)
    with pytest.raises(Refusal, match=f"{column} .* the runs' is {value}") as caught:
        predict(table.assign(**{column: value}), QUESTION, goal)
    assert caught.value.code == "mixed_models"


@pytest.mark.parametrize("option", ["--steps", "--batch", "--tokens"])
@pytest.mark.parametrize("value", ["0", "-10"])
def test_a_target_without_steps_images_or_tokens_is_one_message(sweep, option, value):
    size = ("--size", "configs/model/xxl.yaml", *PATCH_1, "--steps", "4")
    done = run_tool("predict", sweep, *size, option, value)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {option}: ") and done.stdout == ""


@pytest.mark.parametrize(
    "tool", [("predict", "--size", "configs/model/xxl.yaml", *PATCH_1, "--steps", "4"), ("holdout",)]
)
def test_an_answer_that_cannot_be_written_is_one_message(sweep, tmp_path, tool):
    name, *options = tool
    done = run_tool(name, sweep, *options, "--law", "power", "-o", tmp_path)
    assert done.returncode == 2 and done.stderr.endswith(f"error: {tmp_path}: cannot be written (Is a directory)\n")
