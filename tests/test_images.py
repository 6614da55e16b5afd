"""`tools/make_shards.py images`: what is in the shards, from any source, by any workers, however often killed."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from sklearn.datasets import load_sample_images

from fitscale.config.schema_data import LatentConfig
from fitscale.data.build_index import build_index
from fitscale.data.encode import Decoder, Encoder
from fitscale.data.index import ShardReader, key_hash, open_index
from fitscale.data.shards import KINDS
from fitscale.prepare import convert
from fitscale.prepare.preprocess import Rejected, pictures
from tests.conftest import ROOT
from tests.kills import die_after
from tests.photographs import broken_files, encoded, photograph, tar, tiny_vae, write_photographs
from tests.programs import run_tool

IMAGES = 120
PIXELS = ("--encoder", "pixels", "--images-per-shard", "12")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(folder: Path, out: Path, launch: list[str] | None = None) -> list[str]:
    """The program in a process of its own, or of torchrun's."""
    return [
        sys.executable,
        *(launch or []),
        str(ROOT / "tools/make_shards.py"),
        "images",
        str(folder),
        str(out),
        *PIXELS,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photograph-like files of 60 sizes, scikit-learn's two photographs, and twenty broken ones."""
    path = tmp_path_factory.mktemp("images") / "source"
    write_photographs(path, IMAGES, sizes=60)
    for number, image in enumerate(load_sample_images().images):
        (path / "class0" / f"sample{number}.png").write_bytes(encoded(photograph_of(image), "PNG"))
    (path / "broken").mkdir()
    for name, data in broken_files().items():
        (path / "broken" / name).write_bytes(data)
    return path


def photograph_of(image: np.ndarray):
    from PIL import Image

    return Image.fromarray(image)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "vae"
    tiny_vae(path)
    return path


@pytest.fixture(scope="module")
def pixels(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pixels") / "shards"
    done = run_tool("make_shards", "images", folder, out, *PIXELS)
    assert done.returncode == 0, done.stderr
    return out


def contents(out: Path) -> dict[str, str]:
    """Hash of every file of a shard set; unfinished files would be among them."""
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*") if p.is_file()}


def by_key(out: Path) -> dict[int, tuple[int, list[tuple[str, bool, np.ndarray]]]]:
    """Key hash -> label and variants, read as training reads them."""
    index = open_index(out)
    reader, found = ShardReader(index), {}
    for number, image in enumerate(index.images):
        first = int(image["first_variant"])
        rows = [(place, index.variants[place]) for place in range(first, first + int(image["variants"]))]
        arrays = [(KINDS[row["kind"]], bool(row["flip"]), reader.read(number, place)) for place, row in rows]
        found[int(image["key_hash"])] = (int(image["label"]), arrays)
    return found


def test_pixels_are_stored_exactly(folder, pixels):
    stored = by_key(pixels)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "broken"]
    assert len(stored) == len(files) == IMAGES + 2
    decoder = Decoder(LatentConfig("pixels", None, 1, 1.0))
    for path in files:
        label, variants = stored[key_hash(str(path.relative_to(folder).with_suffix("")))]
        assert label == 1 + int(path.parent.name.removeprefix("class"))  # "broken" sorts first
        expected = pictures(path.read_bytes(), 256)
        assert [(kind, flip) for kind, flip, _ in variants] == [(one.kind, one.flip) for one in expected]
        for (_, _, array), picture in zip(variants, expected, strict=True):
            np.testing.assert_array_equal(array, picture.array_CHW)
            assert array.shape[1] % 16 == array.shape[2] % 16 == 0 and array[0].size <= 256**2
    import torch

    from fitscale.data.encode import to_float

    trained_on = torch.from_numpy(to_float(variants[0][2]))
    np.testing.assert_array_equal(decoder(trained_on), expected[0].array_CHW.transpose(1, 2, 0))


def test_every_broken_file_is_rejected_with_its_reason(pixels):
    rejected = [json.loads(line) for line in (pixels / "rejected.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rejected} == {f"broken/{name}" for name in broken_files()}
    assert len(rejected) == 20 and all(row["reason"] for row in rejected)
    summary = json.loads((pixels / "summary.json").read_text())
    assert (summary["images"], summary["rejected"], sum(summary["reasons"].values())) == (IMAGES + 2, 20, 20)
    assert sum(count for _, _, count in summary["sizes"]) == summary["variants"]
    assert (pixels / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_metadata_names_how_the_shards_were_made(pixels):
    meta = open_index(pixels).meta
    assert meta.recipe["resize"] == "Pillow Lanczos, antialiased" and meta.recipe["side"] == 256
    assert meta.recipe["classes"] == [f"class{n}" for n in range(5)] or "broken" in meta.recipe["classes"]
    assert (meta.kind, meta.channels, meta.factor) == ("pixels", 3, 1)


def test_the_index_equals_one_built_from_the_shards(pixels, tmp_path):
    shutil.copytree(pixels, tmp_path / "copy")
    build_index(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(pixels)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_make_the_same_shards(folder, pixels, tmp_path, monkeypatch, workers):
    """Two are told their numbers; four are a Slurm array of the ids 5, 7, 9 and 11."""
    out = tmp_path / "shards"
    for worker in reversed(range(workers)):
        assert not (out / "index.json").exists()
        told = ("--worker", worker, "--workers", workers) if workers == 2 else ()
        for name, value in {"ID": 5 + 2 * worker, "COUNT": 4, "MIN": 5, "MAX": 11, "STEP": 2}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        done = run_tool("make_shards", "images", folder, out, *PIXELS, *told)
        assert done.returncode == 0, done.stderr
        assert f"worker {worker} of {workers} (" in done.stdout
        assert ("left to others" in done.stdout) == (worker > 0)
    assert contents(out) == contents(pixels)


def test_torchruns_two_workers_make_the_same_shards(folder, pixels, tmp_path):
    out = tmp_path / "shards"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(command(folder, out, launch), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"worker {rank} of 2 (torchrun, rank {rank})" in done.stdout for rank in (0, 1))
    assert contents(out) == contents(pixels)


def convert_and_die(calls: int, folder: str, out: str) -> None:
    """Make shards until SIGKILL, `calls` calls after the second begins to be written, or on the way to a third."""
    write, shards = convert.write_shard, iter(range(10**6))

    def counted_write(*arguments):
        if next(shards) == 1:
            die_after(calls)
        write(*arguments)

    convert.write_shard = counted_write
    run_tool("make_shards", "images", folder, out, *PIXELS, "--threads", "1")


def test_killed_five_times_and_continued_nothing_is_lost_or_double(folder, pixels, tmp_path):
    out, chance = tmp_path / "shards", random.Random(1)
    for kill in range(5):
        arguments = (chance.randrange(30_000), str(folder), str(out))
        code = f"from tests.test_images import convert_and_die; convert_and_die(*{arguments})"
        process = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, check=False)
        assert process.returncode == -signal.SIGKILL, f"ended by itself before kill {kill + 1}"
        assert not (out / "index.json").exists()
    assert any(out.glob(".shard-*.tmp.tar")), "no kill hit a shard that was being written"
    subprocess.run(command(folder, out), check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(pixels)


def test_running_again_does_nothing_and_reads_no_image(folder, pixels, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in pixels.iterdir()}
    monkeypatch.delattr(convert, "pictures")
    done = run_tool("make_shards", "images", folder, pixels, *PIXELS)
    assert done.returncode == 0 and "finished, 122 images" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in pixels.iterdir()}


def test_moments_are_the_vaes_posterior_whatever_was_batched(folder, vae, tmp_path):
    out = tmp_path / "shards"
    done = run_tool("make_shards", "images", folder, out, "--encoder", vae, "--batch-size", 7)
    assert done.returncode == 0, done.stderr
    index, stored, encoder = open_index(out), by_key(out), Encoder(str(vae))
    assert (index.meta.kind, index.meta.factor, index.meta.channels, index.meta.moments) == ("vae", 8, 4, True)
    for path in sorted(folder.glob("class1/*"))[:6]:
        _, variants = stored[key_hash(str(path.relative_to(folder).with_suffix("")))]
        for (kind, flip, moments), picture in zip(variants, pictures(path.read_bytes(), 256), strict=True):
            _, height, width = picture.array_CHW.shape
            assert (kind, flip, moments.shape) == (picture.kind, picture.flip, (8, height // 8, width // 8))
            pixels_BHW3 = np.stack([picture.array_CHW.transpose(1, 2, 0)])
            np.testing.assert_allclose(moments, encoder(pixels_BHW3)[0], atol=2e-3)


def test_store_sample_draws_one_latent(folder, vae, tmp_path):
    arrays = {}
    for store in ("moments", "sample"):
        done = run_tool(
            "make_shards", "images", folder / "class0", tmp_path / store, "--encoder", vae, "--store", store
        )
        assert done.returncode == 0, done.stderr
        arrays[store] = by_key(tmp_path / store)
    noise = []
    for key, (_, variants) in arrays["moments"].items():
        for (*_, moments), (*_, sample) in zip(variants, arrays["sample"][key][1], strict=True):
            mean, std = np.split(moments.astype(np.float32), 2)
            noise.append(((sample - mean) / std).ravel())
    values = np.concatenate(noise)
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert not np.array_equal(noise[0][:24], noise[1][:24])  # every variant has a noise of its own


def _sources(folder: Path, tmp: Path) -> dict[str, Path]:
    """Six images with labels 0, 1, 2, 0, 1, 2 in every kind of source."""
    images = [encoded(photograph(n, 40 + n, 50), "PNG") for n in range(6)]
    cells = {"image": [{"bytes": data, "path": None} for data in images], "label": [n % 3 for n in range(6)]}
    parquet.write_table(pa.table(cells), tmp / "a.parquet", row_group_size=4)
    plain = {"image": images, "label": [n % 3 for n in range(6)]}
    parquet.write_table(pa.table(plain), tmp / "b.parquet")
    lines = []
    for number, data in enumerate(images):
        (tmp / f"i {number}.png").write_bytes(data)
        lines.append(f"i {number}.png\t{number % 3}")
        (tmp / "folder" / f"c{number % 3}").mkdir(parents=True, exist_ok=True)
        (tmp / "folder" / f"c{number % 3}" / f"{number}.png").write_bytes(data)
    (tmp / "list.txt").write_text("\n".join(lines) + "\n")
    cls = {k: v for n, d in enumerate(images) for k, v in ((f"{n:03d}.cls", b"%d" % (n % 3)), (f"{n:03d}.png", d))}
    js = {
        k: v
        for n, d in enumerate(images)
        for k, v in ((f"x/{n:03d}.png", d), (f"x/{n:03d}.json", json.dumps({"label": n % 3}).encode()))
    }
    return {
        "parquet": tmp / "a.parquet",
        "parquet of bytes": tmp / "b.parquet",
        "list": tmp / "list.txt",
        "folder": tmp / "folder",
        "webdataset cls": tar(tmp / "cls.tar", cls),
        "webdataset json": tar(tmp / "json.tar", js),
        "tar of folders": tar(tmp / "dirs.tar", {f"c{n % 3}/{n}.png": d for n, d in enumerate(images)}),
    }


def test_every_kind_of_source_gives_the_same_images(folder, tmp_path):
    expected = sorted(
        (n % 3, pictures(encoded(photograph(n, 40 + n, 50), "PNG"), 256)[0].array_CHW.tobytes()) for n in range(6)
    )
    for name, source in _sources(folder, tmp_path).items():
        out = tmp_path / "out" / name
        done = run_tool("make_shards", "images", source, out, "--encoder", "pixels")
        assert done.returncode == 0, (name, done.stderr)
        found = [(label, v[0][2].tobytes()) for label, v in by_key(out).values()]
        assert sorted(found) == expected, name
        assert open_index(out).meta.num_classes == 3


def test_wrong_labels_and_missing_files_are_rejected(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photograph(0, 32, 32), "PNG"))
    (tmp_path / "list.txt").write_text("a.png\t1\nmissing.png\t0\na.png\tcat\na.png\t-3\n")
    assert (
        run_tool("make_shards", "images", tmp_path / "list.txt", tmp_path / "o", "--encoder", "pixels").returncode == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "o" / "rejected.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rows] == [
        "cannot be read: No such file or directory",
        "the list's label 'cat' is no number",
        "the list's label -3 is below 0",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--side", 100], "--side: 100 is not a multiple of 16"),
        (["--images-per-shard", 0], "--images-per-shard: 0 is too small"),
        (["--worker", 1], "--worker and --workers go together"),
        (["--worker", 2, "--workers", 2], "--worker: 2 is not one of 0 .. 1"),
    ],
)
def test_wrong_options_are_refused(folder, tmp_path, options, message):
    done = run_tool("make_shards", "images", folder, tmp_path / "o", "--encoder", "pixels", *options)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "o").exists()


def test_other_options_than_the_folder_was_begun_with_are_refused(folder, pixels):
    done = run_tool("make_shards", "images", folder, pixels, "--encoder", "pixels", "--side", 512)
    assert done.returncode == 2 and "was begun with other options (side 256, not 512" in done.stderr


def test_a_source_of_nothing_usable_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.jpg").write_bytes(b"no")
    done = run_tool("make_shards", "images", tmp_path / "s", tmp_path / "o", "--encoder", "pixels")
    assert done.returncode == 2 and "all 1 images were rejected" in done.stderr
    done = run_tool("make_shards", "images", tmp_path / "none", tmp_path / "o2", "--encoder", "pixels")
    assert done.returncode == 2 and "no such file or folder" in done.stderr


def test_a_vae_that_is_not_there_is_one_message(folder, tmp_path):
    done = run_tool("make_shards", "images", folder, tmp_path / "o", "--encoder", tmp_path / "no-vae")
    assert done.returncode == 2 and "no AutoencoderKL at" in done.stderr


def test_reasons_are_raised_as_rejected():
    with pytest.raises(Rejected):
        pictures(b"", 256)
