"""Figures of a study: curves, residuals, held-out points, isoFLOP curves. canvas.py says how they look."""

from typing import Any

import numpy as np
import pandas as pd

from fitscale.scaling.fit.laws import COMPUTE
from fitscale.scaling.fit.residuals import bend
from fitscale.scaling.fit.study import LawResult, Study
from fitscale.scaling.report import canvas, palette
from fitscale.scaling.report.content import data_of, held_out_text, percent, readable
from fitscale.scaling.report.isoflop_figure import isoflop_curves

MOST_NAMED = 12  # held-out points; more names would hide them
MOST_BEYOND = 10.0  # times the measured and predicted metric: an interval that is wider is cut
FITTED = {"frontier": "fitted: frontier", "last": "fitted: last of a run", "all": "fitted"}


def figures(study: Study) -> dict[str, canvas.Images]:
    """Every figure that the study has data for, by file name."""
    found = {}
    if len(rows := _drawable(study)):
        found["curves"] = curves(study, rows)
    if study.results:
        found["residuals"] = residuals(study)
        if any(len(result.claimed) for result in study.results):
            found["predictions"] = predictions(study)
    if study.isoflops:
        found["isoflop"] = isoflop_curves(study.isoflops[0], study.question.metric)
    return found


def curves(study: Study, rows: pd.DataFrame) -> canvas.Images:
    """Metric against training FLOPs per size, frontier, best law and band, held-out points."""
    axes = canvas.new_figure().add_subplot()
    heights = canvas.limits(pd.concat([rows["value"], *(result.claimed["predicted"] for result in study.results[:1])]))
    canvas.over_compute(axes, rows, heights)
    draw_runs(axes, study, rows)
    _draw_fitted(axes, study, rows)
    for result in study.results[:1]:
        _draw_law(axes, study, result, rows)
    axes.set_ylim(*heights)
    name = readable(study.question.metric)
    canvas.decorate(axes, f"{name} against training compute", compute_label(study), name)
    return canvas.rendered(axes.figure)


def compute_label(study: Study) -> str:
    """The axis of compute; how it was counted is known of images alone."""
    return canvas.OF_IMAGES if data_of(study) == "images" else canvas.COMPUTE_LABEL


def residuals(study: Study) -> canvas.Images:
    """Measured / law - 1 of the best law's fitted points against compute, per size."""
    axes = canvas.new_figure(height=3.6).add_subplot()
    result = study.results[0]
    colors = palette.of_sizes(study.rows, study.held_out)
    for size, points in _by_size(study, result.used):
        points = points.sort_values("train_flops")
        share = 100 * (points["value"].to_numpy() / result.fit.metric(points) - 1)
        style = {"color": colors.colors[size], "label": canvas.literal(size) if colors.listed else None}
        style |= {"markersize": 6 if colors.listed else 3}
        for _, of_run in points.assign(share=share).groupby("run", sort=False):
            axes.plot(of_run["train_flops"], of_run["share"], "o-", linewidth=0.8, **style)
            style["label"] = None
    axes.axhline(0, color="black", linewidth=0.8)
    canvas.logarithmic(axes.xaxis, *canvas.limits(result.used["train_flops"]), scientific=True)
    colors.draw_bar(axes)
    kind = "bent" if bend(result.fit) else "fitted"
    title = f"Residuals of the {kind} {result.name} law at its points"
    canvas.decorate(axes, title, compute_label(study), "measured / law - 1 (%)")
    return canvas.rendered(axes.figure)


def predictions(study: Study) -> canvas.Images:
    """Predicted against measured, on equal axes, for every held-out point that a law speaks of, with intervals."""
    axes = canvas.new_figure(width=7.2).add_subplot()
    drawn = [result for result in study.results if len(result.claimed)]
    every = pd.concat([result.claimed for result in drawn])
    span = _span(every)
    for axis in (axes.xaxis, axes.yaxis):
        canvas.logarithmic(axis, *span)
    axes.plot(span, span, color="black", linewidth=0.8, label="exact")
    for index, result in enumerate(drawn):
        points = result.claimed
        errors = [points["predicted"] - points["low"], points["high"] - points["predicted"]]
        style = {"fmt": "os^Dv"[index % 5], "color": f"C{index}", "markersize": 5, "linewidth": 0.9, "capsize": 2}
        label = f"{result.name} law, {percent(study.question)}"
        axes.errorbar(points["value"], points["predicted"], yerr=np.abs(errors), label=label, **style)
    axes.set(xlim=span, ylim=span, aspect="equal")
    title = f"Predicted against measured: {held_out_text(study)}"
    canvas.decorate(axes, title, *(f"{what} {readable(study.question.metric)}" for what in ("measured", "predicted")))
    first = drawn[0].claimed
    if len(first) <= MOST_NAMED:
        steps = ["" if pd.isna(step) else f", {step:,} steps" for step in first["step"]]
        names = [f"{size}{step}" for size, step in zip(first["size"], steps, strict=True)]
        canvas.label_beside(axes, list(zip(first["value"], first["predicted"], strict=True)), names)
    return canvas.rendered(axes.figure)


def _span(points: pd.DataFrame) -> tuple[float, float]:
    """What measured and predicted need, and of their intervals as much as a factor of `MOST_BEYOND` shows."""
    low, high = canvas.limits(pd.concat([points["value"], points["predicted"]]))
    beyond = canvas.limits(pd.concat([points["low"], points["high"]]))
    return max(min(low, beyond[0]), low / MOST_BEYOND), min(max(high, beyond[1]), high * MOST_BEYOND)


def draw_runs(axes: Any, study: Study, rows: pd.DataFrame) -> None:
    """The curve of every run in the colour of its size; held-out sizes dotted, with open marks."""
    colors = palette.of_sizes(rows, study.held_out)
    named = set()
    for _, points in rows.sort_values("train_flops").groupby("run", sort=False):
        size = points["size"].iloc[0]
        label, style = canvas.literal(size), {"linestyle": "-", "marker": "o", "markersize": 5}
        if size in study.held_out:
            label = f"{label}, held out" if len(study.held_out) <= len(palette.HELD_OUT) else "held out"
            style = {"linestyle": ":", "marker": "D", "markersize": 6, "markerfacecolor": "white"}
        style |= {"color": colors.colors[size], "linewidth": 1.4, "zorder": 3}
        if not colors.listed:
            style |= {"markersize": 3, "linewidth": 0.7}
        unnamed = label in named or not (colors.listed or size in study.held_out)
        axes.plot(points["train_flops"], points["value"], label=None if unnamed else label, **style)
        named.add(label)
    colors.draw_bar(axes)


def _drawable(study: Study) -> pd.DataFrame:
    """The study's rows; where the data themselves were refused, what can be drawn of them."""
    if len(study.rows):
        return study.rows
    rows = study.table[study.table["metric"] == study.question.metric]
    rows = rows[((rows["value"] > 0) & (rows["train_flops"] > 0)).fillna(False)]
    return rows.assign(held_out=False, chosen=False, used=False)


def _by_size(study: Study, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(size, rows[rows["size"] == size]) for size in study.sizes if (rows["size"] == size).any()]


def _draw_fitted(axes: Any, study: Study, rows: pd.DataFrame) -> None:
    """A ring around every point that the best law is fitted to; without a law, that laws of compute would be."""
    best = study.results[0] if study.results else None
    compute_law = best is None or best.fit.law.inputs == COMPUTE
    used = rows[rows["used"]] if best is None else best.used
    many = rows["size"].nunique() > palette.MOST_LISTED
    if len(used) and not (many and len(used) == (~rows["held_out"]).sum()):  # rings around all would hide the marks
        ring = {"s": 30 if many else 95, "facecolors": "none", "edgecolors": "black", "linewidths": 0.9, "zorder": 4}
        label = FITTED[study.question.points if compute_law else "all"]
        axes.scatter(used["train_flops"], used["value"], label=label, **ring)


def _draw_law(axes: Any, study: Study, result: LawResult, rows: pd.DataFrame) -> None:
    if result.fit.law.inputs == COMPUTE:
        _draw_compute_law(axes, study, result, rows)
    else:
        _draw_surface(axes, study, result, rows)
    floor = result.fit.named()["e"] if result.floor is not None and result.floor.identified else 0.0
    if floor > canvas.limits(rows["value"])[0]:
        axes.axhline(floor, color="gray", linewidth=0.9, linestyle="-.", label=f"floor E = {floor:.3g}", zorder=1)


def _draw_compute_law(axes: Any, study: Study, result: LawResult, rows: pd.DataFrame) -> None:
    least, most = result.used["train_flops"].min(), result.used["train_flops"].max()
    grid = np.union1d(np.geomspace(least / 1.3, rows["train_flops"].max() * 1.3, 40), [most])
    line = pd.DataFrame({"train_flops": grid})
    metric = result.fit.metric(line)
    name = f"{result.name} law"
    for part, style, label in ((grid <= most, "-", name), (grid >= most, "--", f"{name}, extrapolated")):
        axes.plot(grid[part], metric[part], style, color="black", linewidth=1.3, zorder=2, label=label)
    _draw_band(axes, result, grid, line, _band(study))


def _band(study: Study) -> str:
    return f"{percent(study.question)} for a new run"


def _draw_band(axes: Any, result: LawResult, compute: Any, line: pd.DataFrame, label: str | None) -> None:
    low, high = result.interval(line)
    style = {"color": "black", "alpha": 0.12, "linewidth": 0, "zorder": 1}
    axes.fill_between(compute, low, high, label=label, **style)


def _draw_surface(axes: Any, study: Study, result: LawResult, rows: pd.DataFrame) -> None:
    """The law along every size's own training (along some of many), and the band of the held-out sizes."""
    name = f"{result.name} law"
    band: str | None = _band(study)
    sizes = _by_size(study, rows)
    for index, (size, points) in enumerate(sizes[:: -(-len(sizes) // palette.MOST_LISTED)][:-1] + sizes[-1:]):
        longest = points.sort_values("train_flops").iloc[-1]
        images = np.geomspace(points["images"].min() / 1.3, points["images"].max() * 1.3, 60)
        line = pd.DataFrame({"parameters": float(longest["parameters"]), "images": images})
        compute = images * float(longest["train_flops"]) / float(longest["images"])
        axes.plot(compute, result.fit.metric(line), "k--", linewidth=1.0, zorder=2, label=None if index else name)
        if size in study.held_out:
            _draw_band(axes, result, compute, line, band)
            band = None
