"""The benchmarks run at a small size; what does not depend on the machine is as the documentation claims."""

import argparse
import json
import threading

import pytest
import torch

from fitscale.model.common.compiler import lacks_for_compiling
from tests.programs import run_tool


def test_packing_beats_the_simpler_schemes(tmp_path):
    options = ("--ranks", 8, "--images-per-rank", 4, 16, "--json", tmp_path / "rows.json")
    done = run_tool("bench_packing", *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 4 and done.stdout.count("\n") == 6
    for row in rows:
        ours = row["packed"]
        assert ours["padding_share"] < 0.01
        allowed = 0.02 if row["images"] >= 16 * row["ranks"] else 0.1
        assert ours["imbalance"] < max(allowed, row["least_imbalance"] + 0.01)
        assert all(ours["time_lost"] <= row[other]["time_lost"] for other in ("longest", "bucketed", "first-fit"))


def test_the_data_benchmark_runs_and_cleans_up(tmp_path):
    small = ("--images", 512, "--passes", 2, "--index-images", 200_000, "--large-images", 1_000_000)
    done = run_tool("bench_data", "--scratch", tmp_path, *small)
    assert done.returncode == 0, done.stderr
    figures = dict(line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:])
    timed = ("its plan: a step of 256 images, median", "1,024 ranks x 16 images: of a step, median of 80")
    timed += ("loader, 256-token latents, warm files: samples/s per core",)
    assert all(float(figures[what].split()[0].replace(",", "")) > 0 for what in timed)
    assert int(figures["memory of the rank for index and plans, resident"].split()[0]) < 500
    memory = next(value for what, value in figures.items() if what.startswith("resident memory, most"))
    assert float(memory.rstrip("%")) < 5
    assert not list(tmp_path.iterdir())


def test_the_sampling_benchmark_compares_the_same_images(tmp_path):
    model = ("model.depth=1", "model.hidden_size=16", "model.num_heads=2", "model.patch_size=1")
    small = ("--images", 3, "--passes", 1, "--sides", 3, 4, "--json", tmp_path / "rows.json")
    done = run_tool("bench_sample", *model, *small)
    assert done.returncode == 0, done.stderr
    packs, alone = json.loads((tmp_path / "rows.json").read_text())
    assert done.stdout.count("\n") == 6 and packs["images_per_s"] > 0 and alone["ratio"] == 1 and alone["moved"] == 0
    assert min(packs["least_nfe"], alone["least_nfe"]) >= 8


STEP = ("model.depth=1", "model.hidden_size=96", "model.num_heads=2", "model.num_classes=10", "--batch", 6)


def test_the_benchmark_of_the_step_compares_with_a_padded_batch(tmp_path):
    options = ("--sizes", "64-256", "--steps", 1, "--ways", "baseline", "eager", "--traffic", "none")
    done = run_tool("bench_step", *STEP, *options, "--json", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "step.json").read_text())["sizes"]["64-256"]["baseline_over_eager"] > 0
    assert run_tool("bench_step", "--sizes", "257").returncode == 2


@pytest.mark.skipif(lacks_for_compiling(torch.device("cpu")) is not None, reason="needs g++ and Python.h")
def test_a_compiled_block_moves_at_most_a_hundred_vectors_in_45_kernels(tmp_path):
    done = run_tool("bench_step", *STEP, "--sizes", "--ways", "fused", "--json", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "step.json").read_text())["bf16"]
    assert 50 < counted["passes"] <= 100 and 20 < counted["kernels"] <= 45


def test_ranks_of_the_benchmark_from_noise_to_features_share_the_images(tmp_path):
    from tools.bench_evaluate import save_networks, work

    save_networks(tmp_path, 4)
    small = ["model.depth=1", "model.hidden_size=16", "model.num_heads=2", "sampling.steps=1"]
    options = argparse.Namespace(config=small, images=5, device="cpu")
    drawn = [work("2 ranks", options, str(tmp_path), rank, 2, threading.Barrier(1)) for rank in range(2)]
    assert drawn == [3, 2]


def test_at_equal_evaluations_ab2_beats_heun():
    """A row of the table of docs/decisions.md."""
    from tools.bench_solvers import DIMENSIONS, METHODS, SAMPLES, Mixture, ours

    noise_ND = torch.randn(SAMPLES, DIMENSIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    velocity = Mixture(0.5).guided(1.5)
    exact_ND = ours("dopri5", rtol=1e-7, atol=1e-7)(velocity, noise_ND, 2)
    error = {name: float((METHODS[name](velocity, noise_ND, 20) - exact_ND).square().mean().sqrt()) for name in METHODS}
    assert error["heun"] > 1.5 * error["ab2 (Adams-Bashforth)"] > 1.1 * error["UniPC, diffusers"]
    assert min(error.values()) > 1e-3 and error["euler"] == max(error.values())


COUNTS = [
    ("bench_step", "--steps"),
    ("bench_step", "--batch"),
    ("bench_sample", "--images"),
    ("bench_packing", "--ranks"),
    ("bench_data", "--passes"),
    ("bench_evaluate", "--images"),
    ("bench_save", "--saves"),
]


@pytest.mark.parametrize(("tool", "option"), COUNTS)
@pytest.mark.parametrize("value", ["0", "-1", "some"])
def test_a_count_of_nothing_is_refused(tool, option, value):
    refused = run_tool(tool, f"{option}={value}")
    assert refused.returncode == 2 and option in refused.stderr and value in refused.stderr


def test_a_torture_of_no_time_at_all_is_refused():
    for minutes in ("-1", "nan"):
        refused = run_tool("torture", f"--minutes={minutes}")
        assert refused.returncode == 2 and "--minutes" in refused.stderr
