"""On a real Slurm: what status.py says in a job's life, who may write into a run directory, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fitscale.config.files import read_jsonl
from fitscale.run.layout import RunDir
from tests.slurm.cluster import ROOT, Cluster, end_soon, last_step, saved_step, starts, write_profile
from tests.tiny import OVERRIDES
from tests.waiting import has_ended, wait_until

pytestmark = pytest.mark.slurm
EVERY = 20
LONG = ("run.steps=1000000", f"checkpoint.every_steps={EVERY}", "model.depth=1")
LATER = {"begin": "now+1hour"}  # such a job waits until the test has it start


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """One node with one task."""
    return write_profile(tmp_path / "profile.yaml", tasks_per_node=1)


@pytest.fixture
def later(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "later.yaml", tasks_per_node=1, sbatch=LATER)


def begin(cluster: Cluster, job: str) -> None:
    cluster.control("update", f"jobid={job}", "starttime=now")


def wait_for_a_save(run: RunDir, number: int) -> None:
    """Wait until attempt `number` has saved a step of its own."""
    wait_until(lambda: len(starts(run)) == number, f"start {number}")
    wait_until(lambda: saved_step(run) > starts(run)[-1]["step"], f"a save of start {number}")


# --- status -------------------------------------------------------------------------------------


class Watched:
    """A run, its job, and what status.py says of it, compared with Slurm's queue, sacct and the run directory."""

    def __init__(self, cluster: Cluster, run: RunDir, shards: Path, profile: Path, *overrides: str) -> None:
        self.cluster, self.run = cluster, run
        self.job = cluster.submit(run, shards, profile, *overrides)

    def accounts(self, *options: str) -> list[str]:
        """The job's states in accounting."""
        command = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={self.job}")
        return [line.split()[0] for line in self.cluster.run(*command, *options).stdout.splitlines()]

    def check(self, state: str, slurm: str) -> dict[str, Any]:
        """status.py says `state` while queue and accounting say `slurm`; the row, true of the run directory."""
        wait_until(lambda: self.cluster.state(self.job) == slurm, f"{self.job} to be {slurm}")
        wait_until(lambda: self.accounts() == [slurm], f"{self.job} to be {slurm} in accounting")
        before = last_step(self.run)
        told = self.cluster.python("status.py", self.run.path, "--json", check=False)
        assert told.returncode == (state == "FAILED"), told.stderr
        row = json.loads(told.stdout)
        assert before <= row["step"] <= last_step(self.run)
        nodes = [start["nodes"] for start in starts(self.run)]
        assert (row["attempts"], row["nodes"]) == (len(nodes), nodes[-1] if nodes else None)
        assert row["job"] == (self.job if slurm in ("PENDING", "RUNNING") else None)
        assert self.cluster.state(self.job) == slurm, "the job went on meanwhile: the test is too slow"
        assert row["state"] == state, row
        return row


def test_status_says_what_slurm_and_the_run_directory_say(slurm_cluster, tmp_path, digits_shards, later):
    lost_shards = shutil.copytree(digits_shards, tmp_path / "shards")
    run = Watched(slurm_cluster, RunDir(tmp_path / "run"), digits_shards, later, *LONG)
    failing = Watched(slurm_cluster, RunDir(tmp_path / "failing"), lost_shards, later, *LONG)
    given_up = Watched(slurm_cluster, RunDir(tmp_path / "given-up"), digits_shards, later, *LONG)
    shutil.rmtree(lost_shards)
    for watched in (run, failing, given_up):
        row = watched.check("PENDING", "PENDING")
        assert (row["attempts"], row["step"], row["loss"], row["error"]) == (0, 0, None, None)

    begin(slurm_cluster, failing.job)
    begin(slurm_cluster, run.job)
    told = slurm_cluster.python("status.py", given_up.run.path, "--cancel").stdout
    assert told == f"cancelled: {given_up.job}\n"
    given_up.check("STOPPED", "CANCELLED")

    wait_for_a_save(run.run, 1)
    row = run.check("RUNNING", "RUNNING")
    assert row["step"] > 0 and row["images_per_s"] > 0
    (error,) = failing.check("FAILED", "FAILED")["error"]
    assert error.startswith(f"{lost_shards}/index.json: no such index"), error

    slurm_cluster.stop(row["nodes"])  # where the job's script runs, too
    slurm_cluster.control("update", f"jobid={run.job}", "starttime=now+1hour")
    assert run.check("PENDING", "PENDING")["step"] >= row["step"]
    assert run.accounts("--duplicates") == ["NODE_FAIL", "PENDING"]
    end_soon(run.run, 2 * EVERY)
    begin(slurm_cluster, run.job)  # on the other node
    row = run.check("FINISHED", "COMPLETED")
    assert (row["attempts"], row["step"], row["left_h"]) == (2, saved_step(run.run), 0)
    assert run.accounts("--duplicates") == ["NODE_FAIL", "COMPLETED"]
    first, second = starts(run.run)
    assert first["nodes"] != second["nodes"] and second["previous_ended"] == "killed"
    slurm_cluster.start()


# --- who may write ------------------------------------------------------------------------------


def on_the_same_node(pid: int) -> Iterator[tuple[int, str]]:
    """(process id, name) of all processes of the node on which `pid` runs."""
    node = os.readlink(f"/proc/{pid}/ns/pid")
    if node == os.readlink("/proc/self/ns/pid"):
        pytest.skip("without namespaces a node's processes are not told from others")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns/pid") == node:
                yield int(process.name), (process / "comm").read_text().strip()
        except OSError:
            continue


def send(signum: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # ended meanwhile
            os.kill(pid, signum)


def test_the_newest_start_owns_the_run_directory(slurm_cluster, tmp_path, digits_shards, profile):
    """A node freezes and thaws when its job runs on another; then somebody submits the run a second time by hand."""
    run = RunDir(tmp_path / "run")
    job = slurm_cluster.submit(run, digits_shards, profile, *LONG)
    wait_for_a_save(run, 1)
    stale, node = slurm_cluster.ranks(job)[0], starts(run)[0]["nodes"]
    frozen = dict(on_the_same_node(stale))
    send(signal.SIGSTOP, list(frozen))
    slurm_cluster.control("update", f"nodename={node}", "state=down", "reason=frozen")
    wait_for_a_save(run, 2)
    assert starts(run)[1]["job"] == job and starts(run)[1]["nodes"] != node

    # the rank first, then those that wait for it, but not the daemon that would kill them
    send(signal.SIGCONT, [stale, *(pid for pid, name in frozen.items() if name != "slurmd")])
    scripts = [pid for pid, name in frozen.items() if name == "slurm_script"]
    wait_until(lambda: all(map(has_ended, [stale, *scripts])), "the end of the earlier attempt")
    said = f"error: {run.path}: attempt 2 (job {job} on {starts(run)[1]['nodes']}) has taken over; this is attempt 1"
    assert said in (run.path / "log.txt").read_text()
    goes_on(slurm_cluster, run, job)
    assert {start["nodes"] for start in starts(run)[1:]} == {starts(run)[1]["nodes"]}
    slurm_cluster.stop(node)
    slurm_cluster.start()

    by_hand = f"exec {sys.executable} -m fitscale train {run.config}"
    told = slurm_cluster.run("sbatch", "--parsable", "--output", str(tmp_path / "out.txt"), "--wrap", by_hand)
    second = told.stdout.strip()
    wait_until(lambda: slurm_cluster.state(job) == "FAILED", "the end of the first job")
    assert not (run.path / "failed.txt").exists()
    wait_until(lambda: starts(run)[-1]["job"] == second, "the start of the second job")
    goes_on(slurm_cluster, run, second)
    assert slurm_cluster.state(job) == "FAILED"  # not queued again

    slurm_cluster.run("scancel", second)
    wait_until(lambda: slurm_cluster.state(second) == "CANCELLED", "the end of the second job")
    wait_until(lambda: read_jsonl(run.attempts)[-1].get("reason") == "SIGTERM", "the end of its attempt")
    assert saved_step(run) == last_step(run)
    assert [row["step"] for row in read_jsonl(run.metrics)] == list(range(1, last_step(run) + 1))


def goes_on(cluster: Cluster, run: RunDir, job: str) -> None:
    """The newest start is one of `job`, which runs, and saves.

    It need not be the job's first: the thawed node's srun, before it ends, may end the step that now bears its name.
    """
    step = last_step(run)
    wait_until(lambda: saved_step(run) > step, f"a later save of job {job}")
    assert starts(run)[-1]["job"] == job
    wait_until(lambda: cluster.state(job) == "RUNNING", f"{job} to run")


# --- a time limit without an end in time --------------------------------------------------------


DEAF = """
import os, signal
if "SLURM_PROCID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
"""


def test_a_job_that_does_not_heed_its_time_limit_is_queued_again(slurm_cluster, tmp_path, digits_shards):
    """Ranks whose step or save takes longer than they are given are killed, and Slurm would leave the job TIMEOUT. Here
    they hear no signal in the job's first start. A job that waits for this one must not be given up meanwhile."""
    (tmp_path / "sitecustomize.py").write_text(DEAF)
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    profile, run = write_profile(tmp_path / "profile.yaml", environment=environment), RunDir(tmp_path / "run")
    watched = Watched(slurm_cluster, run, digits_shards, profile, *LONG)
    wait_for_a_save(run, 1)
    after = ("--parsable", "--output=/dev/null", f"--dependency=afterok:{watched.job}", "--kill-on-invalid-dep=yes")
    waiting = slurm_cluster.run("sbatch", *after, "--wrap=true").stdout.strip()
    slurm_cluster.control("update", f"jobid={watched.job}", "endtime=now")
    wait_until(lambda: slurm_cluster.state(watched.job) == "PENDING", "the job to wait in the queue")
    slurm_cluster.control("update", f"jobid={watched.job}", "timelimit=60")
    end_soon(run, 2 * EVERY)
    assert watched.check("FINISHED", "COMPLETED")["attempts"] == 2
    assert watched.accounts("--duplicates") == ["REQUEUED", "COMPLETED"]
    wait_until(lambda: slurm_cluster.state(waiting) == "COMPLETED", "the end of the job that waited for it")
    row = starts(run)[1]
    assert row["previous_ended"] == "killed" and row["lost_steps"] <= 2 * EVERY, row
    assert [row["step"] for row in read_jsonl(run.metrics)] == list(range(1, last_step(run) + 1))


# --- what is refused ----------------------------------------------------------------------------


def refused(cluster: Cluster, run: Path, shards: Path, profile: Path, *arguments: str) -> str:
    """The one message of a submission that is refused."""
    where = (f"run.dir={run}", f"data.shards={shards}", "--cluster", profile)
    result = cluster.python("submit.py", *OVERRIDES, *where, *arguments, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_an_unknown_partition_is_refused(slurm_cluster, tmp_path, digits_shards):
    profile = write_profile(tmp_path / "profile.yaml", partition="gpu")
    message = refused(slurm_cluster, tmp_path / "run", digits_shards, profile)
    assert message == "error: partition: 'gpu' is unknown to this cluster; it has: high, main\n"
    assert not (tmp_path / "run").exists()


def test_what_sbatch_refuses_is_said(slurm_cluster, tmp_path, digits_shards):
    profile, run = write_profile(tmp_path / "profile.yaml", max_nodes=8), RunDir(tmp_path / "run")
    message = refused(slurm_cluster, run.path, digits_shards, profile, "--nodes", "3")
    refusal = "Batch job submission failed: Node count specification invalid"
    assert message == f"error: sbatch refused the job: {refusal}\n"
    assert not run.path.exists()
    slurm_cluster.submit(run, digits_shards, profile, "optim.lr=0.5", "run.steps=1")  # another config, the same name


def test_a_full_disk_ends_the_run_and_is_said(slurm_cluster, tmp_path, digits_shards):
    """There is room for the run's records, but not for a checkpoint: the job mounts a small disk on its node."""
    run = RunDir(tmp_path / "run")
    checkpoints = run.path / "checkpoints"
    mount = f"mkdir {checkpoints} && mount -t tmpfs -o size=100k tmpfs {checkpoints}"
    profile = write_profile(tmp_path / "profile.yaml", tasks_per_node=1, setup=[mount])
    try:
        row = Watched(slurm_cluster, run, digits_shards, profile, "run.steps=3").check("FAILED", "FAILED")
    finally:
        if checkpoints.is_mount():  # a cluster without namespaces
            subprocess.run(["umount", "--lazy", checkpoints], check=True)
    error = f"{run.checkpoint_path(3)}: the checkpoint could not be saved (rank 0: "
    assert len(row["error"]) == 1 and row["error"][0].startswith(error)
    assert "(No space left on device)); newest: none yet; mend that and start again" in row["error"][0]
    assert row["step"] == 3 and read_jsonl(run.attempts)[-1]["reason"] == "not saved"
    log = (run.path / "log.txt").read_text()
    assert "could not be saved" in log and "No space left on device" in log
