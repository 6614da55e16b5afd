"""The loader: packs hold exactly the planned images, whatever the ranks, workers and packs they are cut into."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fitscale.config.errors import UserError
from fitscale.data.batch_plan import BatchPlan
from fitscale.data.build_index import build_index
from fitscale.data.encode import to_float, unpatchify
from fitscale.data.index import Index, ShardReader, open_index
from fitscale.data.loader import READ_HERE, Pack, StepBatch, make_loader
from fitscale.data.packing import PackRule
from fitscale.data.shards import Sample, ShardSetMeta, Variant, write_shards
from fitscale.flow.path import draws
from tests.shard_sets import LATENTS, PIXELS, indexed_set, plan_of

STEPS, SEED = 12, 5
CHANCE = {"times": "logit_normal", "label_drop": 0.1}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return indexed_set(tmp_path_factory.mktemp("loader"), 60, images_per_shard=8)


def plan(index: Index, patch_size: int = 2) -> BatchPlan:
    return plan_of(index, seed=5, batch=16, patch_size=patch_size, window_shards=2, holdout_fraction=0.1)


def load(index: Index, patch_size: int = 2, **changes: object) -> Iterator[StepBatch]:
    rule = PackRule(changes.pop("pack_tokens", 128), changes.pop("pad_multiple", 1), (1.0, 1e-3))
    steps = range(changes.pop("first_step", 0), changes.pop("last_step", STEPS))
    rank = {name: changes.pop(name) for name in ("dp_rank", "dp_size") if name in changes}
    draw = partial(draws, SEED, channels=patch_size**2 * index.meta.channels, **CHANCE)
    return make_loader(plan(index, patch_size), rule, steps, replace(READ_HERE, **changes), **rank, draw=draw)


def images_of(pack: Pack) -> dict[int, torch.Tensor]:
    """Tokens by slot; padding, which must be as agreed, is left out."""
    ends = pack.cu_seqlens.tolist()
    assert ends[0] == 0 and ends[-1] == len(pack.tokens_TC) and len(ends) == len(pack.slots_S) + 1
    assert np.diff(ends).tolist() == pack.sizes_S2.prod(dim=1).tolist()
    dtypes = [torch.float32, torch.int32, torch.int64, torch.int64, torch.int32]
    tensors = [pack.tokens_TC, pack.sizes_S2, pack.labels_S, pack.slots_S, pack.cu_seqlens]
    assert [tensor.dtype for tensor in tensors] == dtypes
    slots = pack.slots_S.tolist()
    tokens = {slot: pack.tokens_TC[a:b] for slot, a, b in zip(slots, ends, ends[1:], strict=False)}
    if -1 in tokens:
        assert slots[-1] == -1 and pack.sizes_S2[-1, 0] == 1 and pack.labels_S[-1] == 0
        assert not tokens.pop(-1).any()
    assert [*map(len, tokens.values())] == sorted(map(len, tokens.values()))  # equal ones follow each other
    return tokens


def assert_same(a: list[StepBatch], b: list[StepBatch]) -> None:
    assert [one.step for one in a] == [one.step for one in b]
    for one, other in zip(a, b, strict=True):
        assert one.stats == other.stats and len(one.packs) == len(other.packs)
        np.testing.assert_array_equal(one.batch.variants_B, other.batch.variants_B)
        for pack, twin in zip(one.packs, other.packs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(tensors_of(pack), tensors_of(twin), strict=True))


def tensors_of(pack: Pack) -> list[torch.Tensor]:
    return [value for owner in (pack, pack.drawn) for value in vars(owner).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("meta", "patch_size"), [(PIXELS, 1), (PIXELS, 2), (LATENTS, 2)])
def test_packs_hold_the_stored_images(tmp_path, meta, patch_size):
    index = indexed_set(tmp_path, 60, meta=meta)
    reader = ShardReader(index)
    for loaded in load(index, patch_size, pack_tokens=512):
        batch, seen = loaded.batch, {}
        for pack in loaded.packs:
            seen |= images_of(pack)
            for slot, label, size in zip(pack.slots_S, pack.labels_S, pack.sizes_S2, strict=True):
                assert label == batch.labels_B[slot]
                assert size.tolist() == [batch.rows_B[slot], batch.cols_B[slot]]
        assert sorted(seen) == list(range(16))
        for slot, tokens in seen.items():
            stored = reader.read(int(batch.images_B[slot]), int(batch.variants_B[slot]))
            image = unpatchify(tokens.numpy(), int(batch.rows_B[slot]), int(batch.cols_B[slot]), patch_size)
            np.testing.assert_array_equal(image, to_float(stored), strict=True)


def test_stored_moments_are_drawn_anew_at_every_step_whatever_the_ranks(tmp_path):
    meta = ShardSetMeta("vae", factor=8, scaling=1.0, channels=2, num_classes=7, moments=True)
    means, deviations = (np.broadcast_to(value, (8, 2, 16, 16)) for value in (np.arange(8)[:, None, None, None], 0.25))
    moments = np.concatenate([means, deviations], axis=1).astype(np.float16)
    write_shards(tmp_path, [Sample(f"{n}", 0, [Variant(one)]) for n, one in enumerate(moments)], meta)
    plan = plan_of(build_index(tmp_path), seed=1, batch=8, window_shards=1)
    runs = [
        [
            {slot: tokens for pack in step.packs for slot, tokens in images_of(pack).items()}
            for step in make_loader(plan, PackRule(128), range(4), dp_rank=r, dp_size=n)
        ]
        for r, n in ((0, 1), (0, 2), (1, 2))
    ]
    noise = []
    for step, whole in enumerate(runs[0]):
        cut = runs[1][step] | runs[2][step]
        assert all(torch.equal(whole[slot], cut[slot]) for slot in whole) and len(cut) == 8
        means = {slot: round(float(tokens.mean())) for slot, tokens in whole.items()}
        assert sorted(means.values()) == list(range(8))  # an epoch
        noise += [(tokens - means[slot]) / 0.25 for slot, tokens in whole.items()]
    values = torch.stack(noise)
    assert abs(float(values.mean())) < 0.03 and abs(float(values.std()) - 1) < 0.03
    assert len({tuple(one[0, :3].tolist()) for one in noise}) == 32


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(index, workers):
    assert_same(list(load(index, num_workers=workers)), list(load(index)))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_chance_decides_of_an_image_comes_with_it(index, workers):
    for loaded in load(index, dp_rank=1, dp_size=2, pack_tokens=64, pad_multiple=8, num_workers=workers):
        for pack in loaded.packs:
            lengths = pack.cu_seqlens.diff().tolist()
            expected = draws(SEED, loaded.step, pack.slots_S.tolist(), lengths, pack.tokens_TC.shape[1], **CHANCE)
            assert all(map(torch.equal, vars(pack.drawn).values(), vars(expected).values()))


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_is_going_on(index, workers):
    assert_same(list(load(index, first_step=7, num_workers=workers)), list(load(index))[7:])


@pytest.mark.parametrize(
    ("dp_size", "pack_tokens", "pad_multiple"), [(1, 36, 4), (3, 64, 8), (5, 1024, 1), (20, 40, 4)]
)
def test_the_global_batch_is_the_same_however_it_is_cut(index, dp_size, pack_tokens, pad_multiple):
    reference = [
        {slot: tokens for pack in one.packs for slot, tokens in images_of(pack).items()} for one in load(index)
    ]
    cut = {"dp_size": dp_size, "pack_tokens": pack_tokens, "pad_multiple": pad_multiple}
    ranks = [list(load(index, dp_rank=rank, **cut)) for rank in range(dp_size)]
    for step, expected in enumerate(reference):
        packs = [pack for rank in ranks for pack in rank[step].packs]
        assert {len(rank[step].packs) for rank in ranks} == {ranks[0][step].stats.packs_per_rank}
        assert all(0 < len(pack.tokens_TC) <= pack_tokens and len(pack.tokens_TC) % pad_multiple == 0 for pack in packs)
        found = [images_of(pack) for pack in packs]
        assert sum(map(len, found)) == 16
        assert all(torch.equal(tokens, expected[slot]) for one in found for slot, tokens in one.items())


def test_a_rank_without_images_gets_padding_alone(index):
    packs = [pack for rank in range(20) for pack in next(load(index, dp_rank=rank, dp_size=20, pad_multiple=4)).packs]
    empty = [pack for pack in packs if pack.slots_S.tolist() == [-1]]
    assert len(empty) == 4
    assert all(pack.sizes_S2.tolist() == [[1, 4]] and pack.cu_seqlens.tolist() == [0, 4] for pack in empty)


def test_reading_leaves_torchs_global_generator_alone(index):
    before = torch.get_rng_state()
    list(load(index, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_larger_than_a_pack_is_refused_by_name_before_reading(index):
    with pytest.raises(UserError, match=r"'image/\d{5}' in .* 36 tokens, more than batch.pack_tokens = 35"):
        load(index, pack_tokens=35)
    with pytest.raises(UserError, match=r"36 tokens, more than batch.pack_tokens = 39 \(padded to 8\)"):
        load(index, pack_tokens=39, pad_multiple=8)
    load(index, pack_tokens=40, pad_multiple=8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_stops_with_one_plain_message(tmp_path: Path, workers: int):
    indexed_set(tmp_path, 60)
    index = open_index(tmp_path)
    offset = int(index.variants["offset"][7])
    shard = tmp_path / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[offset] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(load(index, last_step=60, num_workers=workers))
    assert "shard-000000.tar is truncated or corrupt: checksum differs" in str(error.value)
    assert "image/" in str(error.value) and "\n" not in str(error.value)
