"""One start of a run: its number, its hold on the run directory, and its lines in attempts.jsonl.

    start:   lock -> attempt.json names this attempt -> unlock; what earlier ones were saving is deleted
    write:   lock -> attempt.json still names this attempt? -> write -> unlock
    end:     a line with the reason; an attempt that was killed leaves none

The lock is held for moments only, so a dead node never leaves one behind. What keeps an earlier attempt from writing
(a process that Slurm lost sight of, a job submitted twice) is the name in attempt.json: the newest start owns the run.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fitscale.config.errors import UserError, writing
from fitscale.config.files import append_jsonl, read_json, read_jsonl, write_atomic
from fitscale.run.layout import ATTEMPTS, METRICS, RunDir

IDLE_ATTEMPTS = 5  # starts of one Slurm job at the same step, after which it is not started again


_between_threads = threading.Lock()  # a POSIX lock is the process's, and ends when any thread closes the file


class TakenOverError(UserError):
    """A newer attempt owns the run directory: this one must stop, and must not be queued again."""


@dataclass(frozen=True)
class Attempt:
    """This start of the run in `run`; the same on every rank, though only rank 0 writes with it."""

    run: RunDir
    number: int
    token: str

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run directory while something is written there.

        Raises:
            TakenOverError: a newer attempt has started.
        """
        with _locked(self.run):
            self.require_own()
            yield

    def require_own(self) -> None:
        """Raises TakenOverError if a newer attempt has started."""
        owner = _owner(self.run)
        if owner.get("token") != self.token:
            raise TakenOverError(
                f"{self.run.path}: attempt {owner.get('attempt')} (job {owner.get('job')} on {owner.get('host')}) has "
                f"taken over; this is attempt {self.number}, which may not write there any more"
            )

    def end(self, reason: str, step: int) -> None:
        """Note why this attempt ended and after which step."""
        row = {"attempt": self.number, "event": "end", "time_unix_s": time.time(), "step": step, "reason": reason}
        with contextlib.suppress(OSError), self.writing():  # a full disk: why training ends is said elsewhere
            append_jsonl(self.run.attempts, row)


def is_taken_over(run: RunDir) -> bool:
    """Whether this start of a Slurm job has begun an attempt, and a newer one owns the run directory now."""
    owner, *begun = [(row.get("job"), row.get("restart")) for row in [_owner(run), *read_jsonl(run.attempts)]]
    own = slurm_start()
    return own in begun and own != owner


def begin_attempt(run: RunDir, step: int) -> Attempt:
    """Take over the run directory, of which `step` steps are saved; to be called on rank 0.

    Raises:
        UserError: this Slurm job has started so often at this very step that another try is of no use.
    """
    with writing(run.path), _locked(run):
        rows, metrics = read_jsonl(run.attempts, **ATTEMPTS), read_jsonl(run.metrics, **METRICS)
        job, restart = slurm_start()
        _require_progress(run, rows, job, step)
        attempt = Attempt(run, 1 + max((row["attempt"] for row in rows), default=0), uuid.uuid4().hex)
        row = {"attempt": attempt.number, "job": job, "restart": restart, "host": socket.gethostname()}
        start = {
            "event": "start",
            "time_unix_s": time.time(),
            "step": step,
            "nodes": os.environ.get("SLURM_JOB_NODELIST"),
            "previous_ended": rows[-1].get("reason", "killed") if rows else None,
            "lost_steps": max(0, metrics[-1]["step"] - step) if metrics else 0,
        }
        write_atomic(run.owner, json.dumps({**row, "token": attempt.token}))
        append_jsonl(run.attempts, {**row, **start})
        for leftover in run.checkpoint_folder.glob(".saving-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    return attempt


def _require_progress(run: RunDir, rows: list[dict[str, Any]], job: str | None, step: int) -> None:
    starts = [row for row in rows if row["event"] == "start"][-IDLE_ATTEMPTS:]
    idle = [row for row in starts if job is not None and row.get("job") == job and row["step"] == step]
    if len(idle) == IDLE_ATTEMPTS:
        raise UserError(
            f"{run.path}: job {job} made no progress in {IDLE_ATTEMPTS} attempts, all from step {step}; it is not "
            f"started again. Why each ended: {run.attempts} and log.txt beside it; then submit the run anew"
        )


def slurm_start() -> tuple[str | None, int]:
    """The Slurm job that this process belongs to, and how often it has been queued again."""
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _owner(run: RunDir) -> dict[str, Any]:
    return read_json(run.owner) if run.owner.exists() else {}


@contextlib.contextmanager
def _locked(run: RunDir) -> Iterator[None]:
    """An exclusive lock between processes and, on a file system with locks, between nodes."""
    run.path.mkdir(parents=True, exist_ok=True)
    with _between_threads, open(run.path / ".lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # POSIX: the kind that network file systems know
        yield
