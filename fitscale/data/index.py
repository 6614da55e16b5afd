"""The index of a shard set: every image's size, label and place, without reading the shards.

    index.json     what the data are; the shards with their image counts, sizes and checksums; the sizes that occur
    images.npy     one IMAGE row per image, shard by shard, inside a shard in the order of the key's hash
    variants.npy   one VARIANT row per variant, in the order of the images

The arrays are memory-mapped, so an index of 100 million images opens at once and costs the memory of what is touched.
`index.json` is written last: without it there is no index. With the rows a `ShardReader` reads single arrays out of the
shards.
"""

import hashlib
import json
import mmap
import os
import zlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fitscale.config.errors import UserError
from fitscale.data.shards import DTYPES, ShardSetMeta, tar_members
from fitscale.data.storage import Cache, Storage

VERSION = 1
OPEN_SHARDS = 64  # files a reader keeps open
IMAGE = np.dtype(
    [("key_hash", "<u8"), ("first_variant", "<u8"), ("shard", "<u4"), ("label", "<i4"), ("variants", "<u2")]
)
VARIANT = np.dtype(
    [
        ("offset", "<u8"),  # of the array's data, from the start of the shard, bytes
        ("length", "<u4"),  # bytes
        ("crc32", "<u4"),  # of the array's data
        ("height", "<u2"),  # latent pixels
        ("width", "<u2"),
        ("dtype", "u1"),  # position in shards.DTYPES
        ("kind", "u1"),  # position in shards.KINDS
        ("flip", "?"),
    ]
)


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


@dataclass(frozen=True, eq=False)
class Index:
    """An open index. `images` and `variants` are memory-mapped structured arrays (dtypes IMAGE and VARIANT)."""

    storage: Storage
    meta: IndexMeta
    images: np.memmap
    variants: np.memmap

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
            found = (one for one in tar_members(path) if one.offset_data <= offset < one.offset_data + one.size)
            return next(found).name.rsplit(".", 2)[0]
        except (UserError, OSError, StopIteration, ValueError):  # damaged headers, or no shard at all
            return f"row {image} of the index"

    def describe(self, image: int) -> str:
        """An image for a person: its key and shard."""
        shard = self.meta.shards[self.images[image]["shard"]].name
        return f"image {self.key(image)!r} in {self.storage.name_of(shard)}"

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


def key_hash(key: str) -> int:
    """Stable 64-bit hash of an image's key; decides what is held out, whatever shard the image is in."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the image `key` is in the held-out share `fraction`: the same in every shard set that has it."""
    return key_hash(key) < _hash_limit(fraction)


def open_index(location: str | Path, cache: Cache | None = None) -> Index:
    """Open the index of the shard set at `location`, a folder or an fsspec URL, without reading the shards.

    Raises:
        UserError: no index, one of another version, or one that does not go with the shards that are there.
    """
    storage = Storage(str(location), cache or Cache())
    if storage.remote:
        return _open_remote(storage)
    meta = _read_index(storage.folder / "index.json")
    for shard in meta.shards:
        path = storage.folder / shard.name
        if not path.is_file():
            raise UserError(f"{path}: the shard is missing, though the index names it")
        if (size := path.stat().st_size) != shard.bytes:
            raise UserError(
                f"{path}: the shard has {size} bytes, its index says {shard.bytes}; truncated, or index stale"
            )
    return map_index(storage, meta, storage.local)


def _open_remote(storage: Storage) -> Index:
    """Map the cached rows; copies that are damaged are fetched again."""
    try:
        meta = _read_index(storage.fetch("index.json"))  # the remote one may be newer than the copy
        contents = hashlib.blake2b("".join(shard.checksum for shard in meta.shards).encode(), digest_size=8)
        storage = replace(storage, version=contents.hexdigest())
        try:
            return map_index(storage, meta, storage.local)
        except UserError:
            return map_index(storage, meta, storage.fetch)
    except FileNotFoundError as error:
        raise UserError(f"{storage.location}: holds no index (index.json, images.npy, variants.npy)") from error


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


def map_index(storage: Storage, meta: IndexMeta, get: Callable[[str], Path]) -> Index:
    """The index `meta` with its rows mapped from the files that `get` gets; UserError if they do not go with it."""
    images, variants = get("images.npy"), get("variants.npy")
    rows = _map_rows(images, IMAGE, meta.num_images), _map_rows(variants, VARIANT, meta.num_variants)
    return Index(storage, meta, *rows)


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


class CorruptSample(UserError):
    """A single image cannot be used; the others of its shard may be fine."""


class ShardReader:
    """Reads variants of `index`'s images. Opens files when first read, so it may be made before workers are forked."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first

    def read(self, image: int, variant: int) -> np.ndarray:
        """The stored (channels, height, width) array of row `variant` of `index.variants`, read-only.

        Raises:
            CorruptSample: the bytes are not those that were indexed; names shard and sample.
            UserError: the shard cannot be read.
        """
        row = self.index.variants[variant]
        data = os.pread(self._file(int(self.index.images[image]["shard"])), int(row["length"]), int(row["offset"]))
        if zlib.crc32(data) != row["crc32"]:
            what = f"{len(data)} of {row['length']} bytes" if len(data) < row["length"] else "checksum differs"
            raise CorruptSample(f"{self.index.describe(image)} is truncated or corrupt: {what}")
        shape = (self.index.meta.stored_channels, int(row["height"]), int(row["width"]))
        return np.frombuffer(data, DTYPES[row["dtype"]]).reshape(shape)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    __del__ = close

    def _file(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[shard] = os.open(self.index.shard_path(shard), os.O_RDONLY)
        except OSError as error:
            path = self.index.storage.name_of(self.index.meta.shards[shard].name)
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        return self._open[shard]
