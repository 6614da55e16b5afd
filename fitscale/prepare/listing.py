"""The images of a source, listed in little memory: 100 million of them take a few gigabytes.

1. A reader gives one record an image, a short string that says where it is, and the image's label.
2. `Source` packs the records into one block of bytes, numbers the classes by name and tells equal keys apart.
3. `Item`s, with their keys, names and functions, are made of the records of one chunk when it is its turn.
"""

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from fitscale.config.errors import UserError
from fitscale.data.index import key_hash
from fitscale.data.storage import retried
from fitscale.prepare.preprocess import Rejected

Result = TypeVar("Result")
Label = str | int | Rejected  # a class's name, its number, or why there is neither
NO_LABEL = -1
_EXACT = ("utf-8", "surrogatepass")  # gives file names back that are not UTF-8


@dataclass(frozen=True)
class Item:
    """One image to be: its key (unique in the source), label, name for people, and a function that reads its bytes.

    `label` is None, and `problem` says why, where it could not be found out.
    """

    key: str
    label: int | None
    name: str
    read: Callable[[], bytes]
    problem: str = ""


class Reader(Protocol):
    """One kind of source; a record says where in it an image is."""

    def records(self) -> Iterator[tuple[str, Label]]:
        """All images, in a stable order."""

    def open(self, record: str) -> tuple[str, str, Callable[[], bytes]]:
        """The image's key, which others may have too; its name for people; and a function that reads its file's bytes,
        and raises Rejected if it never has any, UserError if they cannot be read now."""


class Source:
    """The images that `reader` lists, in its order; `classes` are names by label, where the source has names.

    Raises:
        UserError: some labels are names and others numbers.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._text, self._ends, self._problems = bytearray(), array("Q"), dict[int, str]()
        labels, hashes, ids = array("i"), array("Q"), dict[str, int]()
        numbered = ""  # a record whose label is a number
        for record, label in reader.records():
            if isinstance(label, Rejected):
                self._problems[len(labels)] = str(label)
                labels.append(NO_LABEL)
            elif isinstance(label, str):
                labels.append(ids.setdefault(label, len(ids)))
            else:
                labels.append(label)
                numbered = numbered or record
            hashes.append(key_hash(self._open(record)[0]))
            self._text += record.encode(*_EXACT)
            self._ends.append(len(self._text))
        if ids and numbered:
            name = self._open(numbered)[1]
            raise UserError(f"{name} has a number for its label, others have a class's name ({next(iter(ids))!r})")
        names = sorted(ids)
        self.classes = [_printable(name) for name in names]
        self._labels = np.frombuffer(labels, np.int32)
        if ids:  # numbered as they came until here
            ranks = np.argsort([ids[name] for name in names])
            self._labels = np.append(ranks, NO_LABEL).astype(np.int32)[self._labels]
        self._copies = _copies(np.frombuffer(hashes, np.uint64))
        self.num_classes = max(int(self._labels.max(initial=0)), 0) + 1
        digest = hashlib.blake2b(memoryview(hashes), digest_size=16)
        digest.update(self._labels.data)
        self.fingerprint = digest.hexdigest()  # of all keys and labels

    def __len__(self) -> int:
        return len(self._ends)

    def items(self, start: int, end: int) -> list[Item]:
        """Items `start` .. `end` - 1, or to the last."""
        return [self._item(number) for number in range(start, min(end, len(self)))]

    def _item(self, number: int) -> Item:
        record = self._text[self._ends[number - 1] if number else 0 : self._ends[number]].decode(*_EXACT)
        copies, label = int(self._copies[number]) if self._copies is not None else 0, int(self._labels[number])
        key, name, read = self._open(record)
        key += f"~{copies + 1}" if copies else ""
        return Item(key, None if label == NO_LABEL else label, name, read, self._problems.get(number, ""))

    def _open(self, record: str) -> tuple[str, str, Callable[[], bytes]]:
        key, name, read = self._reader.open(record)
        return re.sub(r"[.\s]", "_", _printable(key)), name, read


def read_listed(function: Callable[[], Result], what: str) -> Result:
    """What `function` reads of `what`, a file or folder that was there when the source was listed.

    Raises:
        UserError: it cannot be read, though tried again, or is gone: no reason to do without it.
    """
    try:
        return retried(function, what)
    except FileNotFoundError as error:
        raise UserError(f"{what}: is gone since it was listed, or its file system is away") from error


def _printable(text: str) -> str:
    """`text` with what is not UTF-8 in it (of a file's name) written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _copies(hashes: np.ndarray) -> np.ndarray | None:
    """Of each item, how many before it have the same key; None if all keys differ."""
    order = np.argsort(hashes, kind="stable")
    _, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    copies = np.empty(len(order), np.int32)
    copies[order] = np.arange(len(order)) - np.repeat(starts, counts)
    return copies if copies.any() else None
