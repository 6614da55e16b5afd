"""The batch plan: which images make up a step's global batch, as a pure function of (indices, seed, step).

1. Every shard set is an endless stream of images (`stream.ImageStream`). A mixture deals its places to the streams in
   proportion to their weights; step n takes places n * B .. n * B + B - 1.
2. Of each image one variant is drawn, from (seed, step, slot): size, crop and flip follow.

So the state of the data is the step alone: every rank computes the same plan and none is sent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from fitscale.config.schema_data import DataConfig
from fitscale.data.index import Index, open_index
from fitscale.data.packing import PackRule
from fitscale.data.storage import Cache
from fitscale.data.stream import LATENT_NOISE, VARIANT_CHOICE, ImageStream, philox

OpenIndex = Callable[[str, Cache], Index]  # functools.cache(open_index) where one command reads a shard set twice


@dataclass(frozen=True)
class GlobalBatch:
    """The images of one optimizer step over all ranks, by slot; int64 arrays (B,)."""

    step: int
    sources_B: np.ndarray  # positions in plan.streams
    images_B: np.ndarray  # rows of the source's index.images
    variants_B: np.ndarray  # rows of the source's index.variants
    rows_B: np.ndarray  # height in patches
    cols_B: np.ndarray  # width in patches
    labels_B: np.ndarray

    @property
    def tokens_B(self) -> np.ndarray:
        return self.rows_B * self.cols_B


class BatchPlan:
    """The global batches of one stream, or of several mixed by `weights` (images in proportion to them).

    A global batch may straddle epochs, and may be larger than a shard set: then it holds an image more than once, each
    time with a variant, and in training a noise, of its own.
    """

    def __init__(
        self, streams: Sequence[ImageStream], *, seed: int, global_batch_size: int, weights: Sequence[float] = (1.0,)
    ) -> None:
        self.streams, self.seed, self.global_batch_size = list(streams), seed, global_batch_size
        self.weights = [Fraction(str(weight)) for weight in weights]
        if len(self.weights) != len(self.streams):
            raise ValueError(f"{len(self.streams)} streams, {len(self.weights)} weights")
        self.patch_size, self.num_images = streams[0].patch_size, sum(stream.num_images for stream in streams)

    def step(self, n: int) -> GlobalBatch:
        """The global batch of optimizer step `n`, counted from 0."""
        before, after = self.next_places(n - 1), self.next_places(n)
        draws_B = philox(self.seed, VARIANT_CHOICE, n, 0).random_raw(self.global_batch_size) >> np.uint64(32)
        parts, slot = [], 0
        for source, (start, end) in enumerate(zip(before, after, strict=True)):
            count = end - start
            parts.append(_draw(self.streams[source], source, start, draws_B[slot : slot + count]))
            slot += count
        return GlobalBatch(n, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def next_places(self, n: int) -> list[int]:
        """The place in each stream where the step after step `n` begins."""
        return places(self.weights, (n + 1) * self.global_batch_size)

    def require_fit(self, rule: PackRule) -> None:
        """Raises UserError, naming an image, if one is larger than a pack."""
        area = self.patch_size**2
        for stream in self.streams:
            height, width, _ = max(stream.sizes, key=lambda size: size[0] * size[1])
            if rule.padded(height * width // area) > rule.pack_tokens:
                reason = f"{height * width // area} tokens, more than batch.pack_tokens = {rule.pack_tokens}"
                reason += f" (padded to {rule.pad_multiple})" if rule.pad_multiple > 1 else ""
                stream.index.refuse_size(height, width, reason)

    def key(self, batch: GlobalBatch, slot: int) -> str:
        """The key of the image in a slot, looked up in its shard; or its row (`Index.key`)."""
        return self.streams[int(batch.sources_B[slot])].index.key(int(batch.images_B[slot]))

    def latent_generator(self, step: int, slot: int) -> np.random.Generator:
        """The noise with which a stored posterior becomes the latent of (step, slot)."""
        return np.random.Generator(philox(self.seed, LATENT_NOISE, step, slot))


def open_plan(
    data: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    patch_size: int,
    split: str = "train",
    open_index: OpenIndex = open_index,
) -> BatchPlan:
    """The plan of a config's shards: the training images, or those of `split` "holdout".

    Raises:
        UserError: a shard set cannot be opened, or has no image that fits.
    """
    cache, about = Cache(Path(data.cache_dir), data.cache_gb), {"seed": seed, "patch_size": patch_size, "split": split}
    streams = [
        ImageStream(open_index(source.shards, cache), data, source, number=number, **about)  # type: ignore[arg-type]
        for number, source in enumerate(data.sources.values())
    ]
    weights = [source.weight for source in data.sources.values()]
    return BatchPlan(streams, seed=seed, global_batch_size=global_batch_size, weights=weights)


def token_shares(data: DataConfig, patch_size: int, open_index: OpenIndex = open_index) -> dict[int, float]:
    """Share of the images that have each number of tokens, as their variants do; adds up to 1.

    Raises:
        UserError: a shard set cannot be opened.
    """
    shares: dict[int, float] = {}
    weights = sum(source.weight for source in data.sources.values())
    for source in data.sources.values():
        sizes = open_index(source.shards, Cache(Path(data.cache_dir), data.cache_gb)).meta.sizes
        counts = [((height // patch_size) * (width // patch_size), count) for height, width, count in sizes]
        used = [(tokens, count) for tokens, count in counts if source.uses(tokens)]
        total = sum(count for _, count in used)
        for tokens, count in used:
            shares[tokens] = shares.get(tokens, 0.0) + source.weight / weights * count / total
    return dict(sorted(shares.items()))


def places(weights: Sequence[Fraction], n: int) -> list[int]:
    """How many of the first `n` places each source has, by Webster's method.

    Image j of a source of weight w wants to be at (j + 1/2) / w; places go in this order, so every source stays within
    one place of its share of a mixture of two, and n + 1 places are the first n and one more.
    """
    total = sum(weights)
    counts = [max(0, -((total - 2 * n * weight) // (2 * total))) for weight in weights]  # what wants to be before n
    sources = range(len(weights))
    while sum(counts) < n:
        counts[min(sources, key=lambda k: ((2 * counts[k] + 1) / weights[k], k))] += 1
    while sum(counts) > n:
        counts[max((k for k in sources if counts[k]), key=lambda k: ((2 * counts[k] - 1) / weights[k], k))] -= 1
    return counts


def _draw(stream: ImageStream, source: int, start: int, draws_B: np.ndarray) -> tuple[np.ndarray, ...]:
    """GlobalBatch's arrays for the next len(draws_B) images of a stream."""
    images_B = stream.images(start, len(draws_B))
    variants_B = stream.variants(images_B, draws_B)
    sizes = stream.index.variants[variants_B]
    return (
        np.full(len(images_B), source, dtype=np.int64),
        images_B,
        variants_B,
        sizes["height"].astype(np.int64) // stream.patch_size,
        sizes["width"].astype(np.int64) // stream.patch_size,
        stream.index.images["label"][images_B].astype(np.int64),
    )
