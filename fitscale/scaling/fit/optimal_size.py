"""The compute-optimal size by a fitted law of size and data, where isoFLOP curves do not overlap.

A budget C buys C / c(N) images of a model of N parameters; c(N), the training FLOPs per image, is a power of N fitted
to the table. The best N minimises the law along that line. Only sizes within those that were trained are searched.
"""

import numpy as np
import pandas as pd

from fitscale.scaling.fit.fitting import Fit
from fitscale.scaling.fit.isoflop import Optimum
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.rows.refusals import Refusal

FINE = 2001


def optimal_sizes(fit: Fit, rows: pd.DataFrame, theta_KP: Array, budgets: Array) -> tuple[list[Optimum], list[Refusal]]:
    """The best size of each budget, its `spread` over the parameter sets `theta_KP`; edge optima are refused."""
    sizes = rows.drop_duplicates("parameters").sort_values("parameters")
    logs_N = np.linspace(np.log(float(sizes["parameters"].min())), np.log(float(sizes["parameters"].max())), FINE)
    cost = np.log(sizes["train_flops"] / sizes["images"].astype(float))
    slope, constant = np.polyfit(np.log(sizes["parameters"].astype(float)), cost, 1)
    optima, refusals = [], []
    for budget in budgets:
        images_N = np.exp(np.log(budget) - constant - slope * logs_N)
        line = pd.DataFrame({"parameters": np.exp(logs_N), "images": images_N})
        metric_N = fit.metric(line)
        best = int(np.argmin(metric_N))
        if best in (0, FINE - 1):
            which = "smallest" if best == 0 else "largest"
            text = f"budget {budget:.3g}: the {which} trained size is the best, so the optimum lies outside"
            refusals.append(Refusal("edge_optimum", text))
            continue
        spread = float(np.std(logs_N[np.argmin(fit.metric(line, theta_KP), axis=1)]))
        optima.append(Optimum(float(budget), float(np.exp(logs_N[best])), float(metric_N[best]), spread, len(sizes)))
    return optima, refusals
