"""Conversions that are interrupted, come late, or find another source than they were begun with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fitscale.config.errors import UserError
from fitscale.data.index import open_index
from fitscale.prepare.convert import Conversion, Converter
from tests.photographs import encoded, photograph, tiny_vae
from tests.programs import run_tool


def write_images(folder: Path, *names: str) -> Path:
    """A 16 x 16 PNG in every file."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(photograph(number, 16, 16), "PNG"))
    return folder


def converter(source: Path, out: Path) -> Converter:
    return Converter(Conversion(str(source), 32, "pixels", "moments", 2, 1), out)


def state(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_source_that_lost_an_image_between_starts_is_refused(tmp_path):
    source, out = write_images(tmp_path / "s", *(f"{n}.png" for n in range(8))), tmp_path / "o"
    assert converter(source, out).run(0, 2) == 2
    (source / "0.png").unlink()
    with pytest.raises(UserError, match=r"o: was begun with other images \(8 then, 7 now\), labels or keys") as caught:
        converter(source, out).run(0, 1)
    assert "\n" not in str(caught.value)
    write_images(source, "0.png")
    assert converter(source, out).run(0, 1) == 0 and len(open_index(out).images) == 8


def test_a_source_with_a_new_class_is_refused(tmp_path):
    source, out = write_images(tmp_path / "s", *(f"{c}/{n}.png" for c in "bc" for n in range(2))), tmp_path / "o"
    assert converter(source, out).run(0, 2) == 1
    (source / "b" / "0.png").rename(source / "0.png")
    (source / "a").mkdir()
    (source / "0.png").rename(source / "a" / "0.png")
    with pytest.raises(UserError, match=r"o: was begun with other images \(4 then, 4 now\), labels or keys"):
        converter(source, out).run(0, 1)


def test_what_an_earlier_version_began_is_refused_plainly(tmp_path):
    source, out = write_images(tmp_path / "s", "0.png", "1.png", "2.png"), tmp_path / "o"
    assert converter(source, out).run(0, 2) == 1
    record = json.loads((out / "job.json").read_text())
    options = ("source", "side", "encoder", "store", "images_per_shard", "batch_size")
    (out / "job.json").write_text(json.dumps({key: record[key] for key in options}))
    with pytest.raises(UserError, match=r"o: was begun by an earlier version.*choose another folder"):
        converter(source, out).run(0, 1)


def test_parts_that_do_not_add_up_to_the_source_are_not_joined(tmp_path):
    source, out = write_images(tmp_path / "s", *(f"{n}.png" for n in range(4))), tmp_path / "o"
    other = write_images(tmp_path / "s2", *(f"{n}.png" for n in range(3))), tmp_path / "o2"
    assert converter(source, out).run(0, 2) == converter(*other).run(1, 2) == 1
    shutil.copytree(other[1], out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("job.json"))
    with pytest.raises(UserError, match=r"o: its parts hold 3 images and 0 rejections, the source lists 4"):
        converter(source, out).run(0, 1)
    assert not (out / "index.json").exists()


def test_a_worker_that_comes_after_the_last_leaves_everything_as_it_is(tmp_path):
    source, out = write_images(tmp_path / "s", *(f"{n}.png" for n in range(6))), tmp_path / "o"
    late = converter(source, out)
    assert converter(source, out).run(0, 1) == 0
    before = state(out)
    assert late.run(0, 2) == 0
    assert state(out) == before


def meanwhile(monkeypatch, act: Callable[[], object]) -> list:
    """Have `act` done once, when the next image is read; its result will be in the list."""
    read, results = Path.read_bytes, []

    def overtaken(path: Path) -> bytes:
        monkeypatch.setattr(Path, "read_bytes", read)
        results.append(act())
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", overtaken)
    return results


def test_a_worker_that_is_overtaken_at_work_leaves_everything_as_it_is(tmp_path, monkeypatch):
    source, out = write_images(tmp_path / "s", *(f"{n}.png" for n in range(6))), tmp_path / "o"
    slow = converter(source, out)
    seen = meanwhile(monkeypatch, lambda: (converter(source, out).run(0, 1), state(out)))
    assert slow.run(0, 2) == 0
    assert [(0, state(out))] == seen


def test_a_chunk_that_another_worker_has_done_meanwhile_is_skipped(tmp_path, monkeypatch):
    source, out = write_images(tmp_path / "s", *(f"{n}.png" for n in range(8))), tmp_path / "o"
    slow, shard = converter(source, out), out / "shard-000002.tar"
    seen = meanwhile(monkeypatch, lambda: (converter(source, out).run(2, 4), shard.stat().st_mtime_ns))
    assert slow.run(0, 2) == 2
    assert [(3, shard.stat().st_mtime_ns)] == seen and len(list(out.glob("*.tar"))) == 2


def test_workers_that_encode_in_another_type_are_refused(tmp_path):
    tiny_vae(tmp_path / "vae")
    source, out = write_images(tmp_path / "s", *(f"{n}.png" for n in range(4))), tmp_path / "o"
    options = ("images", source, out, "--encoder", tmp_path / "vae", "--images-per-shard", 2, "--device", "cpu")
    done = run_tool("make_shards", *options, "--worker", 0, "--workers", 2)
    assert done.returncode == 0 and "worker 0 encodes on cpu in float32" in done.stdout
    record = json.loads((out / "job.json").read_text())
    assert record["dtype"] == "float32"
    (out / "job.json").write_text(json.dumps(record | {"dtype": "bfloat16"}))
    done = run_tool("make_shards", *options)
    assert done.returncode == 2 and "was begun with an encoder in bfloat16, this worker's is in float32" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_asked_for_and_missing_is_named(tmp_path):
    source = write_images(tmp_path / "s", "0.png")
    done = run_tool("make_shards", "images", source, tmp_path / "o", "--encoder", tmp_path, "--device", "cuda")
    assert done.returncode == 2 and "--device: no CUDA device" in done.stderr and not (tmp_path / "o").exists()
