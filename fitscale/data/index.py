"""The index of a shard set: every image's size, label and place, without reading the shards.

    index.json     what the data are; the shards with their image counts, sizes and checksums; the sizes that occur
    images.npy     one IMAGE row per image, shard by shard, inside a shard in the order of the key's hash
    variants.npy   one VARIANT row per variant, in the order of the images

The arrays are memory-mapped, so an index of 100 million images opens at once and costs the memory of what is touched.
`index.json` is written last: without it there is no index.
"""

import hashlib
import json
import mmap
import tarfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NoReturn

import numpy as np

from fitscale.config.errors import UserError
from fitscale.config.files import write_atomic
from fitscale.data.scan import IMAGE, VARIANT, key_hash, member_at, scan_shard
from fitscale.data.shards import ShardSetMeta, read_meta
from fitscale.data.storage import Cache, Storage, checksum_of

VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar: its images are rows first_image .. first_image + images - 1; `checksum` is BLAKE2b-128 of the file."""

    name: str
    images: int
    bytes: int
    checksum: str
    first_image: int


@dataclass(frozen=True)
class IndexMeta(ShardSetMeta):
    """What `index.json` holds: `ShardSetMeta` and the shards."""

    version: int = VERSION
    shards: tuple[Shard, ...] = ()
    sizes: tuple[tuple[int, int, int], ...] = ()  # (height, width, number of variants that have it), ascending

    @property
    def num_images(self) -> int:
        return sum(shard.images for shard in self.shards)

    @property
    def num_variants(self) -> int:
        return sum(count for _, _, count in self.sizes)


class Index:
    """An open index. `images` and `variants` are memory-mapped structured arrays (dtypes IMAGE and VARIANT)."""

    def __init__(
        self, folder: Path, meta: IndexMeta, images: np.memmap, variants: np.memmap, storage: Storage | None = None
    ) -> None:
        self.folder, self.meta, self.images, self.variants = folder, meta, images, variants
        self.storage = storage or Storage(str(folder))

    def __reduce__(self) -> Any:
        return open_index, (self.storage.location, self.storage.cache)  # a worker process maps the files itself

    @cached_property
    def first_images(self) -> np.ndarray:
        """Row of each shard's first image, then the number of images: (shards + 1,) int64."""
        return np.array([*(shard.first_image for shard in self.meta.shards), self.meta.num_images], dtype=np.int64)

    def held_out(self, fraction: float) -> np.ndarray:
        """How many images of each shard are held out; they are the shard's first rows. (shards,) int64."""
        first = self.first_images
        if fraction == 0:
            return np.zeros(len(first) - 1, dtype=np.int64)
        hashes, limit = self.images["key_hash"], _hash_limit(fraction)
        ends = [bisect_left(hashes, limit, start, end) for start, end in pairwise(first)]
        return np.array(ends, dtype=np.int64) - first[:-1]

    def shard_path(self, shard: int) -> Path:
        """Local path of shard number `shard`, fetched if no copy has the right size; raises as `Storage.local`."""
        one = self.meta.shards[shard]
        return self.storage.local(one.name, one.bytes, one.checksum)

    def key(self, image: int) -> str:
        """The key of an image for a person, looked up in its shard; its row where the shard cannot tell it any more."""
        row = self.images[image]
        try:
            path, offset = self.shard_path(int(row["shard"])), int(self.variants[row["first_variant"]]["offset"])
            return member_at(path, offset).rsplit(".", 2)[0]
        except (UserError, OSError, tarfile.TarError, ValueError):  # damaged headers, or no shard at all
            return f"row {image} of the index"

    def describe(self, image: int) -> str:
        """An image for a person: its key and shard."""
        return f"image {self.key(image)!r} in {self.storage.name_of(self._shard_name(self.images[image]))}"

    def _shard_name(self, row: np.void) -> str:
        return self.meta.shards[row["shard"]].name

    def refuse_size(self, height: int, width: int, reason: str) -> NoReturn:
        """Raise UserError with `reason` and the first image that has this size, in latent pixels."""
        match = (self.variants["height"] == height) & (self.variants["width"] == width)
        image = int(np.searchsorted(self.images["first_variant"], np.argmax(match), side="right")) - 1
        raise UserError(f"{self.describe(image)} is {height} x {width} latent pixels: {reason}")

    def read_ahead(self, start: int, end: int) -> None:
        """Read the rows of images start .. end - 1 and of their variants in one go.

        Rows that are mapped and touched at random come from the disk page by page; after this they are in memory.
        """
        if start == end:
            return
        _read_rows(self.images, start, end)
        first, last = self.images[start], self.images[end - 1]
        _read_rows(self.variants, int(first["first_variant"]), int(last["first_variant"]) + int(last["variants"]))

    def release(self) -> None:
        """Give back the memory of rows touched so far; they are mapped again when next used."""
        for rows in (self.images, self.variants):
            rows._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the image `key` is in the held-out share `fraction`: the same in every shard set that has it."""
    return key_hash(key) < _hash_limit(fraction)


def open_index(location: str | Path, cache: Cache | None = None) -> Index:
    """Open the index of the shard set at `location`, a folder or an fsspec URL, without reading the shards.

    Raises:
        UserError: no index, one of another version, or one that does not go with the shards that are there.
    """
    storage = Storage(str(location), cache or Cache())
    if not storage.remote:
        meta = _read_index(storage.folder / "index.json")
        for shard in meta.shards:
            _check_shard(storage.folder / shard.name, shard)
        return _map(storage.folder, meta)
    try:
        meta = _read_index(storage.fetch("index.json"))  # the remote one may be newer than the copy
        contents = hashlib.blake2b("".join(shard.checksum for shard in meta.shards).encode(), digest_size=8)
        storage = replace(storage, version=contents.hexdigest())
        return _map_copies(storage, meta)
    except FileNotFoundError as error:
        raise UserError(f"{storage.location}: holds no index (index.json, images.npy, variants.npy)") from error


def _map_copies(storage: Storage, meta: IndexMeta) -> Index:
    """Map the cached rows; copies that are damaged are fetched again."""
    names = ("images.npy", "variants.npy")
    for name in names:
        storage.local(name)
    try:
        return _map(storage.folder, meta, storage)
    except UserError:
        for name in names:
            storage.fetch(name)
        return _map(storage.folder, meta, storage)


@dataclass(frozen=True)
class Scanned:
    """What the index keeps of one shard; `images` and `variants` as `scan_shard` gives them."""

    name: str
    bytes: int
    checksum: str
    images: np.ndarray
    variants: np.ndarray


def scan(path: Path, meta: ShardSetMeta) -> Scanned:
    """Read a shard from end to end and check it.

    Raises:
        UserError: it is truncated or corrupt, or a sample does not fit `meta`.
    """
    images, variants = scan_shard(path, meta)
    return Scanned(path.name, path.stat().st_size, checksum_of(path), images, variants)


def build_index(folder: str | Path, scanned: Iterable[Scanned] | None = None) -> Index:
    """Write the index of `folder`: of its shards (`*.tar`), each read once and checked, or of those `scanned` already.

    Raises:
        UserError: no shards; a shard is truncated or corrupt, or a sample does not fit `dataset.json`; a key twice.
    """
    folder = Path(folder)
    meta, paths = read_meta(folder), sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: holds no shards (*.tar)")
    with TemporaryDirectory(prefix=".index.", dir=folder) as scratch:
        with open(Path(scratch, "images"), "wb") as image_rows, open(Path(scratch, "variants"), "wb") as variant_rows:
            shards, sizes = _append_rows(
                (scan(path, meta) for path in paths) if scanned is None else scanned, image_rows, variant_rows
            )
        if not sizes:
            raise UserError(f"{folder}: its shards hold no images")
        (folder / "index.json").unlink(missing_ok=True)
        _save(Path(scratch, "images"), folder / "images.npy", IMAGE)
        _save(Path(scratch, "variants"), folder / "variants.npy", VARIANT)
    counted = tuple((height, width, count) for (height, width), count in sorted(sizes.items()))
    whole = IndexMeta(**asdict(meta), shards=tuple(shards), sizes=counted)
    _check_unique(_map(folder, whole))
    write_atomic(folder / "index.json", json.dumps(asdict(whole), indent=1) + "\n")
    return open_index(folder)


def _append_rows(
    scanned: Iterable[Scanned], image_rows: BinaryIO, variant_rows: BinaryIO
) -> tuple[list[Shard], Counter[tuple[int, int]]]:
    """Append the rows of all shards to two files, one shard in memory at a time."""
    shards: list[Shard] = []
    sizes: Counter[tuple[int, int]] = Counter()
    first = 0
    for number, one in enumerate(scanned):
        one.images["shard"] = number
        one.images["first_variant"] += sizes.total()
        image_rows.write(one.images.tobytes())
        variant_rows.write(one.variants.tobytes())
        shards.append(Shard(one.name, len(one.images), one.bytes, one.checksum, first))
        sizes.update(zip(one.variants["height"].tolist(), one.variants["width"].tolist(), strict=True))
        first += len(one.images)
    return shards, sizes


def _hash_limit(fraction: float) -> int:
    return int(fraction * 2.0**64)


def _read_index(path: Path) -> IndexMeta:
    remedy = f"make it with: python tools/make_shards.py index {path.parent}"
    try:
        content = json.loads(path.read_text())
        version = content["version"]
        if version != VERSION:
            raise UserError(f"{path}: version {version} of the index, only {VERSION} can be read; {remedy}")
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        content["sizes"] = tuple((height, width, count) for height, width, count in content["sizes"])
        return IndexMeta(**content)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such index; if the folder holds shards, {remedy}") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not an index ({error}); {remedy}") from error


def _check_shard(path: Path, shard: Shard) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise UserError(f"{path}: the shard is missing, though the index names it")
    if size != shard.bytes:
        raise UserError(f"{path}: the shard has {size} bytes, its index says {shard.bytes}; truncated, or index stale")


def _map(folder: Path, meta: IndexMeta, storage: Storage | None = None) -> Index:
    return Index(
        folder,
        meta,
        _map_rows(folder / "images.npy", IMAGE, meta.num_images),
        _map_rows(folder / "variants.npy", VARIANT, meta.num_variants),
        storage,
    )


def _map_rows(path: Path, dtype: np.dtype, rows: int) -> np.memmap:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: missing or cut short, build the index again: {error}") from error
    if mapped.dtype != dtype or mapped.shape != (rows,):
        raise UserError(f"{path}: does not go with index.json beside it, build the index again")
    return mapped


def _read_rows(rows: np.memmap, start: int, end: int) -> None:
    with open(rows.filename, "rb", buffering=0) as file:  # type: ignore[arg-type]
        file.seek(rows.offset + start * rows.itemsize)
        file.read((end - start) * rows.itemsize)


def _save(raw: Path, path: Path, dtype: np.dtype) -> None:
    """Turn the rows in the file `raw` into the .npy `path`, through the disk and not through memory."""
    np.save(raw.with_suffix(".npy"), np.memmap(raw, dtype, mode="r"))
    raw.with_suffix(".npy").rename(path)


def _check_unique(index: Index) -> None:
    hashes = np.sort(index.images["key_hash"])
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    if twice.size:
        first, second = np.flatnonzero(index.images["key_hash"] == twice[0])[:2]
        raise UserError(f"{index.describe(int(second))}: has the same key as {index.describe(int(first))}")
