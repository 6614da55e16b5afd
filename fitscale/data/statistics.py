"""What is in a shard set, from its index alone, in pieces of bounded size."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fitscale.config.errors import UserError
from fitscale.data.batch_plan import single_plan
from fitscale.data.index import Index
from fitscale.data.storage import checksum_of
from fitscale.data.waste import Loss, bucketed, cost_function, packed, padded_to_longest

PIECE = 1 << 20  # images looked at together
STEPS = 20  # global batches whose waste is averaged


@dataclass(frozen=True)
class Drawn:
    """The sizes training sees: (N,) heights and widths in patches, and in how many draws of an epoch each occurs."""

    rows: np.ndarray
    cols: np.ndarray
    draws: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        return self.rows * self.cols


def drawn_sizes(index: Index, patch_size: int) -> Drawn:
    """Sizes by how often an epoch draws them: of an image's variants each is drawn equally often."""
    for height, width, _ in index.meta.sizes:
        if height % patch_size or width % patch_size:
            index.refuse_size(height, width, f"both must be multiples of --patch-size {patch_size}")
    codes = {height << 16 | width: place for place, (height, width, _) in enumerate(index.meta.sizes)}
    known, places = np.array(sorted(codes)), np.array([codes[code] for code in sorted(codes)])
    draws = np.zeros(len(codes))
    for images, variants in _pieces(index):
        sizes = variants["height"].astype(np.int64) << 16 | variants["width"]
        weights = np.repeat(1 / images["variants"], images["variants"])
        draws += np.bincount(places[np.searchsorted(known, sizes)], weights=weights, minlength=len(codes))
    rows, cols = (
        np.array(side, dtype=np.int64) // patch_size for side in list(zip(*index.meta.sizes, strict=True))[:2]
    )
    return Drawn(rows, cols, draws)


def label_counts(index: Index) -> np.ndarray:
    """Images of each class, (num_classes,)."""
    counts = np.zeros(index.meta.num_classes, dtype=np.int64)
    for images, _ in _pieces(index):
        counts += np.bincount(images["label"], minlength=len(counts))
    return counts


def wasted(index: Index, patch_size: int, batch: int, dp_size: int, pack_tokens: int) -> dict[str, Loss]:
    """Mean losses of packing, of padding to the longest, and of batches of one shape, over real global batches.

    The cost of n tokens is n + n^2 / 20,000: about FiTv2-XL/2's ratio of linear to attention FLOPs.
    """
    settings = {"patch_size": patch_size, "window_shards": 16, "holdout_fraction": 0.0}
    plan, cost = single_plan(index, seed=0, global_batch_size=batch, **settings), cost_function(1.0, 1 / 20000)
    found: dict[str, list[Loss]] = {"packs": [], "padded to the longest": [], "batches of one shape": []}
    for n in range(STEPS):
        step = plan.step(n)
        tokens, shapes = step.tokens_B, step.rows_B << 16 | step.cols_B
        found["packs"].append(packed(tokens, cost, dp_size, max(pack_tokens, int(tokens.max()))))
        found["padded to the longest"].append(padded_to_longest(tokens, cost, dp_size))
        found["batches of one shape"].append(bucketed(shapes, tokens, cost, dp_size, pack_tokens))
    return {name: Loss(*np.mean([tuple(vars(one).values()) for one in all_], axis=0)) for name, all_ in found.items()}


def verify(index: Index) -> Iterator[str]:
    """Read every shard; yields its name when its checksum is right.

    Raises:
        UserError: at the end, naming every shard whose bytes are not those that were indexed.
    """
    wrong = []
    for number, shard in enumerate(index.meta.shards):
        if checksum_of(index.shard_path(number)) == shard.checksum:
            yield shard.name
        else:
            wrong.append(shard.name)
    if wrong:
        raise UserError(f"{index.storage.location}: wrong checksums in {len(wrong)} shards: {', '.join(wrong)}")


def _pieces(index: Index) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(index.images), PIECE):
        images = index.images[start : start + PIECE]
        first = int(images["first_variant"][0])
        yield images, index.variants[first : first + int(images["variants"].sum(dtype=np.int64))]
        index.release()
