"""The index of a shard set: every image's size, label and place, without reading the shards.

    index.json     what the data are; the shards with their image counts, sizes and checksums; the sizes that occur
    images.npy     one IMAGE row per image, shard by shard, inside a shard in the order of the key's hash
    variants.npy   one VARIANT row per variant, in the order of the images

The arrays are memory-mapped, so an index of 100 million images opens at once and costs the memory of what is touched.
`index.json` is written last: without it there is no index. With the rows a `ShardReader` reads single arrays out of the
shards.
"""

import hashlib
import math
import mmap
import os
import zlib
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fitscale.config.errors import PassingError, UserError
from fitscale.data import index_file
from fitscale.data.index_file import IMAGE, IMAGES, MOST_BYTES, VARIANT, VARIANTS, IndexMeta
from fitscale.data.shards import DTYPES, shard_path
from fitscale.data.storage import Cache, File, Storage
from fitscale.data.tars import tar_members

OPEN_SHARDS = 64  # files a reader keeps open
PIECE = 1 << 20  # images looked at together


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

    def shard_of(self, image: int) -> int:
        """The number of an image's shard."""
        return int(np.searchsorted(self.first_images, image, side="right")) - 1

    def shard_path(self, shard: int) -> Path:
        """Local path of shard number `shard`, fetched if no copy has the right size; raises as `Storage.local`."""
        one = self.meta.shards[shard]
        copy = shard_path(Path(), shard).name  # a name of ours
        return self.storage.local(File(one.name, one.bytes, True, one.checksum, copy, damaged=True))

    def check_rows(self, start: int, end: int) -> None:
        """Raises UserError if the rows of images start .. end - 1, or of their variants, cannot be; names the first."""
        if start == end:
            return
        images, numbers = self.images[start:end], np.arange(start, end)
        shards = np.searchsorted(self.first_images, numbers, side="right") - 1
        wrong = index_file.wrong_images(self.meta, shards, images)
        self._refuse_rows(IMAGES, images, wrong, start)
        first = int(images["first_variant"][0])
        variants = self.variants[first : int(images["first_variant"][-1]) + int(images["variants"][-1])]
        sizes = np.array([one.bytes for one in self.meta.shards[shards[0] : shards[-1] + 1]], np.uint64)
        shard_bytes = np.repeat(sizes[shards - shards[0]], images["variants"])
        wrong = index_file.wrong_variants(self.meta, shard_bytes, variants)
        self._refuse_rows(VARIANTS, variants, wrong, first)

    def _refuse_rows(self, name: str, rows: np.ndarray, wrong: np.ndarray, start: int) -> None:
        if wrong.any():
            place = int(np.argmax(wrong))
            values = ", ".join(f"{key} {rows[place][key]}" for key in rows.dtype.names or ())
            raise UserError(
                f"{self.storage.name_of(name)}: row {start + place} cannot be ({values}); build the index again"
            )

    def key(self, image: int) -> str:
        """The key of an image for a person, looked up in its shard; its row where the shard cannot tell it any more."""
        row = self.images[image]
        try:
            path, offset = self.shard_path(self.shard_of(image)), int(self.variants[row["first_variant"]]["offset"])
            found = (one for one in tar_members(path) if one.offset_data <= offset < one.offset_data + one.size)
            return next(found).name.rsplit(".", 2)[0]
        except (OSError, StopIteration, ValueError, LookupError, OverflowError):  # damaged headers, or no shard at all
            return f"row {image} of the index"

    def describe(self, image: int) -> str:
        """An image for a person: its key and shard."""
        shard = self.meta.shards[self.shard_of(image)].name
        return f"image {self.key(image)!r} in {self.storage.name_of(shard)}"

    def refuse_size(self, height: int, width: int, reason: str) -> NoReturn:
        """Raise UserError with `reason` and the first image that has this size, in latent pixels."""
        match = (self.variants["height"] == height) & (self.variants["width"] == width)
        image = int(np.searchsorted(self.images["first_variant"], np.argmax(match), side="right")) - 1
        raise UserError(f"{self.describe(image)} is {height} x {width} latent pixels: {reason}")

    def read_ahead(self, start: int, end: int) -> None:
        """Read the rows of images start .. end - 1 and of their variants in one go, and check them.

        Rows that are mapped and touched at random come from the disk page by page; after this they are in memory.
        """
        if start == end:
            return
        _read_rows(self.images, start, end)
        first, last = (min(int(self.images[row]["first_variant"]), len(self.variants)) for row in (start, end - 1))
        _read_rows(self.variants, first, max(first, last))
        self.check_rows(start, end)

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows, checked: `PIECE` images at a time, and their variants."""
        for start in range(0, len(self.images), PIECE):
            self.check_rows(start, min(start + PIECE, len(self.images)))
            images = self.images[start : start + PIECE]
            first = int(images["first_variant"][0])
            yield images, self.variants[first : first + int(images["variants"].sum(dtype=np.int64))]
            self.release()

    @cached_property
    def draws(self) -> np.ndarray:
        """In how many of an epoch's draws each of the sizes occurs: of an image's variants each is drawn equally often.

        An index of an earlier version does not say so; then all rows are read.
        """
        if self.meta.draws:
            return np.array(self.meta.draws)
        draws = Counter[tuple[int, int]]()
        for images, variants in self.pieces():
            draws.update({size: draw for size, _, draw in index_file.size_counts(images, variants)})  # type: ignore[misc]
        return np.array([draws[height, width] for height, width, _ in self.meta.sizes], dtype=np.float64)

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
        UserError: no index, one of another version or that cannot be, or one that does not go with the shards there.
    """
    storage = Storage(str(location), cache or Cache())
    if storage.remote:
        return _open_remote(storage)
    path = storage.folder / "index.json"
    remedy = f"make it with: python tools/make_shards.py index {path.parent}"
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: no such index ({error.strerror}); if the folder holds shards, {remedy}") from None
    meta = index_file.parse_index(data, str(path), remedy)
    for shard in meta.shards:
        path = storage.folder / shard.name
        if not path.is_file():
            raise UserError(f"{path}: the shard is missing, though the index names it")
        if (size := path.stat().st_size) != shard.bytes:
            raise UserError(
                f"{path}: the shard has {size} bytes, its index says {shard.bytes}; truncated, or index stale"
            )
    return map_index(storage, meta, storage.local)


OpenIndex = Callable[[str, Cache], Index]  # functools.cache(open_index) where one command reads a shard set twice


def _open_remote(storage: Storage) -> Index:
    """Map the cached rows; copies that are damaged are fetched again."""
    try:
        path = storage.fetch(File("index.json", MOST_BYTES))  # the remote one may be newer than the copy
        meta = index_file.parse_index(
            path.read_bytes(), storage.name_of("index.json"), "make it again where the shards are"
        )
        checksums = "".join([*(shard.checksum for shard in meta.shards), *meta.checksums.values()])
        storage = replace(storage, version=hashlib.blake2b(checksums.encode(), digest_size=8).hexdigest())
        try:
            return map_index(storage, meta, storage.local)
        except PassingError:
            raise
        except UserError:
            return map_index(storage, meta, storage.fetch)
    except FileNotFoundError as error:
        raise UserError(f"{storage.location}: holds no index (index.json, images.npy, variants.npy)") from error


def _hash_limit(fraction: float) -> int:
    return int(fraction * 2.0**64)


def map_index(storage: Storage, meta: IndexMeta, get: Callable[[File], Path]) -> Index:
    """The index `meta` with its rows mapped from the files that `get` gets; UserError if they do not go with it."""
    images = index_file.map_rows(get(meta.file(IMAGES, IMAGE, meta.num_images)), IMAGE, meta.num_images)
    variants = index_file.map_rows(get(meta.file(VARIANTS, VARIANT, meta.num_variants)), VARIANT, meta.num_variants)
    return Index(storage, meta, images, variants)


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
        index, row, shard = self.index, self.index.variants[variant], self.index.shard_of(image)
        offset, length, crc32, height, width, code = (int(row[name]) for name in VARIANT.names[:6])  # type: ignore[index]
        shape, dtype = (index.meta.stored_channels, height, width), np.dtype(DTYPES[min(code, len(DTYPES) - 1)])
        if offset + length > index.meta.shards[shard].bytes or math.prod(shape) * dtype.itemsize != length:
            raise CorruptSample(f"{index.storage.name_of(VARIANTS)}: row {variant} does not go with its shard")
        data = os.pread(self._file(shard), length, offset)
        if zlib.crc32(data) != crc32:
            what = f"{len(data)} of {length} bytes" if len(data) < length else "checksum differs"
            raise CorruptSample(f"{index.describe(image)} is truncated or corrupt: {what}")
        return np.frombuffer(data, dtype).reshape(shape)

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
