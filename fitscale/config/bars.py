"""How far something is: a bar where there is a terminal, lines where there is none, such as in the log of a job."""

import sys
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 30.0


class _Lines:
    """Standard error for tqdm: every state of a bar is a line, none is written over another."""

    def write(self, text: str) -> None:
        if state := text.strip():
            sys.stderr.write(f"{state}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(total: int, title: str, unit: str, mininterval_s: float = 1.0, **options: Any) -> "tqdm[Any]":
    """A bar of tqdm's on standard error; without a terminal it is a line at the start, every 30 s and at the end.

    Args:
        mininterval_s: between two states of it on a terminal.
        options: of tqdm's, besides.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=title, unit=unit, mininterval=mininterval_s, **options)
    every = {"mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S}
    return tqdm(total=total, desc=title, unit=unit, file=_Lines(), **every, **options)
