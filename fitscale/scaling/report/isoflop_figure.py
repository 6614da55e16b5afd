"""The figure of isoFLOP curves: metric against size for every budget, and the line of optima."""

import numpy as np

from fitscale.scaling.fit.compute_optimal import IsoFlop
from fitscale.scaling.report import canvas
from fitscale.scaling.report.content import readable


def isoflop_curves(iso: IsoFlop, metric: str) -> canvas.Images:
    """The points of every budget with an optimum, the optima, and the fitted law in the title."""
    from matplotlib import colormaps

    axes = canvas.new_figure().add_subplot()
    canvas.logarithmic(axes.xaxis, *canvas.limits(iso.slices[iso.of]), scientific=True)
    canvas.logarithmic(axes.yaxis, *canvas.limits(iso.slices["value"]))
    for index, optimum in enumerate(iso.optima):
        rows = iso.slices[np.isclose(iso.slices["budget"], optimum.budget)].sort_values(iso.of)
        color = colormaps["plasma"](0.85 * index / max(len(iso.optima) - 1, 1))
        label = f"{optimum.budget:.2g} FLOPs"
        axes.plot(rows[iso.of], rows["value"], "o-", color=color, linewidth=1.1, label=label)
    best = [(optimum.best, optimum.metric) for optimum in iso.optima]
    axes.plot(*zip(*best, strict=True), "k*--", markersize=11, label=f"optimum ({iso.method})")
    interval = "not estimated"
    if iso.interval_90 is not None:
        interval = "{:.3f} to {:.3f}".format(*iso.interval_90)
    title = f"Best {iso.of} by {iso.method}: C^{iso.exponent:.3f} (90 %: {interval})"
    canvas.decorate(axes, title, iso.of, readable(metric))
    return canvas.rendered(axes.figure)
