"""Work cut into numbered chunks, shared by any number of processes through a folder alone: no server, no process group.

    chunks.json             what is worked out, and into how many chunks
    chunk-000012.claim      somebody works on it; its time of change says that he is alive
    chunk-000012.npz        the result, whole or not there

A process claims a chunk that is neither claimed nor finished, works, writes the result, and gives the claim back. One
that has not been renewed for `LEASE_S`, or whose process is gone, counts for nothing: what a killed process began,
another does. A chunk's content depends on its number alone, so that two who do the same one, which a process that was
stopped for long may bring about, write the same.
"""

import fcntl
import json
import os
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fitscale.config.errors import UserError, writing
from fitscale.config.files import read_json, replacing, require_kinds, write_atomic

LEASE_S = 120.0  # how long a claim counts that nobody renews; NFS may show its time up to 60 s late
RENEW_S = LEASE_S / 6
CLEARINGS = 5
POLL_S = 0.5  # between looks at what others have finished
ABOUT, LOCK = "chunks.json", ".lock"


class DamagedChunkError(Exception):
    """A chunk that could not be read and has been set aside, to be made again."""


@dataclass(frozen=True)
class ChunkFolder:
    """`count` chunks in `path`."""

    path: Path
    count: int

    def open(self, about: Mapping[str, Any]) -> None:
        """Make the folder, unless it is there; `about` is for who looks at it from outside."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / ABOUT).exists():
                write_atomic(self.path / ABOUT, json.dumps({**about, "count": self.count}))

    @property
    def exists(self) -> bool:
        return (self.path / ABOUT).exists()

    def file(self, number: int) -> Path:
        return self.path / f"chunk-{number:06d}.npz"

    def unfinished(self) -> list[int]:
        """Numbers of the chunks that have no result, ascending."""
        there = {path.name for path in self.path.glob("chunk-*.npz")}
        return [number for number in range(self.count) if self.file(number).name not in there]

    def work(self, compute: Callable[[int], Mapping[str, np.ndarray]], show: Callable[[int], None]) -> None:
        """Work until every chunk is finished, by this process or others; or until the folder has been cleared away.

        Args:
            compute: the arrays of a chunk, from its number.
            show: is told how many chunks are finished, whenever that is looked at.
        """
        while self.exists and (left := self.unfinished()):
            show(self.count - len(left))
            if not any(self._finish(number, compute) for number in left):
                time.sleep(POLL_S)
        show(self.count)

    def _finish(self, number: int, compute: Callable[[int], Mapping[str, np.ndarray]]) -> bool:
        """Whether the chunk was free, and has been worked out here."""
        with self.claimed(f"chunk-{number:06d}") as mine:
            if not mine or self.file(number).exists():  # finished since the others were looked at
                return mine
            self.write(number, compute(number))
            return True

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Whether `name` is this process's alone while the context lasts; it is not where another has it."""
        claim = self.path / f"{name}.claim"
        if not _take(claim):
            yield False
            return
        over = threading.Event()
        renewal = threading.Thread(target=_renew, args=(claim, over), daemon=True)
        renewal.start()
        try:
            yield True
        finally:
            over.set()
            renewal.join()
            with suppress(OSError):  # the folder may have been cleared away by now
                claim.unlink()

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """The result of a chunk, in one step; nothing where the folder is gone, because its chunks were used by then.

        Raises:
            UserError: it cannot be written, as on a full disk; the other chunks stay.
        """
        if self.exists:
            with writing(self.file(number)), replacing(self.file(number)) as temporary:
                np.savez(temporary, **arrays)  # type: ignore[arg-type]

    def read(self, number: int, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """The arrays of a chunk that are called so, or all; what is read is compared with the archive's checksums.

        Raises:
            DamagedChunkError: it cannot be read; it is kept under another name, and counts as unfinished.
        """
        file = self.file(number)
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files if names is None or name in names}
        except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
            raise self.set_aside(number, str(error)) from error

    def set_aside(self, number: int, why: str) -> DamagedChunkError:
        """Keep the chunk under another name, so that it is made again; the error to raise."""
        file = self.file(number)
        with suppress(OSError):
            file.replace(file.with_suffix(".damaged"))
        return DamagedChunkError(f"{file}: damaged ({why}); kept as {file.stem}.damaged, and made again")

    def clear(self) -> None:
        """Remove the folder with all in it; chunks.json first, so that nobody begins to work there meanwhile."""
        (self.path / ABOUT).unlink(missing_ok=True)
        for _ in range(CLEARINGS):  # who looks at a claim just then may leave a file behind
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                break
            time.sleep(POLL_S / CLEARINGS)


@dataclass(frozen=True)
class ChunkProgress:
    """How far chunked work on the checkpoint of a step has come, seen from outside."""

    step: int
    what: str
    done: int
    count: int


def chunk_progress(folder: Path) -> list[ChunkProgress]:
    """Of all chunked work inside `folder` that is under way, or was left, by step."""
    found = []
    for about in sorted(folder.glob(f"*/{ABOUT}")):
        with suppress(UserError):  # it may be cleared away under our eyes
            row = read_json(about)
            require_kinds(row, about, step=int, what=str, count=int)
            chunks = ChunkFolder(about.parent, row["count"])
            found.append(ChunkProgress(row["step"], row["what"], chunks.count - len(chunks.unfinished()), chunks.count))
    return found


def _take(claim: Path) -> bool:
    """Make the claim; one that counts no longer is put out of the way first."""
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    try:
        if not claim.exists() or not _counts(claim):
            with _alone(claim.parent):
                if claim.exists() and not _counts(claim):  # nobody else has taken it over meanwhile
                    claim.unlink(missing_ok=True)
                with open(claim, "xb") as file:
                    file.write(content)
                return True
    except (FileExistsError, FileNotFoundError):  # somebody was faster, or the folder has been cleared away
        pass
    return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others from taking claims over: of all who see that one is void, the second would remove the first's."""
    with open(folder / LOCK, "ab") as file:
        with suppress(OSError):  # where there are no locks, chunks may be worked out twice, to the same end
            fcntl.lockf(file, fcntl.LOCK_EX)  # POSIX: the kind that network file systems know
        yield


def _counts(claim: Path) -> bool:
    """Whether who made the claim still works on it, as far as can be told."""
    now = claim.with_name(f".now-{socket.gethostname()}-{os.getpid()}")  # by the clock of the claim's own file system
    try:
        now.touch()
        if now.stat().st_mtime - claim.stat().st_mtime > LEASE_S:
            return False
        owner = read_json(claim)
    except FileNotFoundError:
        return False  # given back
    except (OSError, UserError):
        return True  # being written, or out of sight
    finally:
        with suppress(OSError):
            now.unlink()
    return owner.get("host") != socket.gethostname() or _alive(owner.get("pid"))


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, TypeError, OverflowError):
        return True
    return True


def _renew(claim: Path, over: threading.Event) -> None:
    while not over.wait(RENEW_S):
        with suppress(OSError):
            os.utime(claim)
