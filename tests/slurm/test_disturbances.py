"""On a real Slurm of two nodes: a run over both equals one process, and no disturbance changes what is trained."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.config.schema import Config
from fitscale.run.layout import RunDir
from tests.distributed.spawn import run_ranks, train_here
from tests.distributed.test_layouts import tensors
from tests.slurm.cluster import Cluster, end_soon, last_step, saved_step, starts, write_profile
from tests.tiny import tiny_config
from tests.waiting import wait_until

pytestmark = pytest.mark.slurm
EVERY = 20
LONG = ("run.steps=1000000", f"checkpoint.every_steps={EVERY}", "health.timeout_min=1", "model.depth=1")


def test_two_nodes_of_two_tasks_train_as_one_process(slurm_cluster, tmp_path, digits_shards):
    overrides = ("run.steps=12", "optim.lr=2e-4")
    run = RunDir(tmp_path / "four")
    job = slurm_cluster.submit(run, digits_shards, write_profile(tmp_path / "p.yaml"), *overrides, "--nodes", "2")
    run_ranks(train_here, 1, tiny_config(tmp_path / "one", digits_shards, *overrides))
    wait_until(lambda: slurm_cluster.state(job) == "COMPLETED", "the job's end")
    one, four = ([row["loss"] for row in read_jsonl(RunDir(tmp_path / name).metrics)] for name in ("one", "four"))
    assert len(one) == 12
    assert four == pytest.approx(one, abs=1e-6)


@dataclass(frozen=True)
class Disturbed:
    """A job of two ranks, one on each node, and what is done to it; every method returns when it waits in the queue."""

    cluster: Cluster
    run: RunDir
    job: str

    def time_limit(self) -> None:
        """Bring the limit so near that the next look of Slurm, every 30 s, finds it time for the warning."""
        minutes, seconds = self._elapsed()
        self._limit(minutes + (2 if seconds > 30 else 1))
        self._queued()
        self._limit(60)

    def _elapsed(self) -> tuple[int, int]:
        clock = self.cluster.run("squeue", "--noheader", "--jobs", self.job, "--format", "%M").stdout.strip()
        minutes, seconds = clock.split(":")
        return int(minutes), int(seconds)

    def _limit(self, minutes: int) -> None:
        self.cluster.control("update", f"jobid={self.job}", f"timelimit={minutes}")

    def loss_of_the_controller(self) -> None:
        """SIGKILL slurmctld and start it again: training does not notice. Then a partition of higher priority wants the
        nodes: the new controller knows the job."""
        controller = int((self.cluster.folder / "run/slurmctld.pid").read_text().split()[0])
        os.kill(controller, signal.SIGKILL)
        self._moves_on()
        self.cluster.start()
        self._moves_on()
        assert self.cluster.state(self.job) == "RUNNING"
        self.cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
        self._queued()

    def drain(self) -> None:
        """A node is drained: the job keeps it. It is requeued: it waits for the node to come back."""
        self.cluster.control("update", "nodename=node2", "state=drain", "reason=test")
        self._moves_on()
        self.cluster.control("requeue", self.job)
        self._queued()
        self.cluster.control("update", "nodename=node2", "state=resume")

    def killed_task(self) -> None:
        os.kill(self.cluster.ranks(self.job)[1], signal.SIGKILL)
        self._queued()

    def crashed_node(self) -> None:
        """It stays down; the job, which needs two, waits for it."""
        self.cluster.stop("node2")
        self._queued()

    def _queued(self) -> None:
        wait_until(lambda: self.cluster.state(self.job) == "PENDING", "the job to wait in the queue")

    def _moves_on(self) -> None:
        step = last_step(self.run)
        wait_until(lambda: last_step(self.run) > step + 1, "the next steps")


ENDS = {
    Disturbed.loss_of_the_controller: ("SIGUSR2",),
    Disturbed.time_limit: ("SIGUSR2",),  # soon after the new controller's start, which looks first after 30 s
    Disturbed.drain: ("SIGTERM", "killed"),  # killed by Slurm's KillWait, if step and save take longer
    Disturbed.killed_task: ("killed",),
    Disturbed.crashed_node: ("killed",),
}


def test_no_disturbance_changes_what_is_trained(slurm_cluster, tmp_path, digits_shards):
    run, background = RunDir(tmp_path / "disturbed"), ThreadPoolExecutor()
    profile = write_profile(tmp_path / "profile.yaml", tasks_per_node=1, signal_before_end_s=60)
    job = slurm_cluster.submit(run, digits_shards, profile, *LONG, "--nodes", "2")
    for number, (disturb, ends) in enumerate(ENDS.items(), 1):
        wait_for_start(run, number)
        disturb(Disturbed(slurm_cluster, run, job))
        if disturb is Disturbed.crashed_node:
            end_soon(run, 2 * EVERY)
            calm = background.submit(run_ranks, train_here, 2, copy_of(run, tmp_path / "calm"))
            slurm_cluster.start()
        check_loss(run, number, ends)
    wait_until(lambda: slurm_cluster.state(job) == "COMPLETED", "the job's end")
    calm.result()
    print(*read_jsonl(run.attempts), sep="\n")
    require_same(run, RunDir(tmp_path / "calm"))


def wait_for_start(run: RunDir, number: int) -> None:
    """Wait until attempt `number` has taken steps, saved one, and taken steps again."""
    wait_until(lambda: len(starts(run)) == number, f"start {number}")
    first = starts(run)[-1]["step"]
    wait_until(lambda: saved_step(run) > first and last_step(run) > saved_step(run) + 1, f"a save of start {number}")


def check_loss(run: RunDir, number: int, ends: tuple[str, ...]) -> None:
    """No logged step is lost by an orderly end. By any other, those since the newest checkpoint, at most EVERY; if that
    one was still being written, it does not count, and the steps are those since the one before."""
    logged, saved = last_step(run), saved_step(run)
    under_way = any((run.path / "checkpoints").glob(".saving-*"))
    wait_until(lambda: len(starts(run)) == number + 1, f"start {number + 1}")
    row = starts(run)[-1]
    assert row["previous_ended"] in ends, row
    assert (row["step"], row["lost_steps"]) == (saved, logged - saved), row
    most = 0 if row["previous_ended"] != "killed" else EVERY + EVERY * under_way
    assert row["lost_steps"] <= most, row


def copy_of(run: RunDir, calm: Path) -> Config:
    """The config of a run like `run`, to be trained without any disturbance in `calm`."""
    return load_config([str(run.config), f"run.dir={calm}"])


def require_same(run: RunDir, calm: RunDir) -> None:
    """Both runs have the same metrics, and the same weights after the last step."""
    assert run.checkpoints()[-1].step == calm.checkpoints()[-1].step
    assert run.metrics.read_bytes() == calm.metrics.read_bytes()
    for name in ("raw", "ema_0.9"):
        ours, theirs = (tensors(part.path, saved_step(calm), f"weights/{name}") for part in (run, calm))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
