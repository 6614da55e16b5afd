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
        (MAP.replace("run: Name\n", ""), "columns run are missing"),
        (MAP.replace("step: _step", "steps: _step"), "unknown columns steps; valid: run, family"),
        ("- 1", "a column map holds"),
        ("a: [", "not a readable column map"),
    ],
)
def test_wrong_maps_are_named(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read_mapped(*files(tmp_path, columns=columns))
