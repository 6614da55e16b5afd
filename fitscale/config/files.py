"""Files that are whole or not there, and files of one JSON object a line."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError, reading

JSON_BYTES = 256 * 2**20  # no file of one JSON object is larger


def read_jsonl(path: Path, **kinds: Any) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last line cut short by a crash is left out, a missing file has no rows.

    Args:
        path: the file.
        kinds: what every row has to hold, as in `require_kinds`.

    Raises:
        UserError: the file cannot be read; or a line, which is named, holds no JSON object, or not what it has to.
    """
    if not path.exists():
        return []
    with reading(path):
        lines = path.read_bytes().split(b"\n")
    rows = {number: parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], 1) if line}
    for number, row in rows.items():
        require_kinds(row, f"{path}, line {number}", **kinds)
    return list(rows.values())


def require_kinds(content: dict[str, Any], what: object, /, **kinds: Any) -> None:
    """Raises UserError if `content` of `what` lacks a key of `kinds`, or holds there what is of another type."""
    for key, kind in kinds.items():
        if key not in content or not isinstance(content[key], kind):
            there = repr(content[key])[:100] if key in content else "missing"
            raise UserError(f"{what}: {key} is {there}, it must be of type {getattr(kind, '__name__', kind)}")


def read_json(path: Path, most_bytes: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object that the file holds; raises UserError for what cannot be read, is no object, or is too large."""
    with reading(path), open(path, "rb") as file:
        text = file.read(most_bytes + 1)
    if len(text) > most_bytes:
        raise UserError(f"{path}: more than {most_bytes:,} bytes; nothing that fitscale writes here is so large")
    return parse_json(text, path)


def parse_json(text: bytes, what: object) -> dict[str, Any]:
    """The JSON object in `text`, which came from outside as (or in) `what`; raises UserError for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{what}: must hold a JSON object, {{...}}, not {str(content)[:100]}")
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to write a file or to fill a folder at; it becomes `path` if all goes well.

    In one step: a reader, or a crash, sees what was there before or what is new, and whatever is raised inside leaves
    nothing behind. A file is on the disk before it is renamed. The temporary name keeps the suffix, by which libraries
    choose a format; a folder at `path` has to be empty or absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    _remove(temporary)  # of a process that was killed, whose number has come back
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        _remove(temporary)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace the file `path` by `data`, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def append_jsonl(path: Path, *rows: dict[str, Any]) -> None:
    """Add lines to a .jsonl file, alone among all who do; what an earlier crash left of a line is dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # until it is closed
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
