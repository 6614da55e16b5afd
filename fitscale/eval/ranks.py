"""The ranks of one launch that fill chunk folders: each its own chunks; those of a tensor-parallel group, together.

Ranks share nothing but the folder, and so do several launches. In a tensor-parallel group the first rank claims, and
tells the others which chunk they are at; what the others compute is the same, and only the first keeps it.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fitscale.config.bars import bar
from fitscale.parallel.groups import tp_broadcast, tp_place
from fitscale.run.chunks import POLL_S, ChunkFolder, DamagedChunkError

_IDLE, _OVER = -1, -2
Compute = Callable[[int, Callable[[int], Any]], Mapping[str, np.ndarray]]


def is_first() -> bool:
    """Whether this process is the one of its launch that speaks."""
    return os.environ.get("RANK", "0") == "0"


def carry_out(
    folder: ChunkFolder, compute: Compute, fold: Callable[[], None], images: int, title: str, in_groups: bool = True
) -> None:
    """Take part in `folder` until its chunks have been folded, here or elsewhere, and it is cleared away.

    Args:
        compute: the arrays of a chunk, from its number; it tells how many images are done.
        fold: uses all chunks, in one process.
        images: of all chunks together, for the bar on the first rank.
        title: of the bar.
        in_groups: a tensor-parallel group works at one chunk together.
    """
    tell = tp_broadcast if in_groups else int
    if in_groups and tp_place()[0]:
        while (number := tell(0)) != _OVER:
            if number != _IDLE:
                compute(number, lambda images: None)
        return
    per_chunk = images / folder.count
    initial = round((folder.count - len(folder.unfinished())) * per_chunk)
    with bar(images, title, "image", 5.0, initial=initial, disable=not is_first()) as shown:

        def show(finished: int) -> None:
            shown.update(round(finished * per_chunk) - shown.n)
            tell(_IDLE)  # so that those who wait for word do not wait for too long

        def shared(number: int) -> Mapping[str, np.ndarray]:
            tell(number)
            return compute(number, shown.update)

        while folder.exists:
            folder.work(shared, show)
            if not _folded(folder, fold):
                time.sleep(POLL_S)
                tell(_IDLE)
    tell(_OVER)


def _folded(folder: ChunkFolder, fold: Callable[[], None]) -> bool:
    """Whether the fold was nobody else's, and is over."""
    with folder.claimed("fold") as mine:
        if mine and folder.exists:
            try:
                fold()
            except DamagedChunkError as error:
                print(f"warning: {error}", flush=True)
            else:
                folder.clear()
        return mine
