"""Run a ladder of sizes: one run directory per cell, trained and evaluated.

1. Resolve every cell's config and print what each will cost; a mistake in any ends here, with nothing written.
2. Write each run directory's config, and manifest.json into the sweep directory.
3. On this machine: run the cells that are not finished, a few at a time; show how far each one is and, at the end, what
   failed and why. On a Slurm cluster: submit what is missing of every cell, and leave the rest to Slurm.

Everything about a cell is read from its run directory, so stopping and starting again is always safe.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from submitit import LocalExecutor, LocalJob

from fitscale.config.errors import UserError, mistakes_in, writing
from fitscale.config.files import write_atomic
from fitscale.config.load import load_schema
from fitscale.config.program import exit_code
from fitscale.data.index import open_index
from fitscale.jobs import launch
from fitscale.jobs.chain import jobs_of_same_config, submit_missing, told
from fitscale.jobs.job import RunJob
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.submission import Submission, allocate, look_at
from fitscale.jobs.sweep import SweepConfig, cells, cost_table, manifest
from fitscale.run.claim import claimed

POLL_S = 1.0
PLAIN_EVERY_S = 20.0  # between two progress reports where the output is no terminal
NO_TIMEOUT_MIN = 60 * 24 * 365
ERROR_LINES = 12


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train and evaluate every cell of a sweep; finished cells are skipped, interrupted ones go on.",
        epilog="example: python slurm/sweep.py configs/sweep/digits.yaml --cluster configs/cluster/h100.yaml --dry-run",
    )
    parser.add_argument("sweep", nargs="+", metavar="SWEEP|KEY=VALUE", help="sweep YAML files and dotted overrides")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and their cost, run nothing")
    parser.add_argument(
        "--cluster",
        default="local",
        metavar="PROFILE",
        help="cluster profile (YAML); default: local, this machine",
    )
    parser.add_argument("--max-gpu-hours", type=float, metavar="H", help="on a cluster: refuse a sweep that costs more")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program with `argv`; returns 1 if a cell failed on this machine."""
    arguments = parse(argv)
    sweep, opened = load_schema(SweepConfig, arguments.sweep), cache(open_index)
    ladder = []
    for config in cells(sweep):
        with mistakes_in(f"cell {Path(config.run.dir).name}"):
            ladder.append(look_at(config, opened))
    if arguments.cluster != "local":
        on_cluster(arguments, sweep, ladder)
        return 0
    if arguments.max_gpu_hours is not None:
        raise UserError("--max-gpu-hours: goes with --cluster PROFILE")
    print(cost_table(ladder), flush=True)
    if arguments.dry_run:
        return 0
    with claimed([cell.config for cell in ladder]):
        write_manifest(sweep, ladder)
    pending = [cell for cell in ladder if not cell.progress.finished]
    for cell in ladder:
        if cell not in pending:
            print(f"{cell.name}: finished before")
    failed = LocalPool(sweep, pending).run() if pending else []
    for cell in failed:
        report_failure(cell)
    return 1 if failed else 0


def write_manifest(sweep: SweepConfig, ladder: Sequence[Submission]) -> None:
    """Record the sweep in its directory."""
    path = Path(sweep.dir) / "manifest.json"
    with writing(f"dir: {path}"):
        write_atomic(path, json.dumps(manifest(sweep, ladder), indent=1) + "\n")


def on_cluster(arguments: argparse.Namespace, sweep: SweepConfig, ladder: list[Submission]) -> None:
    """Give every cell its nodes, and submit what no cell's directory holds and no live job will do."""
    profile, given = load_schema(ClusterConfig, [arguments.cluster]), []
    for cell in ladder:
        with mistakes_in(f"cell {cell.name}"):
            given.append(allocate(cell, profile, sweep.layout_of(cell.name), sweep.max_days))
    gpu_hours = sum(cell.plan.gpu_hours + cell.evaluate_gpu_hours for cell in given)
    print(
        f"{cost_table(given)}\n{gpu_hours:,.3g} GPU-hours together, planned at {profile.utilisation:.0%} of a "
        f"{profile.device}'s peak (profile {profile.name})",
        flush=True,
    )
    if arguments.max_gpu_hours is not None and gpu_hours > arguments.max_gpu_hours:
        raise UserError(
            f"--max-gpu-hours: {arguments.max_gpu_hours:g}, but the sweep costs {gpu_hours:,.3g}; see above"
        )
    if arguments.dry_run:
        return
    launch.require_slurm(profile.partition)
    lives, count = jobs_of_same_config(given), 0
    with claimed([cell.config for cell in given]):
        write_manifest(sweep, given)
        for cell, live in zip(given, lives, strict=True):
            with mistakes_in(f"cell {cell.name}"):
                ids = submit_missing(profile, cell, live)
            count += len(ids)
            print(f"{cell.name}: {'; '.join(told(live, ids)) or 'finished before'}", flush=True)
    print(f"{count} jobs submitted; how they do: python slurm/status.py {sweep.dir} --watch", flush=True)


def report_failure(cell: Submission) -> None:
    log = cell.run.log
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines() if log.exists() else []
    tail = "\n".join(f"  {line}" for line in [line for line in lines if line.strip()][-ERROR_LINES:])
    print(f"error: cell {cell.name} failed; the last lines of {log}:\n{tail}", file=sys.stderr)


class LocalPool:
    """Cells on this machine through submitit's local executor, as many at a time as the sweep says."""

    def __init__(self, sweep: SweepConfig, pending: list[Submission]) -> None:
        self.sweep, self.local = sweep, sweep.local
        self.ladder, self.waiting = pending, list(pending)
        self.running: dict[int, tuple[Submission, LocalJob]] = {}  # by place, of which there are local.parallel_cells
        self.display = Display()

    def run(self) -> list[Submission]:
        """Run all; returns the cells that did not come to their end. Stops the running ones when it is stopped."""
        with_cores(self.local.parallel_cells)
        failed: list[Submission] = []
        try:
            while self.waiting or self.running:
                self._fill()
                time.sleep(POLL_S)
                failed += self._collect()
                self.display.show(self.ladder)
            self.display.show(self.ladder, last=True)
        finally:
            self._stop()
        return failed

    def _fill(self) -> None:
        """Start waiting cells in the free places."""
        for place in range(self.local.parallel_cells):
            if self.waiting and place not in self.running:
                cell = self.waiting.pop(0)
                self.running[place] = (cell, self._executor(place).submit(RunJob(cell.run)))

    def _executor(self, place: int) -> LocalExecutor:
        executor = LocalExecutor(Path(self.sweep.dir) / "submitit" / "%j")
        gpus = [self.local.gpus[place]] if self.local.gpus else []
        executor.update_parameters(timeout_min=NO_TIMEOUT_MIN, gpus_per_node=len(gpus), visible_gpus=gpus)
        return executor

    def _collect(self) -> list[Submission]:
        """Free the places of the jobs that have ended; returns the cells that are not finished though their job is.

        The run directory says whether a cell is finished, not submitit's result: a process id, and with it the place
        of a result, can come back.
        """
        ended = [place for place, (_, job) in self.running.items() if job.done()]
        left = [self.running.pop(place)[0] for place in ended]
        return [cell for cell in left if not cell.progress.finished]

    def _stop(self) -> None:
        for _, job in self.running.values():
            job.cancel()
        deadline = time.monotonic() + 10
        while any(not job.done() for _, job in self.running.values()) and time.monotonic() < deadline:
            time.sleep(0.1)


class Display:
    """One line a cell: rewritten in place on a terminal, otherwise printed now and then if it has changed."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.lines: list[str] = []
        self.next_s = 0.0

    def show(self, ladder: list[Submission], *, last: bool = False) -> None:
        if not (self.terminal or last or time.monotonic() >= self.next_s):
            return
        width = max(len(cell.name) for cell in ladder)
        lines = [f"  {cell.name:<{width}}  {cell.progress}" for cell in ladder]
        if self.terminal:
            up = f"\x1b[{len(self.lines)}A" if self.lines else ""
            print(up + "".join(f"\x1b[2K{line}\n" for line in lines), end="", flush=True)
        else:
            print("".join(f"{line}\n" for line in lines if line not in self.lines), end="", flush=True)
        self.lines, self.next_s = lines, time.monotonic() + PLAIN_EVERY_S


def with_cores(cells_at_once: int) -> None:
    """Give each of so many processes its share of the cores, unless the user has chosen."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // cells_at_once)))


def catch_signals() -> None:
    """Let SIGINT and SIGTERM end this process through its `finally`: so that it stops its cells.

    SIGINT is set by hand, because a shell's background job starts with it ignored, and so would the cells.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


if __name__ == "__main__":
    catch_signals()
    sys.exit(exit_code(main))
