"""The batch plan: which images make up a step's global batch, as a pure function of (index, seed, step).

1. Epoch after epoch makes one endless stream of images; step n takes images n * B .. n * B + B - 1 of it.
2. An epoch visits the shards in an order drawn from (seed, epoch), `window_shards` of them at a time.
3. Inside such a window the images are permuted, by a draw from (seed, epoch, window).
4. Of each image one variant is drawn, from (seed, step, slot): size, crop and flip follow.

So the state of the data is the step alone: every rank computes the same plan and none is sent. Memory grows with the
number of shards plus a window. Raw words of Philox, a counter-based generator whose output numpy keeps stable, make
every draw.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from fitscale.config.errors import UserError
from fitscale.data.index import Index

SHARD_ORDER, IMAGE_ORDER, VARIANT_CHOICE, LATENT_NOISE = range(4)  # what a draw is for


@dataclass(frozen=True)
class GlobalBatch:
    """The images of one optimizer step over all ranks, by slot; int64 arrays (B,)."""

    step: int
    images_B: np.ndarray  # rows of index.images
    variants_B: np.ndarray  # rows of index.variants
    rows_B: np.ndarray  # height in patches
    cols_B: np.ndarray  # width in patches
    labels_B: np.ndarray

    @property
    def tokens_B(self) -> np.ndarray:
        return self.rows_B * self.cols_B


@dataclass(frozen=True)
class _Epoch:
    shards: np.ndarray  # in their order
    window_ends: np.ndarray  # position in the epoch where each window ends


class BatchPlan:
    """The global batches of one split of a shard set; every image of it exactly once per epoch.

    A global batch may straddle epochs, and may be larger than the split: then it holds an image more than once, each
    time with a variant, and in training a noise, of its own.

    Raises:
        UserError: the split is empty; a height or width is no multiple of `patch_size`.
    """

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        global_batch_size: int,
        patch_size: int,
        window_shards: int,
        holdout_fraction: float,
        split: str = "train",
    ) -> None:
        self.index, self.seed, self.split, self.holdout_fraction = index, seed, split, holdout_fraction
        self.global_batch_size, self.patch_size, self.window_shards = global_batch_size, patch_size, window_shards
        first, held_out = index.first_images, index.held_out(holdout_fraction)
        self._starts = first[:-1] + (held_out if split == "train" else 0)
        self._counts = np.diff(first) - held_out if split == "train" else held_out
        self.num_images = int(self._counts.sum())
        if self.num_images == 0:
            raise UserError(
                f"data.holdout_fraction: {holdout_fraction} leaves no image for split {split} of the "
                f"{index.meta.num_images} images in {index.folder}"
            )
        for height, width, _ in index.meta.sizes:
            if height % patch_size or width % patch_size:
                index.refuse_size(height, width, f"both must be multiples of model.patch_size = {patch_size}")
        # A step reaches into two epochs or windows, unless they are tiny, and the next step goes on where it ends.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def __reduce__(self) -> Any:
        """For worker processes that are not forked: the arguments, without the caches."""
        names = ("seed", "global_batch_size", "patch_size", "window_shards", "holdout_fraction", "split")
        return partial(BatchPlan, self.index, **{name: getattr(self, name) for name in names}), ()

    def step(self, n: int) -> GlobalBatch:
        """The global batch of optimizer step `n`, counted from 0."""
        images_B = self._stream(n * self.global_batch_size, self.global_batch_size)
        rows = self.index.images[images_B]
        draws_B = _random(self.seed, VARIANT_CHOICE, n, 0, len(images_B)) >> np.uint64(32)
        chosen_B = draws_B * rows["variants"] >> np.uint64(32)
        variants_B = (rows["first_variant"] + chosen_B).astype(np.int64)
        sizes = self.index.variants[variants_B]
        return GlobalBatch(
            step=n,
            images_B=images_B,
            variants_B=variants_B,
            rows_B=sizes["height"].astype(np.int64) // self.patch_size,
            cols_B=sizes["width"].astype(np.int64) // self.patch_size,
            labels_B=rows["label"].astype(np.int64),
        )

    def latent_generator(self, step: int, slot: int) -> np.random.Generator:
        """The noise with which a stored posterior becomes the latent of (step, slot)."""
        key, counter = np.array([self.seed, LATENT_NOISE], np.uint64), np.array([0, 0, step, slot], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _stream(self, start: int, count: int) -> np.ndarray:
        """Images start .. start + count - 1 of the endless stream of epochs."""
        parts = []
        while count > 0:
            epoch, position = divmod(start, self.num_images)
            window = int(np.searchsorted(self._epoch(epoch).window_ends, position, side="right"))
            images = self._window(epoch, window)
            begin = len(images) - int(self._epoch(epoch).window_ends[window]) + position
            parts.append(images[begin : begin + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = np.argsort(_random(self.seed, SHARD_ORDER, epoch, 0, len(self._counts)), kind="stable")
        ends = np.cumsum(self._counts[shards])
        last = np.minimum(np.arange(0, len(shards), self.window_shards) + self.window_shards, len(shards)) - 1
        return _Epoch(shards, ends[last])

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        self.index.release()  # the rows of the window before this one
        members = self._epoch(epoch).shards[window * self.window_shards : (window + 1) * self.window_shards]
        images = np.concatenate([self._starts[shard] + np.arange(self._counts[shard]) for shard in members])
        return images[np.argsort(_random(self.seed, IMAGE_ORDER, epoch, window, len(images)), kind="stable")]


def _random(seed: int, purpose: int, a: int, b: int, count: int) -> np.ndarray:
    """`count` random uint64, a pure function of the other arguments (each below 2^64)."""
    counter = np.array([0, 0, a, b], dtype=np.uint64)
    return np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter).random_raw(count)
