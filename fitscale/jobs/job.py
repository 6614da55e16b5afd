"""What a cluster runs: jobs that hold a run directory's path and nothing else.

A job that is started again, be it from its first pickle after the loss of a node, goes on from what the directory
holds: it does what is left, and nothing twice. What it prints is in `log.txt` of the run directory.

    RunJob        train, then evaluate, in one process, as a person would type it (a cell on this machine)
    TrainJob      one of the ranks of a Slurm job: train up to a step
    EvaluateJob   one of the ranks of a Slurm job: evaluate the checkpoint of a step, with the others
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

from submitit.core.job_environment import JobEnvironment
from submitit.helpers import DelayedSubmission

from fitscale.config.errors import PassingError, UserError
from fitscale.config.load import load_config
from fitscale.config.program import USER_ERROR
from fitscale.config.schema import Config
from fitscale.run.attempt import TakenOverError, is_taken_over
from fitscale.run.evaluation_start import is_evaluated, note_start, require_new_chunks
from fitscale.run.layout import RunDir
from fitscale.run.progress import progress

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE: Mapping[str, str] = {}  # the place of a process that is none of several
FIRST_PORT, PORTS = 10000, 20000  # below the ports that Linux hands out by itself


@dataclass(frozen=True)
class RunJob:
    """Train the run in `run`, which holds its config already, then evaluate it."""

    run: RunDir

    def __call__(self) -> None:
        with Stop() as stop:
            self.fitscale(stop, "train", str(self.run.config))
            self.fitscale(stop, "evaluate", str(self.run.path))

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again when the job's time is over: the same."""
        return DelayedSubmission(self)

    def fitscale(self, stop: "Stop", *arguments: str, place: Mapping[str, str] = ALONE) -> None:
        """Run `fitscale ARGUMENTS` as the rank whose `rendezvous` is `place`; rank 0's output goes to log.txt, that of
        others where submitit has theirs. Raises SystemExit(2) on a user's mistake, RuntimeError if it fails otherwise
        or is stopped."""
        command = [sys.executable, "-m", "fitscale", *arguments]
        environment = {key: value for key, value in os.environ.items() if key not in RENDEZVOUS} | {**place}
        with open(self.run.log, "ab") if place.get("RANK", "0") == "0" else nullcontext() as log:
            code = stop.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if code == USER_ERROR:
            raise SystemExit(code)
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {code}; its output: {self.run.log}")


class Stop:
    """Passes this process's SIGTERM on to what it runs, which may take its time to save, and a second one as SIGKILL.

    submitit's own handler does nothing, so that what a signal is for is left to the job.
    """

    def __init__(self) -> None:
        self.came = False
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Stop":
        self.before = signal.signal(signal.SIGTERM, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _pass_on(self, signum: int, _: FrameType | None) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL if self.came else signum)
        self.came = True

    def run(self, command: list[str], **how: Any) -> int:
        """The command's exit code; SIGTERM's if that came before, or the command ended well in spite of it."""
        if self.came:
            return -signal.SIGTERM
        self.process = subprocess.Popen(command, **how)
        if self.came:  # while it was started
            self.process.terminate()
        return self.process.wait() or (-signal.SIGTERM if self.came else 0)


@dataclass(frozen=True)
class StepJob(RunJob):
    """A Slurm job, which does what its `kind` says up to, or at, `step`."""

    step: int
    kind: ClassVar[str]


@dataclass(frozen=True)
class EvaluateJob(StepJob):
    """One rank of the evaluation of the run in `run` at `step`.

    Ranks share the work through the run directory alone (run/chunks.py): one that dies leaves its chunk to the others.
    """

    kind: ClassVar[str] = "evaluate"

    def __call__(self) -> None:
        self._evaluate(JobEnvironment())

    def _evaluate(self, environment: JobEnvironment) -> None:
        config = load_config([str(self.run.config)])
        if is_evaluated(self.run, self.step, progress(config, self.run).pending):
            return  # as where a killed rank has a job started again that the others had finished
        self._begin(environment.global_rank)
        require_device(config)
        with Stop() as stop:
            self.fitscale(stop, "evaluate", str(self.run.path), "--step", str(self.step), place=rendezvous(environment))

    def _begin(self, rank: int) -> None:
        try:
            require_new_chunks(self.run, self.step)
        except UserError as error:
            if rank == 0:
                with open(self.run.log, "a") as log:
                    print(f"error: {error}", file=log)
            raise SystemExit(USER_ERROR) from error
        if rank == 0:
            note_start(self.run, self.step)


@dataclass(frozen=True)
class TrainJob(StepJob):
    """One rank of the run in `run` up to `step`: in this process, so that every rank hears the cluster's signals."""

    kind: ClassVar[str] = "train"

    def __call__(self) -> None:
        environment = JobEnvironment()
        rank = environment.global_rank
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it, until training hears it
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
    """What torch.distributed reads; the port differs between a job's starts, so that no rank meets an earlier one's.

    LOCAL_RANK is the index of the rank's device: 0 where Slurm has bound a GPU to each task, and shows it no other.
    """
    import torch

    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    port = FIRST_PORT + (101 * int(environment.raw_job_id) + restart) % PORTS
    return {
        "RANK": str(environment.global_rank),
        "LOCAL_RANK": "0" if torch.cuda.device_count() == 1 else str(environment.local_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "LOCAL_WORLD_SIZE": str(environment.num_tasks // environment.num_nodes),
        "MASTER_ADDR": environment.hostnames[0] if environment.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(port),
    }
