"""From a run directory to a Slurm job: the batch script, the submission, the queue.

Everything that decides how a job is asked for comes from the cluster's profile; everything that it computes is in the
run directory already.
"""

import shutil
import subprocess
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from shlex import quote
from time import time

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fitscale.config.checks import check_plain
from fitscale.config.errors import UserError, writing
from fitscale.config.files import append_jsonl, read_jsonl
from fitscale.jobs.job import StepJob
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.submission import Allocation
from fitscale.run.layout import JOBS, RunDir

# Time limits at which submitit has a job queued again: what ends one is starts that bring it no further
# (run/attempt.py, run/evaluation_start.py).
MOST_TIMEOUTS = 10**6
# Of srun, when a rank ends: those of a training need each other, one of an evaluation leaves its chunks to the others.
TOGETHER = {"train": ["--kill-on-bad-exit=1"], "evaluate": ["--kill-on-bad-exit=0", "--wait=0"]}
REQUEUE = Path(__file__).with_name("requeue.sh")
# Slurm's states of a job that is over. Of the others some are rare or new (SIGNALING, STAGE_OUT), and all are live.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
ENDED |= {"DEADLINE", "REVOKED"}
HELD = "HELD"  # pending until somebody releases it: for Slurm the reason of PENDING


class _AnywhereExecutor(SlurmExecutor):
    """Writes batch scripts also where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def make_executor(
    profile: ClusterConfig, one: Allocation, job: StepJob, time_min: int, wait: dict[str, str | bool]
) -> SlurmExecutor:
    """submitit's executor for a job of the run `one`; `wait`: sbatch's options that say what it waits for.

    Raises:
        UserError: a name or a value does not reach sbatch as it is written.
    """
    run, machine = one.run.absolute, one.machine_of(job.kind)
    wanted = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint", "exclude")}
    _require_as_written({"run.name": one.config.run.name, "run.dir": str(run.path), **wanted, **profile.sbatch})
    tasks = machine.gpus_per_node
    executor = _AnywhereExecutor(run.submitit / "%j", MOST_TIMEOUTS, python=profile.python)
    if profile.mem_gb is not None:
        share = min(1.0, tasks / profile.tasks_per_node)  # an evaluation takes a part of a node
        wanted["mem"] = f"{round(1024 * profile.mem_gb * share)}M"
    if profile.gpus_per_node:
        wanted["gpus_per_node"] = tasks
    variables = {**profile.environment, "FITSCALE_RUN_DIR": str(run.path)}
    executor.update_parameters(
        job_name=f"{one.config.run.name}-{job.kind}-{job.step}",
        nodes=machine.nodes,
        ntasks_per_node=tasks,
        cpus_per_task=profile.cpus_per_task,
        time=time_min,
        wckey=None,  # submitit's default is a key of its own, which clusters that check theirs refuse
        signal_delay_s=profile.signal_before_end_s,
        stderr_to_stdout=True,
        setup=[
            *(f"export {key}={quote(value)}" for key, value in variables.items()),
            *profile.setup,
            REQUEUE.read_text(),
        ],
        teardown=["end_job $?"],
        # The environment reaches the ranks whatever the shell or the cluster has for --export. Ranks of a node are
        # consecutive, and so are their cores on its sockets, as the GPUs are that they take by their local rank; Slurm
        # is asked to bind none (docs/decisions.md). srun does not take over sbatch's --cpus-per-task (Slurm 22.05).
        srun_args=[
            *TOGETHER[job.kind],
            *("--export=ALL", "--distribution=block:block"),
            *(f"--cpus-per-task={profile.cpus_per_task}", *profile.srun),
        ],
        additional_parameters={"requeue": True, **profile.sbatch, **wait},
        **{key: value for key, value in wanted.items() if value is not None},
    )
    return executor


def _require_as_written(texts: dict[str, str | None]) -> None:
    """Raises UserError for a text that sbatch would change: it drops backslashes, quoted or not."""
    for key, text in texts.items():
        check_plain(key, text)  # the working folder is a part of run.dir, too
        if "\\" in (text or ""):
            raise UserError(f"{key}: {text!r} holds a backslash, which sbatch drops")
    if "%" in str(texts["run.dir"]):
        raise UserError(f"run.dir: {texts['run.dir']}: Slurm replaces % in the names of files; choose another folder")


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


def submit(executor: SlurmExecutor, job: StepJob, held: bool = False) -> str:
    """Hand `job` to Slurm and note it in the run directory, as `held` if it is; returns its id.

    Raises:
        UserError: sbatch refuses it, or there is no room to write.
    """
    with writing(job.run.path):
        try:
            with redirect_stderr(StringIO()):  # where submitit repeats what sbatch says
                job_id = executor.submit(job).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            reasons = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            raise UserError(f"sbatch refused the job: {reasons[-1].strip().removeprefix('sbatch: error: ')}") from error
        try:
            row = {"job": job_id, "kind": job.kind, "step": job.step, "held": held, "time_unix_s": time()}
            append_jsonl(job.run.jobs, row)  # requeue.sh reads it
        except OSError:
            slurm("scancel", job_id)  # nobody would know of it
            raise
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
    queued = slurm("squeue", "--noheader", "--states", "all", "--format", "%A %T %r").splitlines()
    rows = [line.split(maxsplit=2) for line in queued]
    return states | {job: HELD if why.startswith("JobHeld") else state for job, state, why in rows if job in ids}


class QueueUnknownError(UserError):
    """Nobody answers for Slurm's queue; what the run directories say can be told all the same."""


@dataclass(frozen=True)
class LiveJob:
    """A job that Slurm has not finished with: what it does (train or evaluate, up to or at `step`) and its state."""

    id: str
    kind: str
    step: int
    state: str


def live_jobs(runs: list[RunDir]) -> list[list[LiveJob]]:
    """The live jobs of each run, in the order of their submission; Slurm is asked once for all.

    Raises:
        QueueUnknownError: Slurm is not there, or not configured.
    """
    rows = [read_jsonl(run.jobs, **JOBS) for run in runs]
    try:
        states = job_states([row["job"] for of_run in rows for row in of_run])
    except UserError as error:
        raise QueueUnknownError(f"the queue is unknown: {error}") from error
    found = [[LiveJob(row["job"], row["kind"], row["step"], states.get(row["job"], "")) for row in one] for one in rows]
    return [[job for job in one if job.state and job.state not in ENDED] for one in found]
