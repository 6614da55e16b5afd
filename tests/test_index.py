"""The index: sizes and places of all images, and every way in which index and shards can disagree."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fitscale.config.errors import UserError
from fitscale.data.build_index import build_index
from fitscale.data.index import OPEN_SHARDS, ShardReader, is_held_out, key_hash, open_index
from fitscale.data.shards import KINDS, write_shards
from tests.shard_sets import LATENTS, PIXELS, indexed_set, sample, write_set


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("meta", [PIXELS, LATENTS], ids=["pixels", "latents"])
def test_every_variant_is_found_by_its_byte_range(tmp_path, meta):
    samples = write_set(tmp_path, 25, meta=meta)
    build_index(tmp_path)
    index = open_index(tmp_path)
    reader = ShardReader(index)
    by_hash = {key_hash(one.key): one for one in samples}
    assert len(index.images) == 25 and len(index.variants) == 100
    for image, row in enumerate(index.images):
        expected = by_hash.pop(int(row["key_hash"]))
        assert row["label"] == expected.label and row["variants"] == 4
        for number, variant in enumerate(expected.variants):
            place = int(row["first_variant"]) + number
            np.testing.assert_array_equal(reader.read(image, place), variant.array_CHW, strict=True)
            stored = index.variants[place]
            assert (stored["height"], stored["width"]) == variant.array_CHW.shape[1:]
            assert (KINDS[stored["kind"]], stored["flip"]) == (variant.kind, variant.flip)
    assert not by_hash


def test_meta_counts_images_shards_and_sizes(tmp_path):
    meta = indexed_set(tmp_path, 25).meta
    assert [(s.name, s.images, s.first_image) for s in meta.shards] == [
        ("shard-000000.tar", 10, 0), ("shard-000001.tar", 10, 10), ("shard-000002.tar", 5, 20)
    ]  # fmt: skip
    assert all(shard.bytes == (tmp_path / shard.name).stat().st_size for shard in meta.shards)
    assert len({shard.checksum for shard in meta.shards}) == 3
    counted = {(height, width): count for height, width, count in meta.sizes}
    shapes = [variant.array_CHW.shape[1:] for n in range(25) for variant in sample(n).variants]
    assert counted == {shape: shapes.count(shape) for shape in shapes}
    assert (meta.kind, meta.channels, meta.num_classes, meta.num_images) == ("pixels", 3, 7, 25)


def test_opening_does_not_read_the_shards(tmp_path):
    indexed_set(tmp_path, 12)
    for path in tmp_path.glob("*.tar"):
        size = path.stat().st_size
        path.write_bytes(b"")
        os.truncate(path, size)
    assert len(open_index(tmp_path).images) == 12


def test_held_out_images_are_those_whose_key_says_so_whatever_the_shards(tmp_path):
    for per_shard in (7, 40):
        index = indexed_set(tmp_path / str(per_shard), 200, per_shard)
        for fraction in (0.0, 0.1, 0.5):
            keys = {key_hash(f"image/{n:05d}") for n in range(200) if is_held_out(f"image/{n:05d}", fraction)}
            first, counts = index.first_images, index.held_out(fraction)
            found = [index.images["key_hash"][a : a + n] for a, n in zip(first[:-1], counts, strict=True)]
            assert set(np.concatenate(found).tolist()) == keys
            assert abs(len(keys) - 200 * fraction) <= 25


def test_the_hash_is_stable():
    printed_by_b2sum = "f4d13fd3b84a3163"  # printf 'image/00001' | b2sum -l 64
    assert key_hash("image/00001") == int.from_bytes(bytes.fromhex(printed_by_b2sum), "little")


def test_an_index_travels_to_a_worker_as_its_path(tmp_path):
    index = indexed_set(tmp_path, 12)
    travelling = pickle.dumps(index)
    assert len(travelling) < 500
    np.testing.assert_array_equal(pickle.loads(travelling).images, index.images)


def test_released_rows_can_be_read_again(tmp_path):
    index = indexed_set(tmp_path, 12)
    before = index.images.copy()
    index.release()
    np.testing.assert_array_equal(index.images, before)


def test_no_index_says_how_to_make_one(tmp_path):
    write_set(tmp_path, 3)
    with pytest.raises(UserError, match=r"no such index.*make_shards.py index"):
        open_index(tmp_path)
    with pytest.raises(UserError, match="no such index"):
        open_index(tmp_path / "nowhere")


def test_stale_or_damaged_index_names_what_is_wrong(tmp_path):
    indexed_set(tmp_path, 25)
    content = json.loads((tmp_path / "index.json").read_text())

    (tmp_path / "index.json").write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        open_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="not an index"):
        open_index(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(content))

    images = (tmp_path / "images.npy").read_bytes()
    for damaged in (images[:-1], images[:20]):
        (tmp_path / "images.npy").write_bytes(damaged)
        with pytest.raises(UserError, match=r"images.npy"):
            open_index(tmp_path)
    (tmp_path / "images.npy").write_bytes(images)

    shard = tmp_path / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"shard-000001.tar.*truncated"):
        open_index(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar.*missing"):
        open_index(tmp_path)
    shard.write_bytes(whole)
    open_index(tmp_path)


def test_corrupt_data_is_named_by_shard_and_key_when_read(tmp_path):
    index = indexed_set(tmp_path, 12)
    image, variant = 4, int(index.images[4]["first_variant"])
    flip_byte(tmp_path / "shard-000000.tar", int(index.variants[variant]["offset"]) + 3)
    key = next(f"image/{n:05d}" for n in range(12) if key_hash(f"image/{n:05d}") == index.images[4]["key_hash"])
    reader = ShardReader(open_index(tmp_path))
    reader.read(image, variant + 1)
    with pytest.raises(UserError, match=rf"{key}.*shard-000000.tar is truncated or corrupt: checksum"):
        reader.read(image, variant)


def test_a_shard_cut_short_after_opening_is_named(tmp_path):
    index = indexed_set(tmp_path, 5)
    last = int(np.argmax(index.variants["offset"]))
    image = int(np.searchsorted(index.images["first_variant"], last, side="right")) - 1
    os.truncate(tmp_path / "shard-000000.tar", int(index.variants[last]["offset"]) + 1)
    with pytest.raises(UserError, match=r"shard-000000.tar"):
        ShardReader(index).read(image, last)


def test_building_names_the_corrupt_sample(tmp_path):
    index = indexed_set(tmp_path, 25)
    path = tmp_path / "shard-000001.tar"
    whole = path.read_bytes()
    starts = [m for m in range(0, len(whole), 512) if whole[m : m + 5] == b"image"]

    def refused(content: bytes, message: str) -> None:
        path.write_bytes(content)
        before = (tmp_path / "index.json").read_text()
        with pytest.raises(UserError, match=rf"shard-000001\.tar.*{message}"):
            build_index(tmp_path)
        assert (tmp_path / "index.json").read_text() == before

    refused(whole[: starts[7] + 700], "image/0001")  # inside a member
    refused(whole[: starts[10]], "the tar's end is missing")  # between two members
    refused(whole[: starts[10]] + b"\xff" * 512 + whole[starts[10] + 512 :], "truncated or corrupt")  # a header
    refused(b"", "truncated or corrupt")
    refused(whole.replace(b'"kind": "crop"', b'"kind": "crap"', 1), r"sample 0 \(image/00010\).*'crap'")
    refused(whole.replace(b'{"label"', b'["label"', 1), r"sample 0 \(image/00010\)")  # no JSON any more
    refused(whole.replace(b"NUMPY", b"NUMPI", 1), "sample 0")
    label = b'{"label": %d' % (10 % 7)
    refused(whole.replace(label, b'{"label": 8', 1), r"sample 0 \(image/00010\).*label 8 is outside")
    path.write_bytes(whole)
    assert build_index(tmp_path).meta == index.meta
    assert not list(tmp_path.glob(".*"))


def test_the_same_key_twice_is_refused_with_both_places(tmp_path):
    write_shards(tmp_path, [sample(number) for number in (0, 1, 2, 0)], PIXELS, 2)
    with pytest.raises(UserError, match=r"image/00000.*shard-000001.*same key.*shard-000000"):
        build_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_a_shard_that_is_being_written_is_none_yet(tmp_path):
    index = indexed_set(tmp_path, 12)
    (tmp_path / ".shard-000002.tar.1.tmp.tar").write_bytes(b"half of a")
    assert build_index(tmp_path).meta == index.meta


def test_folders_without_shards_or_description_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"dataset.json: no such file"):
        build_index(tmp_path)
    write_shards(tmp_path, [], PIXELS)
    with pytest.raises(UserError, match="holds no shards"):
        build_index(tmp_path)
    (tmp_path / "dataset.json").write_text('{"kind": "pixels", "colour": 1}')
    with pytest.raises(UserError, match=r"dataset.json: not the description"):
        build_index(tmp_path)


def test_a_reader_keeps_few_files_open(tmp_path):
    index = indexed_set(tmp_path, OPEN_SHARDS + 6, images_per_shard=1)
    reader = ShardReader(index)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for image, row in enumerate(index.images):
            reader.read(image, int(row["first_variant"]))
    assert len(os.listdir("/proc/self/fd")) <= before + OPEN_SHARDS
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
