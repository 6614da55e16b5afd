"""What is wrong, or worth knowing, in a runs table before anything is fitted."""

import numpy as np
import pandas as pd

from fitscale.scaling.rows.table import key_columns

HIGHER_IS_BETTER = ("recognised",)
NEVER_MISSING = ("run", "size", "value", "train_flops", "parameters", "step", "images")


def problems(table: pd.DataFrame) -> list[str]:
    """One line per problem; an empty list is a table that can be fitted as it is."""
    found = []
    for metric, rows in table.groupby("metric", sort=True):
        found += [f"{metric}: {problem}" for problem in _of_metric(rows)]
    unfinished = sorted(table.loc[table["status"] == "unfinished", "run"].dropna().unique())
    if unfinished:
        found.append(f"unfinished runs: {', '.join(unfinished)}")
    return found


def summary(table: pd.DataFrame) -> list[str]:
    """One line per metric: rows, runs, sizes, range of compute, and correlation of the metric with log compute."""
    return [
        f"{metric}: {len(rows)} rows of {rows['run'].nunique()} runs, {rows['size'].nunique()} sizes, "
        f"{rows['train_flops'].min():.3g} to {rows['train_flops'].max():.3g} FLOPs, "
        f"r(log compute, {metric}) = {correlation(rows):.3f}"
        for metric, rows in table.groupby("metric", sort=True)
    ]


def correlation(rows: pd.DataFrame) -> float:
    """Pearson's r of the metric and the logarithm of the training FLOPs; NaN with fewer than three rows."""
    whole = rows[(rows["train_flops"] > 0) & rows["value"].notna()]
    if len(whole) < 3:
        return float("nan")
    return float(np.corrcoef(np.log(whole["train_flops"]), whole["value"])[0, 1])


def _of_metric(rows: pd.DataFrame) -> list[str]:
    found = [
        f"{name} is missing in {int(rows[name].isna().sum())} of {len(rows)} rows"
        for name in NEVER_MISSING
        if rows[name].isna().any()
    ]
    bad = int((rows["value"] <= 0).sum())
    if bad:
        found.append(f"value is not above 0 in {bad} rows, so it has no logarithm")
    if rows.duplicated(["run", "step", "train_flops", "weights", *key_columns(rows)]).any():
        found.append("the same checkpoint is measured more than once in the same way")
    for name in ["family", "patch", *key_columns(rows)]:
        values = rows[name].astype("string").fillna("missing").unique()
        if len(values) > 1:
            found.append(f"{name} differs, choose one before fitting: {', '.join(sorted(values))}")
    return found + ([] if rows["metric"].iloc[0] in HIGHER_IS_BETTER else _rising(rows))


def _rising(rows: pd.DataFrame) -> list[str]:
    """Runs that end worse than they were at some checkpoint, measured in the same way."""
    rising = set()
    whole = rows.dropna(subset=["run", "value", "train_flops"])
    for (run, *_), points in whole.groupby(["run", "weights", *key_columns(rows)], dropna=False):
        values = points.sort_values("train_flops")["value"]
        if values.iloc[-1] > values.min():
            rising.add(str(run))
    names = sorted(rising)
    share = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return [f"the last checkpoint is not the best in {share}"] if names else []
