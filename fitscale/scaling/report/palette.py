"""Colours of sizes, or of other things in an order: names in a legend while they are few, a colour bar beyond."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fitscale.scaling.report import canvas
from fitscale.scaling.rows.selection import size_order

MOST_LISTED = 12  # names in a legend; more would leave no room for the figure
HELD_OUT = ("crimson", "darkorange", "deeppink", "saddlebrown")
BRIGHTEST = 0.85  # of a colour map: what is brighter is hard to see on white


@dataclass(frozen=True)
class Palette:
    """A colour per name; `scale` is what a colour bar shows, if names are too many for a legend."""

    colors: dict[str, Any]
    scale: Any
    meaning: str

    @property
    def listed(self) -> bool:
        return self.scale is None

    def draw_bar(self, axes: Any) -> None:
        """The colour bar, if there is need of one."""
        if self.scale is not None:
            bar = axes.figure.colorbar(self.scale, ax=axes, pad=0.01, aspect=30)
            least, most = self.scale.get_clim()
            canvas.logarithmic(bar.ax.yaxis, least, most, scientific=True)
            bar.set_label(self.meaning)
            bar.outline.set_visible(False)


def of_values(values: dict[str, float], meaning: str, name: str = "viridis") -> Palette:
    """Colours for names in ascending order: by rank while they are few, else by the logarithm of their values."""
    from matplotlib import cm, colormaps, colors

    shades = colors.LinearSegmentedColormap.from_list(name, colormaps[name]([BRIGHTEST * i / 255 for i in range(256)]))
    if len(values) <= MOST_LISTED:
        last = max(len(values) - 1, 1)
        return Palette({each: shades(index / last) for index, each in enumerate(values)}, None, meaning)
    scale = cm.ScalarMappable(colors.LogNorm(min(values.values()), max(values.values())), shades)
    return Palette(
        dict(zip(values, map(tuple, scale.to_rgba(np.array(list(values.values())))), strict=True)), scale, meaning
    )


def of_sizes(rows: pd.DataFrame, held_out: list[str]) -> Palette:
    """Colours of the sizes in `rows`; those held out stand out, by colours of their own while they are few."""
    order = [size for size in size_order(rows) if size not in held_out]
    known = rows.groupby("size")[["parameters", "train_flops"]].max().astype(float).loc[order]
    by, meaning = "parameters", "parameters"
    if known[by].isna().any() or (known[by] <= 0).any():
        by, meaning = "train_flops", "largest training compute of the size (FLOPs)"
    palette = of_values(dict(zip(order, known[by].tolist(), strict=True)), meaning)
    own = {size: HELD_OUT[index if len(held_out) <= len(HELD_OUT) else 0] for index, size in enumerate(held_out)}
    return Palette(palette.colors | own, palette.scale, meaning)
