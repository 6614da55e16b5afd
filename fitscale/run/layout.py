"""The layout of a run directory, for every program that writes or reads one. No torch.

config.yaml         the resolved config
environment.json    versions, git revision, topology
metrics.jsonl       one line a logged step: what was computed; the same bytes however often the run was interrupted
throughput.jsonl    one line a logged step: how fast it was
attempts.jsonl      one line a start and one an orderly end: job, step, reason, steps lost
attempt.json        the newest attempt: the only one that may write here
jobs.jsonl          one line a job submitted to a cluster
evaluations.jsonl   one line per evaluated metric
checkpoints/step-00001000/{COMPLETE, weights/, optimizer/}
samples/
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `meta` is its marker: step, images, tokens, FLOPs, files."""

    path: Path
    step: int
    meta: dict[str, Any]

    def weights(self, name: str) -> Path:
        """Folder with the full fp32 weights `name` (raw, ema_0.9999 ...): .safetensors files in the published names."""
        return self.path / "weights" / name

    def weight_names(self) -> list[str]:
        """The names that `weights` takes here."""
        return sorted(path.name for path in (self.path / "weights").iterdir())


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def throughput(self) -> Path:
        return self.path / "throughput.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    def checkpoint_folders(self) -> list[Path]:
        """Every folder named as a checkpoint, oldest first, complete or not."""
        folder = self.path / "checkpoints"
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(path for path in found if _STEP.fullmatch(path.name))

    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest first."""
        found = (read_checkpoint(path) for path in self.checkpoint_folders())
        return [checkpoint for checkpoint in found if checkpoint is not None]


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None if its marker or one of the marker's files is missing or cut short."""
    try:
        meta = json.loads((path / "COMPLETE").read_text())
        whole = all((path / name).stat().st_size == size for name, size in meta["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return Checkpoint(path, int(meta["step"]), meta) if whole else None
