"""Groups of runs compared: one law for each, and what the laws differ by.

1. The rows of every value of a column (family, label_backbone, key_guidance ...) are a study of their own, without
   held-out sizes: the same metric, laws, filters. Everything else about the measurements has to be alike, but for keys
   that are named as the groups' own (a family that learns another objective has another sampler).
2. Of every pair and law: the difference of each exponent; the ratio of the metrics at one compute (level); and the
   compute multiplier, how many times the second's FLOPs the first needs for the same metric. A law of size and data is
   compared along its compute-optimal frontier.
3. Intervals come from the resamples of both groups' runs, drawn independently. One that holds no difference (0, or a
   ratio of 1) is refused as an answer: the data cannot tell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.fit.frontier import ComputeLaw, compute_law
from fitscale.scaling.fit.laws import COMPUTE
from fitscale.scaling.fit.question import AUTO, Question
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.study import FAR, LawResult, Study, study
from fitscale.scaling.fit.uncertainty import central
from fitscale.scaling.rows.refusals import Caution, Refusal, listed
from fitscale.scaling.rows.selection import filtered
from fitscale.scaling.rows.table import KEY, key_columns

MOST_GROUPS = 8  # every pair is compared
PREFIXES = ("", "key_", "label_")
RECIPE = ("family", "patch", "batch", "lr")
MOST_LN = 690.0  # of a ratio: what no compute reaches


@dataclass(frozen=True)
class Difference:
    """What `first` and `second` differ by: first - second of an exponent, first / second of level and compute.

    `at` is the compute of a level, or the metric of a multiplier. `told`: the interval (at the question's level)
    excludes no difference.
    """

    law: str
    first: str
    second: str
    quantity: str  # the name of an exponent, level, or compute
    at: float | None
    value: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        same = 1.0 if self.quantity in ("level", "compute") else 0.0
        return not self.low <= same <= self.high


@dataclass(frozen=True)
class Comparison:
    """Every group's study by its name, the differences, and what could not be compared."""

    question: Question
    column: str
    groups: dict[str, Study]
    differences: list[Difference]
    refusals: list[Refusal]
    cautions: list[Caution]


@dataclass(frozen=True)
class _Side:
    """One group's law: as fitted, and its resamples."""

    group: str
    result: LawResult
    best: ComputeLaw
    draws: ComputeLaw

    @classmethod
    def of(cls, group: str, result: LawResult) -> "_Side":
        fit, rows = result.fit, result.used
        best = compute_law(fit, fit.theta_P[None], rows)
        return cls(group, result, best, compute_law(fit, result.resamples.theta_KP, rows))

    def exponents(self) -> dict[str, tuple[float, Array]]:
        """As fitted and of every resample; of a law of size and data also that of its frontier, gamma."""
        fit, law = self.result.fit, self.result.fit.law
        columns = {law.parameters[index]: index for index in law.exponents}
        draws_KP = self.result.resamples.theta_KP
        found = {name: (float(fit.theta_P[index]), draws_KP[:, index]) for name, index in columns.items()}
        if law.inputs != COMPUTE:
            found["gamma"] = (float(self.best.gamma_K[0]), self.draws.gamma_K)
        return found

    def range(self, column: str) -> tuple[float, float]:
        values = self.result.used[column].astype(float)
        return float(values.min()), float(values.max())


def compare(table: pd.DataFrame, question: Question, column: str, own: Sequence[str] = ()) -> Comparison:
    """Compare the groups of `table` (validated) that `column` makes.

    Args:
        own: keys (with or without key_) in which groups may differ, as part of what is compared.

    Raises:
        Refusal: fewer than two groups have a law, or they were measured in different ways.
        UserError: no such column or key, or too many groups.
    """
    own_keys = [_key(table, name) for name in own]
    column = _column(table, column)
    rows = filtered(table, question.metric, question.where)
    names = rows[column].astype("string")
    found = sorted(names.dropna().unique())
    if len(found) > MOST_GROUPS:
        raise UserError(f"--compare {column}: {len(found)} groups ({listed(found)}); at most {MOST_GROUPS}")
    groups, refusals = {}, []
    for index, name in enumerate(found):
        asked = replace(question, hold_out=(), seed=question.seed + index)  # draws of their own
        answer = study(rows[names == name], asked)
        refusals += [Refusal(refusal.code, f"{column} {name}: {refusal.message}") for refusal in answer.refusals]
        if answer.results:
            groups[str(name)] = answer
    if len(groups) < 2:
        why = "; ".join(str(refusal) for refusal in refusals) or f"the groups are {listed(found) or 'none'}"
        raise Refusal("too_few_points", f"--compare {column}: {len(groups)} groups have a law, two are needed: {why}")
    _refuse_other_keys(groups, {column, *own_keys})
    laws = [name for name in question.laws if name != AUTO]
    if AUTO in question.laws:  # the law that answers best for each group, of every group
        laws = list(dict.fromkeys([*laws, *(answer.results[0].name for answer in groups.values())]))
        for name, answer in groups.items():
            if not set(laws) <= {result.name for result in answer.results}:
                groups[name] = study(answer.table, replace(answer.question, laws=(AUTO, *laws)))
    differences = []
    for name in laws:
        sides, refused = _sides(groups, name)
        refusals += refused
        for first, second in combinations(sides, 2):
            pair, refused = _differences(first, second)
            differences += pair
            refusals += refused
    return Comparison(question, column, groups, differences, refusals, list(_cautions(groups, column, own_keys, names)))


def _column(table: pd.DataFrame, name: str) -> str:
    for prefix in PREFIXES:
        if prefix + name in table.columns:
            return prefix + name
    raise UserError(f"--compare {name}: no such column; valid: {listed(list(table.columns), 50)}")


def _key(table: pd.DataFrame, name: str) -> str:
    column = f"{KEY}{name.removeprefix(KEY)}"
    if column in table.columns:
        return column
    valid = [key.removeprefix(KEY) for key in key_columns(table)]
    raise UserError(f"--own {name}: no such key; valid: {listed(valid)}")


def _refuse_other_keys(groups: dict[str, Study], allowed: set[str]) -> None:
    """Refuse groups that were measured differently in anything but the columns `allowed`."""
    for name in key_columns(next(iter(groups.values())).rows):
        values = _keys(groups, name)
        if name not in allowed and len(set(values.values())) > 1:
            what = f"--compare: the groups were measured in different ways, {name} is {_each(values)}"
            choose = f"choose with --where {name}={next(iter(values.values()))}"
            own = f"or, if it is part of what is compared, say --own {name.removeprefix(KEY)}"
            raise Refusal("mixed_keys", f"{what}; {choose}, {own}")


def _keys(groups: dict[str, Study], name: str) -> dict[str, str]:
    return {group: answer.key.get(name.removeprefix(KEY), "missing") for group, answer in groups.items()}


def _each(values: dict[str, str]) -> str:
    return ", ".join(f"{group}: {value}" for group, value in values.items())


def _cautions(groups: dict[str, Study], column: str, own_keys: list[str], names: pd.Series) -> Iterator[Caution]:
    if names.isna().any():
        yield Caution("left_out", f"{int(names.isna().sum())} rows without {column} are in no group")
    recipes = {name: _recipe(groups, name) for name in RECIPE} | {name: _keys(groups, name) for name in own_keys}
    for name, values in recipes.items():
        if name != column and len(set(values.values())) > 1:
            text = f"groups differ in {name} too ({_each(values)}): what they differ by may be due to that"
            yield Caution("confounded", text)
    for group, answer in groups.items():
        yield from (Caution(caution.code, f"{column} {group}: {caution.message}") for caution in answer.cautions)


def _recipe(groups: dict[str, Study], name: str) -> dict[str, str]:
    return {
        group: listed(sorted(answer.rows[name].astype("string").fillna("missing").unique()))
        for group, answer in groups.items()
    }


def _sides(groups: dict[str, Study], name: str) -> tuple[list[_Side], list[Refusal]]:
    sides, refusals = [], []
    for group, answer in groups.items():
        for result in answer.results:
            try:
                sides += [_Side.of(group, result)] if result.name == name else []
            except Refusal as refusal:
                refusals.append(Refusal(refusal.code, f"{group}: {refusal.message}"))
    return sides, refusals


def _differences(first: _Side, second: _Side) -> tuple[list[Difference], list[Refusal]]:
    """Exponents, level, and the compute multiplier halfway down the metrics that both reach, and at the lowest."""
    who = f"{first.result.name} law, {first.group} against {second.group}"
    theirs = second.exponents()
    found = [
        _difference(first, second, name, None, best - theirs[name][0], _pair(np.subtract, draws_K, theirs[name][1]))
        for name, (best, draws_K) in first.exponents().items()
    ]
    refusals = []
    for level, column in ((True, "train_flops"), (False, "value")):
        low, high = np.sort([first.range(column), second.range(column)], axis=0)[[1, 0], [0, 1]]
        if low >= high:
            what = "compute at which both were trained" if level else "metric that both reach"
            refusals.append(Refusal("no_overlap", f"{who}: there is no {what}"))
        elif level:
            found.append(_level(first, second, float(np.sqrt(low * high))))
        else:
            for metric in (float(np.sqrt(low * high)), float(low)):
                try:
                    found.append(_multiplier(first, second, metric, who))
                except Refusal as refusal:
                    refusals.append(refusal)
    return found, refusals + [_refusal(each, who, first.result.question.level) for each in found if not each.told]


def _level(first: _Side, second: _Side, flops: float) -> Difference:
    ln_K = _pair(np.subtract, np.log(first.draws.metric(flops)), np.log(second.draws.metric(flops)))
    value = float(first.best.metric(flops)[0] / second.best.metric(flops)[0])
    return _difference(first, second, "level", flops, value, np.exp(ln_K))


def _multiplier(first: _Side, second: _Side, metric: float, who: str) -> Difference:
    """Raises Refusal where a law reaches the metric only far from the compute that it is fitted to, or not at all."""
    for side in (first, second):
        low, high = np.log(side.range("train_flops"))
        ln_flops = float(side.best.ln_compute(metric)[0])
        if not low - np.log(FAR) <= ln_flops <= high + np.log(FAR):
            text = f"{who}: {side.group} reaches {metric:.4g} only at {FAR:g} times its compute or further from it"
            raise Refusal("extrapolation", text)
    limited = [np.clip(side.draws.ln_compute(metric), -MOST_LN, MOST_LN) for side in (first, second)]
    ln_K = np.clip(_pair(np.subtract, *limited), -MOST_LN, MOST_LN)
    value = float(np.exp(first.best.ln_compute(metric)[0] - second.best.ln_compute(metric)[0]))
    return _difference(first, second, "compute", metric, value, np.exp(ln_K))


def _pair(operation: np.ufunc, first_K: Array, second_K: Array) -> Array:
    count = min(len(first_K), len(second_K))
    return np.asarray(operation(first_K[:count], second_K[:count]))


def _difference(
    first: _Side, second: _Side, quantity: str, at: float | None, value: float, draws_K: Array
) -> Difference:
    low, high = central(draws_K, first.result.question.level)
    return Difference(first.result.name, first.group, second.group, quantity, at, value, float(low), float(high))


def _refusal(difference: Difference, who: str, level: float) -> Refusal:
    interval = f"{difference.low:.3g} to {difference.high:.3g}"
    what = {"level": "which is better at the same compute", "compute": "which needs less compute for the same metric"}
    which = what.get(difference.quantity, f"whose exponent {difference.quantity} is larger")
    at = "" if difference.at is None else f" at {difference.at:.4g}"
    return Refusal("cannot_tell", f"{who}: these data cannot tell {which}{at} ({100 * level:.3g} %: {interval})")
