"""Where images come from: folders, tars, Parquet files and lists, all as one `Source` in a stable order.

Listing reads names, tar headers and the Parquet files' other columns; the images' bytes are read one at a time, later.
What is wrong with a single image (no label, no image in the bytes) becomes the reason of its rejection. That it cannot
be read is no such reason: it stops the worker, and the next start tries again. Only a list may name missing files.

    folder    a class is a first-level subfolder, numbered by name; without subfolders every label is 0
    tar       webdataset: `<key>.cls` or the "label" of `<key>.json`; else the first folder in the member's name;
              else, of several tars, the tar's own name
    Parquet   column `image` (bytes, or a struct with `bytes`) and `label`
    list      lines `path` or `path<TAB>label`, paths relative to the list
"""

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fitscale.config.errors import UserError
from fitscale.prepare.containers import Parquets, Tars, number_of
from fitscale.prepare.listing import Label, Reader, Source, read_listed
from fitscale.prepare.preprocess import Rejected

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif", ".ppm")

NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def list_source(path: Path) -> Source:
    """All images of a folder (of images, of tars or of Parquet files), of one such file, or of a list (.txt, .tsv).

    Raises:
        UserError: nothing there could hold images; a folder holds images and tars; something is damaged or unreadable.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        source = _list_folder(path) if path.is_dir() else Source(_reader(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be listed: {error}") from error
    if not len(source):
        raise UserError(f"{path}: the source holds no files")
    return source


def _reader(file: Path) -> Reader:
    if file.suffix == ".tar":
        return Tars([file])
    if file.suffix == ".parquet":
        return Parquets([file])
    if file.suffix in (".txt", ".tsv"):
        return List(file)
    raise UserError(f"{file}: a source is a folder, or a file ending in .tar, .parquet, .txt, .tsv")


def _list_folder(path: Path) -> Source:
    folder = Folder(path)
    source = Source(folder)
    kinds = {"tars": folder.tars, "Parquet files": folder.tables, "images": folder.images}
    found = [f"{kind} ({files[0]})" for kind, files in kinds.items() if files]
    if len(found) > 1:
        raise UserError(f"{path}: holds {' and '.join(found)}; a source holds one of these")
    if folder.tars:
        return Source(Tars([path / file for file in folder.tars]))
    if folder.tables:
        return Source(Parquets([path / file for file in folder.tables]))
    return source


class Folder:
    """A folder of images, in class folders or without. A record is a path in it.

    Listing also finds out what kind of folder it is: `tars` and `tables` are no records, `images` holds one example.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tars, self.tables, self.images = list[str](), list[str](), list[str]()

    def records(self) -> Iterator[tuple[str, Label]]:
        flat: Label = 0
        if any(is_folder for _, is_folder, _ in _entries(str(self.folder))):
            flat = Rejected("no label: it is in no class folder, though there are some")
        for record in _walk(str(self.folder), "", ()):
            suffix = os.path.splitext(record)[1]
            if suffix in (".tar", ".parquet"):
                (self.tars if suffix == ".tar" else self.tables).append(record)
                continue
            if not self.images and suffix.lower() in IMAGES:
                self.images.append(record)
            top, slash, _ = record.partition("/")
            yield record, top if slash else flat

    def open(self, record: str) -> tuple[str, str, Callable[[], bytes]]:
        return os.path.splitext(record)[0], record, partial(self.read, record)

    def read(self, record: str) -> bytes:
        path = self.folder / record
        return read_listed(path.read_bytes, str(path))


def _walk(root: str, inside: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths in `root` of all files but hidden ones, links followed, in the order of their parts."""
    folder = os.path.join(root, inside)
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        raise UserError(f"{folder.rstrip('/')}: a link to a folder that holds it")
    for name, is_folder, is_file in _entries(folder):
        if is_folder:
            yield from _walk(root, f"{inside}{name}/", (*above, (status.st_dev, status.st_ino)))
        elif not name.startswith("."):
            if not is_file:
                raise UserError(f"{folder}{name}: neither a file nor a folder (a link to nothing?)")
            yield inside + name


def _entries(folder: str) -> list[tuple[str, bool, bool]]:
    """Name, whether it is a folder, and whether a file, of all that a folder holds."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, entry.is_dir(), entry.is_file()) for entry in entries)


class List(Folder):
    """A file that names one image a line, and its label. A record is a path from the list's folder."""

    def __init__(self, file: Path) -> None:
        super().__init__(file.parent)
        self.file = file

    def records(self) -> Iterator[tuple[str, Label]]:
        with open(self.file, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                if line.strip():
                    name, _, label = line.rstrip("\n").partition("\t")
                    yield name.removeprefix("./"), number_of(label.strip() or "0", "the list's label")

    def read(self, record: str) -> bytes:
        path = self.folder / record
        data = read_listed(lambda: _bytes_if_any(path), str(path))
        if isinstance(data, Rejected):
            raise data
        return data


def _bytes_if_any(path: Path) -> bytes | Rejected:
    """The bytes of a file that somebody has named, or why there is no such file."""
    try:
        return path.read_bytes()
    except ValueError as error:  # the name holds a zero byte
        return Rejected(f"cannot be read: {error}")
    except OSError as error:
        if error.errno in NO_FILE:
            return Rejected(f"cannot be read: {error.strerror}")
        raise
