"""Waiting for what another process or thread does, never for a time to pass.

What comes is waited for as long as the machine takes; the limit is for what never comes.
"""

import time
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 600.0


def wait_until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """Returns when `condition()` is true; AssertionError after `limit_s`."""
    start = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - start
        assert waited_s < limit_s, f"gave up waiting for {what}"
        time.sleep(0.005 if waited_s < 1 else 0.1)


def has_ended(pid: int) -> bool:
    """Whether there is no such process any more, or only its exit code."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rsplit(")", 1)[1].split()[0] == "Z"
