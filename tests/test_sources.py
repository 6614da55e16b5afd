"""Listing a source: which images, in which order, with which labels; and what happens when it cannot be read."""

import errno
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fitscale.config.errors import UserError
from fitscale.data.index import open_index
from fitscale.prepare.convert import Conversion, Converter
from fitscale.prepare.listing import Source
from fitscale.prepare.preprocess import Rejected
from fitscale.prepare.sources import list_source
from tests.photographs import encoded, photograph, tar


def listed(path: Path) -> list[tuple[str, int | None]]:
    """Key and label of every image."""
    source = list_source(path)
    return [(item.key, item.label) for item in source.items(0, len(source))]


def write(folder: Path, *names: str) -> Path:
    """Files that hold their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_a_listing_keeps_less_than_a_hundred_bytes_an_image(tmp_path):
    lines = [f"n{n % 1000:08d}/n{n % 1000:08d}_{n:05d}.JPEG\t{n % 1000}\n" for n in range(20_000)]
    (tmp_path / "list.txt").write_text("".join(lines))
    list_source(tmp_path / "list.txt")  # imports and caches are no part of it
    tracemalloc.start()
    source = list_source(tmp_path / "list.txt")
    kept = tracemalloc.get_traced_memory()[0] / 20_000
    tracemalloc.stop()
    assert kept < 100
    (item,) = source.items(12_345, 12_346)
    assert (item.key, item.label) == ("n00000345/n00000345_12345", 345) and len(source) == 20_000


def test_keys_that_occur_twice_are_numbered_in_order(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\t0\nb.png\t1\na.jpg\t2\na.gif\t3\nb.bmp\t4\n")
    assert listed(tmp_path / "list.txt") == [("a", 0), ("b", 1), ("a~2", 2), ("a~3", 3), ("b~2", 4)]


def test_an_items_bytes_are_its_own(tmp_path):
    folder = write(tmp_path / "s", "b/1.png", "a/2.png", "a.x/3.png")
    source = list_source(folder)
    assert [item.read().decode() for item in source.items(0, 9)] == ["a/2.png", "a.x/3.png", "b/1.png"]
    assert source.classes == ["a", "a.x", "b"] and source.num_classes == 3


def problems(source: Source) -> list[str]:
    return [item.problem for item in source.items(0, len(source))]


def test_flat_class_tars_are_classes_of_their_own(tmp_path):
    """ImageNet's layout: a tar a class, without folders inside."""
    for name in ("n01440764", "n01443537"):
        tar(tmp_path / f"{name}.tar", {f"{name}_{n}.JPEG": b"x" for n in (1, 2)})
    source = list_source(tmp_path)
    assert (source.classes, source.num_classes) == (["n01440764", "n01443537"], 2)
    assert listed(tmp_path)[1:3] == [("n01440764_2", 0), ("n01443537_1", 1)]


def test_one_tar_without_labels_has_no_class(tmp_path):
    source = list_source(tar(tmp_path / "a.tar", {"1.png": b"x", "2.png": b"x", "2.cls": b"5"}))
    (first, second), (problem, _) = source.items(0, 2), problems(source)
    assert (first.label, second.label) == (None, 5) and problem.startswith("no label: ")


def test_names_and_numbers_are_not_mixed_as_labels(tmp_path):
    with pytest.raises(UserError, match=r"a.tar/2.png has a number for its label, others have a class's name \('x'\)"):
        list_source(tar(tmp_path / "a.tar", {"x/1.png": b"x", "2.png": b"x", "2.cls": b"5"}))


@pytest.mark.parametrize("stray", ["b/extra.tar", "extra.parquet"])
def test_a_folder_of_images_and_of_containers_is_refused(tmp_path, stray):
    write(tmp_path, "a/1.JPG", "b/2.jpg", stray)
    with pytest.raises(UserError, match=rf"holds .* \({stray}\) and images \(a/1.JPG\)"):
        list_source(tmp_path)


def test_what_lies_beside_tars_is_no_image(tmp_path):
    write(tmp_path, "README.md", "index.json", "._a.tar")
    tar(tmp_path / "a.tar", {"x/1.png": b"x"})
    assert listed(tmp_path) == [("x/1", 0)]


def test_links_to_class_folders_are_followed(tmp_path):
    write(tmp_path / "far", "1.png", "deep/2.png")
    folder = write(tmp_path / "source", "a/1.png", "c/1.png")
    (folder / "b").symlink_to(tmp_path / "far")
    assert listed(folder) == [("a/1", 0), ("b/1", 1), ("b/deep/2", 1), ("c/1", 2)]


def test_links_to_nothing_and_to_a_folder_above_are_refused(tmp_path):
    folder = write(tmp_path, "a/1.png")
    (folder / "a" / "2.png").symlink_to(folder / "none.png")
    with pytest.raises(UserError, match=r"a/2.png: neither a file nor a folder"):
        list_source(folder)
    (folder / "a" / "2.png").unlink()
    (folder / "a" / "up").symlink_to(folder)
    with pytest.raises(UserError, match=r"a/up: a link to a folder that holds it"):
        list_source(folder)


def test_an_image_beside_class_folders_has_no_class(tmp_path):
    source = list_source(write(tmp_path, "0.png", "a/1.png"))
    assert [item.label for item in source.items(0, 2)] == [None, 0] and source.classes == ["a"]
    assert problems(source)[0] == "no label: it is in no class folder, though there are some"


def test_a_folder_without_folders_is_one_class_in_the_order_of_names(tmp_path):
    assert listed(write(tmp_path, "b.png", "a.png", ".hidden.png")) == [("a", 0), ("b", 0)]


def broken_tars(folder: Path) -> dict[str, Path]:
    """A tar of six images of a block each, damaged in ways that `tarfile` takes for the archive's end."""
    whole = tar(folder / "whole.tar", {f"c/{n}.png": b"x" for n in range(6)}).read_bytes()
    header = 3 * 1024  # of the fourth member
    damaged = {
        "flipped": whole[:header] + bytes([whole[header] ^ 1]) + whole[header + 1 :],
        "cut": whole[:header],
        "zeroed": whole[:header] + bytes(512) + whole[header + 512 :],
        "two": whole + whole,
        "empty": b"",
    }
    for name, data in damaged.items():
        (folder / f"{name}.tar").write_bytes(data)
    return {name: folder / f"{name}.tar" for name in damaged}


@pytest.mark.parametrize("damage", ["flipped", "cut", "zeroed", "two", "empty"])
def test_a_damaged_tar_is_refused_and_not_taken_for_a_short_one(tmp_path, damage):
    assert len(list_source(tar(tmp_path / "a.tar", {f"c/{n}.png": b"x" for n in range(6)}))) == 6
    with pytest.raises(UserError, match=rf"{damage}.tar: .*(truncated or corrupt after c/\d.png|empty)"):
        list_source(broken_tars(tmp_path)[damage])


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr("fitscale.data.storage.FIRST_WAIT_S", 0)


def converter(source: Path, out: Path, **options: int) -> Converter:
    return Converter(Conversion(str(source), 32, "pixels", "moments", options.get("images_per_shard", 2), 1), out)


def write_images(folder: Path, *names: str) -> Path:
    """A 16 x 16 PNG in every file."""
    write(folder, *names)
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(photograph(number, 16, 16), "PNG"))
    return folder


def rejected(out: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (out / "rejected.jsonl").read_text().splitlines()]


def test_an_image_that_cannot_be_read_now_leaves_its_shard_to_the_next_start(tmp_path, no_wait):
    source, out = write_images(tmp_path / "s", "a/0.png", "a/1.png", "b/2.png", "b/3.png"), tmp_path / "o"
    started = converter(source, out)
    source.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"s/a/0.png: is gone since it was listed"):
        started.run(0, 1)
    (tmp_path / "away").rename(source)
    assert converter(source, out).run(0, 1) == 0
    assert len(open_index(out).images) == 4 and rejected(out) == []


def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_named(tmp_path, no_wait, monkeypatch):
    source = list_source(write(tmp_path, "a.png"))
    (item,) = source.items(0, 1)
    faults = [OSError(errno.ESTALE, "Stale file handle")] * 4
    whole = Path.read_bytes

    def faulty(path: Path) -> bytes:
        if faults:
            raise faults.pop()
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", faulty)
    assert item.read() == b"a.png"
    faults += [OSError(errno.EIO, "Input/output error")] * 5
    with pytest.raises(UserError, match=r"a.png: cannot be read after 5 attempts.*Input/output error"):
        item.read()


def test_what_a_list_names_and_is_not_there_is_rejected(tmp_path, no_wait):
    write(tmp_path, "a/1.png")
    (tmp_path / "list.txt").write_text("none.png\na\na/1.png/2.png\n\t3\n")
    for item in list_source(tmp_path / "list.txt").items(0, 4):
        with pytest.raises(Rejected, match=r"cannot be read: (No such file|Is a directory|Not a directory)"):
            item.read()


def test_containers_that_go_away_or_shrink_are_errors_not_rejections(tmp_path, no_wait):
    archive = tar(tmp_path / "a.tar", {"c/1.png": b"x" * 2000})
    table = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": [b"x"], "label": [1]}), table)
    (in_tar,), (in_table,) = (list_source(path).items(0, 1) for path in (archive, table))
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"a.tar: ends after 488 of 2000 bytes"):
        in_tar.read()
    for path, item in ((archive, in_tar), (table, in_table)):
        path.unlink()
        with pytest.raises(UserError, match=rf"{path.name}: is gone since it was listed"):
            item.read()


def test_short_memory_is_no_property_of_an_image(tmp_path, monkeypatch):
    source, out = write_images(tmp_path / "s", "0.png", "1.png"), tmp_path / "o"
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda image: bytearray(2**62))
    with pytest.raises(UserError, match=r"0.png: memory was too short to decode it.*--threads"):
        converter(source, out).run(0, 1)
    monkeypatch.undo()
    assert converter(source, out).run(0, 1) == 0 and rejected(out) == []


def test_a_file_name_that_is_not_utf8_has_a_key_all_the_same(tmp_path):
    source, out = write_images(tmp_path / "s", "a/0.png"), tmp_path / "o"
    (source / "a" / "0.png").rename(source / "a" / os.fsdecode(b"caf\xe9.png"))
    tar(tmp_path / "a.tar", {"c/caf\udce9.png": b"x"})
    tar(tmp_path / "b.tar", {"c\udce9/1.png": b"x"})
    (tmp_path / "list.txt").write_bytes(b"s/a/caf\xe9.png\t0\n")
    assert listed(tmp_path / "a.tar") == [("c/caf\\udce9", 0)]
    assert list_source(tmp_path / "b.tar").classes == ["c\\udce9"]
    (item,) = list_source(tmp_path / "list.txt").items(0, 1)
    assert item.read() == (source / os.fsdecode(b"a/caf\xe9.png")).read_bytes()
    assert converter(source, out).run(0, 1) == 0
    assert open_index(out).key(0) == "a/caf\\udce9"


def damaged_parquet(path: Path) -> Path:
    """Three row groups of two images; the second group's image pages are overwritten."""
    images = [encoded(photograph(number, 16, 16), "PNG") for number in range(6)]
    parquet.write_table(pa.table({"image": images, "label": [0] * 6}), path, row_group_size=2, use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    with open(path, "r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    return path


def test_the_images_of_a_damaged_row_group_are_rejected(tmp_path, no_wait):
    source, out = damaged_parquet(tmp_path / "a.parquet"), tmp_path / "o"
    assert converter(source, out).run(0, 1) == 0
    assert len(open_index(out).images) == 4
    reasons = rejected(out)
    assert len(reasons) == 2 and all(reason.startswith("the Parquet row group is damaged: ") for reason in reasons)


def test_a_parquet_file_with_damaged_labels_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": [b"x"], "label": [1]}), path, use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    with open(path, "r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    with pytest.raises(UserError, match=r"a.parquet: not a Parquet file, damaged, or out of reach: "):
        list_source(path)
