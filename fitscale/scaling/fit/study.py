"""One scaling study: rows of a runs table -> fitted laws, their uncertainty, and their test on sizes held out.

1. Select the rows of one metric that may be compared (rows/selection.py).
2. Set the held-out sizes aside; choose the points that a law of compute speaks of (rows/fitted_points.py) among the
   rest. Laws of size and data are fitted to all of the rest.
3. Fit every law that the columns allow, asked for or not, and judge each by sizes left out of those fitted
   (survival.py). A law that was asked for and cannot be fitted is refused by name; `auto` asks for those that survive.
4. Predict each held-out point. The interval carries what the surviving laws disagree about (answer.py).
5. Rank the laws: by their weight if `auto` chose them, else by their error on the held-out points that count for all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.fit import uncertainty
from fitscale.scaling.fit.answer import Member, draws_KN, interval
from fitscale.scaling.fit.compute_optimal import IsoFlop, by_every_method, isoflop_cautions
from fitscale.scaling.fit.fitting import Fit, fit_law
from fitscale.scaling.fit.laws import COMPUTE, LAWS, Law
from fitscale.scaling.fit.question import AUTO, Question
from fitscale.scaling.fit.quoted import Quoted, quoted
from fitscale.scaling.fit.residuals import bend
from fitscale.scaling.fit.slices import data_column, slices_of_runs
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.survival import dominated, groups, verdict, weights
from fitscale.scaling.rows.fitted_points import chosen
from fitscale.scaling.rows.refusals import Caution, Refusal, listed
from fitscale.scaling.rows.selection import size_order

FAR = 10.0  # a prediction at more than this many times the fitted compute must be asked for
ISOFLOP = "isoflop"
CHOICES = (AUTO, *LAWS, ISOFLOP)
REPORTED = ["run", "size", "step", "parameters", "images", "train_flops", "value", "chosen"]  # of a held-out point


@dataclass(frozen=True)
class LawResult:
    """A fitted law, and the `members` that answer with it: the laws that survive.

    `predictions` has one row per held-out point: value, predicted, low and high (at the question's level), error,
    inside, chosen (it counts: a law of compute speaks of the chosen points alone, one of size and data of all).
    """

    own: Member
    members: list[Member]
    question: Question
    used: pd.DataFrame
    floor: uncertainty.FloorProfile | None
    predictions: pd.DataFrame

    @property
    def fit(self) -> Fit:
        return self.own.fit

    @property
    def resamples(self) -> uncertainty.Resamples:
        return self.own.resamples

    def draws_KN(self, rows: pd.DataFrame, new_run: bool = True) -> Array:
        """Draws of the metric at every row, of a new run or of the law itself, with the laws' disagreement."""
        return draws_KN(self.own, self.members, rows, self.question.seed, new_run)

    def interval(self, rows: pd.DataFrame, level: float | None = None) -> tuple[Array, Array]:
        """low_N and high_N of a new run at every row, at the question's level by default."""
        return interval(self.own, self.members, rows, self.question.seed, level or self.question.level)

    @cached_property
    def lack_of_fit(self) -> str | None:
        """What speaks against the law, in a sentence; None if it passed every test."""
        bent = bend(self.fit)
        failed = [*self.own.verdict.failed, *([f"BENT against its points, {bent}"] if bent else [])]
        if self.own.weight == 0.0:
            best = max(self.members, key=lambda member: member.weight).fit.law.name
            what = f"does not fit: the {best} law leaves far less scatter at the same points"
            return f"{what}; {failed[-1]}" if bent else what
        return f"does not fit well: {'; '.join(failed)}" if failed else None

    @property
    def name(self) -> str:
        return self.fit.law.name

    @property
    def claimed(self) -> pd.DataFrame:
        """The predictions that count."""
        return self.predictions[self.predictions["chosen"]]

    @property
    def error(self) -> float | None:
        """Mean |ln(predicted / actual)| over the held-out points that count."""
        return mean_error(self.claimed)


@dataclass(frozen=True)
class Study:
    """Everything a report needs. `rows` has the columns that `divide` adds."""

    question: Question
    table: pd.DataFrame
    rows: pd.DataFrame
    sizes: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    key: dict[str, str] = field(default_factory=dict)
    results: list[LawResult] = field(default_factory=list)  # best first
    isoflops: list[IsoFlop] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    cautions: list[Caution] = field(default_factory=list)
    unfitted: list[Refusal] = field(default_factory=list)  # laws that nobody named, and that the data do not hold

    @cached_property
    def quoted(self) -> Quoted:
        """What is quoted of it."""
        return quoted(self)


def study(table: pd.DataFrame, question: Question) -> Study:
    """Answer `question` from a validated runs table.

    A refusal that concerns the data leaves no results; one that concerns a law leaves the others.
    """
    try:
        selection = question.select(table)
        sizes = size_order(selection.rows)
        held_out = _held_out(sizes, question.hold_out)
        rows = divide(selection.rows, selection.rows["size"].isin(held_out), question.points)
        if held_out:
            seen, unseen = (rows.loc[rows["held_out"] == out, "train_flops"].max() for out in (False, True))
            refuse_far(seen, unseen, question.extrapolate)
    except Refusal as refusal:
        return Study(question, table, table.iloc[:0], refusals=[refusal])
    found: dict[str, Member] = {}
    refused: dict[str, Refusal] = {}
    if set(question.laws) != {ISOFLOP}:  # which asks no law
        found, refused = members(rows, question, [size for size in sizes if size not in held_out])
    survivors = [member for member in found.values() if member.weight]
    asked = [name for name in question.laws if name in LAWS]
    if AUTO in question.laws:
        asked = list(dict.fromkeys([*asked, *(member.fit.law.name for member in survivors)]))
    silent = [name for name in LAWS if name in refused]
    told = set(silent) if AUTO in question.laws and not found else set(question.laws)
    refusals = [refused[name] for name in silent if name in told]
    unfitted = [refused[name] for name in silent if name not in told and AUTO in question.laws]
    results = [_result(found[name], survivors, rows, question) for name in asked if name in found]
    isoflops: list[IsoFlop] = []
    if ISOFLOP in question.laws:
        try:
            slices = slices_of_runs(rows[~rows["held_out"]])
            of = data_column(slices) if question.optimum == "tokens" else question.optimum
            isoflops, unfit = by_every_method(slices, of, question.seed, question.level)
            refusals += unfit
        except Refusal as refusal:
            refusals.append(refusal)
    results = _ranked(results) if AUTO not in question.laws else sorted(results, key=lambda law: -law.own.weight)
    cautions = selection.cautions + list(_cautions(rows, results, isoflops, held_out))
    return Study(question, table, rows, sizes, held_out, selection.key, results, isoflops, refusals, cautions, unfitted)


def admissible(rows: pd.DataFrame, asked: tuple[str, ...] = ()) -> list[Law]:
    """Laws whose inputs every row has, and those that were asked for."""
    return [
        law for law in LAWS.values() if law.name in asked or (rows[list(law.inputs)] > 0).fillna(False).all(axis=None)
    ]


def divide(rows: pd.DataFrame, held_out: pd.Series, points: str) -> pd.DataFrame:
    """`rows` with columns that are true for what is held_out, chosen (it counts) and used (by laws of compute)."""
    rows = rows.assign(held_out=held_out, chosen=chosen(rows, points), used=False)
    rows.loc[~held_out, "used"] = chosen(rows[~held_out], points)
    return rows


def used_by(law: Law, rows: pd.DataFrame) -> pd.DataFrame:
    """The divided rows that `law` is fitted to: those used, or all that are not held out if it is of size and data."""
    return rows[rows["used"] if law.inputs == COMPUTE else ~rows["held_out"]]


def predicted(fit: Fit, rows: pd.DataFrame) -> pd.DataFrame:
    """The held-out ones of the divided rows with what the law says of them; of size and data, all of them count."""
    unseen = rows.loc[rows["held_out"], REPORTED]
    if fit.law.inputs != COMPUTE:
        unseen = unseen.assign(chosen=True)
    metric = fit.metric(unseen)
    return unseen.assign(predicted=metric, error=metric / unseen["value"] - 1)


def mean_error(predictions: pd.DataFrame) -> float | None:
    """Mean |ln(predicted / actual)|; None of none."""
    return float(np.log1p(predictions["error"]).abs().mean()) if len(predictions) else None


def refuse_far(fitted_flops: float, target_flops: float, agreed: bool) -> None:
    """Refuse a prediction at more than `FAR` times the fitted compute that nobody agreed to."""
    ratio = target_flops / fitted_flops
    if ratio > FAR and not agreed:
        what = f"the prediction is for {ratio:.1f} times the largest fitted compute"
        raise Refusal("extrapolation", f"{what}; beyond {FAR:g} times say so with --extrapolate")


def _held_out(sizes: list[str], asked: tuple[str, ...]) -> list[str]:
    held_out = list(dict.fromkeys(sizes[-1] if size == "largest" else size for size in asked))
    for size in held_out:
        if size not in sizes:
            raise UserError(f"--hold-out {size}: no such size; valid: largest, none, {listed(sizes, 20)}")
    fitted = [size for size in sizes if size not in held_out]
    if len(fitted) < 2:
        what = f"only size {', '.join(fitted) or 'none'} is left to fit"
        raise Refusal("one_size", f"{what}; a law over sizes needs at least two besides the held-out one")
    return held_out


def members(rows: pd.DataFrame, question: Question, sizes: list[str]) -> tuple[dict[str, Member], dict[str, Refusal]]:
    """Every law that can be fitted to the divided rows, with its weight; and why the others cannot."""
    fits, refused = {}, {}
    known = rows[~rows["held_out"]].drop(columns=["held_out", "chosen", "used"])
    for law in admissible(known, question.laws):
        try:
            fits[law.name] = _fit(question.law(law.name), used_by(law, rows), question)
        except Refusal as refusal:
            refused[law.name] = refusal
    used = {name: used_by(fit.law, rows) for name, fit in fits.items()}
    left = groups(known, sizes, question.points)
    verdicts = [verdict(fit, used[name], left, question.seed) for name, fit in fits.items()]
    survives = [
        not dominated(fit, used[name], [other for other in fits.values() if other is not fit])
        for name, fit in fits.items()
    ]
    weight = weights(verdicts, survives) if fits else []
    found = {}
    for fit, of_fit, share in zip(fits.values(), verdicts, weight, strict=True):
        if share or fit.law.name in question.laws:
            draws = uncertainty.resample(fit, question.resamples, question.seed, question.resampling)
            found[fit.law.name] = Member(fit, draws, of_fit, share)
    return found, refused


def _fit(law: Law, used: pd.DataFrame, question: Question) -> Fit:
    if used["size"].nunique() < 2:  # one can own the frontier: then nothing says how the law carries over to another
        where = " on the frontier" if question.points == "frontier" else ""
        what = f"{law.name} law: all {len(used)} points{where} are of size {used['size'].iloc[0]}"
        advice = "try --points last or all, or train the other sizes longer"
        raise Refusal("one_size", f"{what}, so they do not tell how much runs differ; {advice}")
    return fit_law(law, used, question.loss)


def _result(own: Member, members: list[Member], rows: pd.DataFrame, question: Question) -> LawResult:
    fit = own.fit
    unseen = predicted(fit, rows).sort_values(["run", "train_flops"])
    low, high = interval(own, members, rows.loc[unseen.index], question.seed, question.level)
    inside = (low <= unseen["value"]) & (unseen["value"] <= high)
    unseen = unseen.assign(low=low, high=high, inside=inside)
    profile = uncertainty.floor_profile(fit, question.level) if fit.law.floor else None
    return LawResult(own, members, question, used_by(fit.law, rows), profile, unseen)


def _ranked(results: list[LawResult]) -> list[LawResult]:
    """Best first, on the held-out points that count for every law; if there are none, by each law's own error."""
    shared = np.logical_and.reduce([result.predictions["chosen"].sort_index() for result in results])

    def rank(result: LawResult) -> float:
        error = mean_error(result.predictions.sort_index()[shared]) if np.any(shared) else result.error
        return np.inf if error is None else error

    return sorted(results, key=rank)


def _cautions(
    rows: pd.DataFrame, results: list[LawResult], isoflops: list[IsoFlop], held_out: list[str]
) -> Iterator[Caution]:
    fitted = [result.used for result in results] or [rows[~rows["held_out"]]]
    runs = min(used["run"].nunique() for used in fitted)
    if runs < uncertainty.FEW_RUNS:
        text = f"only {runs} runs are fitted: the variance between runs is hardly known, so intervals are wide"
        yield Caution("few_runs", text)
    for result in results:
        if result.lack_of_fit:
            yield Caution("lack_of_fit", f"{result.name} law: {result.lack_of_fit}")
        yield from _floor_caution(result)
        yield from _missed(result)
    yield from isoflop_cautions(isoflops)
    of_compute = any(result.fit.law.inputs == COMPUTE for result in results)
    if held_out and of_compute and not rows.loc[rows["held_out"], "chosen"].any():
        text = f"no point of {', '.join(held_out)} is on the frontier, so it does not test a law of compute"
        yield Caution("not_on_frontier", text)


def _floor_caution(result: LawResult) -> Iterator[Caution]:
    if result.floor is None:
        return
    floor, best = result.fit.named()["e"], float(result.used["value"].min())
    if floor > best:
        what = f"its floor {floor:.4g} lies above the best measurement {best:.4g}"
        yield Caution("misfit", f"{result.name} law: {what}: it does not fit")
    elif not result.floor.identified:
        what = f"the floor E is not identified; at {100 * result.floor.level:.3g} % zero fits as well"
        yield Caution("floor", f"{result.name} law: {what}")


def _missed(result: LawResult) -> Iterator[Caution]:
    missed = result.claimed[~result.claimed["inside"]]
    if len(missed):
        count = f"{len(missed)} of {len(result.claimed)} held-out points"
        worst = missed.loc[np.log1p(missed["error"]).abs().idxmax(), "error"]
        where = f"outside the {100 * result.question.level:.3g} % interval"
        text = f"{result.name} law: {count} lie {where}, the worst by {worst:+.1%}"
        yield Caution("missed", text)
