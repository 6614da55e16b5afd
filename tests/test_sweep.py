"""slurm/sweep.py from end to end: two tiny cells trained and evaluated through submitit's local executor."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.model import flops
from fitscale.run.claim import claim
from fitscale.run.layout import RunDir
from tests.tiny import OVERRIDES
from tests.waiting import LIMIT_S, wait_until

ROOT = Path(__file__).parents[1]
STEPS = 4


def sweep_yaml(folder: Path, shards: Path, *base: str, **cells: list[str]) -> Path:
    path = folder / "sweep.yaml"
    content = {
        "name": "test",
        "dir": str(folder / "out"),
        "base": [
            *OVERRIDES,
            *(f"data.shards={shards}", f"run.steps={STEPS}", "checkpoint.every_steps=1", "optim.warmup_steps=0"),
            *("evaluation.points=2", "evaluation.first_step=2", "evaluation.validation_images=16"),
            *base,
        ],
        "cells": cells,
        "local": {"parallel_cells": 2},
    }
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "slurm/sweep.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def sweep(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_cells_run_to_their_end_a_failed_one_is_shown_and_finished_ones_are_skipped(tmp_path, digits_shards):
    (tmp_path / "empty").mkdir()
    bad = [f"run.init_weights={tmp_path / 'empty'}"]
    path = sweep_yaml(tmp_path, digits_shards, good=["model.depth=3"], bad=bad)
    result = sweep(path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "error: cell bad failed" in result.stderr and str(tmp_path / "empty") in result.stderr
    assert f"step {STEPS}/{STEPS}" in result.stdout and "evaluated 2/2" in result.stdout
    good = RunDir(tmp_path / "out/good")
    assert {row["step"] for row in read_jsonl(good.evaluations)} == {2, STEPS}
    assert good.checkpoints()[-1].step == STEPS
    cell = json.loads((tmp_path / "out/manifest.json").read_text())["cells"][0]
    assert cell["parameters"] == flops.parameters(load_config(cell["arguments"]).model)
    assert cell["train_flops"] > 0 and cell["steps"] == STEPS

    before = contents(good.path)
    again = sweep(sweep_yaml(tmp_path, digits_shards, good=["model.depth=3"]))
    assert again.returncode == 0 and "good: finished before" in again.stdout
    assert contents(good.path) == before  # attempts.jsonl and the log among them: nothing was started


def test_on_a_cluster_a_dry_run_shows_nodes_and_cost_and_too_dear_a_sweep_is_refused(tmp_path, digits_shards):
    path = sweep_yaml(tmp_path, digits_shards, small=[], large=["model.depth=3"])
    cluster = ("--cluster", "configs/cluster/demo.yaml")
    result = sweep(path, *cluster, "layouts.large.nodes=2", "--dry-run")
    assert result.returncode == 0, result.stderr
    header, small, large, _, total, *jobs = result.stdout.splitlines()
    assert "GiB" in header and "s/step" in header and all(len(line) <= 120 for line in (header, small, large))
    assert "1 x 2" in small and "2 x 2" in large and "GPU-hours together, planned at 20% of a cpu's peak" in total
    told = [line.split() for line in jobs if line.startswith(("cell", "train", "evaluate"))]
    chain = [["train", "2"], ["evaluate", "2"], ["train", "4"], ["evaluate", "4"]]
    assert [row[:2] for row in told] == [["cell", "small:"], *chain, ["cell", "large:"], *chain]
    assert jobs[-1].startswith("4 jobs, ") and jobs[-1].endswith("GPU-hours planned")
    dear = sweep(path, *cluster, "--max-gpu-hours", "1e-9")
    assert dear.returncode == 2 and dear.stderr.startswith("error: --max-gpu-hours: 1e-09, but the sweep costs")
    wide = sweep(path, *cluster, "layouts.large.nodes=3")
    assert wide.returncode == 2 and wide.stderr.startswith("error: cell large: --nodes: 3, but profile demo has 1 to 2")
    assert sweep(path, "--max-gpu-hours", "1").stderr.startswith("error: --max-gpu-hours: goes with --cluster")


def test_a_dry_run_writes_nothing(tmp_path, digits_shards):
    result = sweep(sweep_yaml(tmp_path, digits_shards, small=[]), "--dry-run")
    assert result.returncode == 0 and "training FLOPs" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (["model.dept=3"], "error: cell wrong: model.dept=3"),
        (["data.shards=nowhere"], "error: cell wrong: nowhere/index.json: no such index"),
        (["batch.pack_tokens=64"], "error: cell wrong: "),
        (["model.num_classes=9"], "error: cell wrong: model.num_classes: 9, but the shards in"),
        (["run.init_weights=nowhere"], "error: cell wrong: run.init_weights: nowhere: no such file"),
        (["evaluation.features=no.pt"], "error: cell wrong: evaluation.features: no.pt: no such file"),
    ],
)
def test_a_mistake_ends_it_before_anything_is_written(tmp_path, digits_shards, cell, message):
    result = sweep(sweep_yaml(tmp_path, digits_shards, right=[], wrong=cell))
    assert result.returncode == 2 and result.stderr.startswith(message), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_directory_of_another_config_stops_the_sweep(tmp_path, digits_shards):
    path = sweep_yaml(tmp_path, digits_shards, a=[], b=["optim.lr=0.5"])
    claim(load_config([*OVERRIDES, f"run.dir={tmp_path / 'out/b'}"]))
    result = sweep(path)
    assert result.returncode == 2 and "optim.lr: 0.001 there, 0.5 here" in result.stderr
    assert not (tmp_path / "out/a").exists()


def run_by_others(run: RunDir) -> list[int]:
    """The processes whose command line names the run's config."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            found += [int(process.name)] if str(run.config) in (process / "cmdline").read_text() else []
    return found


def test_stopped_it_stops_its_cells_and_started_again_it_goes_on(tmp_path, digits_shards):
    run = RunDir(tmp_path / "out/only")
    process = subprocess.Popen(
        command(sweep_yaml(tmp_path, digits_shards, "run.steps=1000000", only=[])),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell starts a background job
    )
    wait_until(run.checkpoints, "the first checkpoint")
    assert run_by_others(run)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_S) == 143
    wait_until(lambda: not run_by_others(run), "the end of its cell")
    step, end = read_jsonl(run.metrics)[-1]["step"], read_jsonl(run.attempts)[-1]
    assert (end.get("reason"), run.checkpoints()[-1].step) == ("SIGTERM", step)  # it was given the time to save

    assert sweep(sweep_yaml(tmp_path, digits_shards, f"run.steps={step + 2}", only=[])).returncode == 0
    assert [row["step"] for row in read_jsonl(run.metrics)] == list(range(1, step + 3))
    assert {row["attempt"] for row in read_jsonl(run.throughput)} == {1, 2}
