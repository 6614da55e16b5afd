"""Images as arrays: batches of one shape, and what a person sees of them, PNG files and contact sheets. No torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from fitscale.config.files import replacing

Item = TypeVar("Item")
CELL = 96  # least side of an image on a contact sheet, in pixels; small images are enlarged by whole factors
GAP = 6
TITLE = 14  # height of a line of text


def rgb(images: np.ndarray) -> np.ndarray:
    """(..., 1 or 3) -> (..., 3): grey is repeated."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def in_batches(
    function: Callable[[np.ndarray], np.ndarray], arrays: Sequence[np.ndarray], most: int
) -> list[np.ndarray]:
    """`function` of stacks of at most `most` arrays of one shape each: its answers, in the order of the arrays."""
    answers: dict[int, np.ndarray] = {}
    in_order = sorted(range(len(arrays)), key=lambda place: arrays[place].shape)
    for _, places in groupby(in_order, key=lambda place: arrays[place].shape):
        for chosen in batched(places, most):
            answers |= zip(chosen, function(np.stack([arrays[place] for place in chosen])), strict=True)
    return [answers[place] for place in range(len(arrays))]


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Runs of `size` items; the last may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def write_png(path: Path, image: np.ndarray) -> None:
    """Write a uint8 (H, W, 1 or 3) image into a folder that is whole or not there."""
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(path)


def write_contact_sheet(path: Path, images: Sequence[np.ndarray], labels: Sequence[str], title: str) -> None:
    """All images on one sheet, each under its label; enlarged to be seen, but never smoothed."""
    factor = max(1, CELL // max(max(image.shape[:2]) for image in images))
    tiles = [Image.fromarray(rgb(image).repeat(factor, axis=0).repeat(factor, axis=1)) for image in images]
    height, width = max(tile.height for tile in tiles), max(tile.width for tile in tiles)
    columns = min(len(tiles), max(1, round((len(tiles) * height / width) ** 0.5 * 1.25)))
    rows = -(-len(tiles) // columns)
    step_x, step_y = width + GAP, height + GAP + TITLE
    sheet = Image.new("RGB", (max(columns * step_x + GAP, 7 * len(title)), rows * step_y + GAP + TITLE), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 2), title, fill="black")
    for place, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        x, y = GAP + place % columns * step_x, GAP + TITLE + place // columns * step_y
        draw.text((x, y), label, fill="black")
        sheet.paste(tile, (x, y + TITLE))
    with replacing(path) as temporary:
        sheet.save(temporary)
