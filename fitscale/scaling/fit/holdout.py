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
from fitscale.scaling.fit.laws import COMPUTE, LAWS, Law
from fitscale.scaling.rows.fitted_points import chosen
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
    """Predict every fold of `rows` (one selection, select.py) with every law.

    Raises:
        Refusal: there is no fold, or none tests any law.
    """
    found, refusals, fitted = [], [], Counter[str]()
    parts = folds(rows, by)
    if not parts:
        raise Refusal("too_few_points", f"hold-out by {by}: nothing can be held out and still leave enough to fit")
    for fold, known, unseen in parts:
        for name in laws:
            try:
                errors = _errors(LAWS[name], known, unseen, points if by != "step" else "all")
                fitted[name] += 1
                _refuse_untested(errors, points)
                found.append(errors.assign(fold=fold, law=name))
            except Refusal as refusal:
                refusals.append((fold, name, refusal))
    if not found:
        which = "tested" if fitted else "fitted"
        raise Refusal("too_few_points", f"hold-out by {by}: no law could be {which}; the first: {refusals[0][2]}")
    errors = pd.concat(found, ignore_index=True)
    shares = {name: count / len(parts) for name, count in fitted.items()}
    return HoldOut(errors, _ranking(errors, shares), refusals)


def folds(rows: pd.DataFrame, by: str) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Name, known rows and unseen rows of every fold."""
    if by == "size":
        order = size_order(rows)
        groups = [(size, rows["size"].isin(order[:index]), rows["size"] == size) for index, size in enumerate(order)]
        return [(f"size {name}", rows[known], rows[unseen]) for name, known, unseen in groups[2:]]
    if by == "compute":
        flops = rows["train_flops"]
        return [
            (f"beyond 1/{cut} of the compute", rows[flops <= flops.max() / cut], rows[flops > flops.max() / cut])
            for cut in CUTS
            if (flops <= flops.max() / cut).sum() > 2
        ]
    runs = [(str(name), run.sort_values("train_flops")) for name, run in rows.groupby("run", sort=True)]
    return [(f"last of {name}", run.iloc[:-1], run.iloc[-1:]) for name, run in runs if len(run) > 2]


def _errors(law: Law, known: pd.DataFrame, unseen: pd.DataFrame, points: str) -> pd.DataFrame:
    """The law's error at the unseen points that it speaks of: all of them, if it is one of size and data."""
    rows, used = unseen, known
    if law.inputs == COMPUTE:
        rows = unseen[chosen(pd.concat([known, unseen]), points).loc[unseen.index]]
        used = known[chosen(known, points)]
    fit = fit_law(law, used, spare=0)
    rows = rows[["run", "size", "step", "train_flops", "parameters", "images", "value"]]
    predicted = fit.metric(rows) if len(rows) else np.zeros(0)
    return rows.assign(predicted=predicted, error=predicted / rows["value"] - 1)


def _refuse_untested(errors: pd.DataFrame, points: str) -> None:
    if errors.empty:
        where = "on the frontier" if points == "frontier" else "the last of its run"
        raise Refusal("not_on_frontier", f"fitted, but no held-out point is {where}: nothing here tests it")


def _ranking(errors: pd.DataFrame, folds_fitted: dict[str, float]) -> pd.DataFrame:
    everywhere = errors.groupby("fold")["law"].nunique()
    common = everywhere[everywhere == errors["law"].nunique()].index
    compared = errors[errors["fold"].isin(common)] if len(common) else errors
    logs = compared.assign(size_of_error=np.abs(np.log1p(compared["error"])))
    by_law = logs.groupby("law")["size_of_error"]
    table = pd.DataFrame({"mean_error": by_law.mean(), "worst_error": by_law.max()})
    table["folds_fitted"] = table.index.map(folds_fitted)
    return table.sort_values("mean_error").reset_index()
