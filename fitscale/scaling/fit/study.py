"""One scaling study: rows of a runs table -> fitted laws, their uncertainty, and their test on sizes held out.

1. Select the rows of one metric that may be compared (select.py).
2. Set the held-out sizes aside; choose the points that a law of compute speaks of (points.py) among the rest. Laws of
   size and data are fitted to all of the rest.
3. Fit every law, draw whole runs anew, and predict each held-out point. A law that cannot be fitted is refused by name.
4. Rank the laws that were fitted by their error on the held-out points that count for all of them.
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.fit.fitting import Fit, Loss, fit_law
from fitscale.scaling.fit.isoflop import METHODS, IsoFlop, isoflop, slices_of_runs
from fitscale.scaling.fit.laws import COMPUTE, LAWS, Law
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.uncertainty import (
    FEW_RUNS,
    FloorProfile,
    Resamples,
    covariance,
    floor_profile,
    new_run_KN,
    resample,
)
from fitscale.scaling.rows.fitted_points import chosen
from fitscale.scaling.rows.refusals import Caution, Refusal
from fitscale.scaling.rows.selection import Selection, select, size_order

FAR = 10.0  # a prediction at more than this many times the fitted compute must be asked for
CHOICES = (*LAWS, "isoflop")


@dataclass(frozen=True)
class Question:
    """What is asked of the table; every choice that changes the answer."""

    metric: str = "fd"
    laws: tuple[str, ...] = ("offset",)
    points: str = "frontier"
    hold_out: tuple[str, ...] = ("largest",)  # sizes, or `largest`
    where: dict[str, str] = field(default_factory=dict)
    from_step: int = 0
    drop_missing: bool = False
    extrapolate: bool = False  # agree to predictions beyond FAR
    loss: Loss = field(default_factory=Loss)
    resamples: int = 4000
    seed: int = 0


@dataclass(frozen=True)
class LawResult:
    """A fitted law.

    `predictions` has one row per held-out point: value, predicted, low and high (90 %), error, inside, chosen (it
    counts: a law of compute speaks of the chosen points alone, one of size and data of all).
    """

    fit: Fit
    used: pd.DataFrame
    resamples: Resamples
    covariance_PP: Array
    floor: FloorProfile | None
    predictions: pd.DataFrame
    error: float | None  # mean |ln(predicted / actual)| over the held-out points that count


@dataclass(frozen=True)
class Study:
    """Everything a report needs. `rows` has the columns held_out, chosen (it counts) and used (by laws of compute)."""

    question: Question
    table: pd.DataFrame
    rows: pd.DataFrame
    sizes: list[str]
    held_out: list[str]
    key: dict[str, str]
    results: list[LawResult]  # best first
    isoflops: list[IsoFlop]
    refusals: list[Refusal]
    cautions: list[Caution]

    @property
    def answered(self) -> bool:
        return bool(self.results or self.isoflops)


def study(table: pd.DataFrame, question: Question) -> Study:
    """Answer `question` from a validated runs table.

    A refusal that concerns the data leaves no results; one that concerns a law leaves the others.
    """
    try:
        selection = select(table, question.metric, question.where, question.from_step, question.drop_missing)
        rows, held_out = _divide(selection.rows, question)
    except Refusal as refusal:
        return Study(question, table, table.iloc[:0], [], [], {}, [], [], [refusal], [])
    return _answer(table, question, selection, rows, held_out)


def _answer(
    table: pd.DataFrame, question: Question, selection: Selection, rows: pd.DataFrame, held_out: list[str]
) -> Study:
    results: list[LawResult] = []
    isoflops: list[IsoFlop] = []
    refusals: list[Refusal] = []
    for name in question.laws:
        try:
            if name == "isoflop":
                slices = slices_of_runs(rows)
                isoflops = [isoflop(slices, method, question.seed) for method in METHODS]
            else:
                results.append(_result(LAWS[name], rows, question))
        except Refusal as refusal:
            refusals.append(refusal)
    results = _ranked(results)
    cautions = selection.cautions + _cautions(rows, results, isoflops, held_out)
    sizes = size_order(rows)
    return Study(question, table, rows, sizes, held_out, selection.key, results, isoflops, refusals, cautions)


def _divide(rows: pd.DataFrame, question: Question) -> tuple[pd.DataFrame, list[str]]:
    """Mark the rows that are held out, that count, and that laws of compute are fitted to."""
    sizes = size_order(rows)
    held_out = list(dict.fromkeys(sizes[-1] if size == "largest" else size for size in question.hold_out))
    for size in held_out:
        if size not in sizes:
            raise UserError(f"--hold-out {size}: no such size; valid: largest, none, {', '.join(sizes)}")
    fitted = [size for size in sizes if size not in held_out]
    if len(fitted) < 2:
        raise Refusal(
            "one_size",
            f"only size {', '.join(fitted) or 'none'} is left to fit; a law over sizes needs at least two besides the "
            "held-out one",
        )
    rows = rows.assign(held_out=rows["size"].isin(held_out))
    kept = ~rows["held_out"]
    rows = rows.assign(chosen=chosen(rows, question.points), used=False)
    rows.loc[kept, "used"] = chosen(rows[kept], question.points)
    if held_out:
        refuse_far(rows.loc[kept, "train_flops"].max(), rows.loc[~kept, "train_flops"].max(), question.extrapolate)
    return rows, held_out


def refuse_far(fitted_flops: float, target_flops: float, agreed: bool) -> None:
    """Refuse a prediction at more than `FAR` times the fitted compute that nobody agreed to."""
    ratio = target_flops / fitted_flops
    if ratio > FAR and not agreed:
        raise Refusal(
            "extrapolation",
            f"the prediction is for {ratio:.1f} times the largest fitted compute; beyond {FAR:g} times say so with "
            "--extrapolate",
        )


def _result(law: Law, rows: pd.DataFrame, question: Question) -> LawResult:
    used = rows[rows["used"]] if law.inputs == COMPUTE else rows[~rows["held_out"]]
    _refuse_one_size(law, used, question.points)
    fit = fit_law(law, used, question.loss)
    draws = resample(fit, used, question.resamples, question.seed)
    floor = floor_profile(fit, used) if law.floor else None
    claimed = rows if law.inputs == COMPUTE else rows.assign(chosen=True)
    predictions = _predictions(fit, draws, claimed[claimed["held_out"]], question.seed)
    error = _error(predictions, predictions["chosen"].astype(bool))
    return LawResult(fit, used, draws, covariance(fit, used), floor, predictions, error)


def _refuse_one_size(law: Law, used: pd.DataFrame, points: str) -> None:
    """One size can own the frontier; then nothing says how a law of compute carries over to another run."""
    if used["size"].nunique() < 2:
        where = " on the frontier" if points == "frontier" else ""
        raise Refusal(
            "one_size",
            f"{law.name} law: all {len(used)} points{where} are of size {used['size'].iloc[0]}, so they do not tell a "
            "run's luck from the law; try --points last or all, or train the other sizes longer",
        )


def _error(predictions: pd.DataFrame, counted: pd.Series) -> float | None:
    return float(np.abs(np.log1p(predictions.loc[counted, "error"])).mean()) if counted.any() else None


def _ranked(results: list[LawResult]) -> list[LawResult]:
    """Best first, on the held-out points that count for every law; if there are none, by each law's own error."""
    shared = np.logical_and.reduce([result.predictions["chosen"].sort_index() for result in results])

    def rank(result: LawResult) -> float:
        predictions = result.predictions.sort_index()
        error = _error(predictions, pd.Series(shared, predictions.index)) if np.any(shared) else result.error
        return np.inf if error is None else error

    return sorted(results, key=rank)


def _predictions(fit: Fit, draws: Resamples, held_out: pd.DataFrame, seed: int) -> pd.DataFrame:
    columns = ["run", "size", "step", "parameters", "images", "train_flops", "value", "chosen"]
    rows = held_out[columns].sort_values(["run", "train_flops"])
    if rows.empty:
        return rows
    predicted = fit.metric(rows)
    low, high = np.quantile(new_run_KN(fit, draws, rows, seed), [0.05, 0.95], axis=0)
    rows = rows.assign(predicted=predicted, error=predicted / rows["value"] - 1, low=low, high=high)
    return rows.assign(inside=(rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"]))


def _cautions(
    rows: pd.DataFrame, results: list[LawResult], isoflops: list[IsoFlop], held_out: list[str]
) -> list[Caution]:
    found = []
    fitted = [result.used for result in results] or [rows[~rows["held_out"]]]
    runs = min(used["run"].nunique() for used in fitted)
    if runs < FEW_RUNS:
        text = f"only {runs} runs are fitted: how much runs differ by luck is hardly known, so intervals are wide"
        found.append(Caution("few_runs", text))
    for result in results:
        found += _floor_caution(result) + _missed(result)
    for budget in [refusal for iso in isoflops[:1] for refusal in iso.refusals]:
        found.append(Caution(budget.code, budget.message))
    of_compute = any(result.fit.law.inputs == COMPUTE for result in results)
    if held_out and of_compute and not rows.loc[rows["held_out"], "chosen"].any():
        text = f"no point of {', '.join(held_out)} is on the frontier, so it does not test a law of compute"
        found.append(Caution("not_on_frontier", text))
    return found


def _floor_caution(result: LawResult) -> list[Caution]:
    if result.floor is None:
        return []
    floor, best = result.fit.named()["e"], float(result.used["value"].min())
    if floor > best:
        name = result.fit.law.name
        text = f"{name} law: its floor {floor:.4g} lies above the best measurement {best:.4g}: it does not fit"
        return [Caution("misfit", text)]
    if result.floor.identified:
        return []
    text = f"{result.fit.law.name} law: the floor E is not identified; at {result.floor.level:.0%} zero fits as well"
    return [Caution("floor", text)]


def _missed(result: LawResult) -> list[Caution]:
    if result.predictions.empty:
        return []
    missed = result.predictions[result.predictions["chosen"] & ~result.predictions["inside"]]
    if missed.empty:
        return []
    counted = int(result.predictions["chosen"].sum())
    worst = missed.loc[np.log1p(missed["error"]).abs().idxmax(), "error"]
    text = (
        f"{result.fit.law.name} law: {len(missed)} of {counted} held-out points lie outside the 90 % interval, the "
        f"worst by {worst:+.1%}"
    )
    return [Caution("missed", text)]
