"""Scaling studies from run directories to reports; every refusal with its message."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.study import study
from fitscale.scaling.report.content import report_content
from fitscale.scaling.report.files import fit_record
from fitscale.scaling.rows.runs import collect
from tests.synthetic_runs import frontier_law, surface_rows, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, frontier_law, steps=20000, points=6, run_noise=0.01, point_noise=0.01)
    return folder


@pytest.fixture(scope="module")
def table(sweep):
    return collect([sweep])


def refusal(table, **choices):
    answer = study(table, Question(**{"resamples": 50, **choices}))
    assert not answer.results
    assert len(answer.refusals) == 1
    return answer.refusals[0].code, answer.refusals[0].message


def test_the_largest_size_is_predicted_from_the_others(table):
    answer = study(table, Question(laws=("offset", "power"), resamples=100))
    assert answer.held_out == ["l"] and answer.sizes == ["xs", "s", "m", "l"]
    assert not answer.rows.loc[answer.rows["size"] == "l", "used"].any()
    for result in answer.results:
        held_out = table[(table["metric"] == "fd") & (table["size"] == "l")]
        assert list(result.predictions["value"]) == list(held_out["value"])
        errors = result.predictions["predicted"] / result.predictions["value"] - 1
        np.testing.assert_allclose(result.predictions["error"], errors)
        assert (result.predictions["low"] < result.predictions["high"]).all()
    assert [result.error for result in answer.results] == sorted(result.error for result in answer.results)


def test_the_held_out_size_never_reaches_the_fit(table):
    changed = table.assign(value=np.where(table["size"] == "l", table["value"] * 3, table["value"]))
    question = Question(laws=("offset",), resamples=10)
    before, after = (study(rows, question).results[0].fit for rows in (table, changed))
    np.testing.assert_array_equal(before.theta_P, after.theta_P)


def test_points_of_a_run_early_in_training_do_not_count_on_the_frontier(table):
    predictions = study(table, Question(resamples=10)).results[0].predictions
    assert not predictions["chosen"].iloc[0] and predictions["chosen"].iloc[-1]


def test_a_law_of_size_and_data_answers_for_points_above_the_frontier():
    question = Question(metric="loss", laws=("additive", "power"), extrapolate=True, resamples=100)
    answer = study(surface_rows(), question)
    results = {result.fit.law.name: result for result in answer.results}
    assert results["additive"].predictions["chosen"].all() and not results["power"].predictions["chosen"].any()
    assert results["additive"].error == pytest.approx(0.22, abs=0.03) and results["power"].error is None
    cautions = {caution.code: caution.message for caution in answer.cautions}
    assert cautions["missed"].startswith("additive law: 7 of 7 held-out points lie outside the 90 % interval")
    assert "no point of z4 is on the frontier" in cautions["not_on_frontier"]
    headline = next(line for line in report_content(answer)["headlines"] if line.startswith("Additive"))
    assert "OUTSIDE the 90 % interval" in headline
    alone = study(surface_rows(), replace(question, laws=("additive",)))
    assert "not_on_frontier" not in {caution.code for caution in alone.cautions}


def test_laws_are_ranked_by_the_points_that_count_for_all_of_them(table):
    answer = study(table, Question(laws=("power", "additive"), extrapolate=True, resamples=10))
    assert len(answer.results) == 2
    shared = next(result for result in answer.results if result.fit.law.name == "power").predictions["chosen"]
    errors = [np.log1p(result.predictions.loc[shared, "error"]).abs().mean() for result in answer.results]
    assert 0 < shared.sum() < len(shared) and errors == sorted(errors)


def test_the_answer_does_not_depend_on_the_order_of_rows(table):
    question = Question(laws=("offset",), resamples=20)
    first, second = (study(rows, question) for rows in (table, table.sample(frac=1, random_state=2)))
    assert fit_record(first)["laws"] == fit_record(second)["laws"]


def test_refused_metric_that_nobody_measured(table):
    assert refusal(table, metric="fid") == (
        "no_rows",
        "no row has metric fid; the table holds: fd, recognised, validation_loss",
    )


def test_refused_filter_without_rows(table):
    code, message = refusal(table, where={"key_guidance": "1.5"})
    assert code == "no_rows" and message == "no fd row has key_guidance = 1.5; there is: 1.0"
    with pytest.raises(UserError, match="--where guidance: no such column"):
        study(table, Question(where={"guidance": "1"}))


def test_refused_mixed_comparability_keys(table):
    mixed = table.assign(key_guidance=np.where(table["size"] == "s", "1.5", "1.0"))
    code, message = refusal(mixed)
    assert code == "mixed_keys" and "key_guidance: 1.0, 1.5" in message and "--where key_guidance=1.0" in message
    assert study(mixed, Question(where={"key_guidance": "1"}, resamples=10)).sizes == ["xs", "m", "l"]


def test_refused_partly_missing_keys(table):
    code, message = refusal(table.assign(key_sampler=table["key_sampler"].where(table["size"] != "s")))
    assert code == "mixed_keys" and "key_sampler: euler, missing" in message


@pytest.mark.parametrize("column", ["family", "patch"])
def test_refused_mixed_models(table, column):
    values = {"family": ("fit", "fitv2"), "patch": (1, 2)}[column]
    code, message = refusal(table.assign(**{column: np.where(table["size"] == "s", *values)}))
    assert code == "mixed_models" and f"different {column}" in message


def test_refused_missing_values_unless_left_out_by_name(table):
    first_fd = table.index[table["metric"] == "fd"][2]
    holed = table.copy()
    holed.loc[first_fd, "value"] = np.nan
    code, message = refusal(holed)
    assert code == "missing_values" and "l-seed0 step" in message and "--drop-missing" in message
    answer = study(holed, Question(drop_missing=True, resamples=10))
    assert any(caution.code == "left_out" and "l-seed0 step" in caution.message for caution in answer.cautions)


@pytest.mark.parametrize("column", ["run", "size"])
def test_refused_rows_of_no_run_or_size(table, column):
    holed = table.assign(**{column: table[column].where(table["step"] != 20000)})
    code, message = refusal(holed)
    assert code == "missing_values" and f"4 rows have no {column}: " in message
    answer = study(holed, Question(drop_missing=True, resamples=10))
    assert len(answer.rows) == 20 and any(f"{column} missing" in caution.message for caution in answer.cautions)


def test_refused_non_positive_values(table):
    code, message = refusal(table.assign(value=table["value"].where(table["step"] != 20000, 0.0)))
    assert code == "non_positive" and "step 20000" in message


def test_refused_conflicting_rows_and_repeats_counted_once(table):
    fd = table[table["metric"] == "fd"]
    repeated = pd.concat([table, fd.iloc[:1]])
    answer = study(repeated, Question(resamples=10))
    assert len(answer.rows) == len(fd) and any(caution.code == "repeated" for caution in answer.cautions)
    code, message = refusal(pd.concat([table, fd.iloc[:1].assign(value=1.0)]))
    assert code == "conflicting_rows" and "different values" in message
    twice = pd.concat([table, fd.iloc[[0, 0, 0]].assign(value=[float(fd["value"].iloc[0]), 1.0, 1.0])])
    assert [refusal(rows)[0] for rows in (twice, twice.iloc[::-1])] == ["conflicting_rows"] * 2


def test_refused_too_few_sizes(table):
    two = table[table["size"].isin(["s", "l"])]
    code, message = refusal(two)
    assert code == "one_size" and "only size s is left to fit" in message
    with pytest.raises(UserError, match="--hold-out b: no such size; valid: largest, none, xs, s, m, l"):
        study(table, Question(hold_out=("b",)))


def test_refused_frontier_of_one_size(table):
    worse = table.assign(value=table["value"] * np.where(table["size"].isin(["s", "m"]), 50.0, 1.0))
    code, message = refusal(worse, laws=("power",))
    assert code == "one_size" and "power law: all 6 points on the frontier are of size xs" in message


def test_few_runs_are_those_that_the_law_is_fitted_to(table):
    more = pd.concat([table, *(table[table["size"] == "m"].assign(run=f"m-{i}", size=f"m{i}", value=90) for i in "ab")])
    question = Question(laws=("power",), hold_out=("l",), resamples=10)
    cautions = {caution.code: caution.message for caution in study(more, question).cautions}
    assert cautions["few_runs"].startswith("only 3 runs are fitted")
    every = study(more, replace(question, points="all"))
    assert "few_runs" not in {caution.code for caution in every.cautions}


def test_refused_extrapolation_unless_agreed_to(table):
    far = table.assign(train_flops=np.where(table["size"] == "l", 20.0, 1.0) * table["train_flops"])
    code, message = refusal(far)
    assert code == "extrapolation" and "--extrapolate" in message
    assert study(far, Question(extrapolate=True, resamples=10)).results


def test_laws_that_nobody_named_and_that_cannot_be_fitted_are_no_refusals(table):
    few = table[table["size"].isin(["xs", "s", "m"])]
    answer = study(few, Question(laws=("auto",), hold_out=("largest",), resamples=50))
    assert answer.results and not answer.refusals
    assert {"additive", "offset"} & {str(refusal).split()[0] for refusal in answer.unfitted}
    named = study(few, Question(laws=("auto", "additive"), hold_out=("largest",), resamples=50))
    assert ["additive" in str(refusal) for refusal in named.refusals] == [True]
    assert "additive" not in " ".join(map(str, named.unfitted))


def test_refused_law_leaves_the_other(table):
    last = study(table, Question(points="last", laws=("offset", "power"), resamples=10))
    assert [result.fit.law.name for result in last.results] == ["power"]
    assert last.refusals[0].code == "too_few_points"
    (law,) = report_content(last)["laws"]
    assert "all taken for that from run to run" in law["scatter"]


def test_an_unidentified_floor_is_not_printed(tmp_path):
    write_sweep(tmp_path, lambda flops, _: 50 * (flops / 1e12) ** -0.3 + 0.8, run_noise=0.01, point_noise=0.04, seed=5)
    answer = study(collect([tmp_path]), Question(laws=("offset",), resamples=50))
    (result,) = answer.results
    assert not result.floor.identified
    assert any(caution.code == "floor" for caution in answer.cautions)
    (law,) = report_content(answer)["laws"]
    assert law["lines"][-1][:2] == ["e", "not identified"]


def test_a_floor_above_the_best_measurement_is_a_misfit(table):
    fd = table[table["metric"] == "fd"].sort_values("train_flops")
    floored = 30 * (fd["train_flops"] / fd["train_flops"].min()) ** -0.9 + 6
    bent = fd.assign(value=floored.where(fd["train_flops"] < fd["train_flops"].max(), 4.0))
    answer = study(bent, Question(laws=("offset",), hold_out=(), points="all", resamples=20))
    assert answer.results[0].fit.named()["e"] > 4
    (caution,) = [caution for caution in answer.cautions if caution.code == "misfit"]
    assert caution.message.endswith("above the best measurement 4: it does not fit")
