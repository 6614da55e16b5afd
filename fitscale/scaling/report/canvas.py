"""How figures of a study look: canvas, logarithmic axes, labels, and PNG and SVG bytes.

matplotlib is imported when a figure is drawn, and needs no display.
"""

import io
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

DENSE = 200  # places along what a text must not cover
COMPUTE_LABEL = "training compute (FLOPs)"
OF_IMAGES = "training compute (FLOPs: 6 x MACs x images)"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Images = dict[str, bytes]  # png, svg


def new_figure(width: float = 8.5, height: float = 5.2) -> Any:
    """An empty figure of that many inches, in the "constrained" layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def over_compute(axes: Any, rows: pd.DataFrame, heights: tuple[float, float] | None = None) -> None:
    """Make both axes logarithmic, for the training FLOPs of `rows` and their values (or what lies in `heights`)."""
    logarithmic(axes.xaxis, *limits(rows["train_flops"]), scientific=True)
    logarithmic(axes.yaxis, *(heights or limits(rows["value"])))


def logarithmic(axis: Any, low: float, high: float, scientific: bool = False) -> None:
    """Make `axis` logarithmic, with round numbers written out from `low` to `high`, however near they lie.

    `scientific` writes them as powers of ten.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    ratio = high / low
    steps = (1, 2, 3, 5) if ratio < 20 else (1, 2, 5) if ratio < 200 else (1, 3) if ratio < 2000 else (1,)
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if ratio < 4 else LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value) if scientific else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def power_of_ten(value: float, digits: int = 3) -> str:
    """2e12 to so many digits as "2·10¹²"."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    factor = f"{float(mantissa):g}"
    return f"{'' if factor == '1' else f'{factor}·'}10{str(int(exponent)).translate(RAISED)}"


def literal(text: str, most: int = 40) -> str:
    """A text from outside as a label: cut where it is long; no dollar sign begins a formula, no underscore hides it."""
    text = text if len(text) <= most else f"{text[:most]}..."
    return f"{' ' * text.startswith('_')}{text}".replace("$", r"\$")


def limits(values: pd.Series) -> tuple[float, float]:
    """A tenth of the data's logarithmic range above and below, a quarter of their value at most."""
    low, high = float(values.min()), float(values.max())
    margin = min(max((high / low) ** 0.1, 1.02), 1.25)
    return low / margin, high * margin


def decorate(axes: Any, title: str, x_label: str, y_label: str) -> None:
    """Title and labels, all of them literal texts, grid, and the legend to the right, or below where a bar is there."""
    axes.set(xlabel=literal(x_label, 80), ylabel=literal(y_label, 80))
    axes.set_title(literal(title, 120), loc="left")
    axes.grid(which="major", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.get_legend_handles_labels()[0]:
        return
    if len(axes.figure.axes) > 1:
        axes.figure.legend(loc="outside lower center", ncols=4, frameon=False)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def label_beside(axes: Any, points: list[tuple[float, float]], texts: list[str], size: float = 8) -> None:
    """Write a text beside each of the points, where it covers no mark, no line, no error bar and no other text.

    Call it last: it has to know where everything lies; collections are error bars. A text without a free place is left
    out.
    """
    axes.figure.draw_without_rendering()
    axes.figure.set_layout_engine("none")  # found now; texts inside the axes leave it as it is
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    marks_N2 = axes.transData.transform(points)
    bars = [bar_N2 for each in axes.collections for bar_N2 in each.get_segments()]
    lines = [_along(axes, line_N2) for line_N2 in [*bars, *(line.get_xydata() for line in axes.lines)]]
    taken_N2 = np.concatenate([marks_N2, *lines])
    for mark_2, point, text in zip(marks_N2, points, map(literal, texts), strict=True):
        half_2 = np.array([0.6 * size * len(text), 1.2 * size]) * scale / 2
        for rise, side in product((0, 11, -11, 22, -22, 33, -33, 55, -55), (1, -1)):
            centre_2 = mark_2 + np.array([side * (8 * scale + half_2[0]), rise * scale])
            inside = frame.contains(*(centre_2 - half_2)) and frame.contains(*(centre_2 + half_2))
            if inside and not (np.abs(taken_N2 - centre_2) < half_2 + 2 * scale).all(axis=1).any():
                place = {"xytext": (8 * side, rise), "textcoords": "offset points", "fontsize": size, "color": "0.3"}
                axes.annotate(text, point, ha="left" if side > 0 else "right", va="center", **place)
                corners = np.linspace(centre_2 - half_2, centre_2 + half_2, DENSE)
                taken_N2 = np.concatenate([taken_N2, corners, corners * [1, -1] + [0, 2 * centre_2[1]]])
                break


def _along(axes: Any, line_N2: Any) -> Any:
    """Places along a line of data on the canvas, in its pixels."""
    points_N2 = axes.transData.transform(line_N2)
    at = np.linspace(0, len(points_N2) - 1, DENSE)
    return np.stack([np.interp(at, np.arange(len(points_N2)), side_N) for side_N in points_N2.T], axis=1)


def rendered(figure: Any) -> Images:
    """The figure as PNG and SVG, the same bytes for the same data."""
    import matplotlib

    images = {}
    with matplotlib.rc_context({"svg.hashsalt": "fitscale", "svg.fonttype": "none"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            figure.set_layout_engine("none")  # found once, it is the same for both
            images[kind] = buffer.getvalue()
    return images
