"""The three files of an index, read as what anybody may have written (docs/security.md).

What they say is looked at before it is used: index.json whole, when it is read; the number of the rows when they are
mapped; the rows themselves a window at a time, before anything is drawn from them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np

from fitscale.config.errors import UserError, mistakes_in
from fitscale.config.files import parse_json
from fitscale.data.shards import DTYPES, KINDS, ShardSetMeta, whole
from fitscale.data.storage import File

VERSION = 1
MOST_BYTES = 2**26  # of index.json: some 300,000 shards
MOST_HEADER = 2**16  # bytes of a .npy header of version 1
MOST_IMAGES = 2**40
IMAGES, VARIANTS = "images.npy", "variants.npy"
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

    def __post_init__(self) -> None:
        name = self.name
        if not isinstance(name, str) or not name.isprintable() or not re.fullmatch(r"[^./\\][^/\\]{0,200}\.tar", name):
            raise UserError(f"shards: {name!r:.80} is no plain name of a file, such as shard-000000.tar")
        whole(f"images of {name}", self.images, 0, MOST_IMAGES)
        whole(f"bytes of {name}", self.bytes, 0, 2**62)
        _require_checksum(name, self.checksum)


@dataclass(frozen=True)
class IndexMeta(ShardSetMeta):
    """What `index.json` holds: `ShardSetMeta` and the shards."""

    version: int = VERSION
    shards: tuple[Shard, ...] = ()
    sizes: tuple[tuple[int, int, int], ...] = ()  # (height, width, number of variants that have it), ascending
    draws: tuple[float, ...] = ()  # in how many of an epoch's draws each of the sizes occurs; earlier versions: empty
    checksums: dict[str, str] = field(default_factory=dict)  # of images.npy and variants.npy; earlier versions: empty

    def __post_init__(self) -> None:
        super().__post_init__()
        first = 0
        for shard in self.shards:
            if shard.first_image != first:
                raise UserError(f"first_image of {shard.name}: is not {first}, the number of images before it")
            first += shard.images
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise UserError("shards: one is named twice")
        whole("the shards' images", first, 1, MOST_IMAGES)
        for height, width, count in self.sizes:
            whole("sizes, height", height, 1, 2**16 - 1)
            whole("sizes, width", width, 1, 2**16 - 1)
            whole("sizes, variants", count, 1, 2**16 * MOST_IMAGES)
        if not self.sizes or sorted({size[:2] for size in self.sizes}) != [size[:2] for size in self.sizes]:
            raise UserError("sizes: must be ascending, each once")
        numbers = all(type(draws) in (int, float) and 0 < draws < inf for draws in self.draws)
        if len(self.draws) not in (0, len(self.sizes)) or not numbers:
            raise UserError("draws: must be a number above 0 for each of the sizes")
        if self.checksums and self.checksums.keys() != {IMAGES, VARIANTS}:
            raise UserError(f"checksums: must be those of {IMAGES} and {VARIANTS}")
        for name, checksum in self.checksums.items():
            _require_checksum(name, checksum)

    @property
    def num_images(self) -> int:
        return sum(shard.images for shard in self.shards)

    @property
    def num_variants(self) -> int:
        return sum(count for _, _, count in self.sizes)

    def file(self, name: str, dtype: np.dtype, rows: int) -> File:
        """The file of `rows` rows beside index.json."""
        return File(name, rows * dtype.itemsize + MOST_HEADER, checksum=self.checksums.get(name, ""))


def parse_index(data: bytes, name: str, remedy: str) -> IndexMeta:
    """The content of an index.json; UserError, which ends with `remedy`, if it is none, or one of another version."""
    try:
        if len(data) > MOST_BYTES:
            raise UserError(f"{name}: more than {MOST_BYTES:,} bytes")
        content = parse_json(data, f"{name}: not an index")
        with mistakes_in(name):
            if (version := content.get("version")) != VERSION:
                raise UserError(f"version {version!r:.80} of the index, only {VERSION} can be read")
            content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
            content["sizes"] = tuple((height, width, count) for height, width, count in content["sizes"])
            content["draws"] = tuple(content.get("draws", ()))
            return IndexMeta(**content)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name}: not an index ({error}); {remedy}") from error


def map_rows(path: Path, dtype: np.dtype, rows: int) -> np.memmap:
    """The rows of a .npy file, memory-mapped. Its header is compared with the one that it must have, never parsed.

    Raises:
        UserError: it is not there, or does not hold `rows` rows of `dtype`.
    """
    again = "build the index again: python tools/make_shards.py index"
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    expected = "".join(["{", *(f"'{key}': {value!r}, " for key, value in about.items()), "}"])
    try:
        with open(path, "rb") as file:
            start = file.read(10)
            length = int.from_bytes(start[8:], "little")
            header = file.read(length)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {again}") from error
    if start[:8] != b"\x93NUMPY\x01\x00" or header.decode("latin1").strip() != expected:
        raise UserError(f"{path}: does not go with index.json beside it; {again}")
    if size != (needed := 10 + length + rows * dtype.itemsize):
        raise UserError(f"{path}: has {size} bytes, its {rows} rows need {needed}; {again}")
    return np.memmap(path, dtype, "r", offset=10 + length, shape=(rows,))


def wrong_images(meta: IndexMeta, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which of consecutive IMAGE rows, of images in the shards numbered `shards`, cannot be; (rows,) bool."""
    first, counts = rows["first_variant"], rows["variants"].astype(np.uint64)
    ends = np.append(first[1:], first[-1] + counts[-1])
    return (  # type: ignore[no-any-return]
        (rows["shard"] != shards)
        | (rows["label"] < 0)
        | (rows["label"] >= meta.num_classes)
        | (counts == 0)
        | (first > meta.num_variants)
        | (ends > meta.num_variants)
        | (ends != first + counts)
    )


def wrong_variants(meta: IndexMeta, shard_bytes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which VARIANT rows, of images in shards of so many bytes, cannot be; (rows,) bool."""
    heights, widths, _ = np.array(meta.sizes, dtype=np.int64).T
    codes, found = heights << 16 | widths, rows["height"].astype(np.int64) << 16 | rows["width"]
    place = np.minimum(np.searchsorted(codes, found), len(codes) - 1)
    itemsizes = np.array([np.dtype(name).itemsize if name in meta.dtypes else 0 for name in DTYPES])
    dtypes = np.minimum(rows["dtype"], len(DTYPES) - 1)
    numbers = rows["height"].astype(np.int64) * rows["width"] * meta.stored_channels
    return (  # type: ignore[no-any-return]
        (codes[place] != found)
        | (rows["dtype"] != dtypes)
        | (rows["kind"] >= len(KINDS))
        | (numbers * itemsizes[dtypes] != rows["length"])
        | (rows["offset"] > shard_bytes)
        | (rows["offset"] + rows["length"] > shard_bytes)
    )


def size_counts(images: np.ndarray, variants: np.ndarray) -> Iterator[tuple[tuple[int, int], int, float]]:
    """Each (height, width) of `variants`, all those of `images`: how many have it, and in how many draws it occurs."""
    codes = variants["height"].astype(np.int64) << 16 | variants["width"]
    found, places, counts = np.unique(codes, return_inverse=True, return_counts=True)
    draws = np.bincount(places, np.repeat(1 / images["variants"], images["variants"]), len(found))
    for code, count, draw in zip(found.tolist(), counts.tolist(), draws.tolist(), strict=True):
        yield divmod(code, 1 << 16), count, draw


def _require_checksum(name: str, checksum: object) -> None:
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{32}", checksum):
        raise UserError(f"checksum of {name}: {checksum!r:.80} is not 32 hexadecimal digits")
