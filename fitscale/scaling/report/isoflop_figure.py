"""The figure of isoFLOP curves: metric against size for every budget, and the line of optima."""

import numpy as np

from fitscale.scaling.fit.compute_optimal import IsoFlop
from fitscale.scaling.report import canvas, palette
from fitscale.scaling.report.content import readable, sure


def isoflop_curves(iso: IsoFlop, metric: str) -> canvas.Images:
    """The points of every budget with an optimum, the optima, and the fitted law in the title."""
    axes = canvas.new_figure().add_subplot()
    canvas.logarithmic(axes.xaxis, *canvas.limits(iso.slices[iso.of]), scientific=True)
    canvas.logarithmic(axes.yaxis, *canvas.limits(iso.slices["value"]))
    budgets = {f"{optimum.budget:.3g} FLOPs": optimum.budget for optimum in iso.optima}
    colors = palette.of_values(budgets, "budget (FLOPs)", "plasma")
    for label, optimum in zip(budgets, iso.optima, strict=True):
        rows = iso.slices[np.isclose(iso.slices["budget"], optimum.budget)].sort_values(iso.of)
        named = {"label": label if colors.listed else None, "color": colors.colors[label]}
        axes.plot(rows[iso.of], rows["value"], "o-", linewidth=1.1, **named)
    best = [(optimum.best, optimum.metric) for optimum in iso.optima]
    axes.plot(*zip(*best, strict=True), "k*--", markersize=11, label=f"optimum ({iso.method})")
    colors.draw_bar(axes)
    title = f"Best {iso.of} by {iso.method}: C^{iso.exponent:.3f} ({sure(iso)})"
    canvas.decorate(axes, title, iso.of, readable(metric))
    return canvas.rendered(axes.figure)
