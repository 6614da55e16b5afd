"""Other people's tables by column maps."""

import pytest

from fitscale.config.errors import UserError
from fitscale.scaling.rows.files import read_mapped

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
        (MAP.replace("train_flops: [6.0e+9, gmacs, images]\n", ""), "columns train_flops are missing"),
        (MAP.replace("step: _step", "steps: _step"), "unknown columns steps; valid: run, family"),
        ("- 1", "a column map holds"),
        ("a: [", "not a readable column map"),
        ("[" * 10_000, "not a readable column map"),
        ("a: 2026-99-99", "not a readable column map"),
        ("\0", "is not text in UTF-8"),
        ("a: b\n" * 20_000, "more than 65,536 bytes"),
        (MAP.replace("seed: 3", "seed: {a: b}"), "seed: dict is no column, number, =text or list of them"),
        (MAP.replace("seed: 3", "seed: [[_step]]"), "seed: list is no column, number"),
        (MAP.replace("seed: 3", "seed: .inf"), "line 2, column seed: inf is not a whole number"),
        (MAP.replace("seed: 3", "seed: sampler"), "line 2, column seed: 'euler' is not a whole number"),
        (MAP.replace("seed: 3", "seed: [2, sampler]"), "line 2, column sampler: 'euler' is not a number"),
        (MAP.replace("fd: eval/fd", "1: eval/fd"), "a column map holds"),
        (MAP.replace("fd: eval/fd", "fd: [eval/fd, 1.0e+300]"), r"line 2, column value: 4\.05e\+301 is not a number"),
        ("a: &a [_step, _step]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(50)), "b0: list is no column"),
    ],
)
def test_wrong_maps_are_named(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read_mapped(*files(tmp_path, columns=columns))


def test_an_export_with_its_index_is_read_and_damage_is_named_by_line(tmp_path):
    indexed = "".join(f"{n or ''},{line}\n" for n, line in enumerate(WANDB.splitlines()))
    assert read_mapped(*files(tmp_path, indexed)).equals(read_mapped(*files(tmp_path)))
    with pytest.raises(
        UserError, match=r"line 4, column eval/fd: 'x' is not a number|column value: 'x' is not a number"
    ):
        read_mapped(*files(tmp_path, WANDB.replace("30.25", "x")))
    with pytest.raises(UserError, match="line 3: 9 cells, where the header has 8 columns"):
        read_mapped(*files(tmp_path, WANDB.replace("0.55,10", "0.55,,10")))
