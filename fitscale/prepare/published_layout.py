"""Data sets in the layout of the published FiT code, turned into shards.

    from_16_to_<tokens>/<name>.safetensors            images that kept their size
    greater_than_<tokens>_resize/<name>.safetensors   larger images, resized
    greater_than_<tokens>_crop/<name>.safetensors     of those, by the same name, the centre crops

A file holds `feature` (2, rows, cols, numbers of a 2 x 2 patch, order (c p1 p2)): the image, then its mirror image;
`grid`, `size` (rows, cols) and `label`. Features are latents as they are trained on. An image of several folders
becomes one sample whose variants they are.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from einops import rearrange

from fitscale.config.errors import UserError
from fitscale.data.build_index import build_index
from fitscale.data.index import Index
from fitscale.data.shards import Sample, ShardSetMeta, Variant, write_shards

PATCH, CHANNELS, FACTOR = 2, 4, 8
VAE, SCALING = "stabilityai/sd-vae-ft-ema", 0.18215  # that the published features come from


def import_layout(source: Path, out: Path, tokens: int, images_per_shard: int) -> Index:
    """Write shards and index of the published data set in `source` into the new or empty folder `out`.

    Raises:
        UserError: no such folders, or a file in them that is not as published, named.
    """
    folders = [(source / f"from_16_to_{tokens}", "resize"), (source / f"greater_than_{tokens}_resize", "resize")]
    crops = source / f"greater_than_{tokens}_crop"
    files = [(path, kind) for folder, kind in folders for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise UserError(f"{source}: holds no .safetensors files in from_16_to_{tokens} or greater_than_{tokens}_resize")
    about = "FiT (arXiv 2402.12376), published layout"
    recipe = {"preprocessing": about, "source": str(source), "tokens": tokens, "encoder": VAE}
    classes = 1 + max(_label(path) for path, _ in files)
    meta = ShardSetMeta("vae", FACTOR, SCALING, CHANNELS, classes, recipe)
    write_shards(out, _samples(files, crops), meta, images_per_shard)
    return build_index(out)


def _samples(files: list[tuple[Path, str]], crops: Path) -> Iterator[Sample]:
    for path, kind in files:
        variants = _variants(path, kind)
        crop = crops / path.name
        if crop.is_file() and not path.parent.name.startswith("from_"):
            variants += _variants(crop, "crop")
        yield Sample(path.stem.replace(".", "_").replace(" ", "_"), _label(path), variants)


def _label(path: Path) -> int:
    return int(_open(path, "label").reshape(-1)[0])


def _variants(path: Path, kind: str) -> list[Variant]:
    feature, size = _open(path, "feature"), _open(path, "size").reshape(-1).astype(int).tolist()
    if feature.ndim != 4 or feature.shape[0] != 2 or feature.shape[3] != CHANNELS * PATCH**2:
        raise UserError(f"{path}: feature has shape {feature.shape}, not (2, rows, cols, {CHANNELS * PATCH**2})")
    if size != list(feature.shape[1:3]):
        raise UserError(f"{path}: size says {size}, the feature has {feature.shape[1]} x {feature.shape[2]} patches")
    latents = rearrange(feature, "n h w (c p1 p2) -> n c (h p1) (w p2)", p1=PATCH, p2=PATCH)
    return [Variant(np.ascontiguousarray(latent), kind, flip=bool(n)) for n, latent in enumerate(latents)]


def _open(path: Path, name: str) -> np.ndarray:
    """A tensor of the file as float16 or float32 (bfloat16, which numpy lacks, as float32), or as it is if integer."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a file of the published layout, {name}: {error}") from error
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
