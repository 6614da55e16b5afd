"""Figures of a study. matplotlib is imported when one is drawn, without a display."""

import io
from typing import Any

import numpy as np
import pandas as pd

from fitscale.scaling.isoflop import IsoFlop
from fitscale.scaling.laws import COMPUTE
from fitscale.scaling.study import LawResult, Study
from fitscale.scaling.uncertainty import new_run_KN

NAMES = {"fd": "Fréchet distance", "fid": "FID", "validation_loss": "Validation loss", "loss": "Loss"}
HELD_OUT = "crimson"

Images = dict[str, bytes]  # png, svg


def figures(study: Study) -> dict[str, Images]:
    """Every figure that the study has data for, by file name."""
    found = {}
    if drawable(study):
        found["curves"] = curves(study)
    if study.results:
        found["residuals"] = residuals(study)
        if len(study.results[0].predictions):
            found["predictions"] = predictions(study)
    if study.isoflops:
        found["isoflop"] = isoflop_curves(study, study.isoflops[0])
    return found


def drawable(study: Study) -> bool:
    return len(_raw_rows(study)) > 0


def curves(study: Study) -> Images:
    """Metric against training FLOPs per size, frontier, best law and band, held-out points."""
    figure, axes = _new_figure()
    rows = study.rows if len(study.rows) else _raw_rows(study)
    for run, points in rows.sort_values("train_flops").groupby("run", sort=False):
        _draw_run(axes, study, rows, str(run), points)
    used = rows[rows["used"]]
    ring = {"s": 95, "facecolors": "none", "edgecolors": "black", "linewidths": 0.9}
    if len(used):
        axes.scatter(used["train_flops"], used["value"], zorder=4, label=f"{study.question.points}", **ring)
    for result in study.results[:1]:
        _draw_law(axes, study, result, rows)
    low, high = _limits(rows["value"])
    axes.set_ylim(low, high)
    _logarithmic(axes, rows["value"])
    _decorate(
        axes, f"{_name(study)} against training compute", "training compute (FLOPs: 6 x MACs x images)", _name(study)
    )
    return _rendered(figure)


def residuals(study: Study) -> Images:
    """Measured / law - 1 of the best law's fitted points against compute, per size."""
    figure, axes = _new_figure(height=3.6)
    result = study.results[0]
    for size, points in _by_size(study, result.used):
        points = points.sort_values("train_flops")
        share = 100 * (points["value"].to_numpy() / result.fit.metric(points) - 1)
        axes.plot(points["train_flops"], share, "o-", color=_color(study, study.rows, size), linewidth=0.8, label=size)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    law = result.fit.law.name
    _decorate(
        axes, f"Residuals of the {law} law", "training compute (FLOPs: 6 x MACs x images)", "measured / law - 1 (%)"
    )
    return _rendered(figure)


def predictions(study: Study) -> Images:
    """Predicted against measured for every held-out point that a law speaks of, with 90 % intervals."""
    figure, axes = _new_figure(width=6.8, height=5.0)
    every = pd.concat([result.predictions for result in study.results])
    ends = np.array([every["value"].min() / 1.1, every["value"].max() * 1.1])
    axes.plot(ends, ends, color="black", linewidth=0.8, label="exact")
    for index, result in enumerate(study.results):
        compute_law = result.fit.law.inputs == COMPUTE  # it makes no claim about points above the frontier
        points = result.predictions[result.predictions["chosen"]] if compute_law else result.predictions
        errors = [points["predicted"] - points["low"], points["high"] - points["predicted"]]
        style = {"fmt": "os^Dv"[index % 5], "color": f"C{index}", "markersize": 5, "linewidth": 0.9, "capsize": 2}
        axes.errorbar(
            points["value"], points["predicted"], yerr=np.abs(errors), label=f"{result.fit.law.name} law", **style
        )
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("log")
    _ticks(axes.xaxis, every["value"])
    _ticks(axes.yaxis, pd.concat([every[name] for name in ("value", "predicted", "low", "high")]))
    _decorate(axes, "Held-out points", f"measured {_name(study)}", f"predicted {_name(study)}")
    return _rendered(figure)


def isoflop_curves(study: Study, iso: IsoFlop) -> Images:
    """Metric against size for every budget with an optimum, and the line of optima."""
    from matplotlib import colormaps

    from fitscale.scaling.isoflop import slices_of_runs

    figure, axes = _new_figure()
    slices = slices_of_runs(study.rows)
    for index, optimum in enumerate(iso.optima):
        rows = slices[np.isclose(slices["budget"], optimum.budget)].sort_values("parameters")
        color = colormaps["plasma"](0.85 * index / max(len(iso.optima) - 1, 1))
        axes.plot(
            rows["parameters"], rows["value"], "o-", color=color, linewidth=1.1, label=f"{optimum.budget:.2g} FLOPs"
        )
    axes.plot(
        [o.parameters for o in iso.optima], [o.metric for o in iso.optima], "k*--", markersize=11, label="optimum"
    )
    _logarithmic(axes, slices["value"])
    low, high = iso.interval_90
    title = f"Best size grows as C^{iso.exponent:.3f} ({low:.3f} to {high:.3f})"
    _decorate(axes, title, "parameters", _name(study))
    return _rendered(figure)


def _name(study: Study) -> str:
    return NAMES.get(study.question.metric, study.question.metric)


def _new_figure(width: float = 8.5, height: float = 5.2) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _raw_rows(study: Study) -> pd.DataFrame:
    """What can be drawn where the data themselves were refused."""
    rows = study.table[study.table["metric"] == study.question.metric]
    rows = rows[((rows["value"] > 0) & (rows["train_flops"] > 0)).fillna(False)]
    return rows.assign(held_out=False, chosen=False, used=False)


def _by_size(study: Study, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(size, rows[rows["size"] == size]) for size in _sizes(study.rows) if (rows["size"] == size).any()]


def _sizes(rows: pd.DataFrame) -> list[str]:
    return list(rows.groupby("size")["parameters"].max().sort_values().index)


def _color(study: Study, rows: pd.DataFrame, size: str) -> Any:
    from matplotlib import colormaps

    sizes = _sizes(rows)
    return (
        HELD_OUT if size in study.held_out else colormaps["viridis"](0.85 * sizes.index(size) / max(len(sizes) - 1, 1))
    )


def _draw_run(axes: Any, study: Study, rows: pd.DataFrame, run: str, points: pd.DataFrame) -> None:
    size = points["size"].iloc[0]
    held_out = size in study.held_out
    color = _color(study, rows, size)
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
    if result.fit.law.inputs == COMPUTE:
        _draw_compute_law(axes, study, result, rows)
    else:
        _draw_surface(axes, study, result, rows)
    floor = result.fit.named()["e"] if result.floor is not None and result.floor.identified else 0.0
    if floor > _limits(rows["value"])[0]:
        axes.axhline(floor, color="gray", linewidth=0.9, linestyle="-.", label=f"floor E = {floor:.3g}", zorder=1)


def _draw_compute_law(axes: Any, study: Study, result: LawResult, rows: pd.DataFrame) -> None:
    least, most = result.used["train_flops"].min(), result.used["train_flops"].max()
    grid = np.geomspace(least / 1.3, rows["train_flops"].max() * 1.3, 200)
    line = pd.DataFrame({"train_flops": grid})
    metric = result.fit.metric(line)
    inside = grid <= most
    style = {"color": "black", "linewidth": 1.3, "zorder": 2}
    axes.plot(grid[inside], metric[inside], label=f"{result.fit.law.name} law", **style)
    axes.plot(grid[~inside], metric[~inside], linestyle="--", label="its prediction", **style)
    low, high = np.quantile(new_run_KN(result.fit, result.resamples, line, study.question.seed), [0.05, 0.95], axis=0)
    axes.fill_between(grid, low, high, color="black", alpha=0.12, linewidth=0, label="90 % for a new run", zorder=1)


def _draw_surface(axes: Any, study: Study, result: LawResult, rows: pd.DataFrame) -> None:
    """The law along every size's own training, and the band of the held-out sizes."""
    for index, (size, points) in enumerate(_by_size(study, rows)):
        longest = points.sort_values("train_flops").iloc[-1]
        images = np.geomspace(points["images"].min(), points["images"].max(), 60)
        line = pd.DataFrame({"parameters": float(longest["parameters"]), "images": images})
        compute = images * float(longest["train_flops"]) / float(longest["images"])
        label = f"{result.fit.law.name} law" if index == 0 else None
        axes.plot(compute, result.fit.metric(line), "k--", linewidth=1.0, zorder=2, label=label)
        if size in study.held_out:
            draws = new_run_KN(result.fit, result.resamples, line, study.question.seed)
            low, high = np.quantile(draws, [0.05, 0.95], axis=0)
            axes.fill_between(compute, low, high, color="black", alpha=0.12, linewidth=0, label="90 % for a new run")


def _limits(values: pd.Series) -> tuple[float, float]:
    """A tenth of the data's logarithmic range above and below, a quarter of their value at most."""
    low, high = float(values.min()), float(values.max())
    margin = min(max((high / low) ** 0.1, 1.02), 1.25)
    return low / margin, high * margin


def _logarithmic(axes: Any, values: pd.Series) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    _ticks(axes.yaxis, values)


def _ticks(axis: Any, values: pd.Series) -> None:
    """Enough round numbers on a logarithmic axis, however short it is, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    ratio = values.max() / values.min()
    axis.set_major_locator(MaxNLocator(6) if ratio < 4 else LogLocator(subs=(1, 2, 3, 5) if ratio < 30 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _decorate(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left")
    axes.grid(which="major", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _rendered(figure: Any) -> Images:
    """The figure as PNG and SVG, the same bytes for the same data."""
    import matplotlib

    images = {}
    with matplotlib.rc_context({"svg.hashsalt": "fitscale", "svg.fonttype": "none"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            images[kind] = buffer.getvalue()
    return images
