"""Runs at equal compute, for the optimum at each budget: columns budget, run, parameters, images, tokens, value.

Runs that were made for common budgets are taken as they are. Otherwise every run's curve, a line between its
evaluations in logarithms, is cut at `CUTS` log-spaced budgets that at least `LEAST_SIZES` sizes reach.
"""

import numpy as np
import pandas as pd

from fitscale.scaling.fit.solver import Array
from fitscale.scaling.rows.refusals import Refusal

SAME_BUDGET = 1.1  # rows whose compute differs by less belong to one budget
LEAST_SIZES = 4
CUTS = 6  # budgets at which curves are cut
SAME_TOKENS = 1.05  # means over the images of runs differ by which of them they have seen
SLICE = ["budget", "run", "parameters", "images", "tokens", "value"]


def slices_of_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """The slices of `rows`, one selection; images and tokens are missing where the table does not say.

    Raises:
        Refusal: no compute is reached by enough sizes, or the table does not say how many parameters a size has.
    """
    if rows["parameters"].isna().any():
        raise Refusal("missing_values", "isoflop: column parameters is missing in some rows")
    rows = with_tokens(rows).sort_values("train_flops")
    group = (np.log(rows["train_flops"]).diff() > np.log(SAME_BUDGET)).cumsum()
    whole = rows.groupby(group).filter(lambda part: part["parameters"].nunique() >= LEAST_SIZES)
    flops, runs = whole.groupby(group)["train_flops"], whole.groupby(group)["run"]
    # One point of each run at one compute, not dense curves whose points are near each other in a chain.
    if len(whole) and (flops.max() <= flops.min() * SAME_BUDGET).all() and (runs.nunique() == runs.size()).all():
        return whole.assign(budget=flops.transform(lambda flops: np.exp(np.log(flops).mean())))[SLICE]
    return _cut(rows)


def with_tokens(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with columns images and tokens as floats, where the table says them; tokens by those of an image."""
    missing = pd.Series(np.nan, rows.index)
    images, per_image, tokens = (
        rows.get(name, missing).astype(float) for name in ("images", "tokens_per_image", "tokens")
    )
    return rows.assign(images=images, tokens=tokens.fillna(images * per_image))


def tokens_per_image(rows: pd.DataFrame) -> float | None:
    """Tokens of an image, if the rows say so and agree; 1 where the data are tokens from the first."""
    known = with_tokens(rows)
    each = known["tokens"] / known["images"]
    if each.isna().any() or each.max() > SAME_TOKENS * each.min():
        return None
    return float(each.mean())


def data_column(rows: pd.DataFrame) -> str:
    """What the data of `rows` are counted in: tokens where images have alike many, else images."""
    return "images" if tokens_per_image(rows) is None else "tokens"


def along(run: pd.DataFrame, grid: Array) -> pd.DataFrame:
    """The metric, and the data seen, at every compute of `grid` that the run has passed."""
    logs = run[["train_flops", "value", "images", "tokens"]].sort_values("train_flops").astype(float).apply(np.log)
    inside = (np.log(grid) >= logs["train_flops"].iloc[0]) & (np.log(grid) <= logs["train_flops"].iloc[-1])
    cut = {
        name: np.exp(np.interp(np.log(grid[inside]), logs["train_flops"], logs[name]))
        for name in ("value", "images", "tokens")
    }
    of_run = {name: run[name].iloc[0] for name in ("run", "size", "parameters")}
    return pd.DataFrame({"budget": grid[inside], **cut}).assign(**of_run)


def _cut(rows: pd.DataFrame) -> pd.DataFrame:
    grid = np.geomspace(rows["train_flops"].min(), rows["train_flops"].max(), 400)
    curves = [along(run, grid) for _, run in rows.groupby("run", sort=True) if len(run) > 1]
    cuts = pd.concat(curves) if curves else rows.iloc[:0].assign(budget=0.0)
    sizes = cuts.groupby("budget", sort=True)["size"].nunique()
    reached = sizes.index[sizes >= LEAST_SIZES]
    if reached.empty:
        raise Refusal("too_few_points", f"isoflop: no compute is reached by {LEAST_SIZES} sizes at least")
    chosen = reached[[round(i * (len(reached) - 1) / (CUTS - 1)) for i in range(CUTS)]]
    return cuts.loc[cuts["budget"].isin(chosen), SLICE]
