"""Where images come from: folders, tars, Parquet files and lists, all as one `Source` in a stable order.

Listing reads names, tar headers and the Parquet files' other columns; the images' bytes are read one at a time, later.
What is wrong with a single image (no file, no label) is found when it is read and becomes the reason of its rejection.

    folder    a class is a first-level subfolder, numbered by name; without subfolders every label is 0
    tar       webdataset: `<key>.cls` or the "label" of `<key>.json`; else the first folder in the member's name
    Parquet   column `image` (bytes, or a struct with `bytes`) and `label`
    list      lines `path` or `path<TAB>label`, paths relative to the list
"""

import os
from collections.abc import Iterator
from pathlib import Path

from fitscale.config.errors import UserError
from fitscale.data.containers import Parquets, Tars, number_of
from fitscale.data.listing import Label, Reader, Source
from fitscale.data.preprocess import Rejected


def list_source(path: Path) -> Source:
    """All images of a folder (of images, of tars or of Parquet files), of one such file, or of a list (.txt, .tsv).

    Raises:
        UserError: there is nothing there that could hold images.
    """
    source = Source(_reader(path))
    if not len(source):
        raise UserError(f"{path}: the source holds no files")
    return source


def _reader(path: Path) -> Reader:
    if path.is_dir():
        if tars := sorted(path.rglob("*.tar")):
            return Tars(tars)
        if tables := sorted(path.rglob("*.parquet")):
            return Parquets(tables)
        return Folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".tar":
        return Tars([path])
    if path.suffix == ".parquet":
        return Parquets([path])
    if path.suffix in (".txt", ".tsv"):
        return List(path)
    raise UserError(f"{path}: a source is a folder, or a file ending in .tar, .parquet, .txt, .tsv")


class Folder:
    """A folder of images, in class folders or without. A record is a path in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self) -> Iterator[tuple[str, Label]]:
        files = sorted(path for path in self.folder.rglob("*") if not path.is_dir() and not path.name.startswith("."))
        for path in files:
            inside = path.relative_to(self.folder)
            yield str(inside), inside.parts[0] if len(inside.parts) > 1 else 0

    def key(self, record: str) -> str:
        return os.path.splitext(record)[0]

    def name(self, record: str) -> str:
        return record

    def read(self, record: str) -> bytes:
        try:
            return (self.folder / record).read_bytes()
        except OSError as error:
            raise Rejected(f"cannot be read: {error.strerror}") from error


class List(Folder):
    """A file that names one image a line, and its label. A record is a path from the list's folder."""

    def __init__(self, file: Path) -> None:
        super().__init__(file.parent)
        self.file = file

    def records(self) -> Iterator[tuple[str, Label]]:
        with open(self.file, encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    name, _, label = line.rstrip("\n").partition("\t")
                    yield name.removeprefix("./"), number_of(label.strip() or "0", "the list's label")
