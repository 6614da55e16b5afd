"""How well does a law predict what it has not seen? Every law against every held-out point, and a ranking.

- size: every size but the two smallest is predicted from the smaller ones;
- compute: rows beyond a cut in training FLOPs are predicted from those below it, for cuts at 1/2, 1/4 and 1/8 of the
  largest;
- step: the last checkpoint of every run is predicted from that run's earlier ones.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fitscale.scaling.fit.fitting import fit_law
from fitscale.scaling.fit.laws import LAWS
from fitscale.scaling.fit.question import AUTO
from fitscale.scaling.fit.study import admissible, divide, predicted, used_by
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.selection import size_order

BY = ("size", "compute", "step")
CUTS = (8, 4, 2)


@dataclass(frozen=True)
class HoldOut:
    """`errors`: one row per law and held-out point (fold, law, run, step, train_flops, value, predicted, error).

    `ranking`: per law the mean |ln(predicted / actual)|, the worst error, and the share of folds that it could be
    fitted to, best first; laws are compared on the folds that test every ranked law. `refusals` name the folds that say
    nothing of a law: it could not be fitted, or no held-out point is on the frontier that it speaks of.
    """

    errors: pd.DataFrame
    ranking: pd.DataFrame
    refusals: list[tuple[str, str, Refusal]]  # fold, law, why


def hold_out(rows: pd.DataFrame, by: str, laws: tuple[str, ...], points: str) -> HoldOut:
    """Predict every fold of `rows` (one selection, rows/selection.py) with every law, `auto` being all that can be.

    Raises:
        Refusal: there is no fold, or none tests any law.
    """
    found, refusals, fitted = [], [], Counter[str]()
    if AUTO in laws:
        laws = tuple(law.name for law in admissible(rows))
    parts = folds(rows, by)
    if not parts:
        raise Refusal("too_few_points", f"hold-out by {by}: nothing can be held out and still leave enough to fit")
    for fold, part, held_out in parts:
        divided = divide(part, held_out, points if by != "step" else "all")
        for name in laws:
            try:
                fit = fit_law(LAWS[name], used_by(LAWS[name], divided), spare=0)
                fitted[name] += 1
                errors = predicted(fit, divided)
                if not errors["chosen"].any():
                    where = "on the frontier" if points == "frontier" else "the last of its run"
                    text = f"fitted, but no held-out point is {where}: nothing here tests it"
                    raise Refusal("not_on_frontier", text)
                found.append(errors[errors["chosen"]].assign(fold=fold, law=name))
            except Refusal as refusal:
                refusals.append((fold, name, refusal))
    if not found:
        which = "tested" if fitted else "fitted"
        raise Refusal("too_few_points", f"hold-out by {by}: no law could be {which}; the first: {refusals[0][2]}")
    errors = pd.concat(found, ignore_index=True)
    return HoldOut(errors, _ranking(errors, {name: count / len(parts) for name, count in fitted.items()}), refusals)


def folds(rows: pd.DataFrame, by: str) -> list[tuple[str, pd.DataFrame, pd.Series]]:
    """Name, rows, and which of them are held out, of every fold."""
    if by == "size":
        order = size_order(rows)
        parts = [(size, rows[rows["size"].isin(order[: index + 1])]) for index, size in enumerate(order)]
        return [(f"size {size}", part, part["size"] == size) for size, part in parts[2:]]
    if by == "compute":
        flops = rows["train_flops"]
        cuts = [cut for cut in CUTS if (flops <= flops.max() / cut).sum() > 2]
        return [(f"beyond 1/{cut} of the compute", rows, flops > flops.max() / cut) for cut in cuts]
    runs = [(name, run.sort_values("train_flops")) for name, run in rows.groupby("run", sort=True) if len(run) > 2]
    return [(f"last of {name}", run, pd.Series([False] * (len(run) - 1) + [True], run.index)) for name, run in runs]


def _ranking(errors: pd.DataFrame, folds_fitted: dict[str, float]) -> pd.DataFrame:
    everywhere = errors.groupby("fold")["law"].nunique()
    common = everywhere[everywhere == errors["law"].nunique()].index
    compared = errors[errors["fold"].isin(common)] if len(common) else errors
    sizes_of_errors = np.log1p(compared["error"]).abs().groupby(compared["law"])
    ranking = sizes_of_errors.agg(mean_error="mean", worst_error="max").sort_values("mean_error")
    return ranking.assign(folds_fitted=ranking.index.map(folds_fitted)).reset_index()
