"""How runs on a cluster are doing: one table from their run directories and Slurm's queue.

    python slurm/status.py runs/b               one run, or several
    python slurm/status.py sweeps/digits        every cell of a sweep
    python slurm/status.py runs/b --cancel      scancel what is left of their jobs

Where Slurm is not there, the directories alone are told, and UNKNOWN of a run whose jobs may be going on.
The queue is asked before accounting: that keeps NODE_FAIL for a job that was queued again and may have completed since.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.config.program import aligned, exit_code
from fitscale.jobs import launch
from fitscale.run.chunks import chunk_progress
from fitscale.run.comparability import is_as_configured
from fitscale.run.layout import ATTEMPTS, EVALUATIONS, THROUGHPUT, RunDir, find_runs
from fitscale.run.progress import progress

COLUMNS = ("run", "state", "job", "attempts", "step", "loss", "fd", "images_per_s", "mfu", "left_h", "nodes", "chunks")
EVERY_S = 5.0
ERROR_LINES = 5


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show the state of runs and sweeps, or cancel their jobs.",
        epilog="example: python slurm/status.py runs/b --watch",
    )
    parser.add_argument("path", nargs="+", type=Path, metavar="RUN|SWEEP", help="run and sweep directories")
    parser.add_argument("--json", action="store_true", help="one JSON object a run, one a line")
    parser.add_argument("--watch", action="store_true", help="show it again every few seconds, until all have ended")
    parser.add_argument("--cancel", action="store_true", help="scancel the runs' jobs that are not finished")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program with `argv`; returns 1 if a run has failed."""
    arguments = parse(argv)
    runs = find_runs(arguments.path)
    if arguments.cancel:
        return cancel(runs)
    while True:
        rows = [status(run, live) for run, live in zip(runs, live_or_unknown(runs), strict=True)]
        if arguments.json:
            print("\n".join(json.dumps(row) for row in rows), flush=True)
        else:
            print(table(rows), flush=True)
        if not arguments.watch or all(row["state"] in ("FINISHED", "FAILED", "STOPPED") for row in rows):
            return int(any(row["state"] == "FAILED" for row in rows))
        time.sleep(EVERY_S)


def live_or_unknown(runs: list[RunDir]) -> Sequence[list[launch.LiveJob] | None]:
    """The live jobs of each run; None of those with jobs that nobody answers for, which is said."""
    try:
        return launch.live_jobs(runs)
    except launch.QueueUnknownError as error:
        print(f"warning: {error}", file=sys.stderr)
        return [None if run.jobs.exists() else [] for run in runs]


def status(run: RunDir, live: list[launch.LiveJob] | None) -> dict[str, Any]:
    """What there is to know of a run with these live jobs (None: not known); a number that is not known is None."""
    config = load_config([str(run.config)])
    state, job = progress(config, run), leading(live or [])
    speed = (read_jsonl(run.throughput, **THROUGHPUT) or [{}])[-1]
    starts = [row for row in read_jsonl(run.attempts, **ATTEMPTS) if row["event"] == "start"]
    fd = [row for row in read_jsonl(run.evaluations, **EVALUATIONS) if row["metric"] == "fd"]
    distances = [row["value"] for row in fd if is_as_configured(config, "fd", row["key"])]
    step_s, word = speed.get("step_s"), one_word(state.finished, job, run, queue_known=live is not None)
    return {
        "run": str(run.path),
        "state": word,
        "job": job.id if job else None,
        "attempts": len(starts),
        "step": state.step,
        "steps": state.steps,
        "loss": state.loss,
        "fd": distances[-1] if distances else None,
        "images_per_s": speed.get("images_per_s"),
        "mfu": speed.get("mfu"),
        "left_h": None if step_s is None else (state.steps - state.step) * step_s / 3600,
        "nodes": starts[-1].get("nodes") if starts else None,
        "evaluations": [asdict(work) for work in chunk_progress(run.evaluation_folder)],
        "error": last_lines(run.failed if run.failed.exists() else run.log) if word in ("FAILED", "STOPPED") else None,
    }


def leading(live: list[launch.LiveJob]) -> launch.LiveJob | None:
    """The job that says most of its run: one that runs before one that waits, training before evaluations. A held one
    says nothing: it waits for a checkpoint."""
    moving = [job for job in live if job.state != launch.HELD]
    return min(moving, key=lambda job: (job.state != "RUNNING", job.kind != "train"), default=None)


def one_word(finished: bool, job: launch.LiveJob | None, run: RunDir, queue_known: bool) -> str:
    """The run directory says what is finished or failed, Slurm what is still going to happen."""
    if finished:
        return "FINISHED"
    if job:
        return job.state if job.kind == "train" else f"EVALUATION {job.state}"
    if run.failed.exists():
        return "FAILED"
    if not queue_known:
        return "UNKNOWN"
    return "STOPPED" if run.jobs.exists() or run.attempts.exists() else "NEW"


def last_lines(path: Path) -> list[str]:
    """The last lines of a log that hold anything; of a line that was rewritten in place, what stood last."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line.rsplit("\r", 1)[-1] for line in lines if line.strip()][-ERROR_LINES:]


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned text, and the errors of the failed runs below."""
    cells = [COLUMNS, *(tuple(text(row, column) for column in COLUMNS) for row in rows)]
    return "\n".join([aligned(cells), *(f"{row['run']}: {line}" for row in rows for line in row["error"] or [])])


def text(row: dict[str, Any], column: str) -> str:
    if column == "step":
        return f"{row['step']}/{row['steps']}"
    if column == "chunks":
        return chunks_done(row["evaluations"])
    value = row[column]
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def chunks_done(evaluations: list[dict[str, Any]]) -> str:
    """Finished chunks of the evaluations that are under way, or were left, by step: 1000: 34/98."""
    by_step: dict[int, list[int]] = {}
    for work in evaluations:
        done, count = by_step.get(work["step"], (0, 0))
        by_step[work["step"]] = [done + work["done"], count + work["count"]]
    return ", ".join(f"{step}: {done}/{count}" for step, (done, count) in sorted(by_step.items())) or "-"


def cancel(runs: list[RunDir]) -> int:
    """Cancel every job of `runs` that is left, and name it."""
    jobs = [job.id for live in launch.live_jobs(runs) for job in live]
    if jobs:
        launch.slurm("scancel", *jobs)
    print(f"cancelled: {', '.join(jobs) or 'nothing, no job is left'}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
