"""`fitscale check RUN`: whether all that a run directory records is still there and as it was written."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from fitscale.config.errors import UserError, reading
from fitscale.config.files import read_json, read_jsonl, require_kinds
from fitscale.config.load import load_config
from fitscale.config.program import USER_ERROR
from fitscale.run.checkpoint import MARKER, TOTALS, lines_checksum, read_checkpoint
from fitscale.run.layout import ROWS, RunDir, run_at

UNVERIFIED = "unverified: an earlier version saved it without checksums, only sizes can be compared"


def run_check(path: Path) -> int:
    """Print a line for every part of the run in `path`; returns the exit code, 2 if one of them is not ok.

    Raises:
        UserError: it is no run directory.
    """
    run, code = run_at(path), 0
    for part, examine in _parts(run):
        try:
            verdict, remark = "ok", examine(part)
        except UserError as error:
            verdict, remark, code = "not ok", str(error), USER_ERROR
        print(f"{verdict:<8}{part.relative_to(path)}{f'  {remark}' if remark else ''}", flush=True)
    return code


def _parts(run: RunDir) -> Iterator[tuple[Path, Callable[[Path], str]]]:
    """Every file and checkpoint, and what looks at it: raises UserError if it is not as it was written."""
    yield run.config, _check_config
    yield from ((path, _check_json) for path in (run.environment, run.owner) if path.exists())
    begun = run.owner.exists() or run.checkpoint_folder.exists()
    for path in (run.attempts, run.metrics, run.throughput, run.events, run.jobs, run.evaluations):
        if path.exists() or (begun and path in (run.attempts, run.metrics)):
            yield path, _check_rows
    folders = run.checkpoint_folders()
    yield from ((path, _check_checkpoint) for path in folders)
    others = sorted(set(run.checkpoint_folder.glob("*")) - set(folders))
    yield from (
        (path, lambda path: "not part of the run: a save cut short, or put aside by training") for path in others
    )


def _check_config(path: Path) -> str:
    load_config([str(path)])
    return ""


def _check_json(path: Path) -> str:
    read_json(path)
    return ""


def _check_rows(path: Path) -> str:
    with reading(path):
        path.stat()
    rows = read_jsonl(path, **ROWS.get(path.name, {}))
    if path.name == "metrics.jsonl":
        for before, after in pairwise(row["step"] for row in rows):
            if after <= before:
                raise UserError(f"{path}: the line of step {after} comes after that of step {before}")
        for checkpoint in RunDir(path.parent).checkpoints():
            logged = checkpoint.meta.get("logged")
            if logged and logged != lines_checksum(path, logged["bytes"]):
                raise UserError(f"{path}: its lines up to step {checkpoint.step} are not those that were written")
    return f"{len(rows):,} lines"


def _check_checkpoint(path: Path) -> str:
    checkpoint = read_checkpoint(path)
    require_kinds(checkpoint.meta, path / MARKER, **TOTALS, model=dict)
    files, checksums = checkpoint.meta["files"], checkpoint.meta.get("checksums", {})
    if problem := checkpoint.damage(checksums):
        raise UserError(problem)
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MARKER}
    if more := there - files.keys():
        raise UserError(f"{path / min(more)}: not part of the checkpoint")
    size = f"{len(files)} files, {sum(files.values()) / 1e6:,.1f} MB"
    return size if checksums else f"{size}  {UNVERIFIED}"
