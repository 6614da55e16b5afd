"""Sample folders as `fitscale sample` writes them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_samples(
    folder: Path,
    run: Path,
    step: int,
    count: int = 5,
    shape: tuple[int, ...] = (10, 8),
    *,
    guidance: float = 1.5,
    sampler: str | None = None,
    steps: str | None = None,
    weights: str | None = None,
    rope: str | None = None,
) -> Path:
    """`count` images, each of one shade: image i has i / count of white. Grey, or RGB where `shape` ends in 3."""
    folder.mkdir(parents=True)
    settings = {"run": str(run), "step": step, "height": shape[0], "width": shape[1], "weights": weights}
    record = settings | {"sampling": {"method": sampler, "steps": steps, "guidance": {"scale": guidance}}}
    record |= {"model": {"rope": {"method": rope}}} if rope else {}
    (folder / "samples.json").write_text(json.dumps(record))
    for index in range(count):
        image = Image.fromarray(np.full(shape, 255 * index // count, dtype=np.uint8))
        image.save(folder / f"{index:06d}_class{index}.png")
    image.save(folder / "contact_sheet.png")
    return folder
