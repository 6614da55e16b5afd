"""What a cluster runs: jobs that hold a run directory's path and nothing else.

A job that is started again, be it from its first pickle after the loss of a node, goes on from what the directory
holds: it does what is left, and nothing twice. What it prints is in `log.txt` of the run directory.

    RunJob        train, then evaluate, in one process, as a person would type it (a cell on this machine)
    TrainJob      one of the ranks of a Slurm job: train up to a step
    EvaluateJob   evaluate the checkpoint of a step
"""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from submitit.core.job_environment import JobEnvironment
from submitit.helpers import DelayedSubmission

from fitscale.config.errors import PassingError, UserError
from fitscale.config.load import load_config
from fitscale.config.main import USER_ERROR
from fitscale.config.rundir import RunDir
from fitscale.config.schema import Config

LOG = "log.txt"
FAILED = "failed.txt"  # why the run cannot go on by itself; its presence keeps the job from being queued again
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SIGNALLED_STARTS = 20  # starts of a job that may end by a signal before training begins
FAILED_STARTS = 5  # starts that may end so in any other way: on a bad GPU or network, an address in use
EVALUATION_TIMEOUTS = 5  # time limits that one evaluation may reach: it begins anew each time
CONTROLLER_TRIES, CONTROLLER_WAIT_S = 30, 10  # how often a batch script asks a controller that does not answer
FIRST_PORT, PORTS = 10000, 20000  # below the ports that Linux hands out by itself


@dataclass(frozen=True)
class Job:
    """A path, and what submitit queues again when the job's time is over: the same."""

    run_dir: Path

    def __call__(self) -> None:
        raise NotImplementedError

    @property
    def about(self) -> dict[str, Any]:
        """What jobs.jsonl says of it: kind, and step."""
        return {"kind": "run"}

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)

    def run_command(self, *arguments: str) -> None:
        """Run `fitscale ARGUMENTS`; raises SystemExit(2) on a user's mistake, RuntimeError if it fails otherwise."""
        command = [sys.executable, "-m", "fitscale", *arguments]
        environment = {key: value for key, value in os.environ.items() if key not in RENDEZVOUS}
        with open(self.run_dir / LOG, "ab") as log:
            code = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
            ).returncode
        if code == USER_ERROR:
            raise SystemExit(code)
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {code}; its output: {self.run_dir / LOG}")


@dataclass(frozen=True)
class RunJob(Job):
    """Train the run in `run_dir`, which holds its config already, then evaluate it."""

    def __call__(self) -> None:
        self.run_command("train", str(self.run_dir / "config.yaml"))
        self.run_command("evaluate", str(self.run_dir))


@dataclass(frozen=True)
class EvaluateJob(Job):
    """Evaluate the run in `run_dir` at `step`."""

    step: int

    @property
    def about(self) -> dict[str, Any]:
        return {"kind": "evaluate", "step": self.step}

    def __call__(self) -> None:
        require_device(load_config([str(self.run_dir / "config.yaml")]))
        self.run_command("evaluate", str(self.run_dir), "--step", str(self.step))


@dataclass(frozen=True)
class TrainJob(Job):
    """One rank of the run in `run_dir`, in this process, so that every rank hears the cluster's signals itself."""

    until: int  # step

    @property
    def about(self) -> dict[str, Any]:
        return {"kind": "train", "step": self.until}

    def __call__(self) -> None:
        environment = JobEnvironment()
        rank = environment.global_rank
        os.environ.update(rendezvous(environment))
        if rank == 0:
            (self.run_dir / FAILED).unlink(missing_ok=True)
            _log_into(self.run_dir / LOG)
        self._train(rank)

    def _train(self, rank: int) -> None:
        from fitscale.train.preempt import Preempted
        from fitscale.train.trainer import train

        try:
            config = load_config([str(self.run_dir / "config.yaml")])
            require_device(config)
            train(config, self.until)
        except Preempted as stop:
            if stop.signal == signal.SIGUSR2:
                os.kill(os.getpid(), signal.SIGUSR2)  # submitit's own handler again: rank 0 queues the job anew
            raise SystemExit(0 if rank else stop.code) from stop  # a failure here would have srun kill rank 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            self._note(error)
            raise

    def _note(self, error: UserError) -> None:
        """Leave word that the run cannot go on; any rank may meet what the others do not, such as a corrupt image."""
        from fitscale.train.attempt import TakenOverError, is_taken_over

        if not isinstance(error, TakenOverError | PassingError) and not is_taken_over(RunDir(self.run_dir)):
            (self.run_dir / FAILED).write_text(f"{error}\n")


def require_device(config: Config) -> None:
    """Raises RuntimeError where a node has lost its GPU: the fault of the node, and none of the config."""
    import torch

    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch finds no CUDA device on {socket.gethostname()}")


def rendezvous(environment: JobEnvironment) -> dict[str, str]:
    """What torch.distributed reads; the port differs between a job's starts, so that no rank meets an earlier one's."""
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    port = FIRST_PORT + (101 * int(environment.raw_job_id) + restart) % PORTS
    return {
        "RANK": str(environment.global_rank),
        "LOCAL_RANK": str(environment.local_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "LOCAL_WORLD_SIZE": str(environment.num_tasks // environment.num_nodes),
        "MASTER_ADDR": environment.hostnames[0] if environment.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def requeue_lines(run_dir: Path) -> list[str]:
    """Shell lines for the end of a job's batch script: queue the job again unless that is of no use.

    - Training that has begun (a line of attempts.jsonl names this start) goes on after whatever ended it, a killed rank
      or lost peers, but not if the run said itself that it cannot go on, or a newer start owns the run directory: of
      another job, or of this job on other nodes, if Slurm had lost sight of this one.
    - What ended before that, and an evaluation, goes on up to 20 times if a signal ended it (USR2 kills a Python that
      has no handler yet), and up to 5 times after any failure but a user's mistake: the next nodes may be better.
    - Nothing goes on that Slurm itself is ending (cancelled, or requeued); a running job is RUNNING, or SIGNALING for
      the moments in which Slurm sends it a signal, which is when a preempted one may end.
    - A controller that does not answer is asked again, for five minutes.
    """
    failed, owner = quote(str(run_dir / FAILED)), quote(str(run_dir / "attempt.json"))
    attempts = quote(str(run_dir / "attempts.jsonl"))
    job = r"\"job\": \"$SLURM_JOB_ID\", \"restart\":"  # in both files (train/attempt.py)
    this_start, a_start = f'"{job} $restart,"', f'"{job} .*\\"event\\": \\"start\\""'
    return [
        "code=$?",
        "restart=${SLURM_RESTART_COUNT:-0}",
        f"begun=$(grep -cs {a_start} {attempts})",
        "unbegun=$((restart + 1 - ${begun:-0}))",
        "again=",
        f"if grep -qs {this_start} {attempts}; then",
        f"    if [ ! -e {failed} ] && grep -q {this_start} {owner}; then again=1; fi",
        "elif [ $code -gt 128 ] && [ $code -lt 255 ]; then",  # 255: submitit's own end, after too many timeouts
        f"    if [ $unbegun -le {SIGNALLED_STARTS} ]; then again=1; fi",
        f"elif [ $code -ne {USER_ERROR} ] && [ ! -e {failed} ] && [ $unbegun -le {FAILED_STARTS} ]; then again=1; fi",
        'if [ $code -ne 0 ] && [ -n "$again" ]; then',
        f"    for try in {{1..{CONTROLLER_TRIES}}}; do",
        "        state=$(squeue --noheader --jobs $SLURM_JOB_ID --format %T) &&",
        "            case $state in RUNNING | SIGNALING) scontrol requeue $SLURM_JOB_ID ;; esac && break",
        f"        sleep {CONTROLLER_WAIT_S}",
        "    done",
        "fi",
        "exit $code",
    ]


def _log_into(path: Path) -> None:
    """Send this process's output, and that of what it starts, to the end of `path`."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
