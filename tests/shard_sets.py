"""Small shard sets for the tests of data."""

from pathlib import Path
from typing import Any

import numpy as np

from fitscale.config.schema_data import DataConfig
from fitscale.data.batch_plan import BatchPlan, open_plan
from fitscale.data.build_index import build_index
from fitscale.data.index import Index
from fitscale.data.shards import Sample, ShardSetMeta, Variant, write_shards

PIXELS = ShardSetMeta("pixels", factor=1, scaling=1.0, channels=3, num_classes=7)
LATENTS = ShardSetMeta("vae", factor=8, scaling=0.18215, channels=4, num_classes=7)
DRAWN = [("resize", False), ("resize", True), ("crop", False), ("crop", True)]


def sample(number: int, meta: ShardSetMeta = PIXELS, max_side: int = 6) -> Sample:
    """Image `number`: its sizes (even, from 2 to 2 * max_side) and content are functions of the number."""
    rng = np.random.default_rng(number)
    height, width = 2 * rng.integers(1, max_side + 1, size=2)
    if meta.kind == "pixels":
        image = rng.integers(0, 256, (meta.channels, height, width)).astype(np.uint8)
    else:
        image = rng.standard_normal((meta.channels, height, width)).astype(np.float16)
    crop = image[:, :2, :2]
    arrays = [image, image[..., ::-1], crop, crop[..., ::-1]]
    variants = [Variant(array, kind, flip) for array, (kind, flip) in zip(arrays, DRAWN, strict=True)]
    return Sample(f"image/{number:05d}", number % meta.num_classes, variants)


def write_set(folder: Path, images: int, images_per_shard: int = 10, meta: ShardSetMeta = PIXELS) -> list[Sample]:
    """Write samples 0 .. images - 1 without an index, and return them."""
    samples = [sample(number, meta) for number in range(images)]
    write_shards(folder, samples, meta, images_per_shard)
    return samples


def indexed_set(folder: Path, images: int, images_per_shard: int = 10, meta: ShardSetMeta = PIXELS) -> Index:
    """Write samples 0 .. images - 1 and their index."""
    write_set(folder, images, images_per_shard, meta)
    return build_index(folder)


def plan_of(
    index: Index, seed: int = 0, batch: int = 10, patch_size: int = 2, split: str = "train", **data: Any
) -> BatchPlan:
    """The plan of one shard set; `data` are keys of the config's section."""
    about = {"seed": seed, "global_batch_size": batch, "patch_size": patch_size, "split": split}
    return open_plan(DataConfig(index.storage.location, **data), open_index=lambda *_: index, **about)  # type: ignore[arg-type]
