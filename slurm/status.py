"""How runs on a cluster are doing: one table from their run directories and Slurm's queue.

    python slurm/status.py runs/b               one run, or several
    python slurm/status.py sweeps/digits        every cell of a sweep
    python slurm/status.py runs/b --cancel      scancel what is left of their jobs

The queue is asked before accounting: that keeps NODE_FAIL for a job that was queued again and may have completed since.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.main import exit_code
from fitscale.config.rundir import RunDir, read_jsonl
from fitscale.scaling.progress import progress
from fitscale.train import launch
from fitscale.train.job import FAILED

COLUMNS = ("run", "state", "job", "attempts", "step", "loss", "fd", "images_per_s", "mfu", "left_h", "nodes")
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
    runs = [run for path in arguments.path for run in find_runs(path)]
    if arguments.cancel:
        return cancel(runs)
    while True:
        rows = [status(run) for run in runs]
        if arguments.json:
            print("\n".join(json.dumps(row) for row in rows), flush=True)
        else:
            print(table(rows), flush=True)
        if not arguments.watch or all(row["state"] in ("FINISHED", "FAILED", "STOPPED") for row in rows):
            return int(any(row["state"] == "FAILED" for row in rows))
        time.sleep(EVERY_S)


def find_runs(path: Path) -> list[RunDir]:
    """The run at `path`, or the runs of the sweep at `path`.

    Raises:
        UserError: it is neither.
    """
    if (path / "config.yaml").exists():
        return [RunDir(path)]
    runs = [RunDir(config.parent) for config in sorted(path.glob("*/config.yaml"))]
    if not runs:
        raise UserError(f"{path}: neither a run directory (no config.yaml) nor a sweep's (no */config.yaml)")
    return runs


def status(run: RunDir) -> dict[str, Any]:
    """What there is to know of a run; a number that is not known is None."""
    config = load_config([str(run.config)])
    state, live = progress(config, run), launch.live_jobs(run) if run.jobs.exists() else {}
    speed = (read_jsonl(run.throughput) or [{}])[-1]
    starts = [row for row in read_jsonl(run.attempts) if row["event"] == "start"]
    distances = [row["value"] for row in read_jsonl(run.evaluations) if row["metric"] == "fd"]
    step_s, failed = speed.get("step_s"), run.path / FAILED
    return {
        "run": str(run.path),
        "state": overall(state.finished, live, failed.exists(), bool(starts)),
        "job": next(iter(live), None),
        "attempts": len(starts),
        "step": state.step,
        "steps": state.steps,
        "loss": state.loss,
        "fd": distances[-1] if distances else None,
        "images_per_s": speed.get("images_per_s"),
        "mfu": speed.get("mfu"),
        "left_h": None if step_s is None else (state.steps - state.step) * step_s / 3600,
        "nodes": starts[-1]["nodes"] if starts else None,
        "error": failed.read_text().strip().splitlines()[-ERROR_LINES:] if failed.exists() else None,
    }


def overall(finished: bool, live: dict[str, str], failed: bool, started: bool) -> str:
    """One word: the run directory says what is finished or failed, Slurm what is still going to happen."""
    if finished:
        return "FINISHED"
    if live:  # training comes first; an evaluation that waits for it says less
        return next(iter(live.values()))
    if failed:
        return "FAILED"
    return "STOPPED" if started else "NEW"


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned text, and the errors of the failed runs below."""
    cells = [COLUMNS, *(tuple(text(row, column) for column in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    errors = [f"{row['run']}: {line}" for row in rows for line in row["error"] or []]
    return "\n".join(lines + errors)


def text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if column == "step":
        return f"{value}/{row['steps']}"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def cancel(runs: list[RunDir]) -> int:
    """Cancel every job of `runs` that is left, and name it."""
    jobs = [job for run in runs if run.jobs.exists() for job in launch.live_jobs(run)]
    if jobs:
        launch.slurm("scancel", *jobs)
    print(f"cancelled: {', '.join(jobs) or 'nothing, no job is left'}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
