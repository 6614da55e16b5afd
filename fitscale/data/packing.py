"""Cutting a global batch into packs: who computes which images, and in how many pieces.

1. Images are dealt to the data-parallel ranks by cost, the costliest first, each to the least loaded rank (LPT); swaps
   between the most and the least loaded rank then even out what is left. Cost is FLOPs: the ranks finish together.
2. A rank's images must go through in micro-batches of at most `pack_tokens`. The rank that needs most decides for all,
   because every rank must run the same number.
3. Inside a rank the micro-batches are evened out by cost as well (LPT); where the limit does not allow that, they are
   filled by best-fit decreasing.
4. In a pack, images of one length follow each other: attention takes each such run at once, as a batch.

Nothing here is random, and the result decides only speed and memory: the images and what is learned from them stay
the same.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heapreplace
from itertools import chain

import numpy as np

from fitscale.config.errors import UserError

TOLERANCE = 0.005  # ranks are evened out until the most loaded is within this of the mean
MAX_SWAPS_PER_RANK = 4


@dataclass(frozen=True)
class PackingStats:
    """How good a packing is."""

    padding_share: float  # padding tokens / all tokens computed
    imbalance: float  # load of the most loaded rank / mean over ranks - 1
    packs_per_rank: int


@dataclass(frozen=True)
class Packing:
    """`packs[dp_rank][micro]`: the slots of a pack, int64, by length; empty where a rank has nothing to do."""

    packs: list[list[np.ndarray]]
    stats: PackingStats


@dataclass(frozen=True)
class PackRule:
    """What decides how images become packs."""

    pack_tokens: int  # most tokens of a pack, padding included
    pad_multiple: int = 1  # packs are padded to a multiple of this
    cost: tuple[float, float] = (1.0, 0.0)  # (a, b): an image of n tokens costs a * n + b * n^2 MACs

    def padded(self, tokens: int) -> int:
        """Length of a pack of `tokens` after padding; a pack without images is one multiple of padding."""
        return max(-(-tokens // self.pad_multiple), 1) * self.pad_multiple


def macs_of(tokens: np.ndarray, cost: tuple[float, float]) -> np.ndarray:
    """MACs of images of so many tokens: a * n + b * n^2 for `cost` (a, b)."""
    return cost[0] * tokens + cost[1] * tokens.astype(np.float64) ** 2


def split(tokens_B: np.ndarray, rule: PackRule, dp_size: int) -> Packing:
    """Split the images of a global batch, of `tokens_B` tokens each, over ranks and micro-batches.

    Raises:
        UserError: an image does not fit into a pack.
    """
    pack_tokens, pad_multiple, cost_B = rule.pack_tokens, rule.pad_multiple, macs_of(tokens_B, rule.cost)
    limit = pack_tokens // pad_multiple * pad_multiple
    if limit == 0:
        raise UserError(f"batch.pack_tokens: {pack_tokens} is less than the padding multiple, {pad_multiple}")
    if len(tokens_B) and tokens_B.max() > limit:
        slot = int(np.argmax(tokens_B))
        raise UserError(
            f"batch.pack_tokens: the image in slot {slot} has {tokens_B[slot]} tokens, the limit is {limit}"
        )
    costliest_first = np.argsort(-cost_B, kind="stable")
    rank_B, loads = deal(cost_B[costliest_first], dp_size)
    ranks = [costliest_first[places].tolist() for places in _groups(rank_B, dp_size, np.arange(len(rank_B)))]
    _even_out(ranks, cost_B, loads)
    tokens_R = np.bincount(_owners(ranks, len(tokens_B)), tokens_B, minlength=dp_size)
    count = max(1, -(-int(tokens_R.max()) // limit))
    packs = [[slots] for slots in ranks] if count == 1 else _cut(ranks, tokens_B, cost_B, limit, count)
    count = len(packs[0])
    pack_B = _owners([pack for rank in packs for pack in rank], len(tokens_B))
    arrays = _groups(pack_B, dp_size * count, tokens_B)
    stats = _stats(pack_B, tokens_B, rule, dp_size, count)
    return Packing([arrays[rank * count : (rank + 1) * count] for rank in range(dp_size)], stats)


def deal(cost_B: np.ndarray, dp_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each image by LPT, of costs in descending order, and every rank's load.

    The ranks stand in line, least load first, and each takes the next image: as long as the next in line has less than
    any rank that was just served has now. Then they line up anew.
    """
    rank_B, loads, start = np.zeros(len(cost_B), dtype=np.int64), np.zeros(dp_size), 0
    if dp_size == 1:
        return rank_B, cost_B.sum(keepdims=True)
    while start < len(cost_B):
        cost = cost_B[start : start + dp_size]
        line = np.argsort(loads, kind="stable")[: len(cost)]
        before = loads[line]
        after = before + cost
        overtaken = np.flatnonzero(before[1:] >= np.minimum.accumulate(after)[:-1])
        served = int(overtaken[0]) + 1 if len(overtaken) else len(cost)
        loads[line[:served]] = after[:served]
        rank_B[start : start + served] = line[:served]
        start += served
    return rank_B, loads


def _owners(groups: list[list[int]], images: int) -> np.ndarray:
    """The group of every slot (B,)."""
    owners = np.zeros(images, dtype=np.int64)
    owners[list(chain.from_iterable(groups))] = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return owners


def _groups(owner_B: np.ndarray, groups: int, order_B: np.ndarray) -> list[np.ndarray]:
    """The inverse of `_owners`: the slots of every group, ascending by `order_B`, then by slot."""
    ends = np.cumsum(np.bincount(owner_B, minlength=groups))
    return np.split(np.lexsort((order_B, owner_B)), ends[:-1])


def _even_out(ranks: list[list[int]], cost_B: np.ndarray, loads: np.ndarray) -> None:
    """Swap images of the most and the least loaded rank until the former is near the mean, or no swap helps."""
    goal = loads.mean() * (1 + TOLERANCE)
    for _ in range(MAX_SWAPS_PER_RANK * len(ranks)):
        most, least = int(np.argmax(loads)), int(np.argmin(loads))
        gap = loads[most] - loads[least]
        if loads[most] <= goal:
            return
        give, take = _best_swap(cost_B[ranks[most]], cost_B[ranks[least]], gap / 2)
        moved = cost_B[ranks[most][give]] - (0 if take is None else cost_B[ranks[least][take]])
        if not 0 < moved < gap:  # the least loaded rank would become as loaded as the other is
            return
        taken = [] if take is None else [ranks[least].pop(take)]
        ranks[least].append(ranks[most].pop(give))
        ranks[most] += taken
        loads[most] -= moved
        loads[least] += moved


def _best_swap(most: np.ndarray, least: np.ndarray, wanted: float) -> tuple[int, int | None]:
    """Positions (in most, in least or None for nothing) whose costs differ most nearly by `wanted`."""
    order = np.argsort(least, kind="stable")
    ascending = np.concatenate(([0.0], least[order]))  # in front: nothing is given back
    after = np.clip(np.searchsorted(ascending, most - wanted), 1, max(len(ascending) - 1, 1))
    places = np.stack([after - 1, np.minimum(after, len(ascending) - 1)])
    misses = np.abs(most - ascending[places] - wanted)
    side, give = np.unravel_index(np.argmin(misses), misses.shape)
    take = int(places[side, give])
    return int(give), None if take == 0 else int(order[take - 1])


def _cut(
    ranks: list[list[int]], tokens_B: np.ndarray, cost_B: np.ndarray, limit: int, count: int
) -> list[list[list[int]]]:
    """Packs of each rank: equally many, `count` if that will do."""
    tokens, cost = tokens_B.tolist(), cost_B.tolist()
    packs = [_spread(slots, tokens, cost, limit, count) or _fit(slots, tokens, limit) for slots in ranks]
    needed = max(map(len, packs))
    if needed > count:
        return _cut(ranks, tokens_B, cost_B, limit, needed)
    return [pack + [[]] * (count - len(pack)) for pack in packs]


def _fit(slots: list[int], tokens: list[int], limit: int) -> list[list[int]]:
    """Packs of at most `limit` tokens by best-fit decreasing: few, but the last may be nearly empty."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for slot in sorted(slots, key=lambda slot: -tokens[slot]):
        place = bisect_left(rooms, (tokens[slot], 0))
        if place == len(rooms):
            room, pack = limit, len(packs)
            packs.append([])
        else:
            room, pack = rooms.pop(place)
        packs[pack].append(slot)
        insort(rooms, (room - tokens[slot], pack))
    return packs


def _spread(slots: list[int], tokens: list[int], cost: list[float], limit: int, count: int) -> list[list[int]] | None:
    """`count` packs of nearly equal cost (LPT); None if the one that comes next has no room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    rooms = [limit] * count
    heap = [(0.0, pack) for pack in range(count)]
    for slot in sorted(slots, key=lambda slot: -tokens[slot]):
        load, pack = heap[0]
        rooms[pack] -= tokens[slot]
        if rooms[pack] < 0:
            return None
        packs[pack].append(slot)
        heapreplace(heap, (load + cost[slot], pack))
    return packs


def _stats(pack_B: np.ndarray, tokens_B: np.ndarray, rule: PackRule, dp_size: int, count: int) -> PackingStats:
    tokens = np.bincount(pack_B, tokens_B, minlength=dp_size * count).astype(np.int64)
    computed = sum(map(rule.padded, tokens.tolist()))
    loads = np.bincount(pack_B // count, macs_of(tokens_B, rule.cost), minlength=dp_size)
    return PackingStats(
        padding_share=1 - int(tokens_B.sum()) / computed,
        imbalance=float(loads.max() / loads.mean() - 1) if loads.any() else 0.0,
        packs_per_rank=count,
    )
