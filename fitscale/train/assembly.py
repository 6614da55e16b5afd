"""Whole tensors from the parts that ranks keep, without a collective in the training loop.

ZeRO cuts the flattened tensors over the data-parallel ranks, tensor parallelism cuts some of them before. Who keeps
what is agreed on once. Every tensor is written by the rank that keeps most of it; what others keep of it they leave in
a file of their own in the checkpoint's temporary folder, where the writer finds it: nothing of a small ZeRO-1 run,
nearly everything of a ZeRO-3 one.

    loop:    copy        what this rank keeps -> host memory (on CUDA pinned, behind the stream: the loop does not wait)
    thread:  give        what others write -> parts-<rank>.safetensors
             tensors     what this rank writes, read from both places tensor by tensor
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from fitscale.model.backbone import Parameter, parameters_by_name
from fitscale.model.weights import StoredTensor, list_tensors, stored, to_published, write_tensors
from fitscale.parallel.layers import split_of, tp_rank, tp_size
from fitscale.parallel.zero import own_part
from fitscale.train.checkpoint import MOMENTS


@dataclass(frozen=True)
class Part:
    """Consecutive elements of a tensor-parallel rank's flattened tensor, which `rank` keeps."""

    rank: int
    tp_rank: int
    start: int
    numel: int


@dataclass(frozen=True)
class Whole:
    """A parameter, the parts that together are its tensor, shard by shard, and the rank that writes it."""

    entry: Parameter
    shard: tuple[int, ...]  # shape of a tensor-parallel rank's tensor
    parts: list[Part]
    writer: int


class Assembly:
    """One rank's part in it; made by all ranks together, everything else is local."""

    def __init__(self, engine: Any, sets: Mapping[str, str | None]) -> None:
        self.engine, self.sets, self.rank = engine, sets, dist.get_rank()
        self.parameters = dict(engine.module.named_parameters())
        self.wholes = _agree(engine.module, engine)
        self.givers = {part.rank for whole in self.wholes for part in whole.parts if part.rank != whole.writer}
        self.mine = [(whole, part) for whole in self.wholes for part in whole.parts if part.rank == self.rank]
        # Kept from save to save, and touched by a thread before the first: memory that nobody has used yet is slow.
        pinned = engine.device.type == "cuda"
        self.buffers = {
            _key(folder, whole, part): torch.empty(part.numel, pin_memory=pinned)
            for whole, part in self.mine
            for folder in sets
        }
        self.touched = Thread(target=self._touch, name="save's buffers", daemon=True)
        self.touched.start()
        self.copied: Any = None

    def _touch(self) -> None:
        for buffer in self.buffers.values():
            buffer.zero_()

    def copy(self, begun: bool) -> None:
        """Copy to the host what a checkpoint takes from this rank.

        What no optimizer step has touched, frozen or not `begun`, has no state: moments are zero, the EMA is the
        weights.
        """
        self.touched.join()
        for whole, part in self.mine:
            parameter = self.parameters[whole.entry.name]
            for folder, key in self.sets.items():
                self._copy(_key(folder, whole, part), parameter, key, begun and parameter.requires_grad)
        if self.engine.device.type == "cuda":
            self.copied = torch.cuda.Event()
            self.copied.record()

    def _copy(self, name: str, parameter: torch.nn.Parameter, key: str | None, touched: bool) -> None:
        own = own_part(self.engine, parameter, key if touched else None)
        assert own is not None, f"{name}: this rank keeps nothing of it"
        if key in MOMENTS and not touched:
            self.buffers[name].zero_()
        else:
            self.buffers[name].copy_(own[1], non_blocking=True)

    def give(self, temporary: Path) -> None:
        """Write what other ranks need of this one."""
        if self.copied is not None:
            self.copied.synchronize()
        if self.rank in self.givers:
            mine = [(whole, part) for whole in self.wholes for part in whole.parts if part.rank == self.rank]
            names = [
                _key(folder, whole, part) for whole, part in mine if whole.writer != self.rank for folder in self.sets
            ]
            write_tensors(parts_file(temporary, self.rank), {name: stored(self.buffers[name]) for name in names}, {})

    def needed(self) -> set[int]:
        """Ranks that have to `give` before this one reads `tensors`."""
        return {part.rank for whole in self._written() for part in whole.parts} - {self.rank}

    def tensors(self, folder: str, temporary: Path) -> dict[str, StoredTensor]:
        """The tensors of a set that this rank writes, in the published layout."""
        given: dict[str, StoredTensor] = {}
        for rank in self.needed():
            given |= list_tensors(parts_file(temporary, rank), verify=False)
        return {
            whole.entry.name: StoredTensor(whole.entry.shape, partial(self._read, folder, whole, given))
            for whole in self._written()
        }

    def _written(self) -> list[Whole]:
        return [whole for whole in self.wholes if whole.writer == self.rank]

    def _read(self, folder: str, whole: Whole, given: Mapping[str, StoredTensor]) -> torch.Tensor:
        shards = []
        for shard in sorted({part.tp_rank for part in whole.parts}):
            names = [(_key(folder, whole, part), part.rank) for part in whole.parts if part.tp_rank == shard]
            pieces = [self.buffers[name] if rank == self.rank else given[name].read() for name, rank in names]
            shards.append(torch.cat(pieces).view(whole.shard))
        return to_published(
            whole.entry, shards[0] if whole.entry.split is None else torch.cat(shards, whole.entry.split)
        )


def parts_file(temporary: Path, rank: int) -> Path:
    return temporary / f"parts-{rank:05d}.safetensors"


def _key(folder: str, whole: Whole, part: Part) -> str:
    return f"{folder} {whole.entry.name} {part.tp_rank} {part.start}"


def _agree(model: torch.nn.Module, engine: Any) -> list[Whole]:
    """Who keeps and who writes what; a collective over all ranks."""
    named = list(model.named_parameters())
    mine = []
    for _, parameter in named:
        own = own_part(engine, parameter)
        mine.append(None if own is None else (own[0], own[1].numel()))
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (tp_rank(), mine))
    table, wholes = parameters_by_name(model), []
    for number, (name, parameter) in enumerate(named):
        kept = [Part(rank, tp, *found[number]) for rank, (tp, found) in enumerate(everyones) if found[number]]
        entry, shard = table[name], list(table[name].shape)
        cut = split_of(parameter)
        if cut is not None:
            shard[cut] //= tp_size()
        sources = range(tp_size()) if cut is not None else [number % tp_size()]  # replicated: any of them
        parts = [part for tp in sources for part in covering(kept, tp, prod(shard), number)]
        largest = max(part.numel for part in parts)
        candidates = [part.rank for part in parts if part.numel == largest]
        wholes.append(Whole(entry, tuple(shard), parts, candidates[number % len(candidates)]))
    return wholes


def covering(kept: list[Part], tp: int, numel: int, number: int) -> list[Part]:
    """Those of the parts of a tensor-parallel rank that together hold each of `numel` elements once, in order.

    Where all data-parallel ranks keep the whole, the `number` of the parameter says whose is taken.
    """
    chosen: list[Part] = []
    reached = 0
    while reached < numel:
        following = [part for part in kept if part.tp_rank == tp and part.start == reached]
        assert following, f"no rank keeps element {reached} of {numel}"
        chosen.append(following[number % len(following)])
        reached += chosen[-1].numel
    return chosen
