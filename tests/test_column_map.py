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
        (
            MAP + "where: sampler = euler\n",
            "where: 'sampler = euler' is neither a column nor an expression; valid: col",
        ),
        (MAP.split("metrics:")[0] + "metrics: {}\n", "metrics: names no column that holds a metric"),
        (MAP + "where: [1]\n", "where: 1 is no text"),
        (MAP + "images_: _step.values\n", "images_: '_step.values' holds '_step.values', which is not a number"),
        (MAP.replace("seed: 3", "seed: {sampler: {euler: 1}}"), "seed: sampler: nothing is said of 'heun'"),
        (MAP.replace("seed: 3", "seed: {sampler: {euler: [1], heun: 2}}"), "of each a number or a text"),
        (MAP.replace("seed: 3", "seed: {solver: {euler: 1}}"), "no column 'solver' for seed"),
        (MAP.replace("seed: 3", "seed: yes"), "seed: bool is no column"),
        (MAP.replace("seed: 3", "batch: gmacs * 1.1"), "line 2, column batch: .* is not a whole number"),
        (MAP.replace("seed: 3", 'device: "={gpu.name}"'), "no column 'gpu.name' for device"),
        (MAP + "melt: eval\n", "melt: holds names of columns with one"),
        (MAP + 'melt: "x*"\n', r"no column 'x\*' to melt; it has: Name"),
        (MAP + "melt: [eval/fd, eval/x]\n", "no column 'eval/x' to melt"),
        (MAP + "join: sizes.csv\n", "join: holds table: FILE.csv, and by: COLUMN"),
        (MAP + "join: {table: ../sizes.csv, by: Name}\n", r"'\.\./sizes\.csv' is no name of a file beside the map"),
        (MAP + "join: {table: /etc/passwd, by: Name}\n", "'/etc/passwd' is no name of a file beside the map"),
        (MAP + "join: {table: none.csv, by: Name}\n", r"none\.csv: cannot be read"),
        (MAP + "join: {table: export.csv, by: Name}\n", r"export\.csv: Name a stands in more than one row"),
        (MAP + "join: {table: export.csv, by: {Name: id}}\n", r"export\.csv: no column 'id' to join by; it has: Name"),
        ("\n".join(f"key_{n}: _step" for n in range(1001)), "1001 entries; at most 1000 are read"),
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


@pytest.mark.parametrize("million", ["1e6", "1.0e6", "1.0e+6", "1000000", "1_000_000", "1E6", "+1e6"])
def test_numbers_are_read_as_people_write_them(tmp_path, million):
    for rule in (f"[{million}, params_m]", f"params_m * {million}", f"[{million}, 10]"):
        table = read_mapped(*files(tmp_path, columns=MAP.replace("[1.0e+6, params_m]", rule)))
        assert table["parameters"].iloc[0] == 10_000_000
    assert read_mapped(*files(tmp_path, columns=MAP.replace("seed: 3", f"seed: {million}")))["seed"].iloc[0] == 10**6


def test_rows_are_chosen_and_columns_made(tmp_path):
    columns = MAP.replace('"=b"', '"={Name} ({sampler})"') + "where: [sampler == 'euler', _step > 1000]\n"
    columns = columns.replace("images: images", "images: _step * 64.0004").replace("seed: 3", "label_solver: sampler")
    (row,) = read_mapped(*files(tmp_path, columns=columns)).to_dict("records")
    assert (row["size"], row["images"], row["label_solver"], row["value"]) == ("a (euler)", 128001, "euler", 0.55)


def test_a_cell_that_decides_a_value(tmp_path):
    columns = MAP.replace("[1.0e+6, params_m]", "{Name: {a: 33e6, b: 130.5e6}}")
    table = read_mapped(*files(tmp_path, columns=columns))
    assert dict(zip(table["run"], table["parameters"], strict=True)) == {"a": 33_000_000, "b": 130_500_000}


def test_sizes_and_runs_without_names(tmp_path):
    nameless = MAP.replace("run: Name\n", "").replace('size: "=b"\n', "")
    table = read_mapped(*files(tmp_path, columns=nameless))
    assert list(table["size"]) == ["10M", "20M", "10M", "10M", "20M"]
    assert list(table["run"]) == list(table["size"]), "checkpoints of one size, told apart by their step, are one run"
    stepless = read_mapped(*files(tmp_path, columns=nameless.replace("step: _step\n", "")))
    assert list(stepless["run"]) == ["10M run 1", "20M", "10M run 1", "10M run 2", "20M"]
    twice = read_mapped(*files(tmp_path, WANDB + WANDB.splitlines()[1] + "\n", nameless))
    assert list(twice["run"]) == ["10M run 1", "20M", "10M run 2", "10M run 1", "10M run 1", "20M", "10M run 2"]


def test_a_joined_table_adds_columns_and_ours_stand(tmp_path):
    (tmp_path / "sizes.csv").write_text("id,params_m,depth\na,99,12\nc,1,1\n")
    columns = MAP.replace("seed: 3", "depth: depth") + "join: {table: sizes.csv, by: {Name: id}}\n"
    table = read_mapped(*files(tmp_path, columns=columns))
    assert list(table["depth"].isna()) == [False, True, False, False, True] and table["depth"].iloc[0] == 12
    assert set(table["parameters"]) == {10_000_000, 20_000_000}


def test_few_signs_cannot_make_many_cells(tmp_path, monkeypatch):
    monkeypatch.setattr("fitscale.scaling.rows.reshaping.MOST_CELLS", 50)
    with pytest.raises(UserError, match=r"makes 66 cells of .*; at most 50 are made"):
        read_mapped(*files(tmp_path))
    with pytest.raises(UserError, match="makes 72 cells"):
        read_mapped(*files(tmp_path, columns=MAP + "melt: [_step, images, gmacs, params_m]\n"))
