"""On a real Slurm of two nodes: a run over both equals one process, and no disturbance changes its weights."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fitscale.config.rundir import RunDir, read_jsonl
from tests.distributed.spawn import run_ranks
from tests.distributed.test_layouts import tensors
from tests.slurm_cluster import Cluster, last_step, starts, wait_until
from tests.test_train import train_here
from tests.tiny import OVERRIDES, tiny_config

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
PROFILE = "configs/cluster/demo.yaml"
EVERY = 5
LONG = ("run.steps=100000", f"checkpoint.every_steps={EVERY}", "health.timeout_min=1", "model.depth=1")


def submit(cluster: Cluster, run: RunDir, shards: Path, *overrides: str) -> str:
    """Submit the tiny run on 2 nodes x 2 tasks; returns the job's id."""
    where = (f"run.dir={run.path}", f"data.shards={shards}")
    told = cluster.python("submit.py", *OVERRIDES, *where, *overrides, "--cluster", PROFILE, "--nodes", "2").stdout
    return told.split("train: job ")[1].split()[0]


def test_two_nodes_of_two_tasks_train_as_one_process(slurm_cluster, tmp_path, digits_shards):
    overrides = ("run.steps=12", "optim.lr=2e-4")
    run_ranks(train_here, 1, tiny_config(tmp_path / "one", digits_shards, *overrides))
    run = RunDir(tmp_path / "four")
    job = submit(slurm_cluster, run, digits_shards, *overrides)
    wait_until(lambda: slurm_cluster.state(job) == "COMPLETED", "the job's end")
    one, four = ([row["loss"] for row in read_jsonl(RunDir(tmp_path / name).metrics)] for name in ("one", "four"))
    assert len(one) == 12
    assert four == pytest.approx(one, abs=1e-6)


def tasks(job: str) -> Iterator[tuple[int, int]]:
    """(rank, process id) of the job's Python processes."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                item.split("=", 1) for item in (process / "environ").read_text().split("\0") if "=" in item
            )
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        ours = environment.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in environment
        if ours and "submitit.core._submit" in command and "srun" not in command:
            yield int(environment["SLURM_PROCID"]), int(process.name)


def usr2(cluster: Cluster, job: str) -> None:
    cluster.run("scancel", "--signal=USR2", job)


def requeue(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "requeue", job)


def kill_a_task(cluster: Cluster, job: str) -> None:
    os.kill(dict(tasks(job))[3], signal.SIGKILL)


def preempt(cluster: Cluster, job: str) -> None:
    cluster.run(
        "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1"
    )


def crash_a_node(cluster: Cluster, job: str) -> None:
    cluster.stop("node2")
    cluster.start()


def drain_a_node(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "update", "nodename=node2", "state=drain", "reason=test")
    requeue(cluster, job)
    cluster.run("scontrol", "update", "nodename=node2", "state=resume")


def lose_the_controller(cluster: Cluster, job: str) -> None:
    """Kill slurmctld while the job runs and start it again; then requeue, to see that it still knows the job."""
    cluster_pid = int((cluster.folder / "run/slurmctld.pid").read_text().split()[0])
    os.kill(cluster_pid, signal.SIGKILL)
    cluster.start()
    requeue(cluster, job)


def reach_the_time_limit(cluster: Cluster, job: str) -> None:
    """Whole minutes, looked at every half: USR2 comes within one."""
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=1")


DISTURBANCES = {
    usr2: ("SIGUSR2",),
    kill_a_task: ("killed",),
    preempt: ("SIGUSR2",),
    requeue: ("SIGTERM", "killed"),  # by Slurm's KillWait, if step and save take longer
    crash_a_node: ("killed",),
    drain_a_node: ("SIGTERM", "killed"),
    lose_the_controller: ("SIGTERM", "killed"),
    reach_the_time_limit: ("SIGUSR2",),
}


@pytest.mark.skipif(os.environ.get("FITSCALE_LONG") != "1", reason="needs FITSCALE_LONG=1: many minutes of requeueing")
def test_no_disturbance_changes_what_is_trained(slurm_cluster, tmp_path, digits_shards):
    run = RunDir(tmp_path / "disturbed")
    job = submit(slurm_cluster, run, digits_shards, *LONG)
    for number, disturb in enumerate(DISTURBANCES, 1):
        wait_until(lambda n=number: len(starts(run)) == n, f"start {number}, before {disturb.__name__}")
        first = starts(run)[-1]["step"]
        wait_until(lambda step=first: last_step(run) > step + EVERY + 2, f"steps of start {number}")
        disturb(slurm_cluster, job)
    wait_until(lambda: len(starts(run)) == len(DISTURBANCES) + 1, "the last start")
    wait_until(lambda: last_step(run) > starts(run)[-1]["step"], "its first step")
    slurm_cluster.run("scancel", job)
    wait_until(lambda: slurm_cluster.state(job) == "CANCELLED", "the cancelled job's end")
    for (disturb, ends), row in zip(DISTURBANCES.items(), starts(run)[1:], strict=True):
        assert row["previous_ended"] in ends, (disturb.__name__, row)
        assert row["lost_steps"] <= (0 if row["previous_ended"] != "killed" else 2 * EVERY), (disturb.__name__, row)
    compare_with_calm(tmp_path, digits_shards, run)


def compare_with_calm(folder: Path, shards: Path, run: RunDir) -> None:
    """A run without any disturbance, of as many steps as `run` has saved: the same metrics and the same weights."""
    steps = run.checkpoints()[-1].step
    run_ranks(train_here, 4, tiny_config(folder / "calm", shards, *LONG, f"run.steps={steps}"))
    calm = (folder / "calm/metrics.jsonl").read_bytes()
    assert run.metrics.read_bytes().startswith(calm)
    ours, theirs = (tensors(folder / name, steps, "weights/raw") for name in (run.path.name, "calm"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
