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
from fitscale.data.scan import key_hash
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

    def key(self, record: str) -> str:
        """The image's key; others may have the same."""

    def name(self, record: str) -> str:
        """The image for people."""

    def read(self, record: str) -> bytes:
        """The image file's bytes. Raises Rejected if it never has any, UserError if they cannot be read now."""


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
            hashes.append(key_hash(self._key(record)))
            self._text += record.encode(*_EXACT)
            self._ends.append(len(self._text))
        if ids and numbered:
            name = reader.name(numbered)
            raise UserError(f"{name} has a number for its label, others have a class's name ({next(iter(ids))!r})")
        self.classes = [_printable(name) for name in sorted(ids)]
        self._labels = _in_order_of_names(np.frombuffer(labels, np.int32), ids)
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
        copies, label = 0 if self._copies is None else int(self._copies[number]), int(self._labels[number])
        key = self._key(record) + (f"~{copies + 1}" if copies else "")
        problem = self._problems.get(number, "")
        name, read = self._reader.name(record), lambda: self._reader.read(record)
        return Item(key, None if label == NO_LABEL else label, name, read, problem)

    def _key(self, record: str) -> str:
        return re.sub(r"[.\s]", "_", _printable(self._reader.key(record)))


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


def _in_order_of_names(labels: np.ndarray, ids: dict[str, int]) -> np.ndarray:
    """Labels by the order of the classes' names, from `ids` by the order in which they came."""
    if not ids:
        return labels
    ranks = np.full(len(ids) + 1, NO_LABEL, np.int32)
    ranks[[ids[name] for name in sorted(ids)]] = np.arange(len(ids))
    return ranks[labels]


def _copies(hashes: np.ndarray) -> np.ndarray | None:
    """Of each item, how many before it have the same key; None if all keys differ."""
    order = np.argsort(hashes, kind="stable")
    first = np.ones(len(order), bool)
    first[1:] = hashes[order[1:]] != hashes[order[:-1]]
    if first.all():
        return None
    places = np.arange(len(order))
    copies = np.empty(len(order), np.int32)
    copies[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return copies
