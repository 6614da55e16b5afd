"""Weights in the layout of the published checkpoints: full fp32 tensors, whatever the layout of the run.

Names are the same here and there. One thing differs: the rows of `attn.qkv` are (heads, 3, head_dim) here, so that
tensor parallelism cuts them in one piece, and (3, heads, head_dim) there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fitscale.config.errors import UserError
from fitscale.config.schema import ModelConfig
from fitscale.model.fit import FiT
from fitscale.parallel.layers import full_shape, gather_tp, set_value, tp_shard

_LISTED_KEYS = 10


def load_weights(model: FiT, path: Path) -> None:
    """Copy weights in the published names, one .safetensors file or a folder of them, into the model.

    Raises:
        UserError: see `read_items`; the model is unchanged if keys or shapes differ.
    """
    for param, piece in read_items(model, path):
        set_value(param, piece)


def read_items(model: FiT, path: Path) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, this tensor-parallel rank's piece of its tensor in `path`), one at a time, on the CPU.

    Args:
        model: in this rank's layout, partitioned by ZeRO-3 or not.
        path: one .safetensors file, or a folder whose files together hold every tensor.

    Raises:
        UserError: nothing there, a broken file, or keys or shapes of another model (those that differ are listed).
    """
    with ExitStack() as stack:
        try:
            files = _open_files(path, stack)
            check_keys(model, {key: tuple(file.get_slice(key).get_shape()) for key, file in files.items()}, path)
            for name, param in model.named_parameters():
                yield param, tp_shard(param, from_published(name, files[name].get_tensor(name), model.config))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read as safetensors weights: {error}") from error


def published_items(model: FiT, get: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> Iterator[tuple[str, Tensor]]:
    """(published name, full fp32 tensor) of every parameter, one at a time.

    A collective operation: all ranks of a tensor-parallel group iterate to the end, and all get the tensors.

    Args:
        model: names the parameters and says how they are cut.
        get: what to export of a parameter, laid out as the parameter of this rank: itself, an average of it ...
    """
    for name, param in model.named_parameters():
        yield name, to_published(name, gather_tp(param, get(param)).float(), model.config)


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write named full tensors to a safetensors file at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def to_published(name: str, full: Tensor, config: ModelConfig) -> Tensor:
    """A full tensor in the published row order."""
    if not _is_qkv(name):
        return full
    by_head = full.unflatten(0, (config.num_heads, 3, config.head_dim))
    return by_head.transpose(0, 1).flatten(0, 2).contiguous()


def from_published(name: str, full: Tensor, config: ModelConfig) -> Tensor:
    """A full published tensor in this project's row order: the inverse of `to_published`."""
    if not _is_qkv(name):
        return full
    by_kind = full.unflatten(0, (3, config.num_heads, config.head_dim))
    return by_kind.transpose(0, 1).flatten(0, 2).contiguous()


def _is_qkv(name: str) -> bool:
    return name.endswith(("attn.qkv.weight", "attn.qkv.bias"))


def _open_files(path: Path, stack: ExitStack) -> dict[str, Any]:
    """Each tensor's name and the open file that holds it."""
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    files = [stack.enter_context(safe_open(file, "pt")) for file in paths]
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)


def check_keys(model: FiT, found: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raises UserError if `found`, the names and full shapes of the tensors in `path`, are not the model's."""
    expected = {name: full_shape(param) for name, param in model.named_parameters()}
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is not part of the model" for key in found if key not in expected]
    problems += [
        f"{key} is {found[key]}, the model's is {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    if problems:
        listed = "; ".join(problems[:_LISTED_KEYS])
        raise UserError(
            f"{path}: weights of another model than model.name = {model.config.name}: "
            f"{len(problems)} of its keys differ: {listed}{' ...' if len(problems) > _LISTED_KEYS else ''}"
        )
