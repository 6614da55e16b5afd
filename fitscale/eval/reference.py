"""The other side of a Frechet distance: statistics of real images.

    .npz with mu and sigma (ADM's reference files)  ->  as they are
    shards                                          ->  features of every variant of every image, decoded
    image folder                                    ->  features of every image in it, sub-folders too

What had to be computed is kept in the run directory, under a name made of the feature network and the reference.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
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

_HEADER_BYTES = 10_000  # more than the header of an .npy file
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
    """mu (F,) and sigma (F, F) of the file: no more is read of it than they need, and nothing pickled."""
    number = net.num_features
    try:
        with zipfile.ZipFile(path) as archive:
            mean_F, cov_FF = (_array(archive, name, number ** (1 + (name == "sigma"))) for name in ("mu", "sigma"))
        with open(path, "rb") as file:
            identity = hashlib.file_digest(file, "sha256").hexdigest()
    except Exception as error:  # zip archives and arrays that are damaged, or made to be, raise nearly anything
        raise UserError(f"evaluation.reference: {path}: no .npz with arrays mu and sigma: {error}") from error
    if mean_F.shape != (number,) or cov_FF.shape != (number, number):
        raise UserError(
            f"evaluation.reference: {path} has statistics of {mean_F.shape} and {cov_FF.shape}, evaluation.features = "
            f"{net.path} gives {number} features"
        )
    finite = np.isfinite(mean_F).all() and np.isfinite(cov_FF).all()
    if not finite or (cov_FF.diagonal() < 0).any() or not np.allclose(cov_FF, cov_FF.T):
        raise UserError(f"evaluation.reference: {path}: mu or sigma is not finite, or sigma is no covariance matrix")
    return Reference(Statistics(mean_F, cov_FF), identity)


def _array(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """An array of the archive, float64. A zip member gives no more bytes than it says: those of `most` numbers."""
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > 8 * most + _HEADER_BYTES:
        raise ValueError(f"{name} has more than {most} numbers")
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.dtype.kind != "f":
        raise ValueError(f"{name} is of type {array.dtype}")
    return array.astype(np.float64)


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
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UserError(f"evaluation.reference: {file} cannot be read as an image: {error}") from error


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
