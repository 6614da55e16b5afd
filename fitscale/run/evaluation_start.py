"""Starts of the jobs that evaluate a checkpoint: a line each in evaluation/starts.jsonl, and when there are no more.

An evaluation goes on from the chunks that are finished, so that a job may be started as often as something ends it, as
long as every few starts finish one.
"""

import time
from typing import Any

from fitscale.config.errors import UserError, writing
from fitscale.config.files import append_jsonl, read_jsonl
from fitscale.run.attempt import slurm_start
from fitscale.run.chunks import chunk_progress
from fitscale.run.layout import EVALUATIONS, RunDir

IDLE_STARTS = 5  # of one Slurm job that finish no chunk, after which it is not started again
_STARTS: dict[str, Any] = {"job": str | None, "restart": int, "step": int, "rows": int, "chunks": int}


def is_evaluated(run: RunDir, step: int, pending: list[int]) -> bool:
    """Whether nothing is left to do at `step`: it is not `pending`, and no chunk waits there to become rows."""
    return step not in pending and not any(work.step == step for work in chunk_progress(run.evaluation_folder))


def require_new_chunks(run: RunDir, step: int) -> None:
    """Refuse a start of this Slurm job at `step` that would follow five without a new chunk.

    Every rank comes to the same answer, whichever is first: only starts before this one are looked at.

    Raises:
        UserError: what is finished is what five starts of this job have found.
    """
    job, restart = slurm_start()
    rows = read_jsonl(run.evaluation_starts, **_STARTS)
    before = [row for row in rows if job is not None and row["job"] == job and row["restart"] < restart][-IDLE_STARTS:]
    if len(before) == IDLE_STARTS and all(_finished(row) == finished(run, step) for row in before):
        raise UserError(
            f"{run.path}: job {job} finished no chunk of the evaluation of step {step} in {IDLE_STARTS} starts; it "
            "is not started again. Why each ended: log.txt and submitit/ there; a time limit has to be long enough for "
            "one chunk of images. Then submit the run anew"
        )


def note_start(run: RunDir, step: int) -> None:
    """A line for this start; requeue.sh reads it, too. To be called on rank 0."""
    job, restart = slurm_start()
    rows, chunks = finished(run, step)
    row = {"job": job, "restart": restart, "event": "start", "step": step, "rows": rows, "chunks": chunks}
    with writing(run.evaluation_starts):
        append_jsonl(run.evaluation_starts, {**row, "time_unix_s": time.time()})


def finished(run: RunDir, step: int) -> tuple[int, int]:
    """Rows of evaluations.jsonl at `step`, and chunks that are not rows yet."""
    rows = [row for row in read_jsonl(run.evaluations, **EVALUATIONS) if row["step"] == step]
    return len(rows), sum(work.done for work in chunk_progress(run.evaluation_folder) if work.step == step)


def _finished(row: dict[str, Any]) -> tuple[int, int]:
    return row["rows"], row["chunks"]
