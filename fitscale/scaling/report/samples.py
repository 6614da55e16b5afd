"""Samples along the curve: the images of sample folders beneath the checkpoints that drew them.

A sample folder is what `fitscale sample` writes: samples.json, one PNG an image, and a contact sheet. Folders drawn
with one seed show the same noise and classes, so what differs is the model. The number over images was measured on
images made as they were: with their weights, sampler, steps, guidance and positions; where nobody measured so, there is
none. The line to the curve is dashed where the curve's own number was measured in another way.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from fitscale.config.errors import UserError
from fitscale.config.files import read_json
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.study import Study
from fitscale.scaling.report import canvas
from fitscale.scaling.report.content import readable
from fitscale.scaling.report.figures import compute_label, draw_runs
from fitscale.scaling.rows.table import KEY, LARGEST, LARGEST_COUNT, key_columns, number

SHOWN = 8  # images of a folder, in two columns
MOST_FOLDERS = 10
MOST_SIDE = 4096  # pixels of an image that is drawn
MOST_RECORD_BYTES = 2**20  # of a samples.json
ANY = "dataset"  # resolution of a key whose images have the sizes of the data set's
SIDE = 96  # least pixels of an image's longer side; small images are enlarged by whole factors, never smoothed


@dataclass(frozen=True)
class SampleFolder:
    """The images that one checkpoint drew; `guidance` is the scale, `made` what it says of a comparability key."""

    path: Path
    run: Path
    step: int
    height: int
    width: int
    guidance: float
    made: dict[str, str]
    images: tuple[Path, ...]

    @property
    def how(self) -> str:
        return f"{self.height} x {self.width} pixels, guidance {self.guidance:g}"

    def made_as(self, row: pd.Series) -> bool:
        """Whether the images of `row` were made in the same way, as far as both say."""
        said = {name: row.get(KEY + name) for name in self.made}
        return all(pd.isna(value) or value == ANY or _same(value, self.made[name]) for name, value in said.items())


@dataclass(frozen=True)
class Place:
    """A folder, its checkpoint's row on the curve, and the number measured on images made as its own."""

    folder: SampleFolder
    row: pd.Series
    value: float | None

    @property
    def on_curve(self) -> bool:
        return self.folder.made_as(self.row)


def read_folder(path: Path) -> SampleFolder:
    """The sample folder at `path`.

    Raises:
        UserError: it holds no images, or no samples.json that says how they were drawn.
    """
    try:
        record = read_json(path / "samples.json", MOST_RECORD_BYTES)
        guidance = number(record["sampling"]["guidance"]["scale"])
        counts = [number(record[name]) for name in ("step", "height", "width")]
        if not abs(guidance) <= LARGEST or not all(0 <= count <= LARGEST_COUNT for count in counts):
            raise UserError("step, height, width and guidance must be numbers")
        step, height, width = map(int, counts)
        images = tuple(sorted(path.glob("[0-9]*.png")))
        folder = SampleFolder(path, Path(record["run"]), step, height, width, guidance, _made(record), images)
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a folder that `fitscale sample` wrote: {error}") from error
    if not images:
        raise UserError(f"{path}: holds no images")
    return folder


def find_folders(runs: list[Path]) -> list[Path]:
    """The sample folders inside the run directories at `runs`, or directly inside those of a sweep."""
    return [record.parent for path in runs if path.is_dir() for record in sorted(path.rglob("samples/*/samples.json"))]


def _made(record: dict[str, Any]) -> dict[str, str]:
    """What a samples.json says of the comparability key, as the key says it."""
    sampling, model = record["sampling"], record.get("model") or {}
    rope = model.get("rope") or {}
    positions = f"{rope['method']}{' decoupled' * bool(rope.get('decouple'))}" if "method" in rope else None
    said = {
        "weights": record.get("weights"),
        "sampler": sampling.get("method"),
        "steps": sampling.get("steps"),
        "guidance": sampling["guidance"]["scale"],
        "guidance_power": sampling["guidance"].get("power"),
        "rope": positions,
        "resolution": f"{record['height']}x{record['width']}",
    }
    return {name: str(value) for name, value in said.items() if value is not None}


def _same(value: object, other: str) -> bool:
    return str(value) == other or number(str(value)) == number(other)


def placed(study: Study, folders: list[SampleFolder]) -> list[Place]:
    """Every folder at the row of the study that its checkpoint is, from the least compute to the most.

    Raises:
        UserError: a folder's checkpoint is not among the study's rows.
    """
    measured = study.table[(study.table["metric"] == study.question.metric) & study.table["value"].notna()]
    found = []
    for folder in folders:
        row = row_of(study.rows, folder)
        if row is None:
            raise UserError(f"{folder.path}: {folder.run} at step {folder.step} is not among the rows of the study")
        keys = key_columns(study.table)
        alike = [other for _, other in rows_of(measured, folder).iterrows() if folder.made_as(other)]
        own = max(alike, key=lambda other: (other[keys] == row[keys]).sum(), default=None)
        found.append(Place(folder, row, None if own is None else float(own["value"])))
    return sorted(found, key=lambda place: float(place.row["train_flops"]))


def row_of(rows: pd.DataFrame, folder: SampleFolder) -> pd.Series | None:
    """The first of `rows_of`; None if there is none."""
    match = rows_of(rows, folder)
    return None if match.empty else match.iloc[0]


def rows_of(rows: pd.DataFrame, folder: SampleFolder) -> pd.DataFrame:
    """The rows at the folder's step whose run is the end of the folder's run directory."""
    runs = {run: Path(run).parts for run in rows["run"].dropna().unique()}
    same = {run for run, parts in runs.items() if folder.run.parts[-len(parts) :] == parts}
    return rows[rows["run"].isin(same) & (rows["step"] == folder.step).fillna(False)]


def samples_along_the_curve(study: Study, places: list[Place]) -> canvas.Images:
    """The runs' curves above; beneath, one column of images a folder, tied to its checkpoint's point."""
    shown = places[:: -(-len(places) // MOST_FOLDERS)]
    figure = canvas.new_figure(max(8.5, 1.25 * len(shown)), 7.6)
    grid = figure.add_gridspec(2, len(shown), height_ratios=[1.0, 1.15])
    axes = figure.add_subplot(grid[0, :])
    canvas.over_compute(axes, study.rows)
    draw_runs(axes, study, study.rows)
    name = readable(study.question.metric)
    canvas.decorate(axes, f"Samples along the curve: {name} against training compute", compute_label(study), name)
    _clear_below(axes)
    for column, place in enumerate(shown):
        _draw_column(figure, axes, figure.add_subplot(grid[1, column]), place)
    return canvas.rendered(figure)


def _clear_below(axes: Any) -> None:
    """Compute is written above the curves, and nothing hides the lines that lead down to the images."""
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.spines["top"].set_visible(True)
    axes.spines["bottom"].set_visible(False)
    axes.patch.set_visible(False)


def _draw_column(figure: Any, curve: Any, axes: Any, place: Place) -> None:
    from matplotlib.patches import ConnectionPatch

    folder, row = place.folder, place.row
    axes.imshow(mosaic(folder.images[:SHOWN]), interpolation="nearest")
    axes.set_axis_off()
    axes.set_anchor("N")
    compute = float(row["train_flops"])
    number_there = f"measured {place.value:.4g}" if place.value is not None else "not measured so"
    title = f"{canvas.literal(row['size'], 16)}, {folder.step:,} steps\n{canvas.power_of_ten(compute, 2)} FLOPs"
    axes.set_title(f"{title}\n{number_there}", fontsize=8, y=1.0)
    how = folder.how.replace(", ", "\n")
    axes.text(0.5, -0.02, how, transform=axes.transAxes, fontsize=8, color="0.3", ha="center", va="top")
    line = ConnectionPatch((compute, float(row["value"])), (0.5, 1.2), "data", "axes fraction", axesA=curve, axesB=axes)
    line.set(color="0.6", linewidth=0.8, linestyle="-" if place.on_curve else "--", zorder=0)
    figure.add_artist(line)


def mosaic(paths: tuple[Path, ...]) -> Array:
    """The images in two columns on white, (H, W, 3) numbers from 0 to 1; all are of one size.

    Raises:
        UserError: an image cannot be read.
    """
    tiles = [_tile(path) for path in paths]
    for path, tile in zip(paths, tiles, strict=True):
        if tile.shape != tiles[0].shape:
            raise UserError(f"{path}: not of the size of {paths[0].name}; the images of a folder are of one size")
    tiles += [np.full_like(tiles[0], 1.0)] * (len(tiles) % 2)
    rows = [np.concatenate(tiles[start : start + 2], axis=1) for start in range(0, len(tiles), 2)]
    return np.concatenate(rows, axis=0)


def _tile(path: Path) -> Array:
    try:
        with Image.open(path, formats=["PNG"]) as file:
            if max(file.size) > MOST_SIDE:
                raise UserError(f"{path}: {file.width} x {file.height} pixels; at most {MOST_SIDE} a side are drawn")
            image = np.asarray(file.convert("RGB"), dtype=np.float32) / 255
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # damage is a SyntaxError, too
        raise UserError(f"{path}: not a readable PNG: {error}") from error
    factor = max(1, SIDE // max(image.shape[:2]))
    wide = image.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.pad(wide, ((2, 2), (2, 2), (0, 0)), constant_values=1.0)
