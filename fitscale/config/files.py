"""Files that are whole or not there, and files of one JSON object a line."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last line cut short by a crash is left out, a missing file has no rows."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data` in one step: a reader, or a crash, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a .jsonl file, alone among all who do; what an earlier crash left of a line is dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # until it is closed
        file.seek(0, os.SEEK_END)
        if file.tell() and _last_byte(file) != b"\n":
            file.truncate(_after_last_newline(file))
        file.write(json.dumps(row).encode() + b"\n")


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _after_last_newline(file: Any) -> int:
    file.seek(0)
    return file.read().rfind(b"\n") + 1
