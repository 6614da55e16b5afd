"""Figures of a study. matplotlib is imported when one is drawn, without a display."""

import io
from typing import Any

import numpy as np
import pandas as pd

from fitscale.scaling.study import LawResult, Study
from fitscale.scaling.uncertainty import new_run_KN

NAMES = {"fd": "Fréchet distance", "fid": "FID", "validation_loss": "Validation loss", "loss": "Loss"}

MARGIN = 1.25  # room above and below the data


def curves(study: Study) -> dict[str, bytes]:
    """Metric against training FLOPs per size, frontier, best law and band, held-out points; keys png and svg."""
    figure, axes = _new_figure()
    rows = study.rows if len(study.rows) else _raw_rows(study)
    for run, points in rows.sort_values("train_flops").groupby("run", sort=False):
        _draw_run(axes, study, rows, str(run), points)
    used = rows[rows["used"]]
    axes.scatter(
        used["train_flops"], used["value"], s=95, facecolors="none", edgecolors="black", linewidths=0.9, zorder=4
    )
    axes.scatter(
        [], [], s=95, facecolors="none", edgecolors="black", linewidths=0.9, label=f"fitted ({study.question.points})"
    )
    if study.results:
        _draw_law(axes, study, study.results[0], rows)
    _decorate(axes, study, rows)
    return _rendered(figure)


def _new_figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _raw_rows(study: Study) -> pd.DataFrame:
    """What can be drawn where the data themselves were refused."""
    rows = study.table[study.table["metric"] == study.question.metric]
    return rows[(rows["value"] > 0) & (rows["train_flops"] > 0)].assign(held_out=False, chosen=False, used=False)


def _sizes(rows: pd.DataFrame) -> list[str]:
    return list(rows.groupby("size")["parameters"].max().sort_values().index)


def _draw_run(axes: Any, study: Study, rows: pd.DataFrame, run: str, points: pd.DataFrame) -> None:
    from matplotlib import colormaps

    sizes = _sizes(rows)
    size = points["size"].iloc[0]
    held_out = size == study.held_out
    color = "crimson" if held_out else colormaps["viridis"](0.85 * sizes.index(size) / max(len(sizes) - 1, 1))
    first = rows.loc[rows["size"] == size, "run"].min() == run
    axes.plot(
        points["train_flops"],
        points["value"],
        color=color,
        linestyle=":" if held_out else "-",
        linewidth=1.4,
        marker="D" if held_out else "o",
        markersize=6 if held_out else 5,
        markerfacecolor="white" if held_out else color,
        label=(f"{size}, held out" if held_out else size) if first else None,
        zorder=3,
    )


def _draw_law(axes: Any, study: Study, result: LawResult, rows: pd.DataFrame) -> None:
    used = rows.loc[rows["used"], "train_flops"]
    grid = np.geomspace(used.min() / 1.3, max(rows["train_flops"].max(), used.max()) * 1.3, 200)
    line = pd.DataFrame({"train_flops": grid})
    metric = result.fit.metric(line)
    inside = grid <= used.max()
    name = result.fit.law.name
    axes.plot(grid[inside], metric[inside], color="black", linewidth=1.3, label=f"{name} law", zorder=2)
    axes.plot(
        grid[~inside], metric[~inside], color="black", linewidth=1.3, linestyle="--", label="its prediction", zorder=2
    )
    low, high = np.quantile(new_run_KN(result.fit, result.resamples, line, study.question.seed), [0.05, 0.95], axis=0)
    axes.fill_between(grid, low, high, color="black", alpha=0.12, linewidth=0, label="90 % for a new run", zorder=1)
    floor = result.fit.named()["e"] if result.floor is not None and result.floor.identified else 0.0
    if floor > rows["value"].min() / MARGIN:
        axes.axhline(floor, color="gray", linewidth=0.9, linestyle="-.", label=f"floor E = {floor:.3g}", zorder=1)


def _decorate(axes: Any, study: Study, rows: pd.DataFrame) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    values = rows["value"]
    axes.set_ylim(values.min() / MARGIN, values.max() * MARGIN)
    narrow = values.max() / values.min() < 30
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training compute (FLOPs: 6 x MACs x images)")
    name = NAMES.get(study.question.metric, study.question.metric)
    axes.set_ylabel(name)
    axes.set_title(f"{name} against training compute", loc="left")
    axes.grid(which="major", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _rendered(figure: Any) -> dict[str, bytes]:
    """The figure as PNG and SVG, the same bytes for the same data."""
    import matplotlib

    images = {}
    with matplotlib.rc_context({"svg.hashsalt": "fitscale", "svg.fonttype": "none"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            images[kind] = buffer.getvalue()
    return images
