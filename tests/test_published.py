"""The analysis against published studies, through the tools a user runs. Sources: tests/data/scaling/README.md."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fitscale.config.load import load_config
from fitscale.model import flops
from fitscale.scaling.fit.compute_optimal import Optimum, by_every_method, fit_exponent, isoflop
from fitscale.scaling.fit.holdout import hold_out
from fitscale.scaling.rows.files import read_mapped
from fitscale.scaling.rows.selection import correlation
from tests.conftest import ROOT
from tests.programs import run_tool

DATA = Path(__file__).parent / "data" / "scaling"


def table(name, folder):
    """The runs table of a published CSV, by its column map."""
    path = folder / f"{name}.csv"
    done = run_tool("collect_runs", DATA / f"{name}.csv", "--columns", DATA / f"{name}.yaml", "-o", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def fids():
    return read_mapped(DATA / "published_fid.csv", DATA / "published_fid.yaml")


def test_dit_at_equal_steps_correlates_with_compute_as_published(fids):
    dit = fids[(fids["family"] == "DiT") & (fids["step"] == 400000)]
    assert len(dit) == 12
    assert correlation(dit) == pytest.approx(-0.930, abs=0.001)


@pytest.mark.parametrize(
    ("size", "depth", "width"), [("S", 12, 384), ("B", 12, 768), ("L", 24, 1024), ("XL", 28, 1152)]
)
def test_the_gflops_of_dit_are_macs_with_attention(fids, size, depth, width):
    """DiT-X/2 at 256 tokens (Peebles and Xie 2023): attention and MLP of every token, AdaLN of every image."""
    tokens, patch_numbers = 256, 2 * 2 * 4
    block = tokens * (4 + 8) * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = tokens * width * (patch_numbers + 2 * patch_numbers) + width * (256 + width) + 2 * width**2
    rows = fids[fids["size"] == f"DiT-{size}/2"]
    assert len(rows) and (rows["linear_macs"] / (depth * block + ends) - 1).abs().max() < 0.002


@pytest.mark.parametrize(
    ("family", "patch", "error"), [("DiT", 2, 0.057), ("DiT", 4, -0.047), ("DiT", 8, 0.042), ("SiT", 2, -0.068)]
)
def test_the_largest_size_from_three_smaller_at_equal_steps(fids, family, patch, error, tmp_path):
    rows = fids[(fids["family"] == family) & (fids["patch"] == patch) & (fids["step"] == 400000)]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    done = run_tool(
        "fit_scaling", tmp_path / "rows.csv", "--law", "power", "--metric", "fid", "--points", "last", "-o", tmp_path
    )
    assert done.returncode == 0, done.stderr
    (law,) = json.loads((tmp_path / "fit.json").read_text())["laws"]
    assert [point["error"] for point in law["predictions"]] == [pytest.approx(error, abs=0.001)]


def test_repa_with_xl_held_out_prints_every_point(tmp_path):
    rows = pd.read_csv(table("published_fid", tmp_path))
    rows = rows[rows["run"].isin(["SiT+REPA SiT-B/2", "SiT+REPA SiT-L/2", "SiT+REPA SiT-XL/2"])]
    rows.to_csv(tmp_path / "repa.csv", index=False)
    done = run_tool(
        "fit_scaling",
        tmp_path / "repa.csv",
        "--metric",
        "fid",
        "--law",
        "offset",
        "power",
        "additive",
        "--extrapolate",
        "-o",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "refused (not_identified): additive law" in done.stderr, "two sizes leave a law of size and data a valley"
    held_out = rows[rows["size"] == "SiT-XL/2"]
    laws = json.loads((tmp_path / "fit.json").read_text())["laws"]
    assert [law["law"] for law in laws] == ["offset", "power"]
    for law in laws:
        assert [point["value"] for point in law["predictions"]] == list(held_out["value"])
        assert all(np.isfinite(point["error"]) for point in law["predictions"])
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {value:g} |" in report for value in held_out["value"])


def test_a_floor_predicts_the_last_checkpoint_better_than_a_pure_power_law(fids):
    series = fids[fids.groupby("run")["step"].transform("count") >= 4]
    errors = hold_out(series, "step", ("offset", "power"), "all").errors.pivot(
        index="run", columns="law", values="error"
    )
    assert len(errors) >= 9
    assert (errors["offset"].abs() < errors["power"].abs()).sum() >= 7
    assert (errors["power"] < 0).all()


def test_olmo_ladder_is_repeated_and_shown_as_a_miss(tmp_path):
    done = run_tool(
        *(
            "fit_scaling",
            table("olmo_ladder_c4", tmp_path),
            "--law",
            "additive",
            "--metric",
            "c4_loss",
            "--huber",
            "0.001",
        ),
        *("--hold-out", "7B-4T", "13B-5T", "--extrapolate", "--resamples", "1000", "-o", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "fit.json").read_text())
    (law,) = record["laws"]
    (point,) = [point for point in law["predictions"] if point["size"] == "13B-5T"]
    assert point["predicted"] == pytest.approx(2.3444, abs=0.001)
    assert point["error"] == pytest.approx(-0.038, abs=0.0005)
    covered = point["low"] <= point["value"] <= point["high"]
    assert "for the held-out size 13B-5T" in done.stdout and "error -3.8%" in done.stdout
    assert covered or any(caution["code"] == "missed" for caution in record["cautions"])


def test_gadre_over_training_is_repeated(tmp_path):
    rows = pd.read_csv(table("gadre_redpajama", tmp_path))
    rows[rows["status"] != "other"].to_csv(tmp_path / "protocol.csv", index=False)
    done = run_tool(
        *(
            "fit_scaling",
            tmp_path / "protocol.csv",
            "--law",
            "tied",
            "--metric",
            "c4_loss",
            "--linear",
            "--extrapolate",
        ),
        *("--hold-out", "open_lm_1b", "open_lm_7b", "--resamples", "100", "-o", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    (law,) = json.loads((tmp_path / "fit.json").read_text())["laws"]
    errors = {point["size"]: 100 * point["error"] for point in law["predictions"]}
    assert errors == {"open_lm_1b": pytest.approx(0.7103, abs=0.005), "open_lm_7b": pytest.approx(0.7320, abs=0.005)}


PORIAN = pd.read_csv(DATA / "porian_isoflop.csv").rename(
    columns={"flops": "budget", "n": "parameters", "loss": "value"}
)
OPTIMA = pd.read_csv(DATA / "porian_optima.csv")


@pytest.mark.parametrize("config", sorted(OPTIMA["config"].unique()))
def test_porian_exponents(config):
    published = OPTIMA[OPTIMA["config"] == config]
    known = published.dropna(subset="n")
    theirs = [Optimum(*row) for row in known[["flops", "n", "loss", "n_std"]].assign(sizes=9).itertuples(index=False)]
    exponent = published["exponent"].iloc[0]
    assert fit_exponent(theirs)[0] == pytest.approx(exponent, abs=1e-4)
    ours = isoflop(PORIAN[PORIAN["config"] == config])
    assert ours.exponent == pytest.approx(exponent, abs=0.008)
    assert ours.interval[0] < exponent < ours.interval[1]
    tokens = isoflop(PORIAN[PORIAN["config"] == config], of="tokens")
    assert tokens.exponent == pytest.approx(published["tokens_exponent"].iloc[0], abs=0.009)
    coefficient = published["coefficient"].iloc[0]
    assert ours.coefficient_interval[0] < coefficient < ours.coefficient_interval[1]


def test_sizes_left_out_choose_akima_where_it_is_nearer_to_the_published_exponents():
    errors, chosen = {}, []
    for config, rows in PORIAN.groupby("config"):
        exponent = OPTIMA.loc[OPTIMA["config"] == config, "exponent"].iloc[0]
        found, _ = by_every_method(rows, "parameters", 0)
        chosen.append(found[0].method)
        for iso in found:
            errors.setdefault(iso.method, []).append(abs(iso.exponent - exponent))
        errors.setdefault("chosen", []).append(abs(found[0].exponent - exponent))
    assert chosen.count("akima") >= 10 and "parabola" not in chosen
    assert 0.02 < max(errors["parabola-7"]) < 0.04 and 0.05 < max(errors["parabola"]) < 0.07
    assert max(errors["chosen"]) < 0.02


def test_published_fids_of_four_backbones_do_not_tell_them_apart(tmp_path):
    """Two sizes each of three families, at one length of training: no law, and the tool says so."""
    path = table("published_backbones", tmp_path)
    for row in pd.read_csv(path).drop_duplicates("size").itertuples():
        model = load_config([str(ROOT / "configs" / "model" / f"{row.size}.yaml")]).model
        assert row.parameters == flops.parameters(model)
        assert row.train_flops == pytest.approx(row.images * flops.train_flops(model, 256))
    compared = ("--metric", "fid", "--law", "power", "--compare", "family", "--own", "sampler", "guidance")
    done = run_tool("fit_scaling", path, *compared, "-o", tmp_path / "comparison")
    assert done.returncode == 2 and not (tmp_path / "comparison").exists()
    assert "--compare family: 1 groups have a law, two are needed" in done.stderr
    assert all(f"family {name}: power law: 2 points" in done.stderr for name in ("dimr", "flag_dit", "terdit"))
