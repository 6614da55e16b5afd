"""Building the index of a folder of shards: each is read from end to end, and what is wrong with it is found.

1. The tar's members are grouped by key, as webdataset does: `<key>.json`, `<key>.0.npy`, `<key>.1.npy` ...
2. Each image gives one IMAGE row, each variant one VARIANT row with the place and checksum of its array's data.
3. Images are put in the order of their key's hash, so that a held-out share is a prefix of every shard.
4. The rows of all shards are appended to two files, one shard in memory at a time; `index.json` comes last.
"""

import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fitscale.config.errors import UserError
from fitscale.config.files import replacing, write_atomic
from fitscale.data.index import IMAGE, VARIANT, Index, IndexMeta, Shard, key_hash, map_index, open_index
from fitscale.data.shards import DTYPES, KINDS, Sample, ShardSetMeta, Variant, check_sample, read_set, sample_files
from fitscale.data.storage import Storage, checksum_of

VariantRow = tuple[Any, ...]  # as VARIANT


@dataclass(frozen=True)
class Scanned:
    """What the index keeps of one shard: `shard` is 0 in its IMAGE rows, `first_variant` counts from its first."""

    name: str
    bytes: int
    checksum: str
    images: np.ndarray
    variants: np.ndarray


def build_index(folder: str | Path, scanned: Iterable[Scanned] | None = None) -> Index:
    """Write the index of `folder`: of its shards (`*.tar`), each read once and checked, or of those `scanned` already.

    Raises:
        UserError: no shards; a shard is truncated or corrupt, or a sample does not fit `dataset.json`; a key twice.
    """
    folder = Path(folder)
    meta, paths = read_set(folder)
    with (
        replacing(folder / "images.npy") as images_path,
        replacing(folder / "variants.npy") as variants_path,
        open(images_path, "wb") as images,
        open(variants_path, "wb") as variants,
    ):
        shards, sizes = _append_rows(scanned or (scan_shard(path, meta) for path in paths), images, variants)
        if not sizes:
            raise UserError(f"{folder}: its shards hold no images")
        (folder / "index.json").unlink(missing_ok=True)
    counted = tuple((height, width, count) for (height, width), count in sorted(sizes.items()))
    whole = IndexMeta(**asdict(meta), shards=tuple(shards), sizes=counted)
    storage = Storage(str(folder))
    _check_unique(map_index(storage, whole, storage.local))
    write_atomic(folder / "index.json", json.dumps(asdict(whole), indent=1) + "\n")
    return open_index(folder)


def _append_rows(
    scanned: Iterable[Scanned], images: BinaryIO, variants: BinaryIO
) -> tuple[list[Shard], Counter[tuple[int, int]]]:
    """Write the .npy files of both kinds of rows; their headers, of one length for any number of rows, twice."""
    shards: list[Shard] = []
    sizes: Counter[tuple[int, int]] = Counter()
    first = 0
    _write_header(images, IMAGE, 0)
    _write_header(variants, VARIANT, 0)
    for number, one in enumerate(scanned):
        one.images["shard"] = number
        one.images["first_variant"] += sizes.total()
        images.write(one.images.tobytes())
        variants.write(one.variants.tobytes())
        shards.append(Shard(one.name, len(one.images), one.bytes, one.checksum, first))
        sizes.update(zip(one.variants["height"].tolist(), one.variants["width"].tolist(), strict=True))
        first += len(one.images)
    _write_header(images, IMAGE, first)
    _write_header(variants, VARIANT, sizes.total())
    return shards, sizes


def _write_header(file: BinaryIO, dtype: np.dtype, rows: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)


def _check_unique(index: Index) -> None:
    hashes = np.sort(index.images["key_hash"])
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    if twice.size:
        first, second = np.flatnonzero(index.images["key_hash"] == twice[0])[:2]
        raise UserError(f"{index.describe(int(second))}: has the same key as {index.describe(int(first))}")


def scan_shard(path: Path, meta: ShardSetMeta) -> Scanned:
    """Read a shard from end to end and check it.

    Raises:
        UserError: the shard is cut short or corrupt, or a sample does not fit `meta`; names shard, number and key.
    """
    found: list[tuple[int, int, list[VariantRow]]] = []
    for number, (key, files) in enumerate(sample_files(path)):
        try:
            found.append((key_hash(key), *_read_sample(key, files, meta)))
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: sample {number} ({key}) is corrupt: {error}") from error
    found.sort(key=lambda image: image[0])
    images = np.array([(of_key, 0, 0, label, len(rows)) for of_key, label, rows in found], IMAGE)
    images["first_variant"] = np.cumsum(images["variants"], dtype=np.uint64) - images["variants"]
    variants = np.array([row for *_, rows in found for row in rows], VARIANT)
    return Scanned(path.name, path.stat().st_size, checksum_of(path), images, variants)


def _read_sample(key: str, files: dict[str, tuple[int, bytes]], meta: ShardSetMeta) -> tuple[int, list[VariantRow]]:
    described = json.loads(files.pop("json")[1])
    if len(files) != len(described["variants"]):
        raise UserError(f"{len(described['variants'])} variants described, {len(files)} stored")
    variants, rows = [], []
    for number, entry in enumerate(described["variants"]):
        offset, data = files[f"{number}.npy"]
        array, header = _read_npy(data)
        if array.shape[1:] != (entry["height"], entry["width"]):
            raise UserError(f"variant {number} has shape {array.shape}, described as {entry}")
        variants.append(Variant(array, entry["kind"], entry["flip"]))
        rows.append((offset + header, array.nbytes, zlib.crc32(data[header:]), *array.shape[1:]))
    check_sample(Sample(key, described["label"], variants), meta)
    codes = [(DTYPES.index(v.array_CHW.dtype.name), KINDS.index(v.kind), v.flip) for v in variants]
    return described["label"], [row + code for row, code in zip(rows, codes, strict=True)]


def _read_npy(data: bytes) -> tuple[np.ndarray, int]:
    """The array, and the length of the header before its data (in C order, little-endian)."""
    file = io.BytesIO(data)
    array = np.load(file, allow_pickle=False)
    header = len(data) - array.nbytes
    if file.tell() != len(data) or array.tobytes() != data[header:]:
        raise UserError("an array must be stored in C order, little-endian, with nothing after it")
    return array, header
