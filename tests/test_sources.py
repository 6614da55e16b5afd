"""Listing a source: which images, in which order, with which labels; and what happens when it cannot be read."""

import tracemalloc
from pathlib import Path

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
