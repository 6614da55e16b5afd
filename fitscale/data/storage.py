"""Where the files of a shard set are: a local folder, or any fsspec URL behind a bounded local cache.

A remote file is fetched whole, once per machine, when first asked for: the plan reads a window of shards nearly to the
end before it goes on, so a shard in the cache serves many reads, and the store sees long sequential ones. A fetch that
fails is tried again, waiting twice as long each time. The cache is shared by the processes of a machine, of which one
fetches a file while the others that need it wait; the files unused for longest go when it exceeds its bound (one that
is open stays readable until it is closed).

The store is not trusted (docs/security.md). A copy has a name of ours; it is `unverified-<name>` unless it has the
checksum that the index says; and no more is read than the index says there is.
"""

import contextlib
import fcntl
import hashlib
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fitscale.config.errors import PassingError, UserError
from fitscale.config.files import replacing

ATTEMPTS = 5
FIRST_WAIT_S = 0.5
LOCKS = 1024  # lock files in a cache; paths that share one are fetched one after the other
Result = TypeVar("Result")


@dataclass(frozen=True)
class Cache:
    """Local copies of remote files: the folder, and how many GB (1e9 bytes) of shards it may hold."""

    folder: Path = Path("~/.cache/fitscale")
    size_gb: float = 100.0


@dataclass(frozen=True)
class File:
    """A file of a shard set, and what is known of it before it is read."""

    name: str
    most: int  # bytes
    exact: bool = False  # it has exactly `most` bytes
    checksum: str = ""  # BLAKE2b-128, in hexadecimal; "" where none is known
    copy: str = ""  # its name in the cache, where that is another
    damaged: bool = False  # bytes without the checksum serve: each image has a checksum of its own


@dataclass(frozen=True)
class Storage:
    """The files of one shard set, by name."""

    location: str  # a folder or an fsspec URL
    cache: Cache = Cache()
    version: str = ""  # of the contents; each has a cache folder of its own, so that an old copy is never taken for new

    @property
    def remote(self) -> bool:
        return "://" in self.location

    @property
    def folder(self) -> Path:
        """The folder where local files are, or come to be."""
        if not self.remote:
            return Path(self.location)
        digest = hashlib.blake2b(self.location.rstrip("/").encode(), digest_size=8).hexdigest()
        return self.cache.folder.expanduser() / digest / self.version

    def name_of(self, name: str) -> str:
        """A file's path or URL, for messages."""
        return f"{self.location.rstrip('/')}/{name}" if self.remote else str(self.folder / name)

    def local(self, file: File) -> Path:
        """A local path of the file, fetched if need be: if there is no copy, or one of another size.

        Raises:
            FileNotFoundError: the remote store has no such file.
            UserError: it could not be fetched in `ATTEMPTS` attempts; it is not what the index says.
        """
        if not self.remote:
            return self.folder / file.name
        if held := self._held(file):
            return held
        locks = self.cache.folder.expanduser() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / f"{zlib.crc32(str(self._place(file)).encode()) % LOCKS:04d}", "w") as lock:
            with contextlib.suppress(OSError):  # where the file system knows no locks, go without
                fcntl.flock(lock, fcntl.LOCK_EX)
            return self._held(file) or self.fetch(file)  # another process may have been faster

    def fetch(self, file: File) -> Path:
        """Copy a remote file into the cache, whether or not it is there; as `local` otherwise.

        Bytes that do not have the checksum are fetched once more. Then those of a shard are kept as they are,
        unverified: the store holds them so, and those who read them find out which images are damaged.
        """
        from fitscale.data.remote import fetch_file  # imports fsspec, which local shards do not need

        url, path = self.name_of(file.name), self._place(file)
        unverified, verified = path.with_name(f"unverified-{path.name}"), False
        with replacing(unverified) as temporary:
            for _ in range(2 if file.checksum else 1):
                retried(lambda: fetch_file(self.location, file.name, temporary, file.most, file.exact), url)
                if verified := bool(file.checksum) and checksum_of(temporary) == file.checksum:
                    break
            if file.checksum and not (verified or file.damaged):
                raise UserError(f"{url}: came twice without the checksum that index.json says; the set is damaged")
        path = unverified.replace(path) if verified else unverified
        evict(self.cache.folder.expanduser(), self.cache.size_gb * 1e9, keep=path)
        return path

    def _place(self, file: File) -> Path:
        return self.folder / (file.copy or file.name)

    def _held(self, file: File) -> Path | None:
        """The copy that serves, if there is one; its turn to be evicted comes last again."""
        path = self._place(file)
        unverified = path.with_name(f"unverified-{path.name}")
        for one in [path, unverified] if file.damaged or not file.checksum else [path]:
            with contextlib.suppress(FileNotFoundError):
                os.utime(one)
                if not file.exact or one.stat().st_size == file.most:
                    return one
        return None


def checksum_of(path: Path) -> str:
    """BLAKE2b-128 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def retried(function: Callable[[], Result], what: str) -> Result:
    """What `function` returns; errors are tried again after 0.5, 1, 2 ... seconds.

    Of any type: the clients of the stores raise their own (aiohttp's, botocore's), of which many are no OSErrors.

    Raises:
        FileNotFoundError, UserError: at once; waiting does not help.
        PassingError: all attempts failed.
    """
    attempt = 1
    while True:
        try:
            return function()
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:
            if attempt == ATTEMPTS:
                reason = (isinstance(error, OSError) and str(error)) or f"{type(error).__name__}: {error}"
                raise PassingError(f"{what}: cannot be read after {ATTEMPTS} attempts: {reason}") from error
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
            attempt += 1


def evict(folder: Path, limit: float, keep: Path) -> None:
    """Remove the shards (*.tar) unused for longest until the rest fit `limit` bytes; never `keep`."""
    entries = []
    for path in folder.rglob("[!.]*.tar"):  # a hidden one is being fetched
        try:
            entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        except FileNotFoundError:
            continue  # another process was faster
    held = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if held <= limit:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            held -= size
