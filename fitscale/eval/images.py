"""Real images from wherever they lie: a folder, shards, or an array in an .npz; each is read when it is asked for."""

import hashlib
import zipfile
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from PIL import Image

from fitscale.config.errors import UserError
from fitscale.config.schema_data import LatentConfig
from fitscale.data.encode import Decoder, to_float
from fitscale.data.index import Index, ShardReader

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
IMAGES = "arr_0"  # name of the array of images in ADM's files, and in the samples.npz of `fitscale sample`


class ImageSource(Protocol):
    """Images by number."""

    count: int
    identity: str  # hash of what they are

    def read(self, number: int) -> np.ndarray:
        """uint8 (H, W, 1 or 3); raises UserError, with the image's name, for one that cannot be read."""
        ...


class FolderImages:
    """The images in a folder and its sub-folders, in the order of their paths."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not self.files:
            raise UserError(f"evaluation.reference: {folder} holds neither shards with an index nor images")
        self.count = len(self.files)
        self.identity = digest([f"{file.relative_to(folder)} {file.stat().st_size}" for file in self.files])

    def read(self, number: int) -> np.ndarray:
        file = self.files[number]
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise UserError(f"evaluation.reference: {file} cannot be read as an image: {error}") from error


class ShardImages:
    """Every variant of every image of a shard set, decoded; of stored moments, the mean."""

    def __init__(self, index: Index, latent: LatentConfig) -> None:
        self.index, self.latent = index, latent
        self.identity = data_identity(index)
        self.images = np.repeat(np.arange(len(index.images)), index.images["variants"])
        self.count = len(self.images)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.latent)

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(self.index)

    def read(self, number: int) -> np.ndarray:
        image = int(self.images[number])
        nth = number - int(np.searchsorted(self.images, image))
        stored = self._reader.read(image, int(self.index.images[image]["first_variant"]) + nth)
        if stored.dtype == np.uint8:
            return stored.transpose(1, 2, 0)
        return self._decoder(torch.from_numpy(to_float(stored)[: self.index.meta.channels]))


class NpzImages:
    """The array `arr_0`, uint8 (N, H, W, 3), of an .npz file, of which one image is in memory at a time.

    An archive is read from its beginning on, so images are best asked for in their order.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        with self._opened() as file:
            shape, fortran_order, dtype = _header(file)
            self._start = file.tell()
        if len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1 or dtype != np.uint8 or fortran_order:
            raise ValueError(f"{IMAGES} is {dtype} {shape}, not uint8 (N, H, W, 3)")
        self.count, self.shape = shape[0], shape[1:]
        with zipfile.ZipFile(path) as archive:
            there = archive.getinfo(f"{IMAGES}.npy").file_size - self._start
        if there != int(np.prod(shape, dtype=object)):
            raise ValueError(f"{IMAGES} says {shape} and has {there} bytes")
        self._file: IO[bytes] | None = None

    def _opened(self) -> IO[bytes]:  # closes the archive with itself
        return zipfile.ZipFile(self.path).open(f"{IMAGES}.npy")

    def read(self, number: int) -> np.ndarray:
        size = int(np.prod(self.shape))
        place = self._start + number * size
        try:
            if self._file is None or self._file.tell() > place:
                self._file = self._opened()
            self._file.seek(place)
            return np.frombuffer(self._file.read(size), dtype=np.uint8).reshape(self.shape)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"evaluation.reference: {self.path}: image {number} cannot be read: {error}") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def data_identity(*indices: Index) -> str:
    """A hash of the contents of one or more shard sets."""
    return digest([shard.checksum for index in indices for shard in index.meta.shards])


def digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
