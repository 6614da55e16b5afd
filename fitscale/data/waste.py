"""What a global batch costs under simpler schemes than balanced packs, for comparison.

Each scheme gives the padding share (of the tokens computed), the imbalance (dearest rank / mean rank - 1, padding
counted as computed) and the time lost (share of all ranks' time that no image of the batch needs, since every rank
waits for the dearest). The cost of n tokens is cost(n) = a * n + b * n^2, in FLOPs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fitscale.data.packing import split

Cost = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Loss:
    """What a scheme loses on one global batch."""

    padding_share: float
    imbalance: float
    time_lost: float


def cost_function(a: float, b: float) -> Cost:
    return lambda tokens: a * tokens + b * tokens.astype(np.float64) ** 2


def packed(tokens_B: np.ndarray, cost: Cost, dp_size: int, pack_tokens: int) -> Loss:
    """fitscale's packs."""
    packing = split(tokens_B, cost(tokens_B), dp_size=dp_size, pack_tokens=pack_tokens, pad_multiple=1)
    imbalance = packing.stats.imbalance
    return Loss(packing.stats.padding_share, imbalance, 1 - 1 / (1 + imbalance))


def padded_to_longest(tokens_B: np.ndarray, cost: Cost, dp_size: int) -> Loss:
    """Images dealt to the ranks in turn, each rank's padded to the longest of the global batch."""
    counts = np.bincount(np.arange(len(tokens_B)) % dp_size, minlength=dp_size)
    longest = tokens_B.max()
    return _loss(tokens_B, cost, counts * cost(np.array([longest]))[0], int(longest) * len(tokens_B))


def bucketed(shapes_B: np.ndarray, tokens_B: np.ndarray, cost: Cost, dp_size: int, pack_tokens: int) -> Loss:
    """Batches of one shape each, as many images as `pack_tokens` holds, dealt to the ranks in turn; a shape's last
    batch is filled up, since a fixed shape has a fixed number of rows."""
    order = np.argsort(shapes_B, kind="stable")
    loads, computed, batch = np.zeros(dp_size), 0, 0
    for group in np.split(order, np.flatnonzero(np.diff(shapes_B[order])) + 1):
        tokens = int(tokens_B[group[0]])
        rows = max(1, min(pack_tokens // tokens, -(-len(tokens_B) // dp_size)))
        for _ in range(-(-len(group) // rows)):
            loads[batch % dp_size] += rows * cost(np.array([tokens]))[0]
            computed += rows * tokens
            batch += 1
    return _loss(tokens_B, cost, loads, computed)


def first_fit(tokens_B: np.ndarray, cost: Cost, dp_size: int, pack_tokens: int) -> Loss:
    """Packs filled first-fit in the images' order, dealt to the ranks in turn, without regard to cost. A pack holds
    at most a rank's even share of the tokens, so that small batches still reach every rank."""
    limit = min(pack_tokens, max(int(tokens_B.max()), -(-int(tokens_B.sum()) // dp_size)))
    rooms: list[int] = []
    loads: dict[int, float] = defaultdict(float)
    for tokens, dear in zip(tokens_B.tolist(), cost(tokens_B).tolist(), strict=True):
        pack = next((number for number, room in _open(rooms) if room >= tokens), len(rooms))
        if pack == len(rooms):
            rooms.append(limit)
        rooms[pack] -= tokens
        loads[pack] += dear
    ranks = np.bincount(np.array(list(loads)) % dp_size, weights=list(loads.values()), minlength=dp_size)
    return _loss(tokens_B, cost, ranks, int(tokens_B.sum()))


def _open(rooms: list[int], last: int = 64) -> Iterator[tuple[int, int]]:
    """The last packs, oldest first; older ones are taken for full."""
    start = max(0, len(rooms) - last)
    yield from enumerate(rooms[start:], start)


def _loss(tokens_B: np.ndarray, cost: Cost, loads: np.ndarray, computed: int) -> Loss:
    useful = float(cost(tokens_B).sum())
    return Loss(
        padding_share=1 - int(tokens_B.sum()) / computed,
        imbalance=float(loads.max() / loads.mean() - 1),
        time_lost=1 - useful / (len(loads) * float(loads.max())),
    )
