"""Saving while training goes on.

    loop:        copy what this rank keeps to host memory (`assembly`)   (the loop waits for this alone)
    each rank:   a thread leaves what other ranks write of it in a file, then `.given-<rank>`; puts the tensors together
                 that this rank writes, when those it needs have given; writes its files, brings them to the disk, and
                 leaves their checksums in `.done-<rank>`
    rank 0:      a thread waits for all of these, writes COMPLETE, renames the folder, prunes old checkpoints, the last
                 two only while no newer attempt owns the run directory

At most one save is in flight: the next one, and the end of the run, wait for it. A save that fails on any rank is
reported and leaves the checkpoints before it as they were; training goes on, and the next save is a new try. When that
fails too, training ends: it would compute what is lost in the end.
"""

import json
import logging
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fitscale.config.errors import UserError
from fitscale.config.files import read_json, write_atomic
from fitscale.model.weights import write_tensors
from fitscale.run.attempt import Attempt
from fitscale.run.checkpoint import lines_checksum
from fitscale.train.assembly import Assembly, parts_file
from fitscale.train.checkpoint import complete, fsync, prune_checkpoints, tensor_sets

log = logging.getLogger(__name__)
POLL_S = 0.02
MOST_FAILED = 2  # saves in a row
VISIBLE_S = 60.0  # how long another node's file may take to show on a shared file system


class Saver:
    """One rank's part in saving a run's checkpoints."""

    def __init__(
        self, attempt: Attempt, engine: Any, ema_decays: list[float], keep_last: int, keep_steps: set[int]
    ) -> None:
        """Made by all ranks together."""
        self.attempt, self.assembly = attempt, Assembly(engine, tensor_sets(ema_decays))
        self.keep_last, self.keep_steps = keep_last, keep_steps
        self.pending: _Save | None = None
        self.failed = 0  # saves in a row

    def save(self, meta: dict[str, Any]) -> None:
        """Begin the checkpoint of step `meta["step"]`; a collective over all ranks. Raises UserError as `wait`."""
        self.settle()
        self.assembly.copy(begun=meta["optimizer_steps"] > 0)
        self.pending = _Save(self.attempt, self.assembly, meta)
        if dist.get_rank() == 0:
            shutil.rmtree(self.pending.temporary, ignore_errors=True)  # what a killed save of this step left behind
        dist.barrier()
        self.pending.start()

    def settle(self) -> None:
        """`wait`, and say what could not be saved: training goes on."""
        problem = self.wait()
        if problem and dist.get_rank() == 0:
            log.error("%s", problem)

    def wait(self) -> str | None:
        """Wait until no save is in flight; why the last one is not complete, if so. A collective over all ranks.

        Raises:
            UserError: the one before it was not complete either.
        """
        if self.pending is None:
            return None
        problem = self.pending.finish()
        self.pending = None
        self.failed = self.failed + 1 if problem else 0
        if self.failed == MOST_FAILED:
            raise UserError(f"{problem}; nor could the one before it: mend that and start again")
        if problem is None and dist.get_rank() == 0:
            with self.attempt.writing():
                prune_checkpoints(self.attempt.run, self.keep_last, self.keep_steps)
        return problem

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Where training fails, other ranks may be dead: what they have not written by now is waited for no longer."""
        if error is not None and self.pending is not None:
            self.pending.all_given.set()
            self.pending.all_parts_over.set()


class _Save:
    """One rank's part of one save: it is written, and on rank 0 the whole completed, in a thread of its own."""

    def __init__(self, attempt: Attempt, assembly: Assembly, meta: dict[str, Any]) -> None:
        self.attempt, self.run, self.assembly, self.meta = attempt, attempt.run, assembly, meta
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.folder = self.run.checkpoint_path(meta["step"])
        self.temporary = self.folder.with_name(f".saving-{attempt.number}-{self.folder.name}")
        self.logged_bytes = self.run.metrics.stat().st_size
        self.error: str | None = None  # of the first rank that could not write its part
        self.all_given, self.all_parts_over = threading.Event(), threading.Event()

    def start(self) -> None:
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self.given = thread.submit(self._give)
        self.written = thread.submit(self._write)
        self.completed = thread.submit(self._complete) if self.rank == 0 else self.written
        thread.shutdown(wait=False)

    def finish(self) -> str | None:
        """Wait for all ranks; why the checkpoint is not complete, if so. A collective over all ranks."""
        for task, over in ((self.given, self.all_given), (self.written, self.all_parts_over)):
            errors: list[str | None] = [None] * self.world_size
            dist.all_gather_object(errors, self._error_of(task))
            self.error = next((error for error in errors if error), None)
            over.set()
        outcome = [self._error_of(self.completed)]
        if outcome[0] and self.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)  # gives a full disk its space back
            steps = [checkpoint.step for checkpoint in self.run.checkpoints()]
            newest = f"step {steps[-1]}" if steps else "none yet"
            outcome = [f"{self.folder}: the checkpoint could not be saved ({outcome[0]}); newest: {newest}"]
        dist.broadcast_object_list(outcome, src=0)
        return outcome[0]

    def _error_of(self, task: Future[None]) -> str | None:
        """Wait for the end of a task; what went wrong in it, whatever that is: training goes on."""
        error = task.exception()
        return self.error or (f"rank {self.rank}: {error}" if error else None)

    def _give(self) -> None:
        self.assembly.give(self.temporary)
        if self.rank in self.assembly.givers:
            write_atomic(self._marker("given", self.rank), "")

    def _write(self) -> None:
        self.given.result()
        self._wait_for([self._marker("given", rank) for rank in self.assembly.needed()], self.all_given)
        about = {"model": json.dumps(self.meta["model"]), "step": str(self.meta["step"])}
        checksums = {}
        for folder in self.assembly.sets:
            file = f"{folder}/{self.rank:05d}.safetensors"
            checksums[file] = write_tensors(self.temporary / file, self.assembly.tensors(folder, self.temporary), about)
        write_atomic(self._marker("done", self.rank), json.dumps(checksums))

    def _marker(self, what: str, rank: int) -> Path:
        return self.temporary / f".{what}-{rank:05d}"

    def _complete(self) -> None:
        self.written.result()
        markers = [self._marker("done", rank) for rank in range(self.world_size)]
        self._wait_for(markers, self.all_parts_over)
        checksums: dict[str, str] = {}
        for marker in markers:
            checksums |= read_json(marker)
            marker.unlink()
        for rank in self.assembly.givers:
            parts_file(self.temporary, rank).unlink()
            self._marker("given", rank).unlink()
        fsync(self.run.metrics)  # a resumed run has to find the lines up to this step
        logged = lines_checksum(self.run.metrics, self.logged_bytes)
        complete(self.temporary, {**self.meta, "logged": logged}, checksums)
        with self.attempt.writing():
            if self.folder.exists():  # not complete, or training would have resumed after it
                self.folder.rename(self.folder.with_name(f"{self.folder.name}.incomplete-{time.time_ns()}"))
            self.temporary.rename(self.folder)
        fsync(self.folder.parent)

    def _wait_for(self, markers: list[Path], over: threading.Event) -> None:
        deadline = float("inf")
        while missing := [marker.name for marker in markers if not marker.exists()]:
            if over.is_set():
                deadline = min(deadline, time.monotonic() + VISIBLE_S)
            if self.error or time.monotonic() > deadline:
                raise OSError(self.error or f"what other ranks wrote does not show: no {', '.join(missing)}")
            time.sleep(POLL_S)
