"""Images inside tars and Parquet files, listed from the tars' headers and the Parquet files' other columns."""

import json
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from fitscale.config.errors import UserError
from fitscale.data.scan import check_end
from fitscale.prepare.listing import Label, read_listed
from fitscale.prepare.preprocess import Rejected

MAX_LABEL = 2**31 - 1  # a label is an int32 in the index
Place = tuple[int, int]  # offset and size of a member's data


def number_of(text: Any, what: str) -> int | Rejected:
    """The label that `text` says, or why it says none."""
    try:
        number = int(text)
    except (TypeError, ValueError):
        return Rejected(f"{what} {str(text)[:40]!r} is no number")
    if number > MAX_LABEL:
        return Rejected(f"{what} {str(number)[:40]} is above {MAX_LABEL}")
    return number if number >= 0 else Rejected(f"{what} {number} is below 0")


class Tars:
    """webdataset's tars, tars of class folders, or a tar a class. A record is `tar offset size name`."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def records(self) -> Iterator[tuple[str, Label]]:
        for number, file in enumerate(self.files):
            try:
                with open(file, "rb") as stream:
                    for name, (offset, size), label in _members(stream, file):
                        yield f"{number} {offset} {size} {name}", self._of_tar(file) if label is None else label
            except tarfile.TarError as error:
                raise UserError(f"{file}: not a tar, or damaged: {error}") from error

    def _of_tar(self, file: Path) -> Label:
        """The label of a member that has none of its own."""
        return file.stem if len(self.files) > 1 else Rejected("no label: no .cls or .json beside it, and in no folder")

    def key(self, record: str) -> str:
        return _stem(record.split(" ", 3)[3])

    def name(self, record: str) -> str:
        number, _, _, name = record.split(" ", 3)
        return f"{self.files[int(number)].name}/{name}"

    def read(self, record: str) -> bytes:
        number, offset, size, _ = record.split(" ", 3)
        file = self.files[int(number)]
        data = read_listed(lambda: _member(file, (int(offset), int(size))), str(file))
        if len(data) < int(size):
            raise UserError(f"{file}: ends after {len(data)} of {size} bytes of a member, and was whole when listed")
        return data


def _members(stream: BinaryIO, file: Path) -> Iterator[tuple[str, Place, Label | None]]:
    """Name, place and, where it has one, label of a tar's images: of all plain files but hidden ones and labels."""
    places: list[tuple[str, Place]] = []
    last = "the start"
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while member := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
            last = member.name
            if member.isfile() and not Path(member.name).name.startswith("."):
                places.append((member.name, (member.offset_data, member.size)))
        check_end(stream, tar.offset, file, last)
    side_files = {name: place for name, place in places if name.endswith((".cls", ".json"))}
    for name, place in places:
        if name not in side_files:
            yield name, place, _label(stream, name, side_files)


def _stem(name: str) -> str:
    """webdataset's key: up to the first dot of the file's name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    return folder + slash + base.partition(".")[0]


def _label(stream: BinaryIO, name: str, side_files: dict[str, Place]) -> Label | None:
    stem = _stem(name)
    prefix = name[: name.index(stem)] + stem
    if prefix + ".cls" in side_files:
        text = _bytes_at(stream, side_files[prefix + ".cls"]).decode(errors="replace")
        return number_of(text, "the .cls file's label")
    if prefix + ".json" in side_files:
        text = _bytes_at(stream, side_files[prefix + ".json"]).decode(errors="replace")
        try:
            return number_of(json.loads(text).get("label"), "the .json file's label")
        except (ValueError, AttributeError):
            return Rejected("the .json file beside it is damaged")
    folder, slash, _ = stem.partition("/")
    return folder if slash else None


def _member(file: Path, place: Place) -> bytes:
    with open(file, "rb") as stream:
        return _bytes_at(stream, place)


def _bytes_at(stream: BinaryIO, place: Place) -> bytes:
    stream.seek(place[0])
    return stream.read(place[1])


class Parquets:
    """Parquet files with columns `image` and `label`. A record is `file group row-of-the-group row-of-the-file`."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def records(self) -> Iterator[tuple[str, Label]]:
        import pyarrow

        for number, file in enumerate(self.files):
            try:
                for group, row, row_of_file, label in _rows(file):
                    yield f"{number} {group} {row} {row_of_file}", label
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(
                    f"{file}: not a Parquet file, damaged, or out of reach: {_first_line(error)}"
                ) from error

    def key(self, record: str) -> str:
        number, _, _, row = record.split()
        return f"{self.files[int(number)].stem}-{int(row):07d}"

    def name(self, record: str) -> str:
        number, _, _, row = record.split()
        return f"{self.files[int(number)].name}:{row}"

    def read(self, record: str) -> bytes:
        number, group, row, _ = map(int, record.split())
        file = self.files[number]
        images = read_listed(lambda: _images_of(file, group), str(file))
        if isinstance(images, Rejected):
            raise images
        cell = images[row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise Rejected("the row holds no image bytes")
        return data


def _rows(file: Path) -> Iterator[tuple[int, int, int, Label]]:
    """Row group, row inside it, row of the file and label of each image."""
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    if "image" not in table.schema_arrow.names:
        raise UserError(f"{file}: has no column image, only {', '.join(table.schema_arrow.names)}")
    labelled, row_of_file = "label" in table.schema_arrow.names, 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        labels = table.read_row_group(group, ["label"])["label"].to_pylist() if labelled else [0] * rows
        for row, label in enumerate(labels):
            yield group, row, row_of_file, number_of(label, "the column's label")
            row_of_file += 1


@lru_cache(maxsize=2)
def _images_of(file: Path, group: int) -> Any:
    """The column `image` of a row group; if it is damaged, the reason to reject its images. Raises OSError."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file).read_row_group(group, ["image"])["image"]
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system; pyarrow's own have no number
            raise
        return Rejected(f"the Parquet row group is damaged: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
