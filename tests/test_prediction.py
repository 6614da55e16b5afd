"""Predictions for runs that were never made, against the law that made the data."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.model import flops
from fitscale.scaling.fit.prediction import (
    batch_of,
    describe,
    numbers_target,
    predict,
    refuse_other_unit,
    target,
    tokens_of,
)
from fitscale.scaling.fit.question import Question
from fitscale.scaling.rows.files import write_table
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.runs import collect
from fitscale.scaling.rows.table import validate
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


def surface():
    """A law of size and data, of tokens: Hoffmann et al. 2022, equation 10."""
    rng = np.random.default_rng(0)
    return validate(
        pd.DataFrame(
            [
                {"run": f"r{n:.0f}", "size": f"s{n:.0f}", "parameters": round(n), "images": round(d), "metric": "loss"}
                | {"step": round(d / 1e6), "train_flops": 6 * n * d}
                | {"value": (406.4 * n**-0.34 + 410.7 * d**-0.28 + 1.69) * np.exp(rng.normal(0, 0.0005))}
                for n in np.geomspace(1e8, 1e10, 5)
                for d in np.geomspace(1e9, 1e12, 5)
            ]
        )
    )


SURFACE = Question(metric="loss", laws=("additive", "power"), resamples=50)


def best_size(flops):
    return (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (flops / 6) ** (0.28 / 0.62)


@pytest.mark.parametrize(
    "asked",
    [
        {"parameters": 7e9, "images": 1.5e11},
        {"parameters": 7e9, "train_flops": 6 * 7e9 * 1.5e11},
        {"images": 1.5e11, "train_flops": 6 * 7e9 * 1.5e11},
    ],
)
def test_two_numbers_settle_the_third(asked):
    goal = numbers_target(surface(), **asked)
    assert (goal.parameters, goal.images) == (pytest.approx(7e9, rel=1e-6), pytest.approx(1.5e11, rel=1e-6))
    predictions, _ = predict(surface(), SURFACE, goal)
    additive = next(prediction for prediction in predictions if prediction.law == "additive")
    assert not additive.optimal and additive.train_flops == pytest.approx(6.3e21)
    low, high = additive.intervals[0.9]
    assert low < 406.4 * 7e9**-0.34 + 410.7 * 1.5e11**-0.28 + 1.69 < high
    assert {prediction.law for prediction in predictions} == {"additive", "power"}


@pytest.mark.parametrize("name", ["parameters", "images", "train_flops"])
def test_one_number_is_completed_along_the_frontier(name):
    flops = 1e21
    exact = {"train_flops": flops, "parameters": best_size(flops), "images": flops / 6 / best_size(flops)}
    predictions, whole = predict(surface(), SURFACE, numbers_target(surface(), **{name: exact[name]}))
    additive = next(prediction for prediction in predictions if prediction.law == "additive")
    assert additive.optimal and "compute-optimal" in describe(additive, "loss")
    for each in exact:
        assert getattr(additive, each) == pytest.approx(exact[each], rel=0.2)
    assert additive.median == pytest.approx(
        406.4 * exact["parameters"] ** -0.34 + 410.7 * exact["images"] ** -0.28 + 1.69, rel=0.005
    )
    laws = {prediction.law for prediction in predictions}
    assert laws == ({"additive", "power"} if name == "train_flops" else {"additive"})
    assert ("give --flops" in " ".join(map(str, whole.refusals))) == (name != "train_flops")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"train_flops": 1e15}, r"additive law: .* times below the least fitted compute"),
        ({"train_flops": 1e26}, r"times the largest fitted compute"),
        ({"parameters": 2e5, "images": 1e12}, "500.0 times below the least fitted parameters"),
        ({"parameters": 9e11, "images": 1e9}, "90.0 times the largest fitted parameters"),
        ({"parameters": 1e10, "images": 2e7}, "50.0 times below the least fitted data"),
    ],
)
def test_a_run_outside_what_was_fitted_is_refused_above_and_below(asked, message):
    question = replace(SURFACE, laws=("additive",))
    goal = numbers_target(surface(), **asked)
    with pytest.raises(Refusal, match=message) as caught:
        predict(surface(), question, goal)
    assert caught.value.code == "extrapolation"


def test_numbers_that_settle_nothing():
    for asked in ({}, {"parameters": 1e9, "images": 1e10, "train_flops": 6e19}):
        with pytest.raises(UserError, match="one or two of --parameters, --data and --flops"):
            numbers_target(surface(), **asked)


def test_a_table_in_another_unit_is_refused(sweep, table):
    near = load_config([str(sweep / "m-seed0" / "config.yaml")]).model
    for model in (LARGE, near):
        refuse_other_unit(table, model, TOKENS)
        refuse_other_unit(table, model, 16 * TOKENS)  # the run asked about may have longer images than the runs had
    refuse_other_unit(of_two_datasets(table), near, TOKENS)  # images of different lengths
    for factor in (0.5, 2.0, 256.0):  # MACs, or tokens for images
        with pytest.raises(Refusal, match="counts data or compute in another unit"):
            refuse_other_unit(table.assign(train_flops=table["train_flops"] * factor), near, TOKENS)
    texts = surface().assign(tokens=lambda rows: rows["images"])
    with pytest.raises(Refusal, match="the table counts tokens"):
        refuse_other_unit(texts, LARGE, TOKENS)


def test_numbers_from_the_shell(tmp_path):
    surface().to_csv(tmp_path / "texts.csv", index=False)
    command = ("predict", tmp_path / "texts.csv", "--metric", "loss", "--law", "additive")
    done = run_tool(*command, "--flops", "1e21", "-o", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    assert "additive law at its compute-optimal" in done.stdout
    assert json.loads((tmp_path / "p.json").read_text())["target"]["parameters"] is None
    for options, message in (
        (("--size", "xxl", "--steps", "10", "--batch", "256", "--tokens", "256"), "in another unit"),
        (("--size", "xxl", "--flops", "1e21"), "--size: give --steps with it"),
        (("--flops", "1e21", "--steps", "4"), "--steps: belongs to a --size"),
        (("--flops", "nan"), "--flops: nan is outside"),
        ((), "give --size and --steps, or one or two of"),
    ):
        done = run_tool(*command, *options)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
