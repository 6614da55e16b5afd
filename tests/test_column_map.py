"""Other people's tables: column maps, and the list of problems."""

import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.scaling.rows.column_map import read_mapped
from fitscale.scaling.rows.runs import collect
from fitscale.scaling.rows.selection import correlation, problems
from fitscale.scaling.rows.table import validate
from tests.programs import run_tool
from tests.synthetic_runs import write_sweep

WANDB = """Name,_step,eval/fd,eval/loss,params_m,images,gmacs,sampler
a,1000,40.5,0.61,10,64000,1.5,euler
a,2000,,0.55,10,128000,1.5,euler
b,1000,30.25,0.5,20,64000,3,heun
"""
MAP = """
run: Name
size: "=b"
step: _step
parameters: [1.0e+6, params_m]
images: images
train_flops: [6.0e+9, gmacs, images]
key_sampler: sampler
seed: 3
metrics: {fd: eval/fd, validation_loss: eval/loss}
"""


def files(tmp_path, text=WANDB, columns=MAP):
    (tmp_path / "export.csv").write_text(text)
    (tmp_path / "map.yaml").write_text(columns)
    return tmp_path / "export.csv", tmp_path / "map.yaml"


def test_a_wandb_export_becomes_a_runs_table(tmp_path):
    table = read_mapped(*files(tmp_path))
    assert list(zip(table["run"], table["metric"], table["value"], strict=True)) == [
        ("a", "fd", 40.5),
        ("b", "fd", 30.25),
        ("a", "validation_loss", 0.61),
        ("a", "validation_loss", 0.55),
        ("b", "validation_loss", 0.5),
    ]
    assert list(table["train_flops"]) == [5.76e14, 1.152e15, 5.76e14, 1.152e15, 1.152e15]
    assert (
        set(table["size"]) == {"b"} and set(table["seed"]) == {3} and set(table["parameters"]) == {10000000, 20000000}
    )
    assert table["device_hours"].isna().all() and table["width"].isna().all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (MAP.replace("eval/fd", "eval/fid"), "no column 'eval/fid' for fd; it has: Name, _step"),
        (MAP.replace("run: Name\n", ""), "columns run are missing"),
        (MAP.replace("step: _step", "steps: _step"), "unknown columns steps; valid: run, family"),
        ("- 1", "a column map holds"),
        ("a: [", "not a readable column map"),
    ],
)
def test_wrong_maps_are_named(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read_mapped(*files(tmp_path, columns=columns))


def test_check_finds_what_would_stop_a_fit(tmp_path):
    table = read_mapped(*files(tmp_path))
    found = problems(table)
    assert "fd: key_sampler differs, choose one before fitting: euler, heun" in found
    broken = validate(table.assign(value=[0.0, None, 0.6, 0.7, 1.0], status="unfinished"))
    text = "\n".join(problems(broken))
    nameless = "\n".join(problems(broken.assign(run=broken["run"].where(broken["metric"] != "fd"), size=None)))
    assert "fd: run is missing in 2 of 2 rows" in nameless and "fd: size is missing in 2 of 2 rows" in nameless
    assert "fd: value is missing in 1 of 2 rows" in text and "fd: value is not above 0 in 1 rows" in text
    assert "validation_loss: the last checkpoint is not the best in a" in text and "unfinished runs: a, b" in text


def test_a_sound_sweep_has_no_problems(tmp_path):
    write_sweep(tmp_path, lambda flops, _: 50 * (flops / 1e12) ** -0.3)
    table = collect([tmp_path])
    assert problems(table) == []
    assert correlation(table[table["metric"] == "fd"]) < -0.9
    guided = table.assign(value=table["value"] / 10, key_guidance="2.0")
    both = problems(pd.concat([guided, table], ignore_index=True))
    assert any("key_guidance differs" in problem for problem in both) and "not the best" not in "".join(both)


def test_check_from_the_shell(tmp_path):
    export, columns = files(tmp_path)
    command = ["collect_runs", str(export), "--columns", str(columns), "--check"]
    done = run_tool(*command)
    assert done.returncode == 3 and "fd: 2 rows of 2 runs" in done.stdout and "problem: fd: key_sampler" in done.stdout
    nothing = run_tool(*command[:-1])
    assert nothing.returncode == 2 and "nothing to do" in nothing.stderr
    assert pd.read_csv(export).shape == (3, 8)
