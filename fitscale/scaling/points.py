"""Which rows a law speaks of: the frontier, the last checkpoint of every run, or all of them.

A law of compute alone describes the best that a compute buys: checkpoints of a large model early in its training lie
above it. `last` serves ladders whose sizes are trained for the same number of steps.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

POINTS = ("frontier", "last", "all")


def chosen_KN(rows: pd.DataFrame, present_KN: NDArray[np.bool_], points: str) -> NDArray[np.bool_]:
    """Of the rows (sorted by training FLOPs, then value), those that `points` chooses if only `present` ones exist."""
    if points == "frontier":
        return _frontier(rows["value"].to_numpy(dtype=float), present_KN)
    if points == "last":
        return present_KN & is_last(rows)
    return present_KN


def chosen(rows: pd.DataFrame, points: str) -> pd.Series:
    """True for the rows that `points` chooses, in the order of `rows`."""
    in_order = rows.sort_values(["train_flops", "value", "run"], kind="stable")
    flags = chosen_KN(in_order, np.ones((1, len(rows)), dtype=bool), points)[0]
    return pd.Series(flags, index=in_order.index).reindex(rows.index)


def is_last(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """True for the row with the most training FLOPs of its run."""
    return (rows["train_flops"] == rows.groupby("run")["train_flops"].transform("max")).to_numpy(dtype=bool)


def _frontier(value_N: NDArray[np.float64], present_KN: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Lower envelope: no present row with as little compute has a value as low."""
    value_KN = np.where(present_KN, value_N, np.inf)
    best_KN = np.minimum.accumulate(value_KN, axis=1)
    before_KN = np.concatenate([np.full((len(value_KN), 1), np.inf), best_KN[:, :-1]], axis=1)
    return present_KN & (value_KN < before_KN)
