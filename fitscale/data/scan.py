"""Reading one shard from end to end, to index it and to find what is wrong with it.

1. The tar's members are grouped by key, as webdataset does: `<key>.json`, `<key>.0.npy`, `<key>.1.npy` ...
2. Each image gives one IMAGE row, each variant one VARIANT row with the place and checksum of its array's data.
3. Images are put in the order of their key's hash, so that a held-out share is a prefix of every shard.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fitscale.config.errors import UserError
from fitscale.data.shards import DTYPES, KINDS, Sample, ShardSetMeta, Variant, check_sample

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
Member = tuple[str, int, bytes]  # name, offset of its data, its data


def key_hash(key: str) -> int:
    """Stable 64-bit hash of an image's key; decides what is held out, whatever shard the image is in."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def scan_shard(path: Path, meta: ShardSetMeta) -> tuple[np.ndarray, np.ndarray]:
    """IMAGE and VARIANT rows of a shard; `shard` is left 0 and `first_variant` counts from the shard's first.

    Raises:
        UserError: the shard is cut short or corrupt, or a sample does not fit `meta`; names shard, number and key.
    """
    found: list[tuple[int, int, list[tuple[Any, ...]]]] = []
    grouped = groupby(_members(path), key=lambda member: _split(member[0])[0])
    for number, (key, members) in enumerate(grouped):
        try:
            label, variants = _read_sample(key, list(members), meta)
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: sample {number} ({key}) is corrupt: {error}") from error
        found.append((key_hash(key), label, variants))
    return _rows(sorted(found, key=lambda image: image[0]))


def member_at(path: Path, offset: int) -> str:
    """Name of the tar member that holds byte `offset`, for error messages."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.offset_data <= offset < member.offset_data + member.size:
                return member.name
    raise UserError(f"{path}: no member at byte {offset}")


def _members(path: Path) -> Iterator[Member]:
    name = "the first sample"
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    name = member.name
                    content = tar.extractfile(member)
                    if content is None:
                        raise UserError(f"{path}: {name} is no plain file")
                    yield member.name, member.offset_data, content.read()
                check_end(file, tar.offset, path, name)
        except tarfile.TarError as error:
            raise UserError(f"{path}: truncated or corrupt at {name}: {error}") from error


def check_end(file: BinaryIO, offset: int, path: Path, name: str) -> None:
    """Raise UserError unless the tar `path`, whose last member is `name`, really ends at `offset`.

    tarfile takes a damaged or overwritten header, and a file cut between two members, for the end of the archive.
    """
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise UserError(f"{path}: truncated or corrupt after {name}: the tar's end is missing")
    while block := file.read(2**20):
        if block.strip(tarfile.NUL):
            raise UserError(f"{path}: truncated or corrupt after {name}: more data follow the tar's end")


def _split(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the file name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _read_sample(key: str, members: list[Member], meta: ShardSetMeta) -> tuple[int, list[tuple[Any, ...]]]:
    files = {_split(name)[1]: (offset, data) for name, offset, data in members}
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


def _rows(found: list[tuple[int, int, list[tuple[Any, ...]]]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([len(variants) for _, _, variants in found], dtype=np.int64)
    images = np.zeros(len(found), IMAGE)
    images["key_hash"] = [image_hash for image_hash, _, _ in found]
    images["label"] = [label for _, label, _ in found]
    images["variants"] = counts
    images["first_variant"] = np.cumsum(counts) - counts
    return images, np.array([row for _, _, variants in found for row in variants], VARIANT)
