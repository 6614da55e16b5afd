"""One scaling study: rows of a runs table -> fitted laws, their uncertainty, and their test on a size held out.

1. Select the rows of one metric that may be compared (select.py).
2. Set the held-out size aside; choose the points the law speaks of (points.py) among the rest.
3. Fit every law, resample whole runs, and predict each held-out point. A law that cannot be fitted is refused by name.
4. Rank the laws that were fitted by their error on the held-out points that count.
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.fitting import Fit, fit_law
from fitscale.scaling.laws import LAWS, Law
from fitscale.scaling.points import chosen
from fitscale.scaling.refusal import Caution, Refusal
from fitscale.scaling.select import select, size_order
from fitscale.scaling.solver import Array
from fitscale.scaling.uncertainty import (
    FEW_RUNS,
    FloorProfile,
    Resamples,
    covariance,
    floor_profile,
    new_run_KN,
    resample,
)

FAR = 10.0  # a prediction at more than this many times the fitted compute must be asked for


@dataclass(frozen=True)
class Question:
    """What is asked of the table; every choice that changes the answer."""

    metric: str = "fd"
    laws: tuple[str, ...] = ("offset",)
    points: str = "frontier"
    hold_out: str | None = "largest"  # a size, `largest`, or None
    where: dict[str, str] = field(default_factory=dict)
    from_step: int = 0
    drop_missing: bool = False
    extrapolate: bool = False  # agree to predictions beyond FAR
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class LawResult:
    """A fitted law.

    `predictions` has one row per held-out point: value, predicted, low and high (90 %), error, inside, chosen (the law
    speaks of it).
    """

    fit: Fit
    resamples: Resamples
    covariance_PP: Array
    floor: FloorProfile | None
    predictions: pd.DataFrame
    error: float | None  # mean |ln(predicted / actual)| over the held-out points that count


@dataclass(frozen=True)
class Study:
    """Everything a report needs. `rows` has the columns held_out, chosen (the law speaks of it) and used (fitted)."""

    question: Question
    table: pd.DataFrame
    rows: pd.DataFrame
    sizes: list[str]
    held_out: str | None
    key: dict[str, str]
    results: list[LawResult]  # best first
    refusals: list[Refusal]
    cautions: list[Caution]


def study(table: pd.DataFrame, question: Question) -> Study:
    """Answer `question` from a validated runs table.

    A refusal that concerns the data leaves no results; one that concerns a law leaves the others.
    """
    try:
        selection = select(table, question.metric, question.where, question.from_step, question.drop_missing)
        rows, held_out = _divide(selection.rows, question)
    except Refusal as refusal:
        return Study(question, table, table.iloc[:0], [], None, {}, [], [refusal], [])
    results, refusals = [], []
    for name in question.laws:
        try:
            results.append(_result(LAWS[name], rows, question))
        except Refusal as refusal:
            refusals.append(refusal)
    results.sort(key=lambda result: np.inf if result.error is None else result.error)
    cautions = selection.cautions + _cautions(rows, results, held_out, question)
    return Study(question, table, rows, size_order(rows), held_out, selection.key, results, refusals, cautions)


def _divide(rows: pd.DataFrame, question: Question) -> tuple[pd.DataFrame, str | None]:
    """Mark the rows that are held out, that the law speaks of, and that are fitted."""
    sizes = size_order(rows)
    held_out = sizes[-1] if question.hold_out == "largest" else question.hold_out
    if held_out is not None and held_out not in sizes:
        raise UserError(f"--hold-out {held_out}: no such size; valid: largest, none, {', '.join(sizes)}")
    fitted = [size for size in sizes if size != held_out]
    if len(fitted) < 2:
        raise Refusal(
            "one_size",
            f"only size {', '.join(fitted) or 'none'} is left to fit; a law over sizes needs at least two besides the "
            "held-out one",
        )
    rows = rows.assign(held_out=rows["size"] == held_out)
    kept = ~rows["held_out"]
    rows = rows.assign(chosen=chosen(rows, question.points), used=False)
    rows.loc[kept, "used"] = chosen(rows[kept], question.points)
    _refuse_far(rows, question)
    return rows, held_out


def _refuse_far(rows: pd.DataFrame, question: Question) -> None:
    if not rows["held_out"].any():
        return
    ratio = rows.loc[rows["held_out"], "train_flops"].max() / rows.loc[rows["used"], "train_flops"].max()
    if ratio > FAR and not question.extrapolate:
        raise Refusal(
            "extrapolation",
            f"the held-out size was trained with {ratio:.1f} times the largest fitted compute; beyond {FAR:g} times "
            "say so with --extrapolate",
        )


def _result(law: Law, rows: pd.DataFrame, question: Question) -> LawResult:
    used = rows[rows["used"]]
    fit = fit_law(law, used)
    draws = resample(fit, used, question.resamples, question.seed)
    floor = floor_profile(fit, used) if law.floor else None
    predictions = _predictions(fit, draws, rows[rows["held_out"]], question.seed)
    counted = predictions.loc[predictions["chosen"], "error"] if len(predictions) else pd.Series(dtype=float)
    error = float(np.abs(np.log1p(counted)).mean()) if len(counted) else None
    return LawResult(fit, draws, covariance(fit, used), floor, predictions, error)


def _predictions(fit: Fit, draws: Resamples, held_out: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = held_out[["run", "size", "step", "train_flops", "value", "chosen"]].sort_values(["run", "train_flops"])
    if rows.empty:
        return rows
    predicted = fit.metric(rows)
    low, high = np.quantile(new_run_KN(fit, draws, rows, seed), [0.05, 0.95], axis=0)
    rows = rows.assign(predicted=predicted, error=predicted / rows["value"] - 1, low=low, high=high)
    return rows.assign(inside=(rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"]))


def _cautions(rows: pd.DataFrame, results: list[LawResult], held_out: str | None, question: Question) -> list[Caution]:
    found = []
    runs = rows.loc[~rows["held_out"], "run"].nunique()
    if runs < FEW_RUNS:
        found.append(
            Caution(
                "few_runs",
                f"only {runs} runs are fitted: how much runs differ by luck is hardly known, so intervals are wide",
            )
        )
    for result in results:
        name = result.fit.law.name
        if result.floor is not None and not result.floor.identified:
            found.append(
                Caution(
                    "floor",
                    f"{name} law: the floor E is not identified; {result.floor.level:.0%} of the likelihood reaches 0",
                )
            )
        found += _missed(result)
    if held_out is not None and not rows.loc[rows["held_out"], "chosen"].any():
        found.append(
            Caution("not_on_frontier", f"no point of {held_out} is on the frontier, so it does not test the law")
        )
    return found


def _missed(result: LawResult) -> list[Caution]:
    if result.predictions.empty:
        return []
    missed = result.predictions[result.predictions["chosen"] & ~result.predictions["inside"]]
    if missed.empty:
        return []
    counted = int(result.predictions["chosen"].sum())
    worst = missed.loc[np.log1p(missed["error"]).abs().idxmax()]
    return [
        Caution(
            "missed",
            f"{result.fit.law.name} law: {len(missed)} of {counted} held-out points lie outside "
            f"the 90 % interval, the worst by {worst['error']:+.1%}",
        )
    ]
