"""Packing: every image once, no pack over the limit, ranks even, hardly any padding, fast at any size."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitscale.config.errors import UserError
from fitscale.data.packing import Packing, PackRule, deal, split

LINEAR, QUADRATIC = 1.0, 1 / (12 * 768)  # as FiTv2-B: attention is a small share at these lengths


def cost(tokens: np.ndarray) -> np.ndarray:
    return LINEAR * tokens + QUADRATIC * tokens.astype(float) ** 2


def fit_tokens(rng: np.random.Generator, images: int, side: int = 256) -> np.ndarray:
    """Token counts that FiT's preprocessing gives photographs of many sizes and aspect ratios, at target `side`.

    Area at most side^2, sides multiples of 16, and of the images larger than side both ways half are cropped to square.
    """
    area, aspect = np.exp(rng.normal(np.log(400**2), 0.6, images)), np.exp(rng.normal(0, 0.35, images))
    height, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
    shrink = np.minimum(1, side / np.sqrt(height * width))
    crop = (height > side) & (width > side) & (rng.random(images) < 0.5)
    rows, cols = (np.maximum(1, length * shrink // 16) for length in (height, width))
    return np.where(crop, (side // 16) ** 2, rows * cols).astype(np.int64)


def mixed_tokens(rng: np.random.Generator, images: int) -> np.ndarray:
    """64 to 1,024 tokens, small images the commonest."""
    return np.exp(rng.uniform(np.log(64), np.log(1024), images)).astype(np.int64)


DISTRIBUTIONS = {"fit": fit_tokens, "mixed": mixed_tokens}


def pack(tokens: np.ndarray, dp_size: int, pack_tokens: int = 4096, pad_multiple: int = 1) -> Packing:
    return split(tokens, PackRule(pack_tokens, pad_multiple, (LINEAR, QUADRATIC)), dp_size)


def check(packing: Packing, tokens: np.ndarray, dp_size: int, pack_tokens: int, pad_multiple: int) -> None:
    """What must hold for any packing, and that its figures are true."""
    assert len(packing.packs) == dp_size
    assert {len(rank) for rank in packing.packs} == {packing.stats.packs_per_rank}
    flat = [one for rank in packing.packs for one in rank]
    assert all(one.dtype == np.int64 and (np.diff(tokens[one]) >= 0).all() for one in flat)
    assert sorted(np.concatenate(flat).tolist()) == list(range(len(tokens)))
    lengths = [PackRule(pack_tokens, pad_multiple).padded(int(tokens[one].sum())) for one in flat]
    assert max(lengths) <= pack_tokens
    assert packing.stats.padding_share == pytest.approx(1 - tokens.sum() / sum(lengths))
    loads = [sum(cost(tokens[one]).sum() for one in rank) for rank in packing.packs]
    assert packing.stats.imbalance == pytest.approx(max(loads) / np.mean(loads) - 1)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 500), min_size=1, max_size=80),
    dp_size=st.integers(1, 20),
    pack_tokens=st.integers(512, 3000),
    pad_multiple=st.sampled_from([1, 2, 6, 8, 16]),
)
def test_every_image_once_and_no_pack_over_the_limit(tokens, dp_size, pack_tokens, pad_multiple):
    tokens_B = np.array(tokens)
    check(pack(tokens_B, dp_size, pack_tokens, pad_multiple), tokens_B, dp_size, pack_tokens, pad_multiple)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(sorted(DISTRIBUTIONS)),
    dp_size=st.sampled_from([1, 2, 8, 32, 128]),
    per_rank=st.integers(16, 24),
    pad_multiple=st.sampled_from([1, 8, 16]),
)
def test_ranks_are_within_two_percent_and_padding_below_one(seed, kind, dp_size, per_rank, pad_multiple):
    tokens = DISTRIBUTIONS[kind](np.random.default_rng(seed), dp_size * per_rank)
    packing = pack(tokens, dp_size, 4096, pad_multiple)
    check(packing, tokens, dp_size, 4096, pad_multiple)
    assert packing.stats.imbalance < 0.02
    assert packing.stats.padding_share < 0.01


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(sorted(DISTRIBUTIONS)), dp_size=st.sampled_from([1, 4, 16]))
def test_micro_batches_are_as_few_as_the_fullest_rank_allows(seed, kind, dp_size):
    tokens = DISTRIBUTIONS[kind](np.random.default_rng(seed), dp_size * 64)
    packing = pack(tokens, dp_size)
    fullest = max(sum(int(tokens[one].sum()) for one in rank) for rank in packing.packs)
    assert packing.stats.packs_per_rank <= -(-fullest // 4096) + 1


@settings(max_examples=60, deadline=None)
@given(cost=st.lists(st.integers(1, 9) | st.floats(0.1, 1000), min_size=1, max_size=200), dp_size=st.integers(1, 50))
def test_dealing_gives_every_image_to_the_rank_with_the_least(cost, dp_size):
    """In whole lines at once, and yet as one image at a time; of equal ranks the first."""
    cost_B, loads, ranks = np.array(sorted(cost, reverse=True), dtype=float), [0.0] * dp_size, []
    for one in cost_B.tolist():
        ranks.append(min(range(dp_size), key=lambda rank: (loads[rank], rank)))
        loads[ranks[-1]] += one
    rank_B, loads_R = deal(cost_B, dp_size)
    assert rank_B.tolist() == ranks
    np.testing.assert_allclose(loads_R, loads, rtol=1e-12)


def test_a_tight_fit_needs_no_extra_pack():
    """Balanced loads would not fit here: 6 + 6, 4 + 4 + 4 is the only way into two packs of 12."""
    tokens = np.array([6, 6, 4, 4, 4])
    packing = pack(tokens, 1, pack_tokens=12)
    assert [tokens[one].tolist() for one in packing.packs[0]] in ([[6, 6], [4, 4, 4]], [[4, 4, 4], [6, 6]])


def loads(tokens: np.ndarray, dp_size: int) -> list[int]:
    """Tokens of each rank, ascending."""
    return sorted(sum(int(tokens[one].sum()) for one in rank) for rank in pack(tokens, dp_size).packs)


def test_swaps_mend_what_dealing_by_size_leaves():
    """Dealing these to three ranks, costliest first, makes one of 110; 50 + 40, 50 + 40 and 30 + 30 + 30 are even."""
    tokens = np.array([50, 50, 40, 40, 30, 30, 30])
    assert loads(tokens, 3) == [90, 90, 90]


def test_a_swap_that_would_not_help_is_not_made():
    assert loads(np.array([60, 90, 70, 60, 50]), 2) == [160, 170]


def test_ranks_without_images_get_empty_packs():
    packing = pack(np.array([10, 20]), 4, pack_tokens=64, pad_multiple=8)
    assert sorted(len(rank[0]) for rank in packing.packs) == [0, 0, 1, 1]
    assert packing.stats.padding_share == pytest.approx(1 - 30 / (16 + 24 + 8 + 8))


def test_an_image_beyond_the_limit_is_refused():
    with pytest.raises(UserError, match=r"batch.pack_tokens: the image in slot 1 has 65 tokens, the limit is 64"):
        pack(np.array([64, 65]), 1, pack_tokens=71, pad_multiple=8)
    with pytest.raises(UserError, match=r"batch.pack_tokens: 7 is less than the padding multiple, 8"):
        pack(np.array([1]), 1, pack_tokens=7, pad_multiple=8)


def calls(images: int, dp_size: int, kind: str) -> int:
    """Functions called, Python's and C's: a measure of the work that no neighbour on the machine changes."""
    tokens, count = DISTRIBUTIONS[kind](np.random.default_rng(1), images), 0

    def counting(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counting)
    try:
        pack(tokens, dp_size)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("dp_size", [8, 64, 1024])
def test_cost_grows_near_linearly(dp_size, kind):
    """Some packs do not come out at first and are cut again, once or twice: still so many calls an image and rank."""
    assert all(calls(images, dp_size, kind) < 50 * (images + dp_size) for images in (256, 2048, 16384, 65536))
