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
from typing import ClassVar

from submitit.core.job_environment import JobEnvironment
from submitit.helpers import DelayedSubmission

from fitscale.config.errors import PassingError, UserError
from fitscale.config.load import load_config
from fitscale.config.program import USER_ERROR
from fitscale.config.schema import Config
from fitscale.run.attempt import TakenOverError, is_taken_over
from fitscale.run.layout import RunDir

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, PORTS = 10000, 20000  # below the ports that Linux hands out by itself


@dataclass(frozen=True)
class RunJob:
    """Train the run in `run`, which holds its config already, then evaluate it."""

    run: RunDir

    def __call__(self) -> None:
        self.fitscale("train", str(self.run.config))
        self.fitscale("evaluate", str(self.run.path))

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again when the job's time is over: the same."""
        return DelayedSubmission(self)

    def fitscale(self, *arguments: str) -> None:
        """Run `fitscale ARGUMENTS`; raises SystemExit(2) on a user's mistake, RuntimeError if it fails otherwise."""
        command = [sys.executable, "-m", "fitscale", *arguments]
        environment = {key: value for key, value in os.environ.items() if key not in RENDEZVOUS}
        with open(self.run.log, "ab") as log:
            code = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
            ).returncode
        if code == USER_ERROR:
            raise SystemExit(code)
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {code}; its output: {self.run.log}")


@dataclass(frozen=True)
class StepJob(RunJob):
    """A Slurm job, which does what its `kind` says up to, or at, `step`."""

    step: int
    kind: ClassVar[str]
    most_timeouts: ClassVar[int] = 5  # time limits that it may reach, and is queued again


@dataclass(frozen=True)
class EvaluateJob(StepJob):
    """Evaluate the run in `run` at `step`."""

    kind: ClassVar[str] = "evaluate"  # begins anew at each start

    def __call__(self) -> None:
        require_device(load_config([str(self.run.config)]))
        self.fitscale("evaluate", str(self.run.path), "--step", str(self.step))


@dataclass(frozen=True)
class TrainJob(StepJob):
    """One rank of the run in `run` up to `step`: in this process, so that every rank hears the cluster's signals."""

    kind: ClassVar[str] = "train"
    most_timeouts: ClassVar[int] = 10**6  # attempts without progress are what ends it (run/attempt.py)

    def __call__(self) -> None:
        environment = JobEnvironment()
        rank = environment.global_rank
        os.environ.update(rendezvous(environment))
        if rank == 0:
            self.run.failed.unlink(missing_ok=True)
            sys.stdout.flush()
            sys.stderr.flush()
            with open(self.run.log, "ab") as log:  # for this process's output, and that of what it starts
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
        self._train(rank)

    def _train(self, rank: int) -> None:
        from fitscale.train.preempt import Preempted
        from fitscale.train.trainer import train

        try:
            config = load_config([str(self.run.config)])
            require_device(config)
            train(config, self.step)
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
        if not isinstance(error, TakenOverError | PassingError) and not is_taken_over(self.run):
            self.run.failed.write_text(f"{error}\n")


def require_device(config: Config) -> None:
    """Raises RuntimeError where a node has lost its GPU: the fault of the node, and none of the config."""
    if config.run.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
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
