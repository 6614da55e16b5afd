"""The layout of a run directory, for every program that writes or reads one, and where runs are found. No torch."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError
from fitscale.run.checkpoint import Checkpoint, read_checkpoint

# What every line of these files holds, among others.
METRICS: dict[str, Any] = {"step": int, "loss": int | float | None}
ATTEMPTS: dict[str, Any] = {"attempt": int, "event": str, "step": int}
EVALUATIONS: dict[str, Any] = {"step": int, "metric": str, "value": int | float, "key": dict}
THROUGHPUT: dict[str, Any] = {
    "step": int,
    "time_unix_s": int | float,
    "step_s": int | float | None,
    "data_wait_s": int | float,
}
JOBS: dict[str, Any] = {"job": str, "kind": str, "step": int}
ROWS = {
    "metrics.jsonl": METRICS,
    "throughput.jsonl": THROUGHPUT,
    "attempts.jsonl": ATTEMPTS,
    "jobs.jsonl": JOBS,
    "evaluations.jsonl": EVALUATIONS | {"weights": str},
}


class _Inside:
    """The path of a file or folder inside a run directory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: "RunDir", owner: type) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory."""

    path: Path

    config = _Inside("config.yaml")  # the resolved config
    environment = _Inside("environment.json")  # versions, git revision, topology
    metrics = _Inside("metrics.jsonl")  # a line a logged step: what was computed; the same bytes after interruptions
    throughput = _Inside("throughput.jsonl")  # a line a logged step: how fast it was
    events = _Inside("events.jsonl")  # what went wrong: loss spikes, skipped samples, ranks that hang
    attempts = _Inside("attempts.jsonl")  # a line a start and one an orderly end: job, step, reason, steps lost
    owner = _Inside("attempt.json")  # the newest attempt: the only one that may write here
    jobs = _Inside("jobs.jsonl")  # a line a job submitted to a cluster
    log = _Inside("log.txt")  # what the jobs print
    failed = _Inside("failed.txt")  # why a run cannot go on by itself: while it is there, no job is queued again
    evaluations = _Inside("evaluations.jsonl")  # a line an evaluated metric
    checkpoint_folder = _Inside("checkpoints")  # step-00001000/{COMPLETE, weights/, optimizer/}
    evaluation_folder = _Inside("evaluation")  # a folder of chunks for each evaluation that is not over (run/chunks.py)
    evaluation_starts = _Inside("evaluation/starts.jsonl")  # a line a start of a job that evaluates
    samples = _Inside("samples")
    wandb_id = _Inside("wandb_id")  # of the wandb run that mirrors this one
    wandb_outbox = _Inside("wandb_outbox")  # a file each of what evaluations have found and nobody has mirrored yet
    submitit = _Inside("submitit")  # a folder a job

    @property
    def absolute(self) -> "RunDir":
        """The same for a process that runs in another folder."""
        return RunDir(self.path.resolve())

    def sheet(self, step: int, key: str) -> Path:
        """The contact sheet of an evaluation; those of one key, over the steps, show the same noise."""
        return self.samples / f"evaluated_{key}" / f"step-{step:08d}.png"

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoint_folder / f"step-{step:08d}"

    def checkpoint_folders(self) -> list[Path]:
        """Every folder named as a checkpoint, oldest first, complete or not."""
        return sorted(self.checkpoint_folder.glob("step-" + "[0-9]" * 8))

    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest first."""
        found = []
        for path in self.checkpoint_folders():
            with suppress(UserError):
                found.append(read_checkpoint(path))
        return found


def run_at(path: Path) -> RunDir:
    """The run directory `path`; raises UserError if it is none."""
    run = RunDir(path)
    if not run.config.is_file():
        lacking = "config.yaml there" if path.exists() else "such file or folder"
        raise UserError(f"{path}: not a run directory (no {lacking})")
    return run


def find_runs(paths: list[Path]) -> list[RunDir]:
    """The run directories at `paths` or directly inside them, without repeats, in order of their path.

    Raises:
        UserError: a path is no run directory and holds none.
    """
    found: dict[Path, RunDir] = {}
    for path in paths:
        configs = [RunDir(path).config] if RunDir(path).config.is_file() else list(path.glob("*/config.yaml"))
        if not configs:
            raise UserError(f"{path}: neither a run directory (with config.yaml) nor a folder of run directories")
        found |= {config.parent.resolve(): RunDir(config.parent) for config in configs}
    return [found[path] for path in sorted(found)]
