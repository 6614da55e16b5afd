"""A sweep on a real Slurm of two nodes: submitted once, disturbed, complete; again, only what is missing."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from fitscale.config.files import read_jsonl
from fitscale.run.layout import RunDir
from tests.slurm.cluster import Cluster, last_step, starts
from tests.tiny import OVERRIDES
from tests.waiting import wait_until

pytestmark = pytest.mark.slurm
PROFILE = "configs/cluster/demo.yaml"
LONG = 1500  # steps of the largest size: it is disturbed
SIZES = {
    "xs": ["model.depth=1"],
    "s": ["model.depth=1", "model.hidden_size=40"],
    "m": ["model.depth=2"],
    "l": ["model.depth=2", "evaluation.points=2", "evaluation.first_step=100", f"run.steps={LONG}"],
}


class Sweep:
    """Four sizes x two seeds; xs-1 starts from a folder that holds no weights at first, l trains on both nodes."""

    def __init__(self, folder: Path, shards: Path, cluster: Cluster) -> None:
        self.cluster, self.dir, self.start = cluster, folder / "out", folder / "start"
        content = {
            "name": "sweep",
            "dir": str(self.dir),
            "base": [
                *OVERRIDES,
                *(f"data.shards={shards}", "run.steps=10", "checkpoint.every_steps=100", "optim.warmup_steps=0"),
                *("evaluation.points=1", "evaluation.validation_images=16", "health.timeout_min=2", "run.log_every=1"),
            ],
            "cells": {f"{size}-{seed}": [*own, f"run.seed={seed}"] for size, own in SIZES.items() for seed in (0, 1)},
            "layouts": {
                f"{size}-{seed}": {"nodes": 1 + (size == "l"), "tasks_per_node": 1} for size in SIZES for seed in (0, 1)
            },
        }
        content["cells"]["xs-1"].append(f"run.init_weights={self.start}")
        self.start.mkdir()
        self.names = list(content["cells"])
        self.yaml = folder / "sweep.yaml"
        self.yaml.write_text(json.dumps(content))

    def run(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.cluster.python("sweep.py", self.yaml, "--cluster", PROFILE, *options, check=check)

    def submitted(self, *options: str) -> dict[str, str]:
        """Submit; what was said of each cell."""
        lines = self.run(*options).stdout.splitlines()
        return dict(line.split(": ", 1) for line in lines if line.split(": ", 1)[0] in self.names)

    def states(self) -> dict[str, str]:
        rows = self.cluster.python("status.py", self.dir, "--json", check=False).stdout.splitlines()
        return {Path(row["run"]).name: row["state"] for row in map(json.loads, rows)}

    def cell(self, name: str) -> RunDir:
        return RunDir(self.dir / name)

    def wait_for_the_end(self) -> None:
        queue = ("squeue", "--noheader", "--format", "%i")
        wait_until(lambda: not self.cluster.run(*queue).stdout.split(), "an empty queue")


def test_a_sweep_survives_what_happens_and_is_completed_by_submitting_again(slurm_cluster, tmp_path, digits_shards):
    sweep = Sweep(tmp_path, digits_shards, slurm_cluster)
    expensive = sweep.run("--max-gpu-hours", "1e-9", check=False)
    assert expensive.returncode == 2 and "error: --max-gpu-hours: 1e-09, but the sweep costs" in expensive.stderr
    assert not sweep.dir.exists()

    said = sweep.submitted()
    assert list(said) == sweep.names and len(said) == 8
    assert sum(text.count("job ") for text in said.values()) == 20  # l is evaluated twice: 16 + 2 x 2
    again = sweep.submitted()  # at once, while some have ended: there is nothing to add
    del again["xs-1"]  # it may have failed meanwhile
    assert all(
        part.endswith(("submitted before", "finished before")) for one in again.values() for part in one.split("; ")
    )

    disturbed = sweep.cell("l-0")
    wait_until(lambda: last_step(disturbed) > 110, "the long cell's second job")
    preempt = ("--partition=high", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1")
    slurm_cluster.run("sbatch", *preempt)
    wait_until(lambda: len(starts(disturbed)) >= 3, "its start after the preemption")
    assert starts(disturbed)[2]["previous_ended"] == "SIGUSR2"
    step = starts(disturbed)[2]["step"]
    wait_until(lambda: last_step(disturbed) > step + 5, "its steps after the preemption")
    slurm_cluster.stop("node2")
    slurm_cluster.start()
    sweep.wait_for_the_end()

    states = sweep.states()
    assert states.pop("xs-1") == "FAILED"
    assert set(states.values()) == {"FINISHED"}, states
    assert len(starts(disturbed)) >= 4 and starts(disturbed)[3]["previous_ended"] == "killed"
    assert [row["step"] for row in read_jsonl(disturbed.metrics)] == list(range(1, LONG + 1))
    error = slurm_cluster.python("status.py", sweep.dir, check=False)
    failed, last = str(sweep.cell("xs-1").path), error.stdout.splitlines()[-1]
    assert error.returncode == 1 and last.startswith(failed) and str(sweep.start) in last, last

    shutil.copytree(sweep.cell("xs-0").checkpoints()[-1].weights("raw"), sweep.start, dirs_exist_ok=True)
    said = sweep.submitted()
    assert said.pop("xs-1").count("job ") == 2
    assert set(said.values()) == {"finished before"}
    sweep.wait_for_the_end()
    assert set(sweep.states().values()) == {"FINISHED"}
    assert set(sweep.submitted().values()) == {"finished before"}

    shutil.rmtree(sweep.cell("m-1").path)
    said = sweep.submitted()
    assert said.pop("m-1").count("job ") == 2 and set(said.values()) == {"finished before"}
    sweep.wait_for_the_end()
    assert set(sweep.states().values()) == {"FINISHED"}
    cells = json.loads((sweep.dir / "manifest.json").read_text())["cells"]
    assert {cell["name"]: (cell["nodes"], cell["tasks_per_node"]) for cell in cells}["l-0"] == (2, 1)
