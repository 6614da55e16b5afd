"""Reading a tar that anybody may have written: its members, grouped by webdataset's rule for their keys."""

import io
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from fitscale.config.errors import UserError

MOST_MEMBER = 2**30  # bytes of a file in a shard
MOST_HEADER = 2**14  # bytes of what stands before one: long names, attributes
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, LookupError)  # of damaged headers


def sample_files(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """Each sample of a shard: its key, and by extension its files' places in the shard (offset, bytes) and data.

    Raises:
        UserError: as `tar_members`, or a member is no plain file.
    """
    with open(path, "rb") as shard:

        def read(member: tarfile.TarInfo) -> tuple[int, bytes]:
            if not member.isfile() or member.issparse() or not 0 <= member.size <= MOST_MEMBER:
                raise UserError(f"{path}: {member.name} is no plain file of at most {MOST_MEMBER:,} bytes")
            shard.seek(member.offset_data)
            return member.offset_data, shard.read(member.size)

        for key, members in groupby(tar_members(path), key=lambda member: split_name(member.name)[0]):
            yield key, {split_name(member.name)[1]: read(member) for member in members}


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a tar's member by webdataset's rule: the key ends at the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, in their order.

    tarfile takes a damaged or overwritten header, and a file cut between two members, for the end of the archive; here
    the end must be there, and nothing behind it.

    Raises:
        UserError: it is no tar, or is truncated or corrupt; names the member after which.
    """
    last, end = "the start", 0
    with _Headers(io.FileIO(path)) as file:
        size = path.stat().st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                    if not end < member.offset_data <= tar.offset or member.size > size - member.offset_data:
                        raise tarfile.ReadError("a header's size goes beyond the file, or back")
                    last, end = member.name, member.offset_data
                    yield member
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("the tar's end is missing")
                while block := file.read(MOST_HEADER):
                    if block.strip(tarfile.NUL):
                        raise tarfile.ReadError("more data follow the tar's end")
        except _TAR_ERRORS as error:
            raise UserError(f"{path}: truncated or corrupt after {last}, or no tar: {error}") from error


class _Headers(io.BufferedReader):
    """A tar as tarfile reads it; it allocates whatever a header says before it reads."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MOST_HEADER:
            raise tarfile.ReadError(f"a header says that it is followed by {size} bytes of names")
        return super().read(size)
