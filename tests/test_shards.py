"""Shards: readable by webdataset, the same bytes for the same samples, and nothing wrong gets in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from fitscale.config.errors import UserError
from fitscale.data.shards import Sample, Variant, check_balance, check_sample, read_set, write_shards
from tests.shard_sets import DRAWN, LATENTS, PIXELS, sample, write_set


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("meta", [PIXELS, LATENTS], ids=["pixels", "latents"])
def test_webdataset_reads_what_was_written(tmp_path, meta):
    samples = write_set(tmp_path, 25, images_per_shard=10, meta=meta)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    assert [Path(shard).name for shard in shards] == [f"shard-{n:06d}.tar" for n in range(3)]
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
    assert [one["__key__"] for one in read] == [one.key for one in samples]
    for one, expected in zip(read, samples, strict=True):
        assert one["json"]["label"] == expected.label
        assert [(v["kind"], v["flip"]) for v in one["json"]["variants"]] == DRAWN
        for number, variant in enumerate(expected.variants):
            np.testing.assert_array_equal(one[f"{number}.npy"], variant.array_CHW, strict=True)


def test_same_samples_give_the_same_bytes(tmp_path):
    write_set(tmp_path / "a", 12)
    write_set(tmp_path / "b", 12)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_no_temporary_file_is_left_and_the_description_is_read_back(tmp_path):
    write_set(tmp_path, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "shard-000000.tar", "shard-000001.tar"]
    assert read_set(tmp_path)[0] == PIXELS


def test_an_error_leaves_only_whole_shards_and_no_description(tmp_path):
    samples = [sample(0), sample(1), sample(2), replace(sample(3), key="bad", label=7)]
    with pytest.raises(UserError, match=r"'bad'.*label 7 is outside 0 \.\. 6"):
        write_shards(tmp_path, samples, PIXELS, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]


def test_a_folder_with_shards_is_refused(tmp_path):
    write_set(tmp_path, 3)
    before = shard_bytes(tmp_path)
    with pytest.raises(UserError, match="holds shards already"):
        write_shards(tmp_path, [sample(0)], PIXELS)
    assert shard_bytes(tmp_path) == before


def of(array: np.ndarray, **changes: object) -> Sample:
    return replace(Sample("key", 0, [Variant(array)]), **changes)


PIXEL = np.zeros((3, 2, 2), np.uint8)


@pytest.mark.parametrize(
    ("meta", "wrong", "message"),
    [
        (PIXELS, of(PIXEL, label=-1), "label -1 is outside"),
        (PIXELS, of(PIXEL, key="a.b"), "neither dots"),
        (PIXELS, of(PIXEL, key=""), "neither dots"),
        (PIXELS, of(PIXEL, variants=[]), "at least one"),
        (PIXELS, of(PIXEL, variants=[Variant(PIXEL, kind="zoom")]), "'zoom' is not one of resize, crop, scale"),
        (PIXELS, of(PIXEL.astype(np.float32)), "float32 does not go with pixels, only uint8"),
        (PIXELS, of(PIXEL[:1]), r"shape \(1, 2, 2\) is not \(3, height, width\)"),
        (PIXELS, of(PIXEL[:, :0]), "shape"),
        (LATENTS, of(np.full((4, 2, 2), np.nan, np.float32)), "not finite"),
        (LATENTS, of(np.zeros((4, 2, 2), np.float64)), "float64 does not go with vae"),
    ],
)
def test_samples_that_could_not_be_trained_on_are_refused(meta, wrong, message):
    with pytest.raises(UserError, match=message):
        check_sample(wrong, meta)


def test_kinds_and_flips_must_be_drawn_evenly():
    check_balance("x", DRAWN)
    check_balance("x", [("scale", False)] * 3)
    for uneven in ([*DRAWN, DRAWN[0]], DRAWN[:3]):
        with pytest.raises(UserError, match="kind"):
            check_balance("x", uneven)


def test_big_endian_and_strided_arrays_are_stored_plainly(tmp_path):
    array = np.arange(32, dtype=">f4").reshape(4, 2, 4)[..., ::-1]
    write_shards(tmp_path, [of(array)], LATENTS)
    [read] = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False, empty_check=False).decode()
    np.testing.assert_array_equal(read["0.npy"], array.astype("<f4"), strict=True)
