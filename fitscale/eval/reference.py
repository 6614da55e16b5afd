"""The other side of a Frechet distance: statistics of real images.

    .npz with mu and sigma (ADM's reference files)  ->  as they are
    shards                                          ->  features of every variant of every image, decoded
    image folder                                    ->  features of every image in it, sub-folders too

What had to be computed is kept in the run directory, under a name made of the feature network and the reference.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fitscale.config.errors import UserError
from fitscale.config.files import replacing
from fitscale.config.schema_data import DataConfig, LatentConfig
from fitscale.data.encode import Decoder, to_float
from fitscale.data.encoding import require_latent
from fitscale.data.index import Index, OpenIndex, ShardReader
from fitscale.data.pictures import batched
from fitscale.data.storage import Cache
from fitscale.eval.features import AT_ONCE, FeatureNet
from fitscale.eval.frechet import Moments, Statistics

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Reference:
    """Statistics, and a hash of what they were made of."""

    statistics: Statistics
    identity: str


def load_reference(path: Path, net: FeatureNet, data: DataConfig, cache: Path, open_index: OpenIndex) -> Reference:
    """The reference at `path` as `net` sees it; `data`: how images are stored, and shards cached.

    Raises:
        UserError: nothing usable there, or statistics of another feature network.
    """
    if path.suffix == ".npz":
        return _from_npz(path, net)
    if not path.is_dir():
        raise UserError(f"evaluation.reference: {path}: no such .npz file, shards or image folder")
    images: Iterator[np.ndarray]
    if (path / "index.json").is_file():
        index = open_index(str(path), Cache(Path(data.cache_dir), data.cache_gb))
        require_latent(data.latent, index)
        identity, number, images = data_identity(index), index.meta.num_variants, _shard_images(index, data.latent)
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"evaluation.reference: {path} holds neither shards with an index nor images")
        identity = _digest([f"{file.relative_to(path)} {file.stat().st_size}" for file in files])
        number, images = len(files), map(_read_image, files)
    kept = cache / "reference" / f"{net.identity[:16]}_{identity[:16]}.npz"
    if not kept.is_file():
        moments = Moments()
        for batch in batched(tqdm(images, total=number, desc="reference", unit="image", mininterval=5), AT_ONCE):
            moments.add(net.features(batch))
        statistics = moments.statistics()
        with replacing(kept) as temporary:
            np.savez(temporary, mu=statistics.mean_F, sigma=statistics.cov_FF)
    return Reference(_from_npz(kept, net).statistics, identity)


def data_identity(*indices: Index) -> str:
    """A hash of the contents of one or more shard sets."""
    return _digest([shard.checksum for index in indices for shard in index.meta.shards])


def _from_npz(path: Path, net: FeatureNet) -> Reference:
    try:
        with np.load(path) as arrays:
            mean_F, cov_FF = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"evaluation.reference: {path}: no .npz with arrays mu and sigma: {error}") from error
    if mean_F.shape != (net.num_features,) or cov_FF.shape != (net.num_features, net.num_features):
        raise UserError(
            f"evaluation.reference: {path} has statistics of {mean_F.shape[0]} features, evaluation.features = "
            f"{net.path} gives {net.num_features}"
        )
    return Reference(Statistics(mean_F, cov_FF), hashlib.sha256(path.read_bytes()).hexdigest())


def _shard_images(index: Index, latent: LatentConfig) -> Iterator[np.ndarray]:
    reader, decoder = ShardReader(index), Decoder(latent)
    for image, row in enumerate(index.images):
        for variant in range(int(row["first_variant"]), int(row["first_variant"]) + int(row["variants"])):
            stored = reader.read(image, variant)
            if stored.dtype == np.uint8:
                yield stored.transpose(1, 2, 0).copy()
            else:
                yield decoder(torch.from_numpy(to_float(stored)[: index.meta.channels]))  # of stored moments, the mean


def _read_image(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"evaluation.reference: {file} cannot be read as an image: {error}") from error


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
