"""Listing a source: which images, in which order, with which labels; and what happens when it cannot be read."""

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from fitscale.config.errors import UserError
from fitscale.data.listing import Source
from fitscale.data.sources import list_source


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


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar, complete and in the order given."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


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
