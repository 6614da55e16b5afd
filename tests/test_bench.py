"""The benchmarks run at a small size; what does not depend on the machine is as the documentation claims."""

import json

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
