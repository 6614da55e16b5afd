"""The endless stream of one shard set's images: epoch after epoch, as a pure function of (index, seed).

1. An epoch visits the shards in an order drawn from (seed, epoch), `window_shards` of them at a time.
2. Inside such a window the images are permuted, by a draw from (seed, epoch, window).

Memory grows with the number of shards plus a window. Raw words of Philox, a counter-based generator whose output numpy
keeps stable, make every draw.
"""

from dataclasses import KW_ONLY, dataclass, fields
from functools import lru_cache, partial
from typing import Any

import numpy as np

from fitscale.config.errors import UserError
from fitscale.config.schema_data import DataConfig, SourceConfig
from fitscale.data.index import Index, Shard

SHARD_ORDER, IMAGE_ORDER, VARIANT_CHOICE, LATENT_NOISE = range(4)  # what a draw is for
PURPOSES = 256  # draws of source k of a mixture are for purpose + k * PURPOSES


@dataclass(eq=False)
class ImageStream:
    """One split of a shard set, read as `data` says; an epoch has every image with a variant in `limits` once.

    Raises:
        UserError: no image is left; a height or width is no multiple of `patch_size`.
    """

    index: Index
    data: DataConfig
    limits: SourceConfig
    _: KW_ONLY
    seed: int
    patch_size: int
    split: str = "train"
    number: int = 0  # of this stream in a mixture

    def __post_init__(self) -> None:
        index, split = self.index, self.split
        first, held_out = index.first_images, index.held_out(self.data.holdout_fraction)
        self._starts = first[:-1] + (held_out if split == "train" else 0)
        self._stored = np.diff(first) - held_out if split == "train" else held_out  # per shard, within limits or not
        if not self._stored.any():
            raise UserError(
                f"data.holdout_fraction: {self.data.holdout_fraction} leaves no image for split {split} of the "
                f"{index.meta.num_images} images in {index.storage.location}"
            )
        self._counts = self._stored
        if self.limits.limited:  # images that have a variant within the limits; one pass over the index
            self._counts = np.array([len(self._rows_of(shard)) for shard in range(len(held_out))])
        self.num_images = int(self._counts.sum())
        if self.num_images == 0:
            wanted = f"{self.limits.min_tokens} to {self.limits.max_tokens or 'any number of'} tokens"
            held = [height * width // self.patch_size**2 for height, width, _ in index.meta.sizes]
            raise UserError(
                f"data.mixture: no image for split {split} of {index.storage.location} has {wanted}; its images have "
                f"{min(held)} to {max(held)}"
            )
        self.sizes = [size for size in index.meta.sizes if self._within(size[0] * size[1])]
        for height, width, _ in self.sizes:
            if height % self.patch_size or width % self.patch_size:
                index.refuse_size(height, width, f"both must be multiples of model.patch_size = {self.patch_size}")
        # A step reaches into two epochs or windows, unless they are tiny, and the next step goes on where it ends.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def __reduce__(self) -> Any:
        """For worker processes that are not forked: the arguments, without the caches."""
        return partial(ImageStream, **{field.name: getattr(self, field.name) for field in fields(self)}), ()

    def images(self, start: int, count: int) -> np.ndarray:
        """Rows of `index.images`: start .. start + count - 1 of the stream; int64 (count,)."""
        parts = [np.zeros(0, dtype=np.int64)]
        while count > 0:
            epoch, window, left = self._locate(start)
            images = self._window(epoch, window)
            parts.append(images[len(images) - left :][:count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def shards_ahead(self, place: int) -> list[Shard]:
        """The shards of the window after the one that image `place` of the stream is in, of this epoch or the next."""
        epoch, window, left = self._locate(place)
        epoch, window, _ = self._locate(place + left)
        return [self.index.meta.shards[shard] for shard in self._members(epoch, window).tolist()]

    def _locate(self, place: int) -> tuple[int, int, int]:
        """Epoch and window of image `place` of the stream, and how many images the window has from there on."""
        epoch, position = divmod(place, self.num_images)
        _, window_ends = self._epoch(epoch)
        window = int(np.searchsorted(window_ends, position, side="right"))
        return epoch, window, int(window_ends[window]) - position

    def variants(self, images_B: np.ndarray, draws_B: np.ndarray) -> np.ndarray:
        """A variant of each image, rows of `index.variants`; `draws_B` are uniform uint64 below 2^32."""
        rows = self.index.images[images_B]
        first, counts = rows["first_variant"].astype(np.int64), rows["variants"].astype(np.int64)
        if not self.limits.limited:
            return first + _share(draws_B, counts)
        starts = np.cumsum(counts) - counts
        candidates = np.repeat(first - starts, counts) + np.arange(counts.sum())
        allowed = self._allowed(candidates)
        kept = np.add.reduceat(allowed.astype(np.int64), starts) if len(starts) else starts
        return candidates[allowed][np.cumsum(kept) - kept + _share(draws_B, kept)]

    def _within(self, area: Any) -> Any:
        """Whether `area` latent pixels, a number or an array, are within the limits."""
        return self.limits.uses(area // self.patch_size**2)

    def _allowed(self, variants: Any) -> np.ndarray:
        rows = self.index.variants[variants]
        return self._within(rows["height"].astype(np.int64) * rows["width"])  # type: ignore[no-any-return]

    def _rows_of(self, shard: int) -> np.ndarray:
        """The rows of a shard's images that are in this stream, ascending."""
        start, end = int(self._starts[shard]), int(self._starts[shard] + self._stored[shard])
        rows = np.arange(start, end)
        if not self.limits.limited or start == end:
            return rows
        first = self.index.images["first_variant"][start:end].astype(np.int64)
        last = int(first[-1] + self.index.images[end - 1]["variants"])
        allowed = self._allowed(slice(int(first[0]), last))
        self.index.release()
        return rows[np.logical_or.reduceat(allowed, first - first[0])]

    def _random(self, purpose: int, a: int, b: int, count: int) -> np.ndarray:
        return philox(self.seed, purpose + self.number * PURPOSES, a, b).random_raw(count)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in their order, and the position in the epoch where each window ends."""
        shards = stable_order(self._random(SHARD_ORDER, epoch, 0, len(self._counts)))
        ends = np.cumsum(self._counts[shards])
        last = np.minimum(np.arange(0, len(shards), self.data.window_shards) + self.data.window_shards, len(shards)) - 1
        return shards, ends[last]

    def _members(self, epoch: int, window: int) -> np.ndarray:
        """The numbers of a window's shards."""
        return self._epoch(epoch)[0][window * self.data.window_shards : (window + 1) * self.data.window_shards]

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        self.index.release()  # the rows of the window before this one
        members = self._members(epoch, window)
        for shard in members:
            self.index.read_ahead(int(self._starts[shard]), int(self._starts[shard] + self._stored[shard]))
        images = np.concatenate([self._rows_of(int(shard)) for shard in members])
        return images[stable_order(self._random(IMAGE_ORDER, epoch, window, len(images)))]


def philox(seed: int, purpose: int, a: int, b: int) -> np.random.Philox:
    """Random words that are a pure function of the arguments (each below 2^64)."""
    key, counter = np.array([seed, purpose], dtype=np.uint64), np.array([0, 0, a, b], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def stable_order(words: np.ndarray) -> np.ndarray:
    """np.argsort(words, kind="stable") of random uint64, three times as fast.

    numpy sorts 16-bit keys by radix. Two such sorts leave next to nothing out of order, which its sort of longer keys
    is quick to find.
    """
    order = np.argsort((words >> np.uint64(32)).astype(np.uint16), kind="stable")
    order = order[np.argsort((words >> np.uint64(48)).astype(np.uint16)[order], kind="stable")]
    return order[np.argsort(words[order], kind="stable")]  # type: ignore[no-any-return]


def _share(draws_B: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """A number below each count, from uniform draws below 2^32."""
    return (draws_B * counts_B.astype(np.uint64) >> np.uint64(32)).astype(np.int64)
