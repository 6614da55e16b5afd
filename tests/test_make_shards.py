"""tools/make_shards.py as a user runs it, and the digits that it writes."""

import importlib.util
import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from fitscale.config.errors import UserError
from fitscale.data.encode import patchify
from fitscale.data.index import ShardReader, key_hash, open_index
from fitscale.prepare.convert import _load_part
from fitscale.prepare.digits import SCALES, digit_variants
from tests.conftest import ROOT
from tests.photographs import write_photographs
from tests.programs import run_tool


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("make_shards", ROOT / "tools" / "make_shards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def test_digits_are_stored_cropped_at_every_scale(digits_shards):
    index, digits = open_index(digits_shards), digit_variants()
    assert len(index.images) == len(digits) == 1797
    assert (index.meta.kind, index.meta.channels, index.meta.num_classes) == ("pixels", 1, 10)
    reader, row_of = ShardReader(index), {int(row["key_hash"]): image for image, row in enumerate(index.images)}
    for number in range(0, 1797, 50):
        digit = digits[number]
        image = row_of[key_hash(digit.key)]
        row = index.images[image]
        assert row["label"] == load_digits().target[number] and row["variants"] == len(SCALES)
        for place, variant in enumerate(digit.variants, int(row["first_variant"])):
            np.testing.assert_array_equal(reader.read(image, place), variant.array_CHW, strict=True)


def test_the_middle_scale_is_the_scan_itself_cropped_to_its_ink():
    scan, digit = load_digits().images[3], digit_variants()[3]
    small, same, large = (variant.array_CHW[0] for variant in digit.variants)
    padded = np.zeros_like(scan)
    top, left = (np.flatnonzero(scan.any(axis=axis))[0] for axis in (1, 0))
    padded[top : top + same.shape[0], left : left + same.shape[1]] = same
    assert np.abs(padded - scan / 16 * 255).max() <= 0.5
    assert same.any(axis=1)[[0, -1]].all() and same.any(axis=0)[[0, -1]].all()
    assert small.shape == tuple(round(0.75 * side) for side in same.shape) and large.shape[0] == 10
    assert abs(float(small.mean()) - float(large.mean())) < 20  # the same picture


def test_token_counts_span_more_than_four_times(digits_shards):
    areas = [height * width for height, width, _ in open_index(digits_shards).meta.sizes]
    assert max(areas) == 100 and min(areas) <= 16


def test_running_again_says_so_and_touches_nothing(main, digits_shards, capsys):
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in digits_shards.iterdir()}
    assert main("digits", digits_shards) == 0
    output = capsys.readouterr().out
    assert "finished before, 1797 images in 5391 variants, 8 shards" in output
    areas = np.sort(np.prod([variant.array_CHW.shape for digit in digit_variants() for variant in digit.variants], 1))
    assert f"min {areas[0]}, median {areas[5391 // 2]}, max {areas[-1]}" in output
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in digits_shards.iterdir()}


@pytest.mark.parametrize("other", [("--scales", 1), ("--images-per-shard", 100)])
def test_other_shards_in_the_folder_are_refused(main, digits_shards, capsys, other):
    assert main("digits", digits_shards, *other) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {digits_shards}: holds other shards") and output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--scales", 0], "above 0"), (["--images-per-shard", 0], "images per shard: 0 is too small")],
)
def test_wrong_options_write_nothing(main, tmp_path, capsys, arguments, message):
    assert main("digits", tmp_path / "new", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused(main, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    assert main("digits", tmp_path) == 2
    assert "holds no finished shards" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_index_verb_makes_the_index_again(main, digits_shards, tmp_path, capsys):
    for path in [*digits_shards.glob("*.tar"), digits_shards / "dataset.json"]:
        (tmp_path / path.name).symlink_to(path)
    assert main("index", tmp_path) == 0
    assert "1797 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "index.json").read_text()) == json.loads((digits_shards / "index.json").read_text())
    assert (tmp_path / "variants.npy").read_bytes() == (digits_shards / "variants.npy").read_bytes()


@pytest.mark.parametrize("verb", ["digits", "index", "published"])
def test_help_shows_an_example(main, verb, capsys):
    with pytest.raises(SystemExit) as exit:
        main(verb, "--help")
    assert exit.value.code == 0
    assert f"example: python tools/make_shards.py {verb}" in capsys.readouterr().out


def test_sides_are_the_nearest_multiples_where_patches_of_several_pixels_need_them(main, tmp_path):
    main("digits", tmp_path / "even", "--multiple", 2)
    sizes = [(height, width) for height, width, _ in open_index(tmp_path / "even").meta.sizes]
    assert len(sizes) > 5 and not any(height % 2 or width % 2 for height, width in sizes)
    for own, even in zip(digit_variants()[:20], digit_variants(multiple=2)[:20], strict=True):
        for one, other in zip(own.variants, even.variants, strict=True):
            assert np.abs(np.subtract(one.array_CHW.shape, other.array_CHW.shape)).max() <= 1
    assert main("digits", tmp_path / "even") == 2  # holds other shards
    with pytest.raises(UserError, match="--multiple"):
        digit_variants(multiple=0)


def test_scales_must_make_sense():
    with pytest.raises(UserError, match="above 0"):
        digit_variants(())


def write_published(folder, name, rows, cols, label, seed):
    """A file of the published layout, and its latents (2, 4, 2 * rows, 2 * cols)."""
    latents = np.random.default_rng(seed).standard_normal((2, 4, 2 * rows, 2 * cols)).astype(np.float16)
    feature = np.stack([patchify(one, 2).reshape(rows, cols, 16) for one in latents])
    folder.mkdir(exist_ok=True)
    grid = np.zeros((2, rows * cols), np.float16)
    tensors = {"feature": feature, "grid": grid, "size": np.array([rows, cols], np.int32), "label": np.array(label)}
    save_file(tensors, folder / f"{name}.safetensors")
    return latents


def test_the_published_layout_becomes_shards(main, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    small = write_published(source / "from_16_to_256", "a", 3, 5, 2, 0)
    resized = write_published(source / "greater_than_256_resize", "b", 13, 18, 1, 1)
    cropped = write_published(source / "greater_than_256_crop", "b", 16, 16, 1, 2)
    assert main("published", source, tmp_path / "out") == 0
    assert "2 images in 6 variants" in capsys.readouterr().out
    index = open_index(tmp_path / "out")
    reader, found = ShardReader(index), {index.key(image): (image, row) for image, row in enumerate(index.images)}
    for key, label, expected in (("a", 2, [*small]), ("b", 1, [*resized, *cropped])):
        image, row = found[key]
        assert (row["label"], row["variants"]) == (label, len(expected))
        for place, latent in enumerate(expected, int(row["first_variant"])):
            np.testing.assert_array_equal(reader.read(image, place), latent)
            assert index.variants["flip"][place] == place % 2
    assert main("published", source, tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err


def test_what_is_not_of_the_published_layout_is_named(main, tmp_path, capsys):
    folder = tmp_path / "from_16_to_256"
    assert main("published", tmp_path, tmp_path / "out") == 2
    assert "holds no .safetensors files in from_16_to_256" in capsys.readouterr().err
    write_published(folder, "a", 3, 5, 2, 0)
    (folder / "b.safetensors").write_bytes(b"no")
    assert main("published", tmp_path, tmp_path / "out") == 2
    assert "b.safetensors: not a file of the published layout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_says_what_it_does_after_the_last_image(tmp_path):
    write_photographs(tmp_path / "source", 6, sizes=2)
    options = ("--encoder", "pixels", "--images-per-shard", "3")
    done = run_tool("make_shards", "images", tmp_path / "source", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    stages = ("encoding shard-000001.tar", "checking shard-000001.tar", "joining", "index")
    told = [done.stderr.rfind(text) for text in stages]
    assert -1 not in told and told == sorted(told)


def test_a_damaged_part_is_named_and_never_unpacked_beyond_its_size(tmp_path):
    path, about = tmp_path / "000000.npz", np.array('{"shard": ["a.tar", 1, "x"], "rejected": []}')
    writers = {
        "a bomb": lambda: np.savez_compressed(path, about=about, images=np.zeros(10**7, np.uint8)),
        "garbage": lambda: path.write_bytes(b"PK\x03\x04" + bytes(100)),
        "no archive": lambda: np.save(path.open("wb"), np.zeros(3)),
        "nested text": lambda: np.savez(path, about=np.array("[" * 100_000)),
        "rows of another kind": lambda: np.savez(path, about=about, images=np.zeros(3, "U3"), variants=np.zeros(3)),
        "no rows": lambda: np.savez(path, about=about),
    }
    for name, write in writers.items():
        write()
        with pytest.raises(UserError, match=r"000000\.npz: damaged .*; remove it and start again"):
            pytest.fail(f"{name}: {_load_part(path)}")
