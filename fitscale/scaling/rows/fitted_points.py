"""Which rows a law speaks of: the frontier, the last checkpoint of every run, or all of them.

A law of compute alone describes the best that a compute buys: checkpoints of a large model early in its training lie
above it. `last` serves ladders whose sizes are trained for the same number of steps, `all` laws of size and data.
"""

import numpy as np
import pandas as pd

POINTS = ("frontier", "last", "all")
RECIPE = ("batch", "lr")  # runs of one size that share these and their compute are replicates of each other
SAME_COMPUTE = 1.01  # replicates see different images, so their token counts differ a little


def chosen(rows: pd.DataFrame, points: str) -> pd.Series:
    """True for the rows that `points` chooses, in the order of `rows`."""
    if points == "frontier":
        return frontier(rows)
    if points == "last":
        return rows["train_flops"] == rows.groupby("run")["train_flops"].transform("max")
    return pd.Series(True, index=rows.index)


def frontier(rows: pd.DataFrame) -> pd.Series:
    """Lower envelope: True where nothing with as little compute has a value as low.

    Replicates stand or fall together, by their geometric mean: the better of two seeds alone would be a minimum of
    two, below what a run gets on average, and would hide how far runs scatter.
    """
    cell = _replicates(rows)
    logs = rows[["train_flops", "value"]].astype(float).apply(np.log)
    means = logs.groupby(cell).mean().sort_values(["train_flops", "value"], kind="stable")
    before = means["value"].cummin().shift(fill_value=float("inf"))
    return cell.isin(means.index[means["value"] < before])


def _replicates(rows: pd.DataFrame) -> pd.Series:
    """A number per row, shared by the rows of different runs of one recipe at the same compute."""
    recipe = ["size", *(name for name in RECIPE if name in rows)]
    in_order = rows.sort_values(["train_flops", "value", "run"], kind="stable")
    cells = pd.Series(0, index=rows.index)
    count = 0
    for _, group in in_order.groupby(recipe, dropna=False, sort=True):
        start, members = 0.0, set[str]()
        for index, run, flops in zip(group.index, group["run"], group["train_flops"], strict=True):
            if flops > start * SAME_COMPUTE or run in members:
                count, start, members = count + 1, float(flops), set()
            members.add(run)
            cells[index] = count
    return cells
