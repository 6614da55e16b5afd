"""Held-out points: nothing unseen reaches a fit, and the better law wins."""

import numpy as np
import pandas as pd
import pytest

from fitscale.scaling.fit.holdout import folds, hold_out
from fitscale.scaling.rows.refusals import Refusal
from tests.programs import run_tool


def rows(law, sizes=4, points=8):
    found = [
        {
            "run": f"r{size}",
            "size": f"s{size}",
            "parameters": round(10 ** (6 + size / 2)),
            "images": round(images),
            "step": step,
            "train_flops": 6 * 10 ** (6 + size / 2) * images,
            "metric": "fd",
        }
        for size in range(sizes)
        for step, images in enumerate(np.geomspace(1e5, 1e7, points) * 10 ** (size / 2))
    ]
    table = pd.DataFrame(found)
    return table.assign(value=law(table["train_flops"]))


FLOOR = rows(lambda flops: 20 * (flops / 1e13) ** -0.35 + 4)

SURFACE = rows(lambda flops: flops, sizes=5).assign(
    value=lambda rows: 400 * rows["parameters"] ** -0.3 + 800 * rows["images"] ** -0.4 + 1.5
)


@pytest.mark.parametrize("by", ["size", "compute", "step"])
def test_the_true_law_predicts_exactly_and_ranks_first(by):
    answer = hold_out(FLOOR, by, ("power", "offset"), "all")
    assert list(answer.ranking["law"]) == ["offset", "power"]
    assert answer.errors.loc[answer.errors["law"] == "offset", "error"].abs().max() < 1e-6
    assert (answer.errors.loc[answer.errors["law"] == "power", "error"] < -0.001).any()


@pytest.mark.parametrize("by", ["size", "compute", "step"])
def test_what_is_unseen_never_reaches_a_fit(by):
    for name, rows, held_out in folds(FLOOR, by):
        known, unseen = (rows.loc[rows.index[part], "train_flops"] for part in (~held_out, held_out))
        assert len(known) and len(unseen), name
        if by != "step":
            assert unseen.max() > known.max()
    changed = FLOOR.assign(value=FLOOR["value"].where(FLOOR["size"] != "s3", FLOOR["value"] * 2))
    last = "size s3"
    if by == "size":
        first, second = (hold_out(table, by, ("offset",), "all").errors for table in (FLOOR, changed))
        columns = [errors[errors["fold"] == last]["predicted"].to_numpy() for errors in (first, second)]
        np.testing.assert_array_equal(*columns)


def test_laws_that_cannot_be_fitted_are_named():
    answer = hold_out(FLOOR[FLOOR["step"] < 3], "step", ("offset", "power"), "all")
    assert {law for _, law, _ in answer.refusals} == {"offset"}
    assert answer.ranking["law"].tolist() == ["power"]
    with pytest.raises(Refusal, match="no law could be fitted"):
        hold_out(FLOOR[FLOOR["step"] < 3], "step", ("offset",), "all")
    with pytest.raises(Refusal, match="nothing can be held out"):
        hold_out(FLOOR[FLOOR["size"] < "s2"], "size", ("power",), "all")


def test_every_fold_is_tested_or_named():
    """The largest size is far above the frontier: a law of compute is silent there, one of size and data is not."""
    largest = SURFACE["size"] == "s4"
    missed = SURFACE.assign(value=SURFACE["value"].where(~largest, SURFACE["value"] * 3))
    answer = hold_out(missed, "size", ("additive", "power"), "frontier")
    per_fold = answer.errors.groupby(["law", "fold"]).size()
    assert per_fold["additive"].to_dict() == {"size s3": 8, "size s4": 8}
    assert list(per_fold["power"].index) == ["size s2", "size s3"]
    silent = [(fold, law, why.code) for fold, law, why in answer.refusals]
    assert silent == [("size s2", "additive", "not_identified"), ("size s4", "power", "not_on_frontier")]
    ranking = answer.ranking.set_index("law")["folds_fitted"]
    assert ranking.to_dict() == {"additive": pytest.approx(2 / 3), "power": 1.0}
    with pytest.raises(Refusal, match="no held-out point is on the frontier"):
        hold_out(missed[missed["size"].isin(["s0", "s1", "s4"])], "size", ("power",), "frontier")


def test_holdout_from_the_shell(tmp_path):
    FLOOR.to_csv(tmp_path / "runs.csv", index=False)
    command = [
        "holdout",
        str(tmp_path / "runs.csv"),
        "--by",
        "size",
        "-o",
        str(tmp_path / "e.csv"),
    ]
    done = run_tool(*command)
    assert done.returncode == 0, done.stderr
    assert "ranking" in done.stdout and len(pd.read_csv(tmp_path / "e.csv")) > 4
    failed = run_tool(*command, "--metric", "fid")
    assert failed.returncode == 2 and failed.stderr.startswith("error: no row has metric fid")
