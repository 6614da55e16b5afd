"""Samples along the curve: the images of sample folders beneath the checkpoints that drew them.

A sample folder is what `fitscale sample` writes: samples.json, one PNG an image, and a contact sheet. Folders drawn
with one seed show the same noise and classes, so what differs is the model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.study import Study
from fitscale.scaling.report import canvas
from fitscale.scaling.report.content import readable
from fitscale.scaling.report.figures import draw_runs

SHOWN = 8  # images of a folder, in two columns
MOST_FOLDERS = 10
SIDE = 96  # least pixels of an image's longer side; small images are enlarged by whole factors, never smoothed


@dataclass(frozen=True)
class SampleFolder:
    """The images that one checkpoint drew; `guidance` is the scale."""

    path: Path
    run: Path
    step: int
    height: int
    width: int
    guidance: float
    images: tuple[Path, ...]

    @property
    def how(self) -> str:
        return f"{self.height} x {self.width} pixels, guidance {self.guidance:g}"


def read_folder(path: Path) -> SampleFolder:
    """The sample folder at `path`.

    Raises:
        UserError: it holds no images, or no samples.json that says how they were drawn.
    """
    try:
        record = json.loads((path / "samples.json").read_text())
        guidance = float(record["sampling"]["guidance"]["scale"])
        step, height, width = (int(record[name]) for name in ("step", "height", "width"))
        images = tuple(sorted(path.glob("[0-9]*.png")))
        folder = SampleFolder(path, Path(record["run"]), step, height, width, guidance, images)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a folder that `fitscale sample` wrote: {error}") from error
    if not images:
        raise UserError(f"{path}: holds no images")
    return folder


def find_folders(runs: list[Path]) -> list[Path]:
    """The sample folders inside the run directories at `runs`, or directly inside those of a sweep."""
    return [record.parent for path in runs if path.is_dir() for record in sorted(path.rglob("samples/*/samples.json"))]


def placed(study: Study, folders: list[SampleFolder]) -> list[tuple[SampleFolder, pd.Series]]:
    """Every folder with the row of the study that its checkpoint is, from the least compute to the most.

    Raises:
        UserError: a folder's checkpoint is not among the study's rows.
    """
    found = []
    for folder in folders:
        row = row_of(study.rows, folder)
        if row is None:
            raise UserError(f"{folder.path}: {folder.run} at step {folder.step} is not among the rows of the study")
        found.append((folder, row))
    return sorted(found, key=lambda pair: float(pair[1]["train_flops"]))


def row_of(rows: pd.DataFrame, folder: SampleFolder) -> pd.Series | None:
    """The row at the folder's step whose run is the end of the folder's run directory; None if there is none."""
    same_run = [folder.run.parts[-len(Path(run).parts) :] == Path(run).parts for run in rows["run"]]
    match = rows[np.array(same_run, dtype=bool) & (rows["step"] == folder.step).fillna(False).to_numpy(dtype=bool)]
    return None if match.empty else match.iloc[0]


def samples_along_the_curve(study: Study, folders: list[tuple[SampleFolder, pd.Series]]) -> canvas.Images:
    """The runs' curves above; beneath, one column of images a folder, tied to its checkpoint's point."""
    shown = folders[:: -(-len(folders) // MOST_FOLDERS)]
    figure = canvas.new_figure(max(8.5, 1.25 * len(shown)), 7.6)
    grid = figure.add_gridspec(2, len(shown), height_ratios=[1.0, 1.15])
    axes = figure.add_subplot(grid[0, :])
    canvas.over_compute(axes, study.rows)
    draw_runs(axes, study, study.rows)
    name = readable(study.question.metric)
    canvas.decorate(axes, f"Samples along the curve: {name} against training compute", canvas.COMPUTE_LABEL, name)
    _clear_below(axes)
    for column, (folder, row) in enumerate(shown):
        _draw_column(figure, axes, figure.add_subplot(grid[1, column]), folder, row)
    return canvas.rendered(figure)


def _clear_below(axes: Any) -> None:
    """Compute is written above the curves, and nothing hides the lines that lead down to the images."""
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.spines["top"].set_visible(True)
    axes.spines["bottom"].set_visible(False)
    axes.patch.set_visible(False)


def _draw_column(figure: Any, curve: Any, axes: Any, folder: SampleFolder, row: pd.Series) -> None:
    from matplotlib.patches import ConnectionPatch

    axes.imshow(mosaic(folder.images[:SHOWN]), interpolation="nearest")
    axes.set_axis_off()
    axes.set_anchor("N")
    value, compute = float(row["value"]), float(row["train_flops"])
    title = f"{row['size']}, {folder.step:,} steps\n{value:.4g} at\n{canvas.power_of_ten(compute, 2)} FLOPs"
    axes.set_title(title, fontsize=8)
    how = folder.how.replace(", ", "\n")
    axes.text(0.5, -0.02, how, transform=axes.transAxes, fontsize=8, color="0.3", ha="center", va="top")
    line = ConnectionPatch((compute, value), (0.5, 1.2), "data", "axes fraction", axesA=curve, axesB=axes)
    line.set(color="0.6", linewidth=0.8, zorder=0)
    figure.add_artist(line)


def mosaic(paths: tuple[Path, ...]) -> Array:
    """The images in two columns on white, (H, W, 3) numbers from 0 to 1; all are of one size.

    Raises:
        UserError: an image cannot be read.
    """
    tiles = [_tile(path) for path in paths]
    tiles += [np.full_like(tiles[0], 1.0)] * (len(tiles) % 2)
    rows = [np.concatenate(tiles[start : start + 2], axis=1) for start in range(0, len(tiles), 2)]
    return np.concatenate(rows, axis=0)


def _tile(path: Path) -> Array:
    from matplotlib.image import imread

    try:
        image = np.atleast_3d(imread(path))[:, :, :3]
    except (OSError, SyntaxError) as error:  # a damaged PNG is a SyntaxError to Pillow
        raise UserError(f"{path}: not a readable PNG: {error}") from error
    factor = max(1, SIDE // max(image.shape[:2]))
    wide = image.repeat(factor, axis=0).repeat(factor, axis=1)
    edged = np.pad(wide, ((2, 2), (2, 2), (0, 0)), constant_values=1.0)
    return edged.repeat(3 // edged.shape[2], axis=2)
