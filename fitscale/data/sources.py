"""Where images come from: folders, tars, Parquet files and lists, all as one list of `Item`s in a stable order.

Listing reads names, tar headers and the Parquet files' other columns; the images' bytes are read one at a time, later.
What is wrong with a single image (no file, no label) is found when it is read and becomes the reason of its rejection.

    folder    a class is a first-level subfolder, numbered by name; without subfolders every label is 0
    tar       webdataset: `<key>.cls` or the "label" of `<key>.json`; else the first folder in the member's name
    Parquet   column `image` (bytes, or a struct with `bytes`) and `label`
    list      lines `path` or `path<TAB>label`, paths relative to the list
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError
from fitscale.data.preprocess import Rejected

Read = Callable[[], bytes]


@dataclass(frozen=True)
class Item:
    """One image to be: its key (unique in the source), label, name for people, and a function that reads its bytes.

    `label` is None, and `problem` says why, where it could not be found out.
    """

    key: str
    label: int | None
    name: str
    read: Read
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """The images of a source, in an order that depends on nothing but the source."""

    items: list[Item]
    classes: list[str]  # names by label, where the source has names
    num_classes: int


def list_source(path: Path) -> Source:
    """All images of a folder (of images, of tars or of Parquet files), of one such file, or of a list (.txt, .tsv).

    Raises:
        UserError: there is nothing there that could hold images.
    """
    if path.is_dir():
        for suffix, reader in ((".tar", _tars), (".parquet", _parquets)):
            files = sorted(path.rglob(f"*{suffix}"))
            if files:
                return _source(reader(files))
        return _source(_folder(path))
    readers = {".tar": _tars, ".parquet": _parquets, ".txt": _lists, ".tsv": _lists}
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix not in readers:
        raise UserError(f"{path}: a source is a folder, or a file ending in {', '.join(readers)}")
    return _source(readers[path.suffix]([path]))


@dataclass(frozen=True)
class _Found:
    """An item before labels are numbered and keys made unique; `label` is a class name, a number or a complaint."""

    key: str
    label: str | int | Rejected
    name: str
    read: Read


def _source(found: Iterable[_Found]) -> Source:
    listed = list(found)
    if not listed:
        raise UserError("the source holds no files")
    classes = sorted({one.label for one in listed if isinstance(one.label, str)})
    numbers = {name: number for number, name in enumerate(classes)}
    seen: Counter[str] = Counter()
    items = []
    for one in listed:
        key = re.sub(r"[.\s]", "_", one.key)
        seen[key] += 1
        unique = key if seen[key] == 1 else f"{key}~{seen[key]}"
        if isinstance(one.label, Rejected):
            items.append(Item(unique, None, one.name, one.read, str(one.label)))
        else:
            label = numbers[one.label] if isinstance(one.label, str) else one.label
            items.append(Item(unique, label, one.name, one.read))
    highest = max((item.label for item in items if item.label is not None), default=0)
    return Source(items, classes, highest + 1)


def _folder(folder: Path) -> Iterator[_Found]:
    files = sorted(path for path in folder.rglob("*") if not path.is_dir() and not path.name.startswith("."))
    for path in files:
        inside = path.relative_to(folder)
        label = inside.parts[0] if len(inside.parts) > 1 else 0
        yield _Found(str(inside.with_suffix("")), label, str(inside), _file_reader(path))


def _file_reader(path: Path) -> Read:
    def read() -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise Rejected(f"cannot be read: {error.strerror}") from error

    return read


def _lists(files: list[Path]) -> Iterator[_Found]:
    for file in files:
        for line in file.read_text().splitlines():
            if line.strip():
                name, _, label = line.partition("\t")
                number = _number(label.strip() or "0", "the list's label")
                yield _Found(str(Path(name).with_suffix("")), number, name, _file_reader(file.parent / name))


def _number(text: Any, what: str) -> int | Rejected:
    try:
        number = int(text)
    except (TypeError, ValueError):
        return Rejected(f"{what} {str(text)[:40]!r} is no number")
    return number if number >= 0 else Rejected(f"{what} {number} is below 0")


def _tars(files: list[Path]) -> Iterator[_Found]:
    for file in files:
        try:
            yield from _tar(file)
        except tarfile.TarError as error:
            raise UserError(f"{file}: not a tar, or damaged: {error}") from error


def _tar(file: Path) -> Iterator[_Found]:
    with tarfile.open(file, "r:") as tar:
        members = [member for member in tar if member.isfile() and not Path(member.name).name.startswith(".")]
        side_files = {m.name: m for m in members if m.name.endswith((".cls", ".json"))}
        for member in members:
            if member.name in side_files:
                continue
            stem = _stem(member.name)
            reader = _range_reader(file, member.offset_data, member.size)
            yield _Found(stem, _tar_label(file, stem, member.name, side_files), f"{file.name}/{member.name}", reader)


def _stem(name: str) -> str:
    """webdataset's key: up to the first dot of the file's name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    return folder + slash + base.partition(".")[0]


def _tar_label(file: Path, stem: str, name: str, side_files: dict[str, Any]) -> str | int | Rejected:
    prefix = name[: name.index(stem)] + stem
    for suffix in (".cls", ".json"):
        member = side_files.get(prefix + suffix)
        if member is None:
            continue
        text = _range_reader(file, member.offset_data, member.size)().decode(errors="replace")
        if suffix == ".cls":
            return _number(text, "the .cls file's label")
        try:
            return _number(json.loads(text).get("label"), "the .json file's label")
        except (ValueError, AttributeError):
            return Rejected("the .json file beside it is damaged")
    parts = stem.split("/")
    return parts[0] if len(parts) > 1 else 0


def _range_reader(file: Path, offset: int, size: int) -> Read:
    def read() -> bytes:
        with open(file, "rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
        if len(data) < size:
            raise Rejected(f"the tar ends after {len(data)} of {size} bytes")
        return data

    return read


def _parquets(files: list[Path]) -> Iterator[_Found]:
    for file in files:
        yield from _parquet(file)


def _parquet(file: Path) -> Iterator[_Found]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a Parquet file, or damaged: {error}") from error
    if "image" not in table.schema_arrow.names:
        raise UserError(f"{file}: has no column image, only {', '.join(table.schema_arrow.names)}")
    labelled, row_number = "label" in table.schema_arrow.names, 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        labels = table.read_row_group(group, ["label"])["label"].to_pylist() if labelled else [0] * rows
        for row, label in enumerate(labels):
            name = f"{file.stem}-{row_number:07d}"
            yield _Found(
                name, _number(label, "the column's label"), f"{file.name}:{row_number}", _cell(file, group, row)
            )
            row_number += 1


def _cell(file: Path, group: int, row: int) -> Read:
    def read() -> bytes:
        cell = _images_of(file, group)[row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise Rejected("the row holds no image bytes")
        return data

    return read


@lru_cache(maxsize=2)
def _images_of(file: Path, group: int) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(file).read_row_group(group, ["image"])["image"]
