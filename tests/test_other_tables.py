"""Other people's tables, of five shapes, from their raw columns to a law with the documented commands alone."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fitscale.scaling.rows.files import read_table
from tests.programs import run_tool

DATA = Path(__file__).parent / "data" / "scaling"


def collected(table, columns, tmp_path):
    """The runs table of `table` by the map `columns`, a text of YAML."""
    (tmp_path / "map.yaml").write_text(columns)
    done = run_tool("collect_runs", table, "--columns", tmp_path / "map.yaml", "-o", tmp_path / "runs.csv")
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs.csv"


def guessed(table):
    done = run_tool("collect_runs", table, "--guess")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fitted(runs, tmp_path, *options):
    done = run_tool("fit_scaling", runs, "--resamples", "20", *options, "-o", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "report" / "fit.json").read_text())


def test_one_column_per_metric_and_labels_that_rows_are_chosen_by(tmp_path):
    """Gadre et al. 2024 as published: the map is the tool's own, and `role` tells which runs their protocol fits."""
    runs = collected(DATA / "gadre_redpajama.csv", guessed(DATA / "gadre_redpajama.csv"), tmp_path)
    table = read_table(runs)
    assert table["images"].isna().all() and table["tokens"].notna().all()
    chosen = ["--where", "role!=other", "--metric", "loss_c4_val", "--extrapolate", "--hold-out", "open_lm_1b"]
    record = fitted(runs, tmp_path, *chosen, "open_lm_7b", "--law", "tied", "--linear")
    errors = {point["size"]: 100 * point["error"] for point in record["laws"][0]["predictions"]}
    assert errors == {"open_lm_1b": pytest.approx(0.7103, abs=0.005), "open_lm_7b": pytest.approx(0.7320, abs=0.005)}
    assert record["data"] == "tokens" and "tokens" in record["laws"][0]["reference"]


def test_a_ladder_without_names_of_runs(tmp_path):
    """OLMo ladder: every row is a run of its own, since no step makes two of them checkpoints of one."""
    raw = pd.read_csv(DATA / "olmo_ladder_c4.csv").drop(columns="run")
    raw.to_csv(tmp_path / "ladder.csv", index=False)
    runs = collected(tmp_path / "ladder.csv", guessed(tmp_path / "ladder.csv"), tmp_path)
    table = read_table(runs)
    assert table["run"].is_unique and set(table["run"]) >= {"190M run 1", "190M run 4", "13B-5T"}
    options = ["--law", "additive", "--metric", "c4_loss_mean5", "--huber", "0.001", "--extrapolate"]
    record = fitted(runs, tmp_path, *options, "--hold-out", "7B-4T", "13B-5T")
    (point,) = [point for point in record["laws"][0]["predictions"] if point["size"] == "13B-5T"]
    assert point["predicted"] == pytest.approx(2.3444, abs=0.001)


ISOFLOP = """
where: config == "rw:rw/base/long/kaplan/kaplan/train"
train_flops: flops
parameters: n
tokens: flops / (6 * n)
metrics: {loss: loss}
"""


def test_isoflop_points_without_runs_sizes_and_data(tmp_path):
    """Porian et al. 2024: data from arithmetic, sizes named by their parameters."""
    raw = pd.read_csv(DATA / "porian_isoflop.csv").astype({"n": float})
    raw.drop(columns="tokens").to_csv(tmp_path / "points.csv", index=False)
    runs = collected(tmp_path / "points.csv", ISOFLOP, tmp_path)
    table = read_table(runs)
    theirs = raw[raw["config"] == "rw:rw/base/long/kaplan/kaplan/train"]["tokens"]
    np.testing.assert_allclose(table["tokens"].astype(float), theirs, rtol=1e-6)
    assert table["size"].nunique() == table["parameters"].nunique() and "332K" in set(table["size"])
    record = fitted(runs, tmp_path, "--law", "isoflop", "--metric", "loss", "--hold-out", "none", "--extrapolate")
    published = pd.read_csv(DATA / "porian_optima.csv").set_index("config")["exponent"]
    exponents = [iso["exponent"] for iso in record["isoflop"]]
    assert min(abs(np.array(exponents) - published["rw:rw/base/long/kaplan/kaplan/train"].iloc[0])) < 0.008


PAPER = """
where: ["family == 'DiT' and model in ['DiT-S/2', 'DiT-B/2', 'DiT-L/2', 'DiT-XL/2']", train_steps == 4e5]
family: family
size: model
parameters: params_m * 1e6
patch: {model: {DiT-S/2: 2, DiT-B/2: 2, DiT-L/2: 2, DiT-XL/2: 2}}
step: train_steps
images: batch * train_steps
train_flops: [6.0e9, forward_gmacs, batch, train_steps]
key_sampler: "={sampler}, {guidance}"
metrics: {fid: fid}
"""


def test_a_papers_table_in_units_of_its_own(tmp_path):
    """DiT (Peebles and Xie 2023), table 4: rows chosen, millions and giga, names of runs made."""
    raw = pd.read_csv(DATA / "published_fid.csv").drop(columns=["run", "patch", "images_seen"])
    raw.to_csv(tmp_path / "paper.csv", index=False)
    runs = collected(tmp_path / "paper.csv", PAPER, tmp_path)
    table = read_table(runs)
    assert list(table["run"]) == list(table["size"]) and set(table["key_sampler"]) == {"DDPM 250, 1.0"}
    record = fitted(runs, tmp_path, "--law", "power", "--metric", "fid", "--points", "last")
    assert [point["error"] for point in record["laws"][0]["predictions"]] == [pytest.approx(0.057, abs=0.001)]


CHART = """
melt: "* - eval/fd"
join: {table: exported_runs.csv, by: {column: Name}}
run: column
size: model
parameters: params_m * 1e6
step: Step
images: Step * batch
train_flops: 6 * params_m * 1e6 * 256 * images_per_step * Step
metrics: {fd: cell}
"""


def test_a_chart_that_wandb_exported_joined_with_its_table_of_runs(tmp_path):
    """One column a run, with its minimum and maximum beside it; sizes are in the other export."""
    sizes, steps = {"s-0": 10.0, "m-0": 40.0, "l-0": 160.0, "xl-0": 640.0}, np.array([1000, 2000, 4000, 8000])
    chart = {"Step": steps}
    for name, millions in sizes.items():
        curve = np.round(4e5 * (6e6 * millions * 256 * 64 * steps) ** -0.25, 3).astype(object)
        curve[:1] = curve[:1] if name != "xl-0" else ""
        chart |= {f"{name} - eval/fd{end}": curve for end in ("", "__MIN", "__MAX")} | {f"{name} - _step": steps}
    pd.DataFrame(chart).to_csv(tmp_path / "chart.csv", index=False)
    exported = pd.DataFrame({"Name": sizes, "State": "finished"}).assign(
        Name=list(sizes), params_m=list(sizes.values())
    )
    exported.assign(model=list("smlx"), batch=64, images_per_step=64.0).to_csv(
        tmp_path / "exported_runs.csv", index=False
    )
    first = run_tool("collect_runs", tmp_path / "chart.csv", "--guess")
    assert first.returncode == 3 and "melt: '* - eval/fd'" in first.stdout and "does not work yet" in first.stdout
    runs = collected(tmp_path / "chart.csv", CHART, tmp_path)
    table = read_table(runs)
    assert len(table) == 15 and table["run"].nunique() == 4 and set(table["batch"].isna()) == {True}
    assert set(table.loc[table["size"] == "x", "parameters"]) == {640000000}
    record = fitted(runs, tmp_path, "--law", "power", "--metric", "fd", "--points", "all")
    assert record["laws"][0]["parameters"]["b"] == pytest.approx(0.25, abs=0.001)
