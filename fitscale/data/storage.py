"""Where the files of a shard set are: a local folder, or any fsspec URL behind a bounded local cache.

A remote file is fetched whole, once per machine, when first asked for: the plan reads a window of shards nearly to the
end before it goes on, so a shard in the cache serves many reads, and the store sees long sequential ones. A fetch that
fails is tried again, waiting twice as long each time. A copy is written under a temporary name, checked and synced to
disk before it takes its place; one whose size is not the index's is fetched again. The cache is shared by the processes
of a machine, of which one fetches a file while the others that need it wait; the files unused for longest go when it
exceeds its bound (one that is open stays readable until it is closed).
"""

import contextlib
import fcntl
import hashlib
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    def local(self, name: str, size: int | None = None, checksum: str = "") -> Path:
        """A local path of the file, fetched if need be: if there is no copy, or one that has not `size` bytes.

        Raises:
            FileNotFoundError: the remote store has no such file.
            UserError: it could not be fetched in `ATTEMPTS` attempts.
        """
        path = self.folder / name
        if self.remote and not _is_held(path, size):
            with _lock(self.cache.folder.expanduser(), path):
                if not _is_held(path, size):  # another process may have been faster
                    self.fetch(name, size, checksum)
        return path

    def fetch(self, name: str, size: int | None = None, checksum: str = "") -> Path:
        """Copy a remote file into the cache, whether or not it is there; as `local` otherwise.

        Bytes that do not have `checksum` are fetched once more and then kept: the store holds them so, and those who
        read them find out which images are damaged.
        """
        url, path = self.name_of(name), self.folder / name
        with replacing(path) as temporary:
            for _ in range(2):
                retried(lambda: _copy(url, temporary, size), url)
                if not checksum or checksum_of(temporary) == checksum:
                    break
        evict(self.cache.folder.expanduser(), self.cache.size_gb * 1e9, keep=path)
        return path


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


def _is_held(path: Path, size: int | None) -> bool:
    """Whether a copy of that size, or of any, is there; its turn to be evicted comes last again."""
    try:
        os.utime(path)
        return size is None or path.stat().st_size == size
    except FileNotFoundError:
        return False


def _copy(url: str, path: Path, size: int | None) -> None:
    """Fetch a file; OSError if it has not `size` bytes, UserError if fsspec does not know such a URL."""
    import fsspec

    try:
        store, remote = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}") from error
    store.get_file(remote, str(path))
    if size not in (None, came := path.stat().st_size):
        raise OSError(f"{came} bytes came, the index says {size}")


@contextmanager
def _lock(cache: Path, path: Path) -> Iterator[None]:
    """Hold the machine's lock for fetching `path`; where the file system knows no locks, go without."""
    folder = cache / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{zlib.crc32(str(path).encode()) % LOCKS:04d}", "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
