"""A mixture: shares kept to the image, every source a stream of its own, limits on the sizes that are used."""

import contextlib
import io
import pickle
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitscale.config.errors import UserError
from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config, to_yaml
from fitscale.config.schema_data import DataConfig, SourceConfig
from fitscale.data.batch_plan import BatchPlan, open_plan, places, token_shares
from fitscale.data.encoding import indices_of
from fitscale.data.index import Index
from fitscale.data.loader import READ_HERE, make_loader
from fitscale.data.packing import PackRule
from fitscale.data.stream import ImageStream
from fitscale.run.claim import claim
from fitscale.run.layout import RunDir
from tests.distributed.spawn import run_ranks, train_here
from tests.shard_sets import LATENTS, indexed_set
from tests.tiny import OVERRIDES

DATA, EVERY, ABOUT = DataConfig(window_shards=2), SourceConfig(), {"seed": 3, "patch_size": 2}


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> list[Index]:
    return [indexed_set(tmp_path_factory.mktemp(f"set{images}"), images, images_per_shard=7) for images in (40, 61, 13)]


def mixture(indices: list[Index], weights: list[float], batch: int = 24, **limits: SourceConfig) -> BatchPlan:
    streams = [
        ImageStream(index, DATA, limits.get(f"limits{number}", EVERY), **ABOUT, number=number)
        for number, index in enumerate(indices)
    ]
    return BatchPlan(streams, seed=3, global_batch_size=batch, weights=weights)


def images_of(plan: BatchPlan, source: int, steps: int) -> list[int]:
    batches = [plan.step(n) for n in range(steps)]
    return [image for batch in batches for image in batch.images_B[batch.sources_B == source].tolist()]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.integers(1, 400))
def test_places_are_dealt_one_by_one_as_websters_method_does(weights, n):
    fractions = [Fraction(weight, 7) for weight in weights]
    seats = sorted((Fraction(2 * j + 1) / w, k) for k, w in enumerate(fractions) for j in range(n))
    expected = [sum(1 for _, source in seats[:n] if source == k) for k in range(len(weights))]
    assert places(fractions, n) == expected


def test_every_source_is_a_stream_of_its_own_whatever_the_others(indices):
    plan = mixture(indices, [3, 2, 0.5])
    for source, index in enumerate(indices):
        alone = ImageStream(index, DATA, EVERY, **ABOUT, number=source)
        seen = images_of(plan, source, 40)
        assert seen == alone.images(0, len(seen)).tolist()
        assert sorted(seen[: index.meta.num_images]) == list(range(index.meta.num_images))  # an epoch, each once


def test_shares_of_the_images_are_the_weights(indices):
    plan = mixture(indices, [3, 2, 0.5])
    for steps in (1, 7, 300):
        counts = np.sum([np.bincount(plan.step(n).sources_B, minlength=3) for n in range(steps)], axis=0)
        np.testing.assert_allclose(counts, np.array([3, 2, 0.5]) / 5.5 * steps * 24, atol=1)


def test_a_step_is_pure_and_independent_of_the_batch_size(indices):
    plan = mixture(indices, [1, 2, 1])
    again = pickle.loads(pickle.dumps(plan))
    plan.step(3)
    assert all(
        np.array_equal(a, b) for a, b in zip(*(vars(one.step(9)).values() for one in (plan, again)), strict=True)
    )
    small = mixture(indices, [1, 2, 1], batch=8)
    assert images_of(small, 1, 30) == images_of(plan, 1, 10)


def test_limits_choose_the_variants_and_leave_out_images_without_any(indices):
    limits = SourceConfig("x", 1.0, min_tokens=4, max_tokens=12)
    plan = mixture(indices[:2], [1, 1], limits1=limits)
    index = indices[1]
    areas = index.variants["height"].astype(int) * index.variants["width"] // 4
    fits = (areas >= 4) & (areas <= 12)
    owner = np.repeat(np.arange(len(index.images)), index.images["variants"])
    usable = sorted(set(owner[fits].tolist()))
    assert 0 < len(usable) < len(index.images) and plan.streams[1].num_images == len(usable)
    assert sorted(images_of(plan, 1, 50)[: len(usable)]) == usable
    drawn: dict[int, set[int]] = {}
    for n in range(300):
        batch = plan.step(n)
        mine = batch.sources_B == 1
        assert (owner[batch.variants_B[mine]] == batch.images_B[mine]).all() and fits[batch.variants_B[mine]].all()
        for image, variant in zip(batch.images_B[mine].tolist(), batch.variants_B[mine].tolist(), strict=True):
            drawn.setdefault(image, set()).add(variant)
    assert all(drawn[image] == set(np.flatnonzero(fits & (owner == image)).tolist()) for image in usable)


def config_of(folder, *overrides: str):
    """A tiny config with two sets of latents; the second gives three images of four, all of them small."""
    for name, images in (("a", 30), ("b", 50)):
        if not (folder / name).exists():
            indexed_set(folder / name, images, meta=LATENTS)
    sources = [f"data.mixture.{name}.shards={folder / name}" for name in ("a", "b")]
    latent = ("data.latent.kind=vae", "data.latent.factor=8", "data.latent.scaling=0.18215")
    model = ("model.in_channels=4", "model.num_classes=7", "model.patch_size=2", f"run.dir={folder / 'run'}")
    limits = ("data.mixture.b.weight=3", "data.mixture.b.max_tokens=6")
    return load_config([*OVERRIDES, *sources, *latent, *model, *limits, *overrides])


def train_and_tell(config) -> str:
    """Train; what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_here(config)
    return said.getvalue()


def test_a_mixture_trains_and_names_its_images(tmp_path):
    config = config_of(tmp_path, "run.steps=3", "run.log_every=1")
    said, _ = run_ranks(train_and_tell, 2, config)
    rows = read_jsonl(RunDir(tmp_path / "run").metrics)
    assert [row["images"] for row in rows] == [config.batch.global_batch_size * n for n in (1, 2, 3)]
    assert "29 of a (25.0%), 46 of b (75.0%) for training" in said


def test_the_loader_reads_every_image_from_its_own_shards(tmp_path):
    config = config_of(tmp_path)
    plan = open_plan(config.data, seed=0, global_batch_size=16, patch_size=2)
    for step in make_loader(plan, PackRule(4096), range(4), replace(READ_HERE, num_workers=2)):
        assert np.bincount(step.batch.sources_B).tolist() == [4, 12]
        assert max(step.batch.tokens_B[step.batch.sources_B == 1]) <= 6 < max(step.batch.tokens_B)
        keys = {plan.key(step.batch, slot) for slot in range(16)}
        assert len(keys) <= 16 and all(key.startswith("image/") for key in keys)


def shares_of(config):
    return token_shares(config.data, 2, indices_of(config.data))


def test_token_shares_follow_weights_and_limits(tmp_path):
    config = config_of(tmp_path)
    shares = shares_of(config)
    assert sum(shares.values()) == pytest.approx(1)
    only_a = shares_of(config_of(tmp_path, "data.mixture.b.weight=1e-9"))
    assert sum(share for tokens, share in shares.items() if tokens > 6) == pytest.approx(
        0.25 * sum(share for tokens, share in only_a.items() if tokens > 6)
    )


def test_the_config_survives_yaml_and_weights_are_part_of_the_run(tmp_path):
    config = config_of(tmp_path)
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config([str(tmp_path / "saved.yaml")]) == config
    claim(config)
    (tmp_path / "a").rename(tmp_path / "moved")
    claim(load_config([str(tmp_path / "saved.yaml"), f"data.mixture.a.shards={tmp_path / 'moved'}"]))
    with pytest.raises(UserError, match=r"data.mixture.b.weight: 3.0 there, 2.0 here"):
        claim(load_config([str(tmp_path / "saved.yaml"), "data.mixture.b.weight=2"]))
    with pytest.raises(UserError, match=r"data.mixture.c.weight: absent there, 1.0 here"):
        claim(load_config([str(tmp_path / "saved.yaml"), "data.mixture.c.shards=x"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mixture.a.weight=1"], r"data.mixture.a.shards: must be given"),
        (["data.mixture.a.shards=x", "data.mixture.a.weight=0"], r"data.mixture.a.weight: 0.0 must be above 0"),
        (["data.mixture.a.shards=x", "data.mixture.a.weight=inf"], r"data.mixture.a.weight: inf must be above 0"),
        (
            ["data.mixture.a.shards=x", "data.mixture.a.min_tokens=9", "data.mixture.a.max_tokens=4"],
            r"data.mixture.a.max_tokens: 4 is too small, the least is 9",
        ),
        (["data.mixture.a.shards=x", "data.shards=y"], r"data.shards and data.mixture: only one of the two"),
        (["data.mixture.a.wieght=1"], r"wieght"),
    ],
)
def test_a_wrong_mixture_is_refused_by_its_key(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(overrides)


def test_limits_that_no_image_meets_are_refused_with_what_there_is(indices):
    with pytest.raises(UserError, match=r"has 500 to 600 tokens; its images have 1 to 36"):
        mixture(indices[:1], [1.0], limits0=SourceConfig("x", min_tokens=500, max_tokens=600))
