"""From the plan to packs of tokens on this rank.

1. A worker takes a step number, asks the plan for the global batch, and splits it over ranks and micro-batches.
2. It reads the byte ranges of its own rank's images, patchifies them and lays them end to end, pack after pack; for
   training it also draws what chance decides of them (noise), which would keep the training thread from its device.
3. The training process cuts that one tensor into `Pack`s (views), in the order of the steps.

Every step is computed from its number alone, so workers change nothing and resuming is starting at another step.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fitscale.config.errors import UserError
from fitscale.config.schema_data import DataConfig
from fitscale.data.batch_plan import BatchPlan, GlobalBatch
from fitscale.data.encode import draw_latent, patchify, to_float
from fitscale.data.index import CorruptSample, Index, ShardReader
from fitscale.data.packing import PackingStats, PackRule, split
from fitscale.data.stream import ImageStream

PADDING_SLOT = -1
READ_HERE = DataConfig(num_workers=0)
TERMINATED_S = 300  # how long a worker lives on after SIGTERM


class Drawn(Protocol):
    """What chance decides of images that lie end to end."""

    def part(self, images: slice, tokens: slice) -> Self:
        """That of some of them, which follow each other, and of their tokens."""


Draw = Callable[[int, Sequence[int], Sequence[int]], Drawn]  # of a step, slots, and tokens of each


@dataclass(frozen=True)
class Pack:
    """Images laid end to end. Padding is an image too: slot -1, label 0, one row of zero tokens, last in the pack."""

    tokens_TC: torch.Tensor  # float32
    sizes_S2: torch.Tensor  # int32, (rows, cols) in patches
    labels_S: torch.Tensor  # int64
    slots_S: torch.Tensor  # int64, positions in the global batch
    cu_seqlens: torch.Tensor  # int32, (S + 1,); the last is T
    drawn: Any  # `Drawn` by the loader's `draw`, None without one


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step, and the global batch that it is a share of.

    Between processes tokens and draws travel as one shared tensor for all packs, and the rest by value.
    """

    batch: GlobalBatch
    stats: PackingStats
    tokens_TC: torch.Tensor  # of all packs, end to end
    slots: list[np.ndarray]  # of every pack, padding included
    sizes: list[np.ndarray]
    skipped: list[str]  # corrupt images of this rank, left out of its packs' loss
    drawn: Drawn | None = None  # of all packs

    @property
    def step(self) -> int:
        return self.batch.step

    @cached_property
    def packs(self) -> list[Pack]:
        """This rank's packs; their tokens are views."""
        packs, start, image = [], 0, 0
        for slots, sizes in zip(self.slots, self.sizes, strict=True):
            cu_seqlens = np.concatenate(([0], np.cumsum(sizes.prod(axis=1))))
            images, tokens = slice(image, image + len(slots)), slice(start, start + int(cu_seqlens[-1]))
            labels = np.where(slots == PADDING_SLOT, 0, self.batch.labels_B[slots])
            packs.append(
                Pack(
                    tokens_TC=self.tokens_TC[tokens],
                    sizes_S2=torch.from_numpy(sizes.astype(np.int32)),
                    labels_S=torch.from_numpy(labels),
                    slots_S=torch.from_numpy(slots),
                    cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
                    drawn=self.drawn.part(images, tokens) if self.drawn else None,
                )
            )
            start, image = tokens.stop, images.stop
        return packs


def make_loader(
    plan: BatchPlan,
    rule: PackRule,
    steps: range,
    data: DataConfig = READ_HERE,
    dp_rank: int = 0,
    dp_size: int = 1,
    draw: Draw | None = None,
) -> Iterator[StepBatch]:
    """Iterator over the StepBatch of `steps` for rank `dp_rank`; `draw` runs where the images are read.

    `data.num_workers` processes each read `data.prefetch_steps` ahead; 0 reads in this process when asked. With
    `data.on_error` "skip" a corrupt image becomes padding (slot -1, zero tokens) where it lies in its pack: it weighs
    nothing, and the step names it.

    Raises:
        UserError: here, if an image is larger than a pack; while iterating, if a shard is missing or corrupt.
    """
    plan.require_fit(rule)
    loaded_steps: DataLoader[Any] = DataLoader(
        _Steps(plan, rule, steps, dp_rank, dp_size, data.on_error, draw),
        batch_size=None,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_steps if data.num_workers else None,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # else the loader would draw from torch's global generator
    )
    return _iterate(loaded_steps)


def _iterate(loaded_steps: DataLoader[Any]) -> Iterator[StepBatch]:
    for loaded in loaded_steps:
        if isinstance(loaded, UserError):
            raise loaded
        yield loaded


@dataclass
class _Steps(Dataset[Any]):
    """Step number -> what this rank computes. Runs in the workers."""

    plan: BatchPlan
    rule: PackRule
    steps: range
    dp_rank: int
    dp_size: int
    on_error: str
    draw: Draw | None

    def __post_init__(self) -> None:
        self.readers = [ShardReader(stream.index) for stream in self.plan.streams]
        self.prefetchers = [ShardPrefetcher(stream) for stream in self.plan.streams]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, item: int) -> StepBatch | UserError:
        try:
            return self._load(self.steps[item])
        except UserError as error:
            return error  # raised in the training process, where it is not wrapped into the worker's traceback

    def _load(self, step: int) -> StepBatch:
        batch = self.plan.step(step)
        for prefetcher, place in zip(self.prefetchers, self.plan.next_places(step), strict=True):
            prefetcher.fetch_after(place)
        packing = split(batch.tokens_B, self.rule, self.dp_size)
        mine = packing.packs[self.dp_rank]
        sizes_B2 = np.stack([batch.rows_B, batch.cols_B], axis=1)
        slots, sizes = zip(*(self._pad(pack, sizes_B2[pack]) for pack in mine), strict=True)
        lengths = np.concatenate(sizes).prod(axis=1)
        tokens, corrupt = self._read(batch, np.concatenate(slots), lengths)
        kept = [np.where(np.isin(pack, list(corrupt)), PADDING_SLOT, pack) for pack in slots]
        drawn = self.draw(step, np.concatenate(kept).tolist(), lengths.tolist()) if self.draw else None
        return StepBatch(batch, packing.stats, tokens, kept, list(sizes), list(corrupt.values()), drawn)

    def _pad(self, slots: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots and sizes of a pack, with its padding image if it needs one."""
        tokens = int(sizes.prod(axis=1).sum())
        padding = self.rule.padded(tokens) - tokens
        if padding == 0:
            return slots, sizes
        return np.append(slots, PADDING_SLOT), np.append(sizes, [[1, padding]], axis=0)

    def _read(self, batch: GlobalBatch, slots: np.ndarray, lengths: np.ndarray) -> tuple[torch.Tensor, dict[int, str]]:
        """Tokens of all slots end to end, and what is wrong with the slots that had to be left zero."""
        patch_size = self.plan.patch_size
        tokens_TC = torch.zeros(int(lengths.sum()), patch_size**2 * self.plan.streams[0].index.meta.channels)
        ends, corrupt = np.cumsum(lengths), {}
        for slot, start, end in zip(slots.tolist(), ends - lengths, ends, strict=True):
            if slot == PADDING_SLOT:
                continue
            try:
                tokens_TC[start:end] = torch.from_numpy(patchify(self._image(batch, slot), patch_size))
            except CorruptSample as error:
                if self.on_error == "stop":
                    raise
                corrupt[slot] = str(error)
        return tokens_TC, corrupt

    def _image(self, batch: GlobalBatch, slot: int) -> np.ndarray:
        """The image of a slot as it is trained on, (channels, height, width) float32."""
        source = int(batch.sources_B[slot])
        stored = self.readers[source].read(int(batch.images_B[slot]), int(batch.variants_B[slot]))
        if self.plan.streams[source].index.meta.moments:
            return draw_latent(stored, self.plan.latent_generator(batch.step, slot))
        return to_float(stored)


def _outlive_signals(worker: int) -> None:
    """Let a worker go on after Ctrl-C, and for a while after SIGTERM, which all processes of a job get at once:
    training has a step to end and a checkpoint to save, and the death of a worker would end it at once."""

    def hear(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(TERMINATED_S)

    signal.signal(signal.SIGTERM, hear)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent


class ShardPrefetcher:
    """One process's fetching for one stream."""

    def __init__(self, stream: ImageStream) -> None:
        self.stream = stream
        self._asked: list[int] = []

    def fetch_after(self, place: int) -> None:
        """Begin to fetch what comes after the window of image `place`, unless this is so already.

        Nothing is fetched that would push the window before it out of the cache.
        """
        index = self.stream.index
        if not index.storage.remote:
            return
        shards = self.stream.shards_ahead(place)
        size = sum(index.meta.shards[shard].bytes for shard in shards)
        if shards == self._asked or 2 * size > index.storage.cache.size_gb * 1e9:
            return
        self._asked = shards
        first = os.getpid() % len(shards)  # the processes of a machine begin at different ones
        threading.Thread(target=_fetch, args=(index, shards[first:] + shards[:first]), daemon=True).start()


def _fetch(index: Index, shards: list[int]) -> None:
    with contextlib.suppress(UserError, OSError):  # who reads it will meet the same error, and report it
        for shard in shards:
            index.shard_path(shard)
