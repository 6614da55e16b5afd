"""The members of a tar, with webdataset's rule for their keys; what is damaged is an error and no short archive."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from fitscale.config.errors import UserError


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
    last = "the start"
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                    last = member.name
                    yield member
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("the tar's end is missing")
                while block := file.read(2**20):
                    if block.strip(tarfile.NUL):
                        raise tarfile.ReadError("more data follow the tar's end")
        except tarfile.TarError as error:
            raise UserError(f"{path}: truncated or corrupt after {last}, or no tar: {error}") from error
