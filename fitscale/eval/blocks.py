"""Sums over many rows, a block at a time: memory stays flat, and the number of threads changes no bit of the result.

A block has fixed content and is turned into float64 on its own. Threads take whole blocks, BLAS works with one thread
inside each, and the results are folded in the order of the blocks.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")

ROWS = 1024  # of a block
MOST_THREADS = 16  # each holds some 100 MB at 2,048 features


def starts(array: np.ndarray, rows: int = ROWS) -> range:
    """First rows of the blocks of `array`."""
    return range(0, len(array), rows)


def block(array: np.ndarray, start: int, rows: int = ROWS) -> np.ndarray:
    """Rows [start, start + rows) in float64, contiguous."""
    return np.array(array[start : start + rows], dtype=np.float64, order="C")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in their order; it must not write what another call reads.

    No thread works further ahead than one item each, so that results do not pile up.
    """
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    waiting: deque[Future[Result]] = deque()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for item in items:
            if len(waiting) > threads:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
