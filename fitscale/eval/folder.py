"""A folder of generated images: one PNG each, a contact sheet of the first, all in an .npz, and how they were made.

Images are written as they come, so that memory does not grow with their number; the folder appears under its name when
it is whole.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fitscale.config.errors import UserError, writing
from fitscale.config.files import replacing
from fitscale.data.pictures import rgb, write_contact_sheet, write_png

SETTINGS = "samples.json"
SHEET_IMAGES = 100  # most images on a contact sheet


@dataclass(frozen=True)
class Generated:
    """A uint8 (H, W, channels) image, and what it cost: function evaluations and passes of the network."""

    index: int
    image: np.ndarray
    nfe: int
    network_evaluations: int


def check_samples_folder(out: Path) -> None:
    """`out` can be written: it is new, empty, or an earlier folder of samples, which will be replaced.

    Raises:
        UserError: there is something else, or it cannot be made.
    """
    with writing(f"--out: {out}"):
        if out.exists() and not (out.is_dir() and ((out / SETTINGS).is_file() or not any(out.iterdir()))):
            raise UserError(f"--out: {out} exists and is no folder of samples; choose a new one")
        above = next(path for path in out.absolute().parents if path.exists())
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise UserError(f"--out: {above} is no folder that can be written to")


def write_samples(
    out: Path, drawn: Iterable[Generated], labels: list[int], settings: dict[str, Any], title: str
) -> list[int]:
    """Write the images `drawn`, all of one size and in the order of `labels`; returns their function evaluations."""
    with writing(out), replacing(out.resolve()) as folder:
        folder.mkdir()
        nfe, passes, shown = _write_images(folder, drawn, labels)
        write_contact_sheet(folder / "contact_sheet.png", shown, [str(label) for label in labels[: len(shown)]], title)
        record = {**settings, "nfe": nfe, "network_evaluations": passes, "labels": labels}
        (folder / SETTINGS).write_text(json.dumps(record, indent=1))
        if out.exists():
            shutil.rmtree(out)
    return nfe


def _write_images(
    folder: Path, drawn: Iterable[Generated], labels: list[int]
) -> tuple[list[int], list[int], list[np.ndarray]]:
    """PNG files and samples.npz (`arr_0`, uint8 NHWC with 3 channels: what ADM's evaluator reads)."""
    nfe, passes, shown = [], [], []
    array_NHWC: np.ndarray | None = None
    for place, (made, label) in enumerate(zip(drawn, labels, strict=True)):
        if array_NHWC is None:
            shape = (len(labels), *made.image.shape[:2], 3)
            array_NHWC = np.lib.format.open_memmap(folder / "arr_0.npy", "w+", np.uint8, shape)
        array_NHWC[place] = rgb(made.image)
        write_png(folder / f"{made.index:06d}_class{label}.png", made.image)
        nfe.append(made.nfe)
        passes.append(made.network_evaluations)
        if place < SHEET_IMAGES:
            shown.append(made.image)
    del array_NHWC  # flushes
    array, member = folder / "arr_0.npy", zipfile.ZipInfo("arr_0.npy")  # of no date: equal images, equal bytes
    with (
        open(array, "rb") as source,
        zipfile.ZipFile(folder / "samples.npz", "w") as archive,
        archive.open(member, "w", force_zip64=True) as file,
    ):
        shutil.copyfileobj(source, file)
    array.unlink()
    return nfe, passes, shown
