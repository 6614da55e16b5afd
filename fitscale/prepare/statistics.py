"""What is in a shard set, from its index alone, in pieces of bounded size; and what its batches cost.

A global batch costs more under simpler schemes than balanced packs. Each scheme gives the padding share (of the tokens
computed), the imbalance (most loaded rank / mean rank - 1, padding counted as computed) and the time lost (share of all
ranks' time that no image of the batch needs, since every rank waits for the most loaded). The cost of n tokens is
a * n + b * n^2, in FLOPs.
"""

from dataclasses import astuple, dataclass

import numpy as np

from fitscale.config.schema_data import DataConfig
from fitscale.data.batch_plan import open_plan
from fitscale.data.index import Index
from fitscale.data.packing import PackRule, macs_of, split
from fitscale.prepare.preprocess import MULTIPLE, area_limited

STEPS = 20  # global batches whose waste is averaged
OPEN_PACKS = 64  # of first-fit; older packs are taken for full
Cost = tuple[float, float]  # a, b


@dataclass(frozen=True)
class DrawnSizes:
    """The sizes training sees: (N,) heights and widths in patches, and in how many draws of an epoch each occurs."""

    rows: np.ndarray
    cols: np.ndarray
    draws: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        return self.rows * self.cols


def drawn_sizes(index: Index, patch_size: int) -> DrawnSizes:
    """Sizes by how often an epoch draws them: of an image's variants each is drawn equally often."""
    for height, width, _ in index.meta.sizes:
        if height % patch_size or width % patch_size:
            index.refuse_size(height, width, f"both must be multiples of --patch-size {patch_size}")
    heights, widths, _ = np.array(index.meta.sizes, dtype=np.int64).T
    return DrawnSizes(heights // patch_size, widths // patch_size, index.draws)


def label_counts(index: Index) -> np.ndarray:
    """Images of each class, (num_classes,)."""
    counts = np.zeros(index.meta.num_classes, dtype=np.int64)
    for images, _ in index.pieces():
        counts += np.bincount(images["label"], minlength=len(counts))
    return counts


@dataclass(frozen=True)
class Waste:
    """What a scheme loses on one global batch."""

    padding_share: float
    imbalance: float
    time_lost: float


def wasted(index: Index, patch_size: int, batch: int, dp_size: int, pack_tokens: int) -> dict[str, Waste]:
    """Mean waste of packing, of padding to the longest, and of batches of one shape, over real global batches.

    The cost of n tokens is n + n^2 / 20,000: about FiTv2-XL/2's ratio of linear to attention FLOPs.
    """
    data, cost = DataConfig(index.storage.location), (1.0, 1 / 20000)
    plan = open_plan(data, seed=0, global_batch_size=batch, patch_size=patch_size, open_index=lambda *_: index)
    wastes = []
    for step in map(plan.step, range(STEPS)):
        tokens, shapes = step.tokens_B, step.rows_B << 16 | step.cols_B
        packs = packed(tokens, cost, dp_size, max(pack_tokens, int(tokens.max())))
        buckets = bucketed(shapes, tokens, cost, dp_size, pack_tokens)
        wastes.append([astuple(one) for one in (packs, padded_to_longest(tokens, cost, dp_size), buckets)])
    names = ("packs", "padded to the longest", "batches of one shape")
    return {name: Waste(*means) for name, means in zip(names, np.mean(wastes, axis=0), strict=True)}


def packed(tokens_B: np.ndarray, cost: Cost, dp_size: int, pack_tokens: int) -> Waste:
    """fitscale's packs."""
    stats = split(tokens_B, PackRule(pack_tokens, cost=cost), dp_size).stats
    return Waste(stats.padding_share, stats.imbalance, 1 - 1 / (1 + stats.imbalance))


def padded_to_longest(tokens_B: np.ndarray, cost: Cost, dp_size: int) -> Waste:
    """Images dealt to the ranks in turn, each rank's padded to the longest of the global batch."""
    counts = np.bincount(np.arange(len(tokens_B)) % dp_size, minlength=dp_size)
    longest = tokens_B.max()
    return _waste(tokens_B, cost, counts * macs_of(longest, cost), int(longest) * len(tokens_B))


def bucketed(shapes_B: np.ndarray, tokens_B: np.ndarray, cost: Cost, dp_size: int, pack_tokens: int) -> Waste:
    """Batches of one shape each, as many images as `pack_tokens` holds, dealt to the ranks in turn; a shape's last
    batch is filled up, since a fixed shape has a fixed number of rows."""
    loads, computed, batch = np.zeros(dp_size), 0, 0
    for shape in np.unique(shapes_B):
        of_shape = tokens_B[shapes_B == shape]
        rows = max(1, min(pack_tokens // int(of_shape[0]), -(-len(tokens_B) // dp_size)))
        for _ in range(-(-len(of_shape) // rows)):
            loads[batch % dp_size] += rows * macs_of(of_shape[0], cost)
            computed += rows * int(of_shape[0])
            batch += 1
    return _waste(tokens_B, cost, loads, computed)


def first_fit(tokens_B: np.ndarray, cost: Cost, dp_size: int, pack_tokens: int) -> Waste:
    """Packs filled first-fit in the images' order, dealt to the ranks in turn, without regard to cost. A pack holds
    at most a rank's even share of the tokens, so that small batches still reach every rank."""
    limit = min(pack_tokens, max(int(tokens_B.max()), -(-int(tokens_B.sum()) // dp_size)))
    rooms: list[int] = []
    pack_B = []
    for tokens in tokens_B.tolist():
        open_packs = range(max(0, len(rooms) - OPEN_PACKS), len(rooms))
        pack = next((number for number in open_packs if rooms[number] >= tokens), len(rooms))
        if pack == len(rooms):
            rooms.append(limit)
        rooms[pack] -= tokens
        pack_B.append(pack)
    loads = np.bincount(np.array(pack_B) % dp_size, weights=macs_of(tokens_B, cost), minlength=dp_size)
    return _waste(tokens_B, cost, loads, int(tokens_B.sum()))


def _waste(tokens_B: np.ndarray, cost: Cost, loads: np.ndarray, computed: int) -> Waste:
    useful = float(macs_of(tokens_B, cost).sum())
    return Waste(
        padding_share=1 - int(tokens_B.sum()) / computed,
        imbalance=float(loads.max() / loads.mean() - 1),
        time_lost=1 - useful / (len(loads) * float(loads.max())),
    )


def photograph_sizes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) rows and columns of tokens of photographs, as FiT's preprocessing for side 256 leaves them.

    A model of ImageNet: half of the photographs are 500 x 375 pixels, either way up, the others have
    log-normal areas and aspect ratios (medians 400 x 400 pixels and 1.25). Large ones are cropped in half the draws.
    """
    area = (400 * 400) * np.exp(rng.normal(0, 0.6, count))
    ratio = np.exp(rng.normal(0.2, 0.25, count))
    height, width = np.sqrt(area / ratio), np.sqrt(area * ratio)
    common = rng.random(count) < 0.5
    height, width = np.where(common, 375, height), np.where(common, 500, width)
    upright = rng.random(count) < 0.25
    height, width = np.where(upright, width, height), np.where(upright, height, width)
    crop = (np.minimum(height, width) > 256) & (rng.random(count) < 0.5)
    limited = [area_limited(max(int(h), 32), max(int(w), 32), 256) for h, w in zip(height, width, strict=True)]
    return np.where(crop[:, None], 16, np.array(limited) // MULTIPLE)
