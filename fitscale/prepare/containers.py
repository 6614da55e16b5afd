"""Images inside tars and Parquet files, listed from the tars' headers and the Parquet files' other columns."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fitscale.config.errors import UserError
from fitscale.data.shards import split_name, tar_members
from fitscale.prepare.listing import Label, read_listed
from fitscale.prepare.preprocess import Rejected, first_line

MAX_LABEL = 2**31 - 1  # a label is an int32 in the index
Extent = tuple[int, int]  # offset and size of a member's data


def number_of(text: Any, what: str) -> int | Rejected:
    """The label that `text` says, or why it says none."""
    try:
        number = int(text)
    except (TypeError, ValueError):
        return Rejected(f"{what} {str(text)[:40]!r} is no number")
    if number > MAX_LABEL:
        return Rejected(f"{what} {str(number)[:40]} is above {MAX_LABEL}")
    return number if number >= 0 else Rejected(f"{what} {number} is below 0")


@dataclass(frozen=True)
class Tars:
    """webdataset's tars, tars of class folders, or a tar a class. A record is `tar offset size name`."""

    files: list[Path]

    def records(self) -> Iterator[tuple[str, Label]]:
        for number, file in enumerate(self.files):
            unlabelled = Rejected("no label: no .cls or .json beside it, and in no folder")
            of_tar = file.stem if len(self.files) > 1 else unlabelled
            for name, (offset, size), label in _images(file):
                yield f"{number} {offset} {size} {name}", of_tar if label is None else label

    def open(self, record: str) -> tuple[str, str, Callable[[], bytes]]:
        number, offset, size, name = record.split(" ", 3)
        file = self.files[int(number)]
        return _key(name), f"{file.name}/{name}", partial(_read_member, file, int(offset), int(size))


def _read_member(file: Path, offset: int, size: int) -> bytes:
    data = read_listed(lambda: np.fromfile(file, np.uint8, size, offset=offset).tobytes(), str(file))
    if len(data) < size:
        raise UserError(f"{file}: ends after {len(data)} of {size} bytes of a member, and was whole when listed")
    return data


def _images(file: Path) -> Iterator[tuple[str, Extent, Label | None]]:
    """Name, place and, where it has one, label of a tar's images: of all plain files but hidden ones and labels."""
    extents = [
        (member.name, (member.offset_data, member.size))
        for member in tar_members(file)
        if member.isfile() and not Path(member.name).name.startswith(".")
    ]
    side_files = {name: extent for name, extent in extents if name.endswith((".cls", ".json"))}
    with open(file, "rb") as stream:
        for name, extent in extents:
            if name not in side_files:
                yield name, extent, _label(stream, name, side_files)


def _key(name: str) -> str:
    return split_name(name.removeprefix("./"))[0]


def _label(stream: BinaryIO, name: str, side_files: dict[str, Extent]) -> Label | None:
    stem = split_name(name)[0]
    if extent := side_files.get(stem + ".cls"):
        return number_of(_text(stream, extent), "the .cls file's label")
    if extent := side_files.get(stem + ".json"):
        try:
            return number_of(json.loads(_text(stream, extent)).get("label"), "the .json file's label")
        except (ValueError, AttributeError):
            return Rejected("the .json file beside it is damaged")
    folder, slash, _ = _key(name).partition("/")
    return folder if slash else None


def _text(stream: BinaryIO, extent: Extent) -> str:
    stream.seek(extent[0])
    return stream.read(extent[1]).decode(errors="replace")


@dataclass(frozen=True)
class Parquets:
    """Parquet files with columns `image` and `label`. A record is `file group row-of-the-group row-of-the-file`."""

    files: list[Path]

    def records(self) -> Iterator[tuple[str, Label]]:
        import pyarrow

        for number, file in enumerate(self.files):
            try:
                for row_of_file, (group, row, label) in enumerate(_rows(file)):
                    yield f"{number} {group} {row} {row_of_file}", label
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{file}: not a Parquet file, damaged, or out of reach: {first_line(error)}") from error

    def open(self, record: str) -> tuple[str, str, Callable[[], bytes]]:
        number, group, row, row_of_file = map(int, record.split())
        file = self.files[number]
        return f"{file.stem}-{row_of_file:07d}", f"{file.name}:{row_of_file}", partial(_read_row, file, group, row)


def _read_row(file: Path, group: int, row: int) -> bytes:
    images = read_listed(lambda: _images_of(file, group), str(file))
    if isinstance(images, Rejected):
        raise images
    cell = images[row].as_py()
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise Rejected("the row holds no image bytes")
    return data


def _rows(file: Path) -> Iterator[tuple[int, int, Label]]:
    """Row group, row inside it and label of each image."""
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    columns = table.schema_arrow.names
    if "image" not in columns:
        raise UserError(f"{file}: has no column image, only {', '.join(columns)}")
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        labels = table.read_row_group(group, ["label"])["label"].to_pylist() if "label" in columns else [0] * rows
        for row, label in enumerate(labels):
            yield group, row, number_of(label, "the column's label")


@lru_cache(maxsize=2)
def _images_of(file: Path, group: int) -> Any:
    """The column `image` of a row group; if it is damaged, the reason to reject its images. Raises OSError."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file).read_row_group(group, ["image"])["image"]
    except (pyarrow.ArrowException, OSError) as error:
        # an OSError of the file system has a number, pyarrow's own have none; its error of memory is both kinds
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        return Rejected(f"the Parquet row group is damaged: {first_line(error)}")
