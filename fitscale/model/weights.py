"""Weights in the layout of the published checkpoints: full tensors under the published names, whatever the layout of
the run, from file to file or to model, one tensor in memory at a time.

    list_tensors, list_state_dict   names and shapes, and for each tensor how to read it
    check_keys                      are they the model's?
    read_items, load_weights        this rank's shard of each tensor in `path`, into the model
    published_items                 the full tensors of a model, over the tensor-parallel ranks
    write_tensors                   header, then one tensor after the other, sorted by name -> fsync -> rename

Names are the same here and there. Three things differ: the rows of fused q, k and v are (heads, 3, head_dim) here, so
that tensor parallelism cuts them in one piece, and (3, heads, head_dim) there; and the two numbers of a pair that RoPE
turns are neighbours in a head there, and half a head apart here (`halves`), so that both are read in runs. Attention's
scores are the same. Bytes of ternary weights hold other rows here than there (`common.ternary`); weights that are not
packed yet are when a network takes them packed.

safetensors' own writer wants all tensors at once. Its format (https://github.com/huggingface/safetensors): the header's
length in 8 bytes, a JSON header, then the tensors' bytes, everything little-endian. Equal tensors and metadata make
equal bytes here, however many files the tensors came from.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fitscale.config.errors import UserError, writing
from fitscale.config.files import replacing
from fitscale.config.schema import ModelConfig
from fitscale.model.backbone import Parameter, parameter_table, parameters_by_name
from fitscale.model.common.ternary import pack, pack_quarters, ternary_values, unpack, unpack_quarters
from fitscale.parallel.layers import gather_tp, set_value, tp_shard
from fitscale.run.checkpoint import require_intact

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TAGS = {"fp32": "F32", "bf16": "BF16"}
_ALIGNMENT = 8  # bytes; the header is filled up with spaces to it
_LISTED_KEYS = 10


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file, or elsewhere."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    packed: bool = False  # bytes, of ternary weights; all else is floating-point


def stored(tensor: Tensor) -> StoredTensor:
    """A tensor that is in memory already."""
    return StoredTensor(tuple(tensor.shape), tensor.detach, tensor.dtype == torch.uint8)


def list_tensors(path: Path, verify: bool = True) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file, or of all those of a folder, by name.

    A file is mapped only while one of its tensors is in use, so that what was read does not stay in memory.

    Args:
        path: the file or folder.
        verify: compare a checkpoint's files with their checksums first.

    Raises:
        UserError: no such file there, or a broken one.
    """
    if verify:
        require_intact(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no .safetensors file in this folder")
    found: dict[str, StoredTensor] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (a safetensors file is no dict)
                part = opened.get_slice(name)
                found[name] = StoredTensor(
                    tuple(part.get_shape()), partial(_read, file, name), part.get_dtype() == "U8"
                )
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; UserError if it is no such file."""
    with _opened(path) as opened:
        return opened.metadata() or {}


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
    except Exception as error:  # damaged archives raise nearly anything
        raise UserError(f"{path}: cannot be read as a state dict of torch.save: {error}") from error
    state = loaded if entry is None and _is_state_dict(loaded) else _entry(path, loaded, entry)
    return {name: stored(tensor) for name, tensor in state.items()}


def check_keys(model: ModelConfig, found: Mapping[str, StoredTensor], path: Path) -> None:
    """Raises UserError if names, shapes or kinds of `found`, the tensors in `path`, are not the model's.

    Of a model that takes ternary weights packed, they may be whole.
    """
    expected = {entry.name: entry for entry in parameter_table(model)}
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is not part of the model" for key in found if key not in expected]
    problems += [
        f"{key} is {_described(one.shape, one.packed)}, the model's is {_described(entry.stored_shape, entry.packed)}"
        for key, entry in expected.items()
        if (one := found.get(key)) and not _fits(one, entry)
    ]
    if problems:
        listed = "; ".join(problems[:_LISTED_KEYS])
        raise UserError(
            f"{path}: weights of another model than model.name = {model.name}: "
            f"{len(problems)} of its keys differ: {listed}{' ...' if len(problems) > _LISTED_KEYS else ''}"
        )


def _fits(one: StoredTensor, entry: Parameter) -> bool:
    return (entry.packed and one.shape == entry.stored_shape) if one.packed else one.shape == entry.shape


def _described(shape: tuple[int, ...], packed: bool) -> str:
    return f"{shape}{' of packed ternary weights' if packed else ''}"


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy weights in the published names, one .safetensors file or a folder of them, into the model.

    Raises:
        UserError: see `read_items`; the model is unchanged if keys or shapes differ.
    """
    for param, shard in read_items(model, path):
        set_value(param, shard)


def read_items(model: nn.Module, path: Path, verify: bool = True) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, this tensor-parallel rank's shard of its tensor in `path`), one at a time, on the CPU.

    Args:
        model: has its config; in this rank's layout, partitioned by ZeRO-3 or not.
        path: one .safetensors file, or a folder whose files together hold every tensor.
        verify: as in `list_tensors`.

    Raises:
        UserError: nothing there, a broken file, or keys or shapes of another model (those that differ are listed).
    """
    tensors, table = list_tensors(path, verify), parameters_by_name(model)
    check_keys(model.config, tensors, path)  # type: ignore[arg-type]
    for name, param in model.named_parameters():
        yield param, tp_shard(from_published(table[name], tensors[name].read()), table[name].split)


def published_items(
    model: nn.Module, get: Callable[[nn.Parameter], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """(published name, full fp32 tensor) of every parameter, one at a time.

    A collective operation: all ranks of a tensor-parallel group iterate to the end, and all get the tensors.

    Args:
        model: names the parameters and says how they are cut.
        get: what to export of a parameter, laid out as the parameter of this rank: itself, its EMA ...
    """
    table = parameters_by_name(model)
    for name, param in model.named_parameters():
        whole = gather_tp(get(param), table[name].split)
        yield name, to_published(table[name], whole if table[name].packed else whole.float())


def to_published(entry: Parameter, full: Tensor) -> Tensor:
    """A full tensor in the published row order."""
    if entry.packed:
        return pack_quarters(to_published(replace(entry, packed=False), unpack(full)))
    full = _reordered(entry, full, (2, -1))
    if entry.qkv_heads is not None:
        full = full.unflatten(0, (entry.qkv_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return full.contiguous()


def from_published(entry: Parameter, full: Tensor) -> Tensor:
    """A full published tensor in this project's row order: the inverse of `to_published`.

    Weights that the table wants packed may be whole: then they are made ternary, as they are in training.

    Raises:
        UserError: bytes that are no ternary weights.
    """
    if entry.packed:
        values = unpack_quarters(full) if full.dtype == torch.uint8 else ternary_values(full)
        if values.max() > 1:
            raise UserError(
                f"{entry.name}: these bytes are no packed ternary weights: one of the four values of a byte is 3"
            )
        return pack(from_published(replace(entry, packed=False), values))
    if entry.qkv_heads is not None:
        full = full.unflatten(0, (3, entry.qkv_heads, -1)).transpose(0, 1).flatten(0, 2)
    return halves(entry, full).contiguous()


def packed_tensors(model: ModelConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Published tensors as a file for `model` holds them: what it takes packed, and is whole, as it is published."""

    def read(entry: Parameter) -> Tensor:
        return to_published(entry, from_published(entry, tensors[entry.name].read()))

    packed = [entry for entry in parameter_table(model) if entry.packed]
    return {**tensors, **{one.name: StoredTensor(one.stored_shape, partial(read, one), True) for one in packed}}


def halves(entry: Parameter, full: Tensor) -> Tensor:
    """With the pairs that RoPE turns taken apart: the first numbers of all pairs of a head, then the second ones."""
    return _reordered(entry, full, (-1, 2))


def _reordered(entry: Parameter, full: Tensor, shape: tuple[int, int]) -> Tensor:
    """The rows of each rotary head seen as a matrix of this shape, transposed."""
    if not entry.rotary:
        return full
    parts = full.unflatten(0, (entry.rotary, 1 if entry.qkv_heads is None else 3, -1))
    turned = parts[:, :2].unflatten(2, shape).transpose(2, 3).flatten(2, 3)
    return torch.cat((turned, parts[:, 2:]), dim=1).flatten(0, 2)


def write_tensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    metadata: dict[str, str],
    dtype: str = "fp32",
    progress: Callable[[int], object] = lambda _: None,
) -> str:
    """Write `tensors` as one .safetensors file, whole or not at all, replacing what is at `path`; returns its xxh3_64.

    Args:
        path: its folder is made if there is none.
        tensors: of any floating-point type, or packed ternary weights, which are written as they are.
        metadata: the file's own; it decides the bytes too, so it should not tell one layout from another.
        dtype: a key of `DTYPES`; rounding to bf16 is to the nearest, ties to even.
        progress: called with the number of bytes after each tensor.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    header = _header({name: tensors[name] for name in sorted(tensors)}, dtype, metadata)
    checksum = xxhash.xxh3_64(header)
    with writing(path), replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for name in sorted(tensors):
            kind = torch.uint8 if tensors[name].packed else DTYPES[dtype]
            content = tensors[name].read().to("cpu", kind).reshape(-1).view(torch.uint8).numpy().data
            checksum.update(content)
            progress(file.write(content))
    return checksum.hexdigest()


def write_state_dict(path: Path, tensors: Mapping[str, StoredTensor], dtype: str = "fp32") -> None:
    """Write `tensors` with torch.save, all of them in memory; otherwise as `write_tensors`."""
    kinds = {name: torch.uint8 if one.packed else DTYPES[dtype] for name, one in tensors.items()}
    state = {name: one.read().to("cpu", kinds[name]).clone() for name, one in tensors.items()}
    with writing(path), replacing(path) as temporary:
        torch.save(state, temporary)


def num_bytes(tensor: StoredTensor, dtype: str) -> int:
    """Size of a tensor in the file."""
    return torch.Size(tensor.shape).numel() * (1 if tensor.packed else DTYPES[dtype].itemsize)


def _header(tensors: dict[str, StoredTensor], dtype: str, metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name, tensor in tensors.items():
        end, tag = begin + num_bytes(tensor, dtype), "U8" if tensor.packed else _TAGS[dtype]
        entries[name] = {"dtype": tag, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors weights: {error}") from error


def _read(file: Path, name: str) -> Tensor:
    with _opened(file) as opened:
        return opened.get_tensor(name)


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
