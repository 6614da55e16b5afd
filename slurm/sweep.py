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
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit import LocalExecutor, LocalJob

from fitscale.config.errors import UserError, cannot_write
from fitscale.config.files import write_atomic
from fitscale.config.load import load_schema
from fitscale.config.program import exit_code
from fitscale.config.schema import Config
from fitscale.data import sizes
from fitscale.jobs import launch
from fitscale.jobs.allocate import Allocation, allocate
from fitscale.jobs.chain import missing_links, require_same_config, submit_links
from fitscale.jobs.job import LOG, RunJob
from fitscale.jobs.ladder import Cell, TokenShares, cells, manifest, table
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.sweep import SweepConfig
from fitscale.plan.preflight import open_data, require_files
from fitscale.run.claim import claimed
from fitscale.run.progress import pending_evaluations, progress

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
    sweep = load_schema(SweepConfig, arguments.sweep)
    ladder = cells(sweep)
    for cell in ladder:
        require_inputs(cell)
    if arguments.cluster != "local":
        return on_cluster(arguments, sweep, ladder)
    if arguments.max_gpu_hours is not None:
        raise UserError("--max-gpu-hours: goes with --cluster PROFILE")
    print(table(ladder, token_shares), flush=True)
    if arguments.dry_run:
        return 0
    with claimed([cell.config for cell in ladder]):
        write_manifest(sweep, ladder)
    pending = [cell for cell in ladder if not progress(cell.config, cell.run).finished]
    for cell in ladder:
        if cell not in pending:
            print(f"{cell.name}: finished before")
    failed = LocalPool(sweep, pending).run() if pending else []
    for cell in failed:
        report_failure(cell)
    return 1 if failed else 0


def require_inputs(cell: Cell) -> None:
    """Raises UserError, with the cell's name, if something is not there that training or an evaluation will read."""
    try:
        open_data(cell.config)
        require_files(cell.config)
    except UserError as error:
        raise UserError(f"cell {cell.name}: {error}") from error


def token_shares(config: Config) -> TokenShares:
    """How many tokens the images have that `config` trains on, from the index of its shards."""
    return sizes.token_shares(config.data, config.model.patch_size)


def write_manifest(sweep: SweepConfig, ladder: list[Cell], asked: dict[str, dict[str, Any]] | None = None) -> None:
    """Record the sweep in its directory; `asked`: what a cluster is asked for, by cell."""
    content, path = (
        json.dumps(manifest(sweep, ladder, token_shares, asked), indent=1),
        Path(sweep.dir) / "manifest.json",
    )
    try:
        write_atomic(path, content + "\n")
    except OSError as error:
        raise cannot_write(f"dir: {path}", error) from error


def on_cluster(arguments: argparse.Namespace, sweep: SweepConfig, ladder: list[Cell]) -> int:
    """Give every cell its nodes, and submit what is missing; returns 0."""
    profile = load_schema(ClusterConfig, [arguments.cluster])
    given = {cell.name: allocate_cell(sweep, cell, profile) for cell in ladder}
    ladder = [replace(cell, config=given[cell.name].config) for cell in ladder]
    gpu_hours = sum(one.train_gpu_hours + one.evaluate_gpu_hours for one in given.values())
    print(table(ladder, token_shares, {name: cost_columns(one) for name, one in given.items()}))
    print(
        f"{gpu_hours:,.3g} GPU-hours together, planned at {profile.utilisation:.0%} of a {profile.device}'s peak "
        f"(profile {profile.name})",
        flush=True,
    )
    if arguments.max_gpu_hours is not None and gpu_hours > arguments.max_gpu_hours:
        raise UserError(
            f"--max-gpu-hours: {arguments.max_gpu_hours:g}, but the sweep costs {gpu_hours:,.3g}; see above"
        )
    if not arguments.dry_run:
        launch.require_slurm(profile.partition)
        submit_missing(sweep, ladder, profile, given)
    return 0


def allocate_cell(sweep: SweepConfig, cell: Cell, profile: ClusterConfig) -> Allocation:
    try:
        return allocate(cell.config, profile, sweep.layout_of(cell.name), sweep.max_days)
    except UserError as error:
        raise UserError(f"cell {cell.name}: {error}") from error


def cost_columns(one: Allocation) -> dict[str, str]:
    """What a cell is given, and what that costs."""
    parallel = one.config.parallel
    return {
        "nodes x tasks": f"{one.layout.nodes} x {one.layout.tasks_per_node}",
        "layout": f"dp {one.plan.dp_size} tp {parallel.tensor_parallel_size} ZeRO {parallel.zero_stage}",
        "days": f"{one.plan.days(one.config.run.steps):.3g}",
        "GPU-hours to train": f"{one.train_gpu_hours:,.3g}",
        "to evaluate": f"{one.evaluate_gpu_hours:,.3g}",
    }


def submit_missing(
    sweep: SweepConfig, ladder: list[Cell], profile: ClusterConfig, given: dict[str, Allocation]
) -> None:
    """Submit what no cell's directory holds and no live job will do, and say so, cell by cell."""
    live = dict(zip((cell.name for cell in ladder), launch.live_jobs([cell.run for cell in ladder]), strict=True))
    for cell in ladder:
        require_same_config(cell.config, cell.run, live[cell.name])
    asked = {
        name: {"nodes": one.layout.nodes, "tasks_per_node": one.layout.tasks_per_node, "gpu_hours": one.train_gpu_hours}
        for name, one in given.items()
    }
    with claimed([cell.config for cell in ladder]):
        write_manifest(sweep, ladder, asked)
        count = sum(submit_cell(cell, profile, given[cell.name].layout, live[cell.name]) for cell in ladder)
    print(f"{count} jobs submitted; how they do: python slurm/status.py {sweep.dir} --watch", flush=True)


def submit_cell(cell: Cell, profile: ClusterConfig, layout: launch.Layout, live: list[launch.LiveJob]) -> int:
    """Submit what a cell lacks, and say so; returns the number of jobs."""
    links = missing_links(cell.config, cell.run, live, pending_evaluations(cell.config, cell.run))
    try:
        ids = submit_links(profile, cell.run, layout, cell.config.run.name, links)
    except UserError as error:
        raise UserError(f"cell {cell.name}: {error}") from error
    done = [f"{link.kind} {link.step}: job {job}" for link, job in ids.items()]
    done += [f"{job.kind} {job.step}: job {job.id} ({job.state}), submitted before" for job in live]
    print(f"{cell.name}: {'; '.join(done) or 'finished before'}", flush=True)
    return len(ids)


def report_failure(cell: Cell) -> None:
    log = cell.run.path / LOG
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines() if log.exists() else []
    tail = "\n".join(f"  {line}" for line in [line for line in lines if line.strip()][-ERROR_LINES:])
    print(f"error: cell {cell.name} failed; the last lines of {log}:\n{tail}", file=sys.stderr)


class LocalPool:
    """Cells on this machine through submitit's local executor, as many at a time as the sweep says."""

    def __init__(self, sweep: SweepConfig, pending: list[Cell]) -> None:
        self.sweep, self.local = sweep, sweep.local
        self.ladder, self.waiting = pending, list(pending)
        self.running: dict[int, tuple[Cell, LocalJob]] = {}  # by place, of which there are local.parallel_cells
        self.display = Display()

    def run(self) -> list[Cell]:
        """Run all; returns the cells that did not come to their end. Stops the running ones when it is stopped."""
        with_cores(self.local.parallel_cells)
        failed: list[Cell] = []
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
                self.running[place] = (cell, self._executor(place).submit(RunJob(cell.run.path)))

    def _executor(self, place: int) -> LocalExecutor:
        executor = LocalExecutor(Path(self.sweep.dir) / "submitit" / "%j")
        gpus = [self.local.gpus[place]] if self.local.gpus else []
        executor.update_parameters(timeout_min=NO_TIMEOUT_MIN, gpus_per_node=len(gpus), visible_gpus=gpus)
        return executor

    def _collect(self) -> list[Cell]:
        """Free the places of the jobs that have ended; returns the cells that are not finished though their job is.

        The run directory says whether a cell is finished, not submitit's result: a process id, and with it the place
        of a result, can come back.
        """
        ended = [place for place, (_, job) in self.running.items() if job.done()]
        left = [self.running.pop(place)[0] for place in ended]
        return [cell for cell in left if not progress(cell.config, cell.run).finished]

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

    def show(self, ladder: list[Cell], *, last: bool = False) -> None:
        if not (self.terminal or last or time.monotonic() >= self.next_s):
            return
        width = max(len(cell.name) for cell in ladder)
        lines = [f"  {cell.name:<{width}}  {progress(cell.config, cell.run)}" for cell in ladder]
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
