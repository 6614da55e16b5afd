"""What a checkpoint's folder is, and whether its files are still what was written. No torch.

    COMPLETE   JSON: step, images, tokens, FLOPs, the model; `files`, the size of each file in bytes; `checksums`, the
               xxh3_64 of each, taken while it was written; `logged`, the size and the xxh3_64 of metrics.jsonl then;
               `seal`, the xxh3_64 of all that

Sizes are compared whenever a checkpoint is looked for; whole files where they are read, and by `fitscale check`.
Checkpoints of version 0.1 have no checksums: of them sizes are all that can be compared.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from fitscale.config.errors import UserError, reading
from fitscale.config.files import read_json, require_kinds, write_atomic

MARKER = "COMPLETE"
# In the marker, counted since the run's first step; "optimizer_steps" leaves out those that were skipped.
TOTALS: dict[str, Any] = dict.fromkeys(("step", "optimizer_steps", "images", "tokens"), int)
TOTALS |= dict.fromkeys(("train_flops", "paper_flops", "device_hours"), int | float)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `meta` is its marker."""

    path: Path
    step: int
    meta: dict[str, Any]

    def weights(self, name: str) -> Path:
        """Folder with the full fp32 weights `name` (raw, ema_0.9999 ...): .safetensors files in the published names."""
        return self.path / "weights" / name

    def weight_names(self) -> list[str]:
        """The names that `weights` takes here."""
        return sorted(path.name for path in (self.path / "weights").iterdir())

    def damage(self, names: Iterable[str]) -> str | None:
        """What is wrong with the first of these files that is not as it was written; reads them whole."""
        for name in names:
            try:
                with reading(self.path / name), open(self.path / name, "rb") as file:
                    found = hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
            except UserError as error:
                return str(error)
            if found != self.meta["checksums"][name]:
                return f"{self.path / name}: damaged (xxh3_64 {found}, {self.meta['checksums'][name]} was written)"
        return None


def lines_checksum(path: Path, most_bytes: int) -> dict[str, Any]:
    """Size and xxh3_64 of the whole lines among the first bytes of a file to which lines are added."""
    with open(path, "rb") as file:
        content = file.read(most_bytes)
    content = content[: content.rfind(b"\n") + 1]
    return {"bytes": len(content), "xxh3_64": xxhash.xxh3_64_hexdigest(content)}


def write_marker(folder: Path, meta: dict[str, Any], checksums: dict[str, str]) -> None:
    """Declare the checkpoint in `folder` complete; `checksums` are those of its files, by path inside the folder."""
    sizes = {name: (folder / name).stat().st_size for name in sorted(checksums)}
    meta = {**meta, "files": sizes, "checksums": dict(sorted(checksums.items()))}
    write_atomic(folder / MARKER, json.dumps({**meta, "seal": _seal(meta)}, indent=1))


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`.

    Raises:
        UserError: its marker is missing or damaged, or one of the marker's files is missing or has another size.
    """
    marker = path / MARKER
    meta = read_json(marker)
    seal = meta.pop("seal", None)
    if seal != (_seal(meta) if "checksums" in meta else None):
        raise UserError(f"{marker}: damaged (its seal is not that of its content)")
    require_kinds(meta, marker, step=int, files=dict, **({"checksums": dict} if seal else {}))
    for name, size in meta["files"].items():
        if ".." in Path(name).parts or Path(name).is_absolute() or "\0" in name:
            raise UserError(f"{marker}: {name} is no file of the checkpoint")
        with reading(path / name):
            there = (path / name).stat().st_size
        if there != size:
            raise UserError(f"{path / name}: {there} bytes, {size} were written")
    return Checkpoint(path, meta["step"], meta)


def require_intact(path: Path) -> None:
    """Compare the weights at `path`, a file or folder, with what was written, if they are those of a checkpoint.

    Raises:
        UserError: one is damaged, or the checkpoint is not complete.
    """
    path = path.absolute()
    for folder in path.parents:
        if path.is_relative_to(folder / "weights") and (folder / MARKER).is_file():
            checkpoint = read_checkpoint(folder)
            names = [name for name in checkpoint.meta.get("checksums", {}) if (folder / name).is_relative_to(path)]
            if problem := checkpoint.damage(names):
                raise UserError(f"{problem}; `fitscale train` on its run goes on from the newest intact checkpoint")


def _seal(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode())
