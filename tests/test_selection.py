"""The rows of a question: what keeps them from being fitted, asked for and listed."""

import numpy as np
import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.study import study
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.runs import collect
from fitscale.scaling.rows.selection import correlation, problems, select, size_order
from fitscale.scaling.rows.table import data_column, validate
from tests.programs import run_tool
from tests.synthetic_runs import write_sweep


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, lambda flops, _: 50 * (flops / 1e12) ** -0.3, steps=20000, points=6)
    return collect([folder])


def test_refused_rows_of_no_step_where_the_step_decides(table):
    holed = table.assign(step=table["step"].where(table["size"] != "l"))
    assert len(select(holed, "fd", {}).rows) == 24
    with pytest.raises(Refusal, match="6 rows have no step"):
        select(holed, "fd", {}, from_step=5000)
    kept = select(holed, "fd", {}, from_step=5000, drop_missing=True)
    assert set(kept.rows["size"]) == {"xs", "s", "m"} and "step missing" in kept.cautions[1].message


def test_cautions_name_unfinished_runs_and_mixed_recipes(table):
    changed = table.assign(
        status=np.where(table["size"] == "s", "unfinished", "finished"), lr=np.where(table["size"] == "m", 1e-4, 2e-4)
    )
    cautions = {caution.code: caution.message for caution in select(changed, "fd", {}).cautions}
    assert cautions["unfinished"] == "runs with steps left: s-seed0"
    assert "0.0001, 0.0002" in cautions["mixed_recipe"]


def two_samplers():
    """Two runs, one of them measured at two steps; the metric fd with two samplers."""
    columns = {"run": list("abaab"), "size": "b", "step": [1000, 1000, 1000, 2000, 1000], "parameters": 10}
    columns |= {"images": 64000, "train_flops": [1e14, 2e14, 1e14, 2e14, 2e14], "metric": ["fd"] * 2 + ["loss"] * 3}
    columns |= {"value": [40.5, 30.25, 0.61, 0.55, 0.5], "key_sampler": ["euler", "heun", "euler", "euler", "heun"]}
    return validate(pd.DataFrame(columns))


def test_check_finds_what_would_stop_a_fit():
    table = two_samplers()
    (fd, loss) = problems(table)
    differs = "rows were measured in different ways and cannot be compared (key_sampler: euler, heun); choose with "
    assert fd == f"fd: {differs}--where key_sampler=euler" and loss.startswith("loss: rows were measured in different")
    broken = validate(table.assign(value=[0.0, None, 0.6, 0.7, 1.0], status="unfinished", images=None))
    text = "\n".join(problems(broken))
    assert "fd: 1 rows have no value: b step 1000; complete the table" in text
    assert "fd: laws are fitted on logarithms, but value or train_flops is not above 0 in: a step 1000" in text
    assert "fd: images is missing in 2 of 2 rows" in text and "parameters is missing" not in text
    assert "loss: the last checkpoint is not the best in a" in text and "unfinished runs: a, b" in text
    nameless = "\n".join(problems(table.assign(run=table["run"].where(table["metric"] != "fd"), size=None)))
    assert "fd: 2 rows have no run or size" in nameless and "loss: 3 rows have no size" in nameless
    twice = pd.concat([table, table.iloc[[0, 1]].assign(value=[40.5, 31])])
    assert [problem.split(":")[1] for problem in problems(twice)][:3] == [
        " the same measurement has different values",
        " rows were measured in different ways and cannot be compared (key_sampler",
        " identical rows",
    ]


def test_a_sound_sweep_has_no_problems(table):
    assert problems(table) == []
    assert correlation(table[table["metric"] == "fd"]) < -0.9
    guided = table.assign(value=table["value"] / 10, key_guidance="2.0")
    both = problems(pd.concat([guided, table], ignore_index=True))
    assert any("(key_guidance: 1.0, 2.0)" in problem for problem in both) and "not the best" not in "".join(both)


def test_rows_that_are_all_left_out_are_refused(table):
    with pytest.raises(Refusal, match="no row of metric fd is left") as caught:
        select(table.assign(value=np.nan), "fd", {}, drop_missing=True)
    assert caught.value.code == "no_rows"


def test_check_from_the_shell(tmp_path):
    two_samplers().to_csv(tmp_path / "runs.csv", index=False)
    done = run_tool("collect_runs", tmp_path / "runs.csv", "--check")
    assert done.returncode == 3 and "fd: 2 rows of 2 runs" in done.stdout and "problem: fd: rows were" in done.stdout
    nothing = run_tool("collect_runs", tmp_path / "runs.csv")
    assert nothing.returncode == 2 and "nothing to do" in nothing.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv"}


def test_rows_are_chosen_by_any_column(table):
    labelled = validate(table.assign(label_role=np.where(table["size"] == "l", "test", "fit"), tokens=None))
    of_s, of_m = (str(table.loc[table["size"] == size, "parameters"].iloc[0]) for size in ("s", "m"))
    for where, sizes in (
        ({"role": "test"}, {"l"}),
        ({"label_role!": "fit"}, {"l"}),
        ({"size!": "l"}, {"xs", "s", "m"}),
        ({"step>": "2e4", "parameters<": of_s}, {"xs", "s"}),
        ({"parameters >": f" {of_m}.0 "}, {"m", "l"}),
        ({"key_guidance": "1"}, {"xs", "s", "m", "l"}),
        ({"train_flops": str(table["train_flops"].iloc[0])}, {table["size"].iloc[0]}),
    ):
        assert set(select(labelled, "fd", where).rows["size"]) == sizes, where
    with pytest.raises(UserError, match="--where step>=many: give a number"):
        select(table, "fd", {"step>": "many"})
    with pytest.raises(UserError, match="--where steps: no such column; valid: run"):
        select(table, "fd", {"steps>": "1"})


def test_parameters_are_needed_where_a_law_needs_them(table):
    unknown = table.assign(parameters=None)
    selection = select(validate(unknown), "fd", {})
    assert size_order(selection.rows) == ["xs", "s", "m", "l"]
    assert [caution.code for caution in selection.cautions] == ["no_parameters"]
    answer = study(validate(unknown), Question(laws=("power", "additive"), resamples=20))
    assert answer.held_out == ["l"] and [result.name for result in answer.results] == ["power"]
    assert "column parameters is missing" in answer.refusals[0].message


def test_tokens_are_the_data_of_language_models_and_never_mixed_with_images(table):
    language = validate(table.assign(tokens=table["images"] * 7, images=None))
    assert data_column(language) == "tokens" and data_column(table) == "images"
    assert list(select(language, "fd", {}).rows["images"]) == list(7 * table.loc[table["metric"] == "fd", "images"])
    mixed = table.assign(images=table["images"].where(table["size"] != "s"), tokens=table["images"])
    with pytest.raises(Refusal, match="data are counted in images, but in tokens in: s-seed0") as caught:
        select(validate(mixed), "fd", {})
    assert caught.value.code == "mixed_models"
