"""Which rows a law speaks of: the frontier, the last checkpoint of every run, or all of them.

A law of compute alone describes the best that a compute buys: checkpoints of a large model early in its training lie
above it. `last` serves ladders whose sizes are trained for the same number of steps, `all` laws of size and data.
"""

import pandas as pd

POINTS = ("frontier", "last", "all")


def chosen(rows: pd.DataFrame, points: str) -> pd.Series:
    """True for the rows that `points` chooses, in the order of `rows`."""
    if points == "frontier":
        return frontier(rows)
    if points == "last":
        return rows["train_flops"] == rows.groupby("run")["train_flops"].transform("max")
    return pd.Series(True, index=rows.index)


def frontier(rows: pd.DataFrame) -> pd.Series:
    """Lower envelope: True where no row with as little compute has a value as low."""
    in_order = rows.sort_values(["train_flops", "value", "run"], kind="stable")
    before = in_order["value"].cummin().shift(fill_value=float("inf"))
    return (in_order["value"] < before).reindex(rows.index)
