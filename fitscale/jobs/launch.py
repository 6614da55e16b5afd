"""From a run directory to a Slurm job: the layout that is asked for, the batch script, the submission, the queue.

Everything that decides how a job is asked for comes from the cluster's profile; everything that it computes is in the
run directory already.
"""

import shutil
import subprocess
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from shlex import quote
from time import time
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fitscale.config.errors import UserError, cannot_write
from fitscale.config.files import append_jsonl, read_jsonl
from fitscale.config.schema import Config
from fitscale.jobs.job import Job
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.requeue import setup_lines, teardown_lines
from fitscale.run.layout import RunDir

# submitit counts timeouts against a budget; here attempts without progress are what ends a job (train/attempt.py).
ANY_NUMBER = 10**6
# Slurm's states of a job that is over. Of the others some are rare or new (SIGNALING, STAGE_OUT), and all are live.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
ENDED |= {"DEADLINE", "REVOKED"}


@dataclass(frozen=True)
class Layout:
    """The processes of one job."""

    nodes: int
    tasks_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


def make_layout(profile: ClusterConfig, config: Config, nodes: int, tasks_per_node: int | None) -> Layout:
    """The layout, if the cluster has it and the config fits it.

    Raises:
        UserError: more nodes or GPUs than the profile has; ranks that tensor parallelism cannot divide, or not within a
            node; more ranks than images in a batch.
    """
    layout = Layout(nodes, tasks_per_node or profile.tasks_per_node)
    if not 1 <= nodes <= profile.max_nodes:
        raise UserError(f"--nodes: {nodes}, but profile {profile.name} has 1 to {profile.max_nodes} (max_nodes)")
    if layout.tasks_per_node < 1 or (profile.gpus_per_node and layout.tasks_per_node > profile.gpus_per_node):
        raise UserError(
            f"--tasks-per-node: {layout.tasks_per_node}, but a node of profile {profile.name} has "
            f"{profile.gpus_per_node} GPUs (gpus_per_node), one for each task"
        )
    tp = config.parallel.tensor_parallel_size
    if layout.tasks_per_node % tp:
        valid = ", ".join(str(n) for n in range(1, layout.tasks_per_node + 1) if layout.tasks_per_node % n == 0)
        raise UserError(
            f"parallel.tensor_parallel_size: {tp} does not divide the {layout.tasks_per_node} tasks of a node, within "
            f"which it must stay; valid: {valid}"
        )
    dp, batch = layout.world_size // tp, config.batch.global_batch_size
    if dp > batch:
        raise UserError(
            f"--nodes: {nodes} x {layout.tasks_per_node} tasks are {dp} data-parallel ranks for {batch} images"
        )
    return layout


def on_its_devices(config: Config, profile: ClusterConfig) -> Config:
    """`config` for the profile's devices: where these are GPUs, a node that has lost its own must not train on its
    cores, as `run.device: auto` would have it."""
    if not profile.gpus_per_node or config.run.device != "auto":
        return config
    return replace(config, run=replace(config.run, device="cuda"))


def describe(layout: Layout, config: Config) -> str:
    """The layout, for a person."""
    parallel = config.parallel
    dp = layout.world_size // parallel.tensor_parallel_size
    return (
        f"{layout.nodes} nodes x {layout.tasks_per_node} tasks = {layout.world_size} ranks: dp {dp} x tp "
        f"{parallel.tensor_parallel_size}{' + sp' if parallel.sequence_parallel else ''}, ZeRO {parallel.zero_stage}; "
        f"{config.batch.global_batch_size / dp:.4g} images a rank and step"
    )


class _AnywhereExecutor(SlurmExecutor):
    """Writes batch scripts also where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def make_executor(
    profile: ClusterConfig,
    run: RunDir,
    layout: Layout,
    name: str,
    after: str | None = None,
    timeouts: int = ANY_NUMBER,
) -> SlurmExecutor:
    """submitit's executor for a job of `run`.

    `after`: the id of a job that has to succeed first; `timeouts`: how often the job is queued again at its time limit.
    """
    executor = _AnywhereExecutor(run.path.resolve() / "submitit" / "%j", timeouts, python=profile.python)
    wanted = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint", "exclude")}
    if profile.mem_gb is not None:
        share = min(1.0, layout.tasks_per_node / profile.tasks_per_node)  # an evaluation takes a part of a node
        wanted["mem"] = f"{round(1024 * profile.mem_gb * share)}M"
    if profile.gpus_per_node:
        wanted["gpus_per_node"] = layout.tasks_per_node
    executor.update_parameters(
        job_name=name,
        nodes=layout.nodes,
        ntasks_per_node=layout.tasks_per_node,
        cpus_per_task=profile.cpus_per_task,
        time=profile.time_min,
        signal_delay_s=profile.signal_before_end_s,
        stderr_to_stdout=True,
        setup=[
            *(f"export {key}={quote(value)}" for key, value in profile.environment.items()),
            *profile.setup,
            *setup_lines(run.path.resolve()),
        ],
        teardown=teardown_lines(),
        # srun does not take over sbatch's --cpus-per-task (Slurm 22.05's release notes)
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={profile.cpus_per_task}", *profile.srun],
        additional_parameters={"requeue": True, **profile.sbatch}
        | ({"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"} if after else {}),
        **{key: value for key, value in wanted.items() if value is not None},
    )
    return executor


def batch_script(executor: SlurmExecutor) -> str:
    """What would be given to sbatch."""
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def require_slurm(partition: str | None) -> None:
    """Raises UserError if there is no Slurm here, or it has no such partition."""
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch on PATH: submit from a login node of the cluster, or run here with --cluster local")
    found = slurm("sinfo", "--noheader", "--format", "%R").split()
    if partition is not None and partition not in found:
        raise UserError(f"partition: {partition!r} is unknown to this cluster; it has: {', '.join(sorted(set(found)))}")


def slurm(*command: str) -> str:
    """Output of one of Slurm's commands; raises UserError with its last line if it fails or is not there."""
    if shutil.which(command[0]) is None:
        raise UserError(f"no {command[0]} on PATH: ask from a login node of the cluster")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"{command[0]}: {said[0]}")
    return result.stdout


def submit(executor: SlurmExecutor, job: Job) -> str:
    """Hand `job` to Slurm and note it in the run directory; returns its id.

    Raises:
        UserError: sbatch refuses it, or there is no room to write.
    """
    try:
        with redirect_stderr(StringIO()):  # where submitit repeats what sbatch says
            job_id = executor.submit(job).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        reasons = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
        raise UserError(f"sbatch refused the job: {reasons[-1].strip().removeprefix('sbatch: error: ')}") from error
    except OSError as error:
        raise cannot_write(job.run_dir, error) from error
    try:
        append_jsonl(RunDir(job.run_dir).jobs, {"job": job_id, **job.about, "time_unix_s": time()})
    except OSError as error:
        slurm("scancel", job_id)  # nobody would know of it
        raise cannot_write(job.run_dir, error) from error
    return job_id


def job_states(ids: list[str]) -> dict[str, str]:
    """State of each job in the queue or in accounting; a job that neither knows is left out.

    The queue goes first: accounting keeps NODE_FAIL or PREEMPTED for a while after the job was queued again.
    """
    if not ids:
        return {}
    states = {}
    if shutil.which("sacct"):
        lines = slurm("sacct", "--noheader", "--parsable2", "-X", "-o", "JobID,State", "-j", ",".join(ids)).splitlines()
        states = {job: state.split()[0] for job, state in (line.split("|")[:2] for line in lines)}
    queued = slurm("squeue", "--noheader", "--states", "all", "--format", "%A %T").splitlines()
    return states | {job: state for job, state in map(str.split, queued) if job in ids}


@dataclass(frozen=True)
class LiveJob:
    """A job that Slurm has not finished with: what it does (train or evaluate, up to or at `step`) and its state."""

    id: str
    kind: str
    step: int
    state: str


def live_jobs(runs: list[RunDir]) -> list[list[LiveJob]]:
    """The live jobs of each run, in the order of their submission; Slurm is asked once for all."""
    rows: list[list[dict[str, Any]]] = [read_jsonl(run.jobs) for run in runs]
    states = job_states([row["job"] for of_run in rows for row in of_run])
    return [
        [
            LiveJob(row["job"], row["kind"], row["step"], states[row["job"]])
            for row in of_run
            if row["job"] in states and states[row["job"]] not in ENDED
        ]
        for of_run in rows
    ]
