"""The other side of a comparison: real images, as a feature network sees them.

    .npz with mu and sigma (ADM's reference files)  ->  as they are; mu_s and sigma_s (for sFID) and images
                                                        (arr_0, for features) if they are there
    .npz with arr_0 alone, uint8 (N, H, W, 3)       ->  features of every image
    shards                                          ->  features of every variant of every image, decoded
    image folder                                    ->  features of every image in it, sub-folders too

What has to be computed is cut into chunks that all ranks, and all runs of a folder, work out together (run/chunks.py).
It is kept beside the run directories, in `references/`, under a name made of the feature network and the reference.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitscale.config.errors import UserError, writing
from fitscale.config.files import replacing
from fitscale.config.schema_data import DataConfig
from fitscale.data.encoding import require_latent
from fitscale.data.index import OpenIndex
from fitscale.data.pictures import in_batches, rgb
from fitscale.data.storage import Cache
from fitscale.eval.blocks import in_threads
from fitscale.eval.features import BATCH, FeatureNet
from fitscale.eval.figures import SeenReference
from fitscale.eval.frechet import Moments, Statistics, moments_of
from fitscale.eval.images import IMAGES, FolderImages, ImageSource, NpzImages, ShardImages
from fitscale.eval.ranks import carry_out
from fitscale.eval.requests import chunk_ranges
from fitscale.run.chunks import ChunkFolder
from fitscale.run.layout import RunDir

KEPT_FEATURES = 10_000  # images, evenly spaced, whose features are kept; ADM's reference files hold as many images
_HEADER_BYTES = 10_000  # more than the header of an .npy file


@dataclass(frozen=True)
class Reference:
    """What a network sees of real images, and a hash of what they are."""

    seen: SeenReference
    identity: str


def reference_cache(run: RunDir) -> Path:
    """Where what has been computed is kept for all runs beside this one; inside the run if nothing can be put there."""
    beside = run.path.absolute().parent
    return (beside if os.access(beside, os.W_OK) else run.path) / "references"


def load_reference(path: Path, net: FeatureNet, data: DataConfig, cache: Path, open_index: OpenIndex) -> Reference:
    """The reference at `path` as `net` sees it; `data`: how images are stored, and shards cached.

    Raises:
        UserError: nothing usable there, or statistics of another feature network.
    """
    if path.suffix == ".npz":
        return _from_npz(path, net, cache)
    if not path.is_dir():
        raise UserError(f"evaluation.reference: {path}: no such .npz file, shards or image folder")
    source: ImageSource
    if (path / "index.json").is_file():
        index = open_index(str(path), Cache(Path(data.cache_dir), data.cache_gb))
        require_latent(data.latent, index)
        source = ShardImages(index, data.latent)
    else:
        source = FolderImages(path)
    return Reference(_computed(source, net, cache), source.identity)


def _from_npz(path: Path, net: FeatureNet, cache: Path) -> Reference:
    """Statistics of the file, and features of its images: no more is read than they need, and nothing pickled."""
    try:
        with open(path, "rb") as file:
            identity = hashlib.file_digest(file, "sha256").hexdigest()
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).stem for name in archive.namelist()}
            given = _statistics(archive, net, "mu", "sigma") if IMAGES not in names or "mu" in names else None
            has_spatial = net.num_spatial and {"mu_s", "sigma_s"} <= names
            spatial = _statistics(archive, net, "mu_s", "sigma_s") if has_spatial else None
        source = NpzImages(path, identity) if IMAGES in names else None
    except UserError:
        raise
    except Exception as error:  # zip archives and arrays that are damaged, or made to be, raise nearly anything
        raise UserError(f"evaluation.reference: {path}: no .npz with arrays mu and sigma: {error}") from error
    seen = _computed(source, net, cache) if source else None
    if given is None:
        assert seen is not None
        return Reference(seen, identity)
    return Reference(SeenReference(given, spatial, seen.features_NF if seen else None), identity)


def _statistics(archive: zipfile.ZipFile, net: FeatureNet, mu: str, sigma: str) -> Statistics:
    number = net.num_spatial if mu == "mu_s" else net.num_features
    mean_F, cov_FF = _array(archive, mu, number), _array(archive, sigma, number**2)
    if mean_F.shape != (number,) or cov_FF.shape != (number, number):
        raise UserError(
            f"evaluation.reference: {archive.filename} has statistics of {mean_F.shape} and {cov_FF.shape}, "
            f"evaluation.features = {net.path} gives {number} features"
        )
    finite = np.isfinite(mean_F).all() and np.isfinite(cov_FF).all()
    if not finite or (cov_FF.diagonal() < 0).any() or not np.allclose(cov_FF, cov_FF.T):
        raise UserError(
            f"evaluation.reference: {archive.filename}: {mu} or {sigma} is not finite, or no covariance matrix"
        )
    return Statistics(mean_F, cov_FF)


def _array(archive: zipfile.ZipFile, name: str, most: int, kind: type = np.float64) -> np.ndarray:
    """An array of the archive. A zip member gives no more bytes than it says: those of `most` numbers."""
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > 8 * most + _HEADER_BYTES:
        raise ValueError(f"{name} has more than {most} numbers")
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.dtype.kind != "f":
        raise ValueError(f"{name} is of type {array.dtype}")
    return array.astype(kind)


def _computed(source: ImageSource, net: FeatureNet, cache: Path) -> SeenReference:
    """Statistics and features of the source's images, from `cache` or put there, together with whoever else does."""
    kept = cache / f"{net.identity[:16]}_{source.identity[:16]}.npz"
    folder = ChunkFolder(cache / f".{kept.stem}", len(chunk_ranges(source.count)))
    while not kept.is_file():
        folder.open({"step": 0, "what": "reference"})
        fold = partial(_fold, folder, source, net, kept)
        carry_out(folder, partial(_look_at, source, net), fold, source.count, "reference", in_groups=False)
    if folder.exists:  # of a process that was killed when it had folded
        folder.clear()
    with suppress(UserError, ValueError, OSError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(kept) as archive:
        has_spatial = net.num_spatial and "mu_s.npy" in archive.namelist()
        features_NF = _array(archive, "features", KEPT_FEATURES * net.num_features, np.float32)
        if features_NF.shape[1:] == (net.num_features,):
            statistics = _statistics(archive, net, "mu", "sigma")
            spatial = _statistics(archive, net, "mu_s", "sigma_s") if has_spatial else None
            return SeenReference(statistics, spatial, features_NF)
    raise UserError(f"evaluation.reference: {kept} is damaged; move it away, and it is made again")


def _look_at(source: ImageSource, net: FeatureNet, number: int, show: Callable[[int], Any]) -> dict[str, np.ndarray]:
    """What the network says of the images of a chunk; those that cannot be read are left out, and named."""
    images, broken = [], []
    places = chunk_ranges(source.count)[number]
    for place in places:
        try:
            images.append(rgb(source.read(place)))
        except UserError as error:
            broken.append(str(error))
    wanted = ["features", "spatial"] if net.num_spatial else ["features"]

    def look(images_NHW3: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(images_NHW3)).to(net.device).movedim(-1, 1)
        said = net.look(pixels)
        return torch.cat([said[name] for name in wanted], dim=1).cpu().numpy()

    rows = in_batches(look, images, BATCH)
    show(len(places))
    said = np.stack(rows) if rows else np.zeros((0, net.num_features + net.num_spatial), dtype=np.float32)
    parts = np.split(said, [net.num_features], axis=1)
    return dict(zip(wanted, parts, strict=False)) | {"broken": np.array(broken, dtype=str)}


def _fold(folder: ChunkFolder, source: ImageSource, net: FeatureNet, kept: Path) -> None:
    def of_chunk(number: int) -> tuple[int, list[str], Moments, Moments]:
        chunk = folder.read(number)
        features_NF, spatial_NS = chunk["features"], chunk.get("spatial", np.zeros((0, 1)))
        return len(features_NF), chunk["broken"].tolist(), moments_of(features_NF), moments_of(spatial_NS)

    moments, spatial, counts, broken = Moments(), Moments(), [], []
    for count, unreadable, features_part, spatial_part in in_threads(of_chunk, range(folder.count)):
        counts.append(count)
        broken += unreadable
        moments.merge(features_part)
        spatial.merge(spatial_part)
    if broken:
        print(f"{len(broken)} images of the reference cannot be read and are left out:", *broken, sep="\n", flush=True)
    statistics, ends = moments.statistics(), np.cumsum(counts)
    chosen = np.unique(np.linspace(0, ends[-1] - 1, min(KEPT_FEATURES, int(ends[-1]))).round().astype(int))
    parts = [
        folder.read(number, ("features",))["features"][chosen[(chosen >= end - count) & (chosen < end)] - (end - count)]
        for number, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]
    arrays = {"mu": statistics.mean_F, "sigma": statistics.cov_FF, "features": np.concatenate(parts)}
    if net.num_spatial:
        arrays |= {"mu_s": spatial.statistics().mean_F, "sigma_s": spatial.statistics().cov_FF}
    with writing(kept), replacing(kept) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
