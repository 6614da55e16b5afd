"""From a runs table to the rows of one question, or a refusal. Nothing is left out without being said.

What stops a fit is found in one place, `_faults`: `select` refuses at the first, `problems` lists all of them.
"""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.rows.refusals import Caution, Refusal, listed
from fitscale.scaling.rows.table import COLUMNS, KEY, LABEL, data_column, key_columns, number, numbers

NEEDED = ["run", "size", "value", "train_flops"]
OPERATORS: dict[str, Callable[[pd.Series, float], pd.Series]] = {">": operator.ge, "<": operator.le}  # before the =
HIGHER_IS_BETTER = ("recognised",)


@dataclass(frozen=True)
class Selection:
    """Rows that may be fitted together, the key they share, and what a reader must know about them."""

    rows: pd.DataFrame
    key: dict[str, str]
    cautions: list[Caution] = field(default_factory=list)


def select(
    table: pd.DataFrame, metric: str, where: dict[str, str], from_step: int = 0, drop_missing: bool = False
) -> Selection:
    """The rows of `metric` that satisfy every `column = value` of `where`, from `from_step` on.

    A column that ends in !, > or < makes of it: unequal, at least, at most. Of rows that count their data in tokens
    (`data_column`), `images` is what laws of size and data take for D: those tokens.

    Raises:
        Refusal: no such rows, missing or non-positive values, conflicting rows, mixed keys, families, patch sizes or
            units of data.
        UserError: no such column, or no number where one is compared.
    """
    rows = filtered(table, metric, where)
    cautions: list[Caution] = []
    needed = NEEDED
    if from_step:
        early = (rows["step"] < from_step).fillna(False)
        cautions.append(Caution("left_out", f"{int(early.sum())} rows before step {from_step} are left out, as asked"))
        rows, needed = rows[~early], [*NEEDED, "step"]
    if drop_missing and (incomplete := rows[needed].isna().any(axis=1)).any():
        cautions.append(Caution("left_out", f"left out, {_missing(rows, needed)} missing: {_named(rows[incomplete])}"))
        rows = rows[~incomplete]
    if rows.empty:
        raise Refusal("no_rows", f"no row of metric {metric} is left; check --where, --from-step and --drop-missing")
    if (repeated := _repeated(rows)).any():
        cautions.append(Caution("repeated", f"identical rows counted once: {_named(rows[repeated])}"))
        rows = rows[~repeated]
    for fault in _faults(rows, needed):
        raise fault
    rows = rows.assign(images=rows[data_column(rows)])
    if rows["parameters"].isna().any():
        rows = rows.assign(parameters=rows["parameters"].astype(float))  # NaN, which can be counted with, for NA
    key = {name.removeprefix(KEY): rows[name].iloc[0] for name in key_columns(rows) if rows[name].notna().any()}
    return Selection(rows.reset_index(drop=True), key, cautions + _cautions(rows))


def problems(table: pd.DataFrame) -> list[str]:
    """What would stop a fit, or is worth knowing before one, a line each; an empty list is a table without any."""
    found = []
    for metric, rows in table.groupby("metric", sort=True):
        of_metric = [fault.message for fault in _faults(rows, NEEDED)]
        if (repeated := _repeated(rows)).any():
            of_metric.append(f"identical rows: {_named(rows[repeated])}")
        of_some_laws = ["parameters", data_column(rows)]  # without them a table serves laws of compute alone
        of_some_laws += ["step"] * bool(rows.duplicated(["run", *key_columns(rows)]).any())  # else no run has two
        missing = {name: int(rows[name].isna().sum()) for name in of_some_laws}
        of_metric += [f"{name} is missing in {n} of {len(rows)} rows" for name, n in missing.items() if n]
        if metric not in HIGHER_IS_BETTER and (rising := _rising(rows)):
            of_metric.append(f"the last checkpoint is not the best in {listed(rising)}")
        found += [f"{metric}: {problem}" for problem in of_metric]
    unfinished = _unfinished(table)
    return found + ([f"unfinished runs: {listed(unfinished)}"] if unfinished else [])


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


def size_order(rows: pd.DataFrame) -> list[str]:
    """Sizes from the fewest parameters to the most; where some are not known, from the least compute to the most."""
    known = rows.groupby("size")[["parameters", "train_flops"]].max()
    by = "parameters" if known["parameters"].notna().all() else "train_flops"
    return list(known.sort_values(by, kind="stable").index)


def filtered(table: pd.DataFrame, metric: str, where: dict[str, str]) -> pd.DataFrame:
    """The rows of `metric` that `where` keeps; raises Refusal where there is none, UserError for no such column."""
    rows = table[table["metric"] == metric]
    if rows.empty:
        known = listed(sorted(table["metric"].dropna().unique()), 20) or "none"
        raise Refusal("no_rows", f"no row has metric {metric}; the table holds: {known}")
    for name, value in where.items():
        sign = name.rstrip()[-1:] if name.rstrip()[-1:] in ("!", *OPERATORS) else ""
        column = _column(table, name.rstrip().removesuffix(sign).strip())
        kept = rows[_satisfies(rows[column], sign, value.strip())]
        if kept.empty:
            present = listed(sorted(rows[column].dropna().astype(str).unique()), 20) or "nothing"
            raise Refusal("no_rows", f"no {metric} row has {column} {sign}= {value}; there is: {present}")
        rows = kept
    return rows


def _column(table: pd.DataFrame, name: str) -> str:
    """The column of that name, or the label."""
    for column in (name, LABEL + name):
        if column in table.columns:
            return column
    raise UserError(f"--where {name}: no such column; valid: {listed(list(table.columns), 50)}")


def _satisfies(column: pd.Series, sign: str, value: str) -> pd.Series:
    if sign not in OPERATORS:
        return _equals(column, value) != (sign == "!")
    if math.isnan(limit := number(value)):
        raise UserError(f"--where {column.name}{sign}={value}: give a number")
    return OPERATORS[sign](numbers(column), limit)


def _equals(column: pd.Series, value: str) -> pd.Series:
    """Equal as a number where both are numbers (so 1 finds 1.0), else as text."""
    number = pd.to_numeric(pd.Series([value]), errors="coerce").iloc[0]
    same = column.astype("string") == value
    return same.fillna(False) | (pd.to_numeric(column, errors="coerce") == number).fillna(False)


def _faults(rows: pd.DataFrame, needed: list[str]) -> Iterator[Refusal]:
    """Everything that keeps the rows of one metric from being fitted together."""
    incomplete = rows[needed].isna().any(axis=1)
    if incomplete.any():
        what = f"{int(incomplete.sum())} rows have no {_missing(rows, needed)}: {_named(rows[incomplete])}"
        advice = "complete the table, or leave them out with --drop-missing"
        yield Refusal("missing_values", f"{what}; {advice}")
    rows = rows[~incomplete]
    numbers = rows[["value", "train_flops"]].astype(float)
    bad = rows[~((numbers > 0) & np.isfinite(numbers)).all(axis=1)]
    if len(bad):
        text = f"laws are fitted on logarithms, but value or train_flops is not above 0 in: {_named(bad)}"
        yield Refusal("non_positive", text)
    different = rows[rows.groupby(_identity(rows), dropna=False)["value"].transform("nunique") > 1]
    if len(different):
        text = f"the same measurement has different values: {_named(different)}; keep one of them in the table"
        yield Refusal("conflicting_rows", text)
    for column in ("family", "patch"):
        if len(values := _values(rows, column)) > 1:
            what = f"rows of different {column} ({listed(values)}) follow different laws"
            yield Refusal("mixed_models", f"{what}; choose one with --where {column}={values[0]}")
    of_tokens = rows["images"].isna() & rows["tokens"].notna()
    if of_tokens.any() and rows["images"].notna().any():
        yield Refusal("mixed_models", f"data are counted in images, but in tokens in: {_named(rows[of_tokens])}")
    differing = {name: values for name in key_columns(rows) if len(values := _values(rows, name)) > 1}
    if differing:
        text = "; ".join(f"{name}: {listed(values)}" for name, values in differing.items())
        first, values = next(iter(differing.items()))
        what = f"rows were measured in different ways and cannot be compared ({text})"
        yield Refusal("mixed_keys", f"{what}; choose with --where {first}={values[0]}")


def _cautions(rows: pd.DataFrame) -> list[Caution]:
    found = []
    if names := _unfinished(rows):
        found.append(Caution("unfinished", f"runs with steps left: {listed(names)}"))
    if (unknown := rows["parameters"].isna()).any():
        of_sizes = listed(sorted(rows.loc[unknown, "size"].unique()))
        text = f"parameters is missing for size {of_sizes}: sizes are put in order by their largest compute"
        found.append(Caution("no_parameters", text))
    for column in ("batch", "lr"):
        if len(values := _values(rows, column)) > 1:
            text = f"{column} ({COLUMNS[column].meaning}) differs between runs: {listed(values)}"
            found.append(Caution("mixed_recipe", text))
    if not key_columns(rows):
        found.append(Caution("no_key", "no comparability key: nothing says that these numbers were measured alike"))
    return found


def _identity(rows: pd.DataFrame) -> list[str]:
    """Columns that rows share only if they are one measurement."""
    return ["run", "step", "train_flops", "weights", *key_columns(rows)]


def _repeated(rows: pd.DataFrame) -> pd.Series:
    """True for rows that say what an earlier one has said."""
    return rows.duplicated([*_identity(rows), "value"])


def _rising(rows: pd.DataFrame) -> list[str]:
    """Runs that end worse than they were at some checkpoint, measured in the same way."""
    whole = rows.dropna(subset=["run", "value", "train_flops"]).sort_values("train_flops")
    values = whole.groupby(["run", "weights", *key_columns(rows)], dropna=False)["value"].agg(["last", "min"])
    return sorted({str(run) for run in values[values["last"] > values["min"]].index.get_level_values("run")})


def _unfinished(rows: pd.DataFrame) -> list[str]:
    return sorted(rows.loc[rows["status"] == "unfinished", "run"].dropna().unique())


def _missing(rows: pd.DataFrame, needed: list[str]) -> str:
    return " or ".join(name for name in needed if rows[name].isna().any())


def _values(rows: pd.DataFrame, column: str) -> list[str]:
    """Different values as text; a missing one counts as a value of its own."""
    return sorted(rows[column].astype("string").fillna("missing").unique())


def _named(rows: pd.DataFrame) -> str:
    return listed([f"{run} step {step}" for run, step in zip(rows["run"], rows["step"], strict=True)])
