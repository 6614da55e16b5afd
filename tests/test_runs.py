"""Run directories -> runs table: real files, written as the trainer and the evaluator write them."""

import math
import subprocess
import sys

import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl
from fitscale.config.load import load_config
from fitscale.model import flops
from fitscale.scaling.rows.files import read_table, write_table
from fitscale.scaling.rows.runs import collect, load_table
from fitscale.scaling.rows.table import data_hash
from tests.synthetic_runs import KEY, TOKENS, write_sweep


def law(train_flops, parameters):
    return 50 * (train_flops / 1e12) ** -0.3


def test_one_row_per_evaluation_with_everything_the_directory_holds(tmp_path):
    (run,) = write_sweep(tmp_path, law, sizes=("s",), points=4)
    table = collect([tmp_path])
    assert len(table) == 12 and set(table["metric"]) == {"fd", "validation_loss", "recognised"}
    row = table[table["metric"] == "fd"].iloc[-1]
    model = load_config([str(run.config)]).model
    assert (row["run"], row["size"], row["family"], row["seed"]) == ("s-seed0", "s", "fitv2", 0)
    assert (row["width"], row["depth"], row["heads"], row["patch"]) == (64, 3, 4, 1)
    assert row["parameters"] == flops.parameters(model)
    assert row["tokens_per_image"] == TOKENS
    assert row["linear_macs"] == flops.linear_macs(model, TOKENS)
    assert row["attention_macs"] == pytest.approx(flops.mixing_macs(model, TOKENS), rel=1e-9)
    assert row["train_flops"] == 6 * (row["linear_macs"] + row["attention_macs"]) * row["images"]
    assert row["paper_flops"] == 3 * flops.paper_macs(model) * row["images"]
    assert row["status"] == "finished" and row["device"] == "cpu"
    assert {name: row[f"key_{name}"] for name in KEY} == {**KEY, "steps": "50", "guidance": "1.0"}


def test_missing_stays_missing_through_csv_and_parquet(tmp_path):
    (run,) = write_sweep(tmp_path / "sweep", law, sizes=("s",), points=1)
    run.environment.unlink()
    append_jsonl(
        run.evaluations, {"step": 4000, "metric": "fd", "value": None, "train_flops": 1e12, "key": {"steps": 9}}
    )
    for name in ("runs.csv", "runs.parquet"):
        write_table(collect([tmp_path / "sweep"]), tmp_path / name)
        row = read_table(tmp_path / name).iloc[-1]
        assert math.isnan(row["value"]) and math.isnan(row["linear_macs"]) and pd.isna(row["samples"])
        assert pd.isna(row["device"]) and pd.isna(row["images"]) and row["key_steps"] == "9"


def test_tables_survive_their_files_exactly(tmp_path):
    write_sweep(tmp_path / "sweep", law, run_noise=0.1)
    table = collect([tmp_path / "sweep"])
    for name in ("runs.csv", "runs.parquet"):
        write_table(table, tmp_path / name)
        pd.testing.assert_frame_equal(load_table([tmp_path / name]), table)
    assert data_hash(table.sample(frac=1, random_state=0)) == data_hash(table)
    assert data_hash(table.assign(value=table["value"] * (1 + 1e-12))) != data_hash(table)


def test_runs_of_two_sweeps_keep_their_names_apart(tmp_path):
    for sweep in ("a", "b"):
        write_sweep(tmp_path / sweep, law, sizes=("s",))
    assert set(collect([tmp_path / "a", tmp_path / "b"])["run"]) == {"a/s-seed0", "b/s-seed0"}
    assert len(collect([tmp_path / "a", tmp_path / "a" / "s-seed0"])) == len(collect([tmp_path / "a"]))


def test_a_run_with_steps_left_is_unfinished(tmp_path):
    (run,) = write_sweep(tmp_path, law, sizes=("s",), points=3)
    lines = run.evaluations.read_text().splitlines(keepends=True)
    run.evaluations.write_text("".join(lines[:-3]))
    assert set(collect([tmp_path])["status"]) == {"unfinished"}


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a run directory"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken}", r"evaluations\.jsonl, line 1: not JSON"),
        ("[1]", r"evaluations\.jsonl, line 1: must hold a JSON object"),
        ('{"key": [1]}', r"evaluations\.jsonl, line 1: key must hold a JSON object"),
        ('{"step": "x", "metric": "fd"}', r"evaluations\.jsonl: line 1, column step: 'x' is not a whole number"),
        ('{"metric": "fd", "value": {"a": 1}}', r"line 1, column value: {'a': 1} is not a number"),
        ('{"metric": "fd", "value": Infinity}', r"line 1, column value: inf is not a number"),
        ('{"metric": "fd", "images": true}', r"line 1, column images: True is not a whole number"),
        ('{"metric": "fd", "images": 5, "tokens": "x"}', r"line 1, column tokens: 'x' is not a number of tokens"),
        ('{"metric": "a\\nb"}', r"line 1, column metric: 'a\\nb' is not printable text"),
        ('{"metric": "fd", "key": {"a\\nb": 1}}', r"is named 'key_a\\nb'; a name is printable text"),
        ('{"metric": "fd", "value": ' + "9" * 5000 + "}", "line 1"),
    ],
)
def test_what_is_no_evaluation_is_named(tmp_path, line, message):
    (run,) = write_sweep(tmp_path, law, sizes=("s",), points=1)
    run.evaluations.write_text(line + "\n")
    with pytest.raises(UserError, match=message) as refused:
        collect([tmp_path])
    assert len(str(refused.value)) < 1200


def test_an_environment_that_is_no_object_is_named(tmp_path):
    (run,) = write_sweep(tmp_path, law, sizes=("s",), points=1)
    run.environment.write_text("[]")
    with pytest.raises(UserError, match=r"environment\.json: must hold a JSON object"):
        collect([tmp_path])


def test_collect_runs_from_the_shell(tmp_path):
    write_sweep(tmp_path / "sweep", law, sizes=("xs", "s"))
    command = [sys.executable, "tools/collect_runs.py", str(tmp_path / "sweep"), "-o", str(tmp_path / "runs.csv")]
    assert "sizes s, xs" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert len(read_table(tmp_path / "runs.csv")) == 30
    command[2] = str(tmp_path / "nothing")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert [line.split()[0] for line in failed.stderr.splitlines()] == ["loading", "error:"]


def test_run_directory_is_found_as_itself(tmp_path):
    (run,) = write_sweep(tmp_path, law, sizes=("s",))
    assert set(collect([run.path])["run"]) == {"s-seed0"}
