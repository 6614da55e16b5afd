"""The plan: a pure function of (index, seed, step) that shows every image once an epoch, each variant as often."""

import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitscale.config.errors import UserError
from fitscale.data.batch_plan import BatchPlan, GlobalBatch
from fitscale.data.index import IMAGE, VARIANT, Index, IndexMeta, Shard, is_held_out, key_hash, open_index
from fitscale.data.shards import KINDS
from fitscale.data.storage import Storage
from fitscale.data.stream import philox, stable_order
from tests.shard_sets import indexed_set, plan_of

IMAGES = 97


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return indexed_set(tmp_path_factory.mktemp("plan"), IMAGES, images_per_shard=8)


def plan(index: Index, **changes: object) -> BatchPlan:
    return plan_of(index, **{"seed": 3, "batch": 16, "window_shards": 3, **changes})  # type: ignore[arg-type]


def stream(plan: BatchPlan, images: int) -> np.ndarray:
    steps = -(-images // plan.global_batch_size)
    return np.concatenate([plan.step(n).images_B for n in range(steps)])[:images]


def assert_same(a: GlobalBatch, b: GlobalBatch) -> None:
    assert a.step == b.step
    for name in ("images_B", "variants_B", "rows_B", "cols_B", "labels_B"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 130),
    window=st.integers(1, 20),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    split=st.sampled_from(["train", "holdout"]),
    seed=st.integers(0, 2**32),
)
def test_every_image_of_the_split_once_per_epoch(index, batch, window, fraction, split, seed):
    if fraction == 0 and split == "holdout":
        return
    one = plan(index, batch=batch, window_shards=window, holdout_fraction=fraction, split=split, seed=seed)
    held_out = {key_hash(f"image/{n:05d}") for n in range(IMAGES) if is_held_out(f"image/{n:05d}", fraction)}
    wanted = [i for i in range(IMAGES) if (int(index.images[i]["key_hash"]) in held_out) == (split == "holdout")]
    assert one.num_images == len(wanted)
    seen = stream(one, 3 * len(wanted)).reshape(3, -1)
    assert all(sorted(epoch) == wanted for epoch in seen.tolist())


def test_a_step_is_the_same_whatever_was_asked_before(index):
    forwards, fresh = plan(index), plan(index)
    in_order = [forwards.step(n) for n in range(40)]
    for n in (39, 0, 17, 5, 6, 17):
        assert_same(fresh.step(n), in_order[n])
        assert_same(pickle.loads(pickle.dumps(fresh)).step(n), in_order[n])


def test_the_stream_does_not_depend_on_the_batch_size(index):
    np.testing.assert_array_equal(stream(plan(index, batch=7), 300), stream(plan(index), 300))


def test_seed_and_epoch_change_the_order(index):
    first, second = stream(plan(index), 2 * IMAGES).reshape(2, -1)
    assert (first != second).mean() > 0.9
    assert (first != stream(plan(index, seed=4), IMAGES)).mean() > 0.9


def test_each_epoch_has_its_own_order_inside_a_window_and_each_step_its_own_variants(tmp_path):
    index = indexed_set(tmp_path, 32, images_per_shard=32)
    one = plan(index, batch=32)
    first, second = one.step(0), one.step(1)
    assert first.images_B.tolist() != second.images_B.tolist()
    drawn = [batch.variants_B - index.images["first_variant"][batch.images_B].astype(int) for batch in (first, second)]
    assert drawn[0].tolist() != drawn[1].tolist()


def test_a_window_holds_the_images_of_its_shards_only(tmp_path):
    index = indexed_set(tmp_path, 96, images_per_shard=8)
    one = plan(index, window_shards=3)
    windows = index.images["shard"][stream(one, 2 * 96)].reshape(2, 4, 24).tolist()
    for epoch in windows:
        assert [len(set(window)) for window in epoch] == [3] * 4
        assert len(set().union(*epoch)) == 12
        assert all(window != sorted(window) and window != sorted(window, reverse=True) for window in epoch)
    assert set(windows[0][0]) != set(windows[1][0])  # another order of shards in the next epoch


def test_batch_describes_the_drawn_variants(index):
    batch = plan(index).step(5)
    for slot, (image, variant) in enumerate(zip(batch.images_B, batch.variants_B, strict=True)):
        row, stored = index.images[image], index.variants[variant]
        assert row["first_variant"] <= variant < row["first_variant"] + row["variants"]
        assert (batch.rows_B[slot], batch.cols_B[slot]) == (stored["height"] // 2, stored["width"] // 2)
        assert batch.labels_B[slot] == row["label"]
    assert batch.tokens_B.tolist() == (batch.rows_B * batch.cols_B).tolist()
    assert {getattr(batch, name).dtype for name in ("images_B", "variants_B", "rows_B", "labels_B")} == {np.dtype("i8")}


def test_half_of_the_draws_take_each_kind_and_half_each_flip(index):
    one = plan(index, batch=1000)
    drawn = index.variants[np.concatenate([one.step(n).variants_B for n in range(10)])]
    counts = Counter(zip(drawn["kind"].tolist(), drawn["flip"].tolist(), strict=True))
    assert set(counts) == {(KINDS.index(kind), flip) for kind in ("resize", "crop") for flip in (False, True)}
    assert all(abs(count - 2500) < 200 for count in counts.values())  # 4.6 standard deviations


def test_train_and_holdout_are_disjoint_and_together_everything(index):
    splits = [plan(index, holdout_fraction=0.3, split=split) for split in ("train", "holdout")]
    train, holdout = (set(stream(one, one.num_images).tolist()) for one in splits)
    assert not train & holdout and train | holdout == set(range(IMAGES))


def test_an_empty_split_is_refused(index):
    with pytest.raises(UserError, match=r"data.holdout_fraction: 0.0 leaves no image for split holdout of the 97"):
        plan(index, split="holdout")


def test_sizes_that_patches_do_not_divide_are_refused_by_name(index):
    with pytest.raises(UserError, match=r"'image/\d{5}' in .*tar is 2 x 2 latent.*model.patch_size = 4"):
        plan(index, patch_size=4)


def test_memory_is_shards_and_windows_not_images(tmp_path):
    """Over a made-up index of 3 million images, a plan holds windows of them and no more."""
    shards = tuple(Shard(str(number), 10_000, 0, "", number * 10_000) for number in range(300))
    images = np.memmap(tmp_path / "images", IMAGE, "w+", shape=3_000_000)
    images["variants"] = 1
    variants = np.memmap(tmp_path / "variants", VARIANT, "w+", shape=1)
    index = Index(Storage(str(tmp_path)), IndexMeta("pixels", 1, 1.0, 1, 10, shards=shards), images, variants)
    tracemalloc.start()
    one = plan(index, window_shards=4, batch=256)
    for n in range(0, 400, 40):
        one.step(n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 8 * 4 * 10_000  # ten windows of int64: two are kept, and making one takes a few


def test_opened_again_the_plan_is_the_same(index):
    assert_same(plan(open_index(index.storage.folder)).step(9), plan(index).step(9))


@pytest.mark.parametrize("kept", [0, 2**64 - 2**60, 2**36 - 2**30, 3])
def test_order_is_numpys_stable_one_whatever_bits_are_equal(kept):
    words = philox(1, 2, 3, 4).random_raw(100_000)
    words = words[:5000] & np.uint64(kept) if kept else words
    np.testing.assert_array_equal(stable_order(words), np.argsort(words, kind="stable"))


def test_shards_ahead_are_those_of_the_next_window(index):
    """Over two epochs and into the third, whose order is another."""
    one = plan(index).streams[0]
    shards = index.images["shard"][one.images(0, 3 * IMAGES)]
    names = [shard.name for shard in index.meta.shards]
    ahead = [[names.index(shard.name) for shard in one.shards_ahead(place)] for place in range(2 * IMAGES)]
    starts = [place for place in range(1, 2 * IMAGES) if ahead[place] != ahead[place - 1]]
    assert len(starts) == 2 * 5 - 1  # 13 shards, windows of 3
    for start in starts:
        wanted = ahead[start - 1]
        images = sum(index.meta.shards[shard].images for shard in wanted)
        assert set(shards[start : start + images].tolist()) == set(wanted)
