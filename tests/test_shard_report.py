"""`fitscale data`: the figures are the shards', damage is found, pictures are written."""

import numpy as np
import pytest
from PIL import Image

from fitscale.cli import main
from fitscale.data.index import ShardReader, open_index
from fitscale.prepare.statistics import bucketed, drawn_sizes, first_fit, label_counts, packed, padded_to_longest
from tests.shard_sets import LATENTS, indexed_set

LINEAR = (1.0, 0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "set"
    folder.mkdir()
    indexed_set(folder, 50)
    return folder


def test_sizes_count_as_often_as_an_epoch_draws_them(shards):
    index, drawn = open_index(shards), drawn_sizes(open_index(shards), 2)
    expected: dict[tuple[int, int], float] = {}
    for row in index.images:
        first = int(row["first_variant"])
        for variant in index.variants[first : first + int(row["variants"])]:
            size = (int(variant["height"]) // 2, int(variant["width"]) // 2)
            expected[size] = expected.get(size, 0) + 1 / int(row["variants"])
    found = {(int(r), int(c)): d for r, c, d in zip(drawn.rows, drawn.cols, drawn.draws, strict=True)}
    assert found == pytest.approx(expected) and sum(found.values()) == pytest.approx(50)
    assert label_counts(index).tolist() == [8, 7, 7, 7, 7, 7, 7]


def test_the_report_says_what_is_there(shards, tmp_path, capsys):
    assert main(["data", str(shards), "--out", str(tmp_path / "r"), "--batch", "16", "--ranks", "2", "--verify"]) == 0
    out = capsys.readouterr().out
    for text in (
        "50 images in 200 variants, 5 shards",
        "7 classes; images a class: least 7, median 7, most 8",
        "tokens per image",
        "aspect ratio",
        "padded to the longest",
        "5 shards verified: every checksum is right, index.json and all rows agree",
    ):
        assert text in out
    for name in ("tokens.png", "contact_sheet.png"):
        with Image.open(tmp_path / "r" / name) as image:
            assert min(image.size) > 100


def test_the_contact_sheet_shows_the_stored_pixels(shards, tmp_path):
    assert main(["data", str(shards), "--out", str(tmp_path)]) == 0
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("RGB")).reshape(-1, 3)
    stored = ShardReader(open_index(shards)).read(0, 0)
    colours = {tuple(pixel) for pixel in sheet.tolist()}
    assert {tuple(pixel) for pixel in stored.reshape(3, -1).T.tolist()} <= colours


def test_verify_names_every_damaged_shard(tmp_path, capsys):
    indexed_set(tmp_path, 30)
    for name in ("shard-000000.tar", "shard-000002.tar"):
        data = bytearray((tmp_path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / name).write_bytes(data)
    arguments = ["data", str(tmp_path), "--out", str(tmp_path / "r")]
    assert main([*arguments, "--verify"]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert "wrong checksums in 2 shards: shard-000000.tar, shard-000002.tar" in error
    assert all(line.startswith("verify: ") for line in progress)


def test_latents_need_their_vae_for_a_sheet(tmp_path, capsys):
    indexed_set(tmp_path, 20, meta=LATENTS)
    assert main(["data", str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    assert "name their VAE with --vae" in capsys.readouterr().out
    assert not (tmp_path / "r" / "contact_sheet.png").exists()


@pytest.mark.parametrize(("option", "message"), [("--ranks", "--ranks: 0 is too small"), ("--batch", "--batch: 0")])
def test_wrong_options(shards, capsys, option, message):
    assert main(["data", str(shards), option, "0"]) == 2
    assert message in capsys.readouterr().err


def test_a_patch_size_that_does_not_divide_is_refused(shards, capsys):
    assert main(["data", str(shards), "--patch-size", "4"]) == 2
    assert "multiples of --patch-size 4" in capsys.readouterr().err


def test_losses_of_the_schemes_by_hand():
    tokens = np.array([4, 4, 2, 2])
    longest = padded_to_longest(tokens, LINEAR, 2)
    assert (longest.padding_share, longest.imbalance, longest.time_lost) == (0.25, 0.0, 0.25)
    perfect = packed(tokens, LINEAR, 2, 100)
    assert (perfect.padding_share, perfect.time_lost) == (0.0, 0.0)
    shapes = bucketed(tokens, tokens, LINEAR, 2, 8)  # a rank has the fours, the other the twos
    assert (shapes.padding_share, shapes.imbalance, shapes.time_lost) == (0.0, pytest.approx(1 / 3), 0.25)
    filled = bucketed(np.array([4, 4, 4]), np.array([4, 4, 4]), LINEAR, 1, 8)  # 2 + 1, the second filled up
    assert filled.padding_share == 0.25
    fit = first_fit(np.array([3, 3, 2, 2, 2]), LINEAR, 2, 100)  # packs of 6: 3+3, 2+2+2
    assert (fit.padding_share, fit.imbalance) == (0.0, 0.0)
    uneven = first_fit(np.array([4, 4, 2, 2, 2]), LINEAR, 2, 100)  # packs of 7: 4+2, 4+2, and 2 more for rank 0
    assert uneven.imbalance == pytest.approx(1 / 7)
