"""Weights from file to file in the published names, never more than one tensor in memory.

    list_tensors, list_state_dict     names and shapes, and for each tensor how to read it
    check_keys (published.py)         are they the model's?
    write_tensors                     header, then one tensor after the other, sorted by name -> fsync -> rename

safetensors' own writer wants all tensors at once. Its format (https://github.com/huggingface/safetensors): the header's
length in 8 bytes, a JSON header, then the tensors' bytes, everything little-endian. Equal tensors and metadata make
equal bytes here, however many files the tensors came from.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fitscale.config.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TAGS = {"fp32": "F32", "bf16": "BF16"}
_ALIGNMENT = 8  # bytes; the header is filled up with spaces to it


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file, or of all those of a folder, by name.

    A file is mapped only while one of its tensors is in use, so that what was read does not stay in memory.

    Raises:
        UserError: no such file there, or a broken one.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no .safetensors file in this folder")
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (a safetensors file is no dict)
                    shape = tuple(opened.get_slice(name).get_shape())
                    found[name] = StoredTensor(shape, partial(_read, file, name))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read as safetensors weights: {error}") from error
    return found


def list_state_dict(path: Path, entry: str | None) -> dict[str, StoredTensor]:
    """The tensors of a state dict saved with `torch.save`: the file is one, or has one under the name `entry`.

    Args:
        path: zip file of `torch.save`; mapped, not read, so its pages need not stay in memory.
        entry: "model", "ema", "state_dict" ...; None takes the only one that there is.

    Raises:
        UserError: no such file, a broken one, one with more than plain tensors in it, or no such entry.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a state dict of torch.save: {reason}") from error
    state = loaded if entry is None and _is_state_dict(loaded) else _entry(path, loaded, entry)
    return {name: StoredTensor(tuple(tensor.shape), tensor.detach) for name, tensor in state.items()}


def write_tensors(
    path: Path,
    tensors: dict[str, StoredTensor],
    dtype: str,
    metadata: dict[str, str],
    progress: Callable[[int], object],
) -> None:
    """Write `tensors` as one .safetensors file, whole or not at all, replacing what is at `path`.

    Args:
        path: its folder is made if there is none.
        tensors: of any floating-point type.
        dtype: a key of `DTYPES`; rounding to bf16 is to the nearest, ties to even.
        metadata: the file's own; it decides the bytes too, so it should not tell one layout from another.
        progress: called with the number of bytes after each tensor.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(_header({name: tensors[name].shape for name in sorted(tensors)}, dtype, metadata))
            for name in sorted(tensors):
                progress(_write(file, tensors[name].read().to(DTYPES[dtype])))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size of a tensor in the file."""
    return torch.Size(shape).numel() * DTYPES[dtype].itemsize


def _header(shapes: dict[str, tuple[int, ...]], dtype: str, metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name, shape in shapes.items():
        end = begin + num_bytes(shape, dtype)
        entries[name] = {"dtype": _TAGS[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write(file: BinaryIO, tensor: Tensor) -> int:
    return file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _read(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors weights: {error}") from error


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _entry(path: Path, loaded: object, entry: str | None) -> dict[str, Tensor]:
    entries = {str(key): value for key, value in loaded.items()} if isinstance(loaded, dict) else {}
    found = {key: value for key, value in entries.items() if _is_state_dict(value)}
    if entry is None and len(found) == 1:
        return next(iter(found.values()))
    listed = ", ".join(found) or "none"
    if entry is None:
        raise UserError(f"{path}: which of its state dicts? --weights takes the name of one; it has {listed}")
    if entry not in found:
        raise UserError(f"--weights: {path} has no state dict called {entry}; it has {listed}")
    return found[entry]
