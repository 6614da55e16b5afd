"""A command looks at every run once: whatever it does with it, and however many runs share the shards."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.run.claim import claim
from fitscale.run.layout import find_runs
from tests.tiny import OVERRIDES

ROOT = Path(__file__).parents[1]
DEMO = ("--cluster", "configs/cluster/demo.yaml")
# Runs a program, and tells stderr of every index that it opens.
TELLING = """
import runpy, sys
def tell(event, arguments):
    if event == "open" and str(arguments[0]).endswith("/index.json"):
        print("opened", arguments[0], file=sys.stderr)
sys.addaudithook(tell)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SLURM = {  # of a cluster without any job: each answers as much as a submission asks
    "sinfo": "echo main",
    "squeue": "",
    "sacct": "",
    "sbatch": "echo x >>$0.count; echo Submitted batch job $(wc -l <$0.count)",
}


def opened(folder: Path, program: str, *arguments: object) -> Counter[str]:
    """How often `python PROGRAM ARGUMENTS` opens the index of each folder of shards."""
    for name, text in SLURM.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{folder}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TELLING, program, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("opened ")]
    return Counter(str(Path(line.removeprefix("opened ")).parent) for line in lines)


def test_submitting_a_run_opens_its_index_once(tmp_path, digits_shards):
    run = (*OVERRIDES, f"run.dir={tmp_path}/run", f"data.shards={digits_shards}", *DEMO)
    assert opened(tmp_path, "slurm/submit.py", *run, "--dry-run") == {str(digits_shards): 1}
    assert opened(tmp_path, "slurm/submit.py", *run) == {str(digits_shards): 1}
    assert len(read_jsonl(tmp_path / "run/jobs.jsonl")) == 1


@pytest.fixture
def sweep(tmp_path, digits_shards) -> tuple[Path, dict[str, int]]:
    """Three cells, two of them on the same shards; and how often the index of each is to be opened."""
    others = shutil.copytree(digits_shards, tmp_path / "others")
    own = {"a": [], "b": ["model.depth=3", "run.seed=1"], "c": [f"data.shards={others}"]}
    base = [*OVERRIDES, f"data.shards={digits_shards}"]
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps({"dir": f"{tmp_path}/out", "base": base, "cells": own}))  # JSON is YAML
    return path, {str(digits_shards): 1, str(others): 1}


@pytest.mark.parametrize("where", [(), DEMO])
def test_a_dry_run_of_a_sweep_opens_every_index_once(tmp_path, sweep, where):
    path, once = sweep
    assert opened(tmp_path, "slurm/sweep.py", path, *where, "--dry-run") == once
    assert not (tmp_path / "out").exists()


def test_submitting_a_sweep_opens_every_index_once(tmp_path, sweep):
    path, once = sweep
    assert opened(tmp_path, "slurm/sweep.py", path, *DEMO) == once
    runs = find_runs([tmp_path / "out"])
    assert [(run.path.name, len(read_jsonl(run.jobs))) for run in runs] == [("a", 1), ("b", 1), ("c", 1)]
    cells = json.loads((tmp_path / "out/manifest.json").read_text())["cells"]
    assert [(cell["name"], cell["nodes"]) for cell in cells] == [("a", 1), ("b", 1), ("c", 1)]


def test_a_plan_by_the_speed_of_a_run_on_the_same_shards_opens_their_index_once(tmp_path, digits_shards):
    data = (*OVERRIDES, f"data.shards={digits_shards}")
    run = claim(load_config([*data, f"run.dir={tmp_path}/run"]))
    run.environment.write_text(json.dumps({"world_size": 1, "device": "NVIDIA H100"}))
    rows = [{"step": step, "time_unix_s": 0.0, "step_s": 60.0, "data_wait_s": 0.0} for step in range(3)]
    run.throughput.write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = ROOT / "fitscale/__main__.py"
    assert opened(tmp_path, str(program), "plan", *data, "--measured", run.path) == {str(digits_shards): 1}


def test_an_evaluation_opens_its_index_once(tmp_path):
    then = shutil.copytree(ROOT / "tests" / "data" / "version_0_1", tmp_path / "then")
    config = then / "runs" / "fitv2" / "config.yaml"
    config.write_text(config.read_text().replace("shards: shards", f"shards: {then}/shards"))
    asked = ("fitscale/__main__.py", "evaluate", config.parent, "--force", "--device", "cpu")
    assert opened(tmp_path, *asked) == {f"{then}/shards": 1}
