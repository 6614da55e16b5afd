"""`fitscale tune`: a grid of samplings on one checkpoint, of which all points are kept."""

import csv
import io
import shutil
from contextlib import redirect_stderr

import pytest

from fitscale.config.errors import UserError
from fitscale.config.files import read_jsonl
from fitscale.eval.tune import grid, verdict
from fitscale.run.layout import RunDir
from tests.distributed.spawn import run_ranks
from tests.distributed.test_evaluation import CHUNK_IMAGES, eye, trained  # noqa: F401 (fixtures)
from tests.test_evaluate import told_by
from tests.tiny import OVERRIDES


def test_a_grid_is_the_product_of_its_axes():
    points = list(grid(["guidance.scale=1:2:3", "guidance.interval=[0,1],[0.25,1]"], OVERRIDES))
    assert [point.settings["guidance.scale"] for point in points] == ["1.0", "1.0", "1.5", "1.5", "2.0", "2.0"]
    assert [tuple(point.sampling.guidance.interval) for point in points[:2]] == [(0.0, 1.0), (0.25, 1.0)]
    assert len(list(grid(["guidance.scale=1:4"], OVERRIDES))) == 7
    assert [point.sampling.method for point in grid(["method=euler,heun"], OVERRIDES)] == ["euler", "heun"]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("guidance.scale", "must be KEY=VALUES"),
        ("guidance.scale=", "values are a,b,c or first:last"),
        ("guidance.scale=1:x", "values are a,b,c"),
        ("guidance.scale=1:2:5000", "5,000 points; valid: 1 to 1,000"),
        ("steps=[", "values are a,b,c"),
        ("steps=0,5", "sampling.steps: 0 is too small"),
        ("guidance.nothing=1", "guidance.nothing"),
        ("method=ddpm", "cannot sample"),
        ("steps=1:1e400", "values are a,b,c"),
    ],
)
def test_a_grid_that_cannot_be_is_one_message(over, message):
    with pytest.raises(UserError, match=message):
        list(grid([over], OVERRIDES))


def test_a_grid_has_a_limit():
    with pytest.raises(UserError, match="1,000,000 points; valid: at most 1,000"):
        list(grid(["guidance.scale=1:4:1000", "rtol=1:4:1000"], OVERRIDES))


def test_the_verdict_says_what_the_best_costs_and_how_flat_it_is():
    rows = [
        {"steps": steps, "value": value, "standard_error": 1.0, "nfe": nfe}
        for steps, value, nfe in (("10", 5.9, 10.0), ("20", 5.0, 20.0), ("40", 6.1, 40.0))
    ]
    said = "best: steps=20: fd 5, 20 function evaluations an image; 2 of 3 points are within its standard error"
    assert verdict(rows, "fd") == f"{said}, steps=10 with 10"
    rows[1]["standard_error"] = None
    assert verdict(rows, "fd").endswith("; 1 of 3 points are within its standard error")


@pytest.mark.parametrize(("option", "value"), [("--seed", -1), ("--samples", 1), ("--samples", 10**9), ("--step", 9)])
def test_what_is_out_of_range_is_one_message(trained, capfd, option, value):  # noqa: F811
    from fitscale.cli import main

    assert main(["tune", str(trained.path), "--over", "steps=2", option, str(value)]) == 2
    told = capfd.readouterr().err.splitlines()
    assert told[-1].startswith(f"error: {option}: ")


def tune(path, *arguments):
    from fitscale.eval import requests

    requests.chunk_ranges.__defaults__ = (CHUNK_IMAGES,)
    return told_by("tune", path, "--samples", 60, *arguments)


def test_every_point_is_kept_and_measured_once(trained, tmp_path):  # noqa: F811
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, run.path)
    (first, second) = run_ranks(tune, 2, run.path, "--over", "guidance.scale=1,2", "steps=2,3")
    assert "best: guidance.scale=" in first and "table and plot: " in first and "best" not in second
    rows = [row for row in read_jsonl(run.evaluations) if row["metric"] == "fd"]
    settings = [(row["key"]["guidance"], row["key"]["steps"], row["samples"]) for row in rows]
    assert settings == [(1.0, 2, 60), (1.0, 3, 60), (2.0, 2, 60), (2.0, 3, 60)]
    (folder,) = (run.path / "tune").iterdir()
    with open(folder / "table.csv") as file:
        table = list(csv.DictReader(file))
    assert [(row["guidance.scale"], row["steps"], float(row["value"])) for row in table] == [
        (f"{row['key']['guidance']:g}", str(row["key"]["steps"]), row["value"]) for row in rows
    ]
    assert (folder / "tune.png").read_bytes().startswith(b"\x89PNG")
    before = run.evaluations.read_bytes()
    (again,) = run_ranks(tune, 1, run.path, "--over", "guidance.scale=1,2", "steps=2,3")
    assert run.evaluations.read_bytes() == before and again.splitlines()[-7:] == first.splitlines()[-7:]


def test_a_metric_that_is_not_measured_is_named(trained, tmp_path):  # noqa: F811
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, run.path)
    (told,) = run_ranks(refusal_of_tune, 1, run.path, "--over", "steps=2", "--metric", "speed")
    assert told.splitlines()[-1].startswith("error: --metric: speed is not among fd, ")


def refusal_of_tune(path, *arguments):
    from fitscale.cli import main

    with redirect_stderr(io.StringIO()) as told:
        assert main([str(word) for word in ("tune", path, "--samples", 60, *arguments)]) == 2
    return told.getvalue()
