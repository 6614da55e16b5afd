"""From a runs table to the rows of one question, or a refusal. Nothing is left out without being said."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.rows.refusals import Caution, Refusal
from fitscale.scaling.rows.table import COLUMNS, key_columns

NEEDED = ("run", "size", "value", "train_flops")


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

    Raises:
        Refusal: no such rows, missing or non-positive values, conflicting rows, mixed keys, families or patch sizes.
    """
    rows = _filter(table, metric, where)
    cautions: list[Caution] = []
    if from_step:
        late = rows["step"].isna() | (rows["step"] >= from_step)
        cautions.append(
            Caution("left_out", f"{int((~late).sum())} rows before step {from_step} are left out, as asked")
        )
        rows = rows[late]
    if rows.empty:
        raise Refusal("no_rows", f"no row of metric {metric} is left; check --where and --from-step")
    rows = _without_missing(rows, [*NEEDED, *["step"] * bool(from_step)], drop_missing, cautions)
    _refuse_non_positive(rows)
    rows = _without_repeats(rows, cautions)
    _refuse_mixed(rows)
    cautions += _cautions(rows)
    return Selection(rows.reset_index(drop=True), _shared_key(rows), cautions)


def size_order(rows: pd.DataFrame) -> list[str]:
    """Sizes from the fewest parameters to the most.

    Raises:
        UserError: the table does not say how many parameters a size has.
    """
    parameters = rows.groupby("size")["parameters"].max()
    if parameters.isna().any():
        raise UserError(f"column parameters is missing for size {', '.join(parameters[parameters.isna()].index)}")
    return list(parameters.sort_values(kind="stable").index)


def _filter(table: pd.DataFrame, metric: str, where: dict[str, str]) -> pd.DataFrame:
    rows = table[table["metric"] == metric]
    if rows.empty:
        known = ", ".join(sorted(table["metric"].dropna().unique())) or "none"
        raise Refusal("no_rows", f"no row has metric {metric}; the table holds: {known}")
    for column, value in where.items():
        if column not in table.columns:
            raise UserError(f"--where {column}: no such column; valid: {', '.join(table.columns)}")
        kept = rows[_equals(rows[column], value)]
        if kept.empty:
            present = ", ".join(sorted(rows[column].dropna().astype(str).unique())) or "nothing"
            raise Refusal("no_rows", f"no {metric} row has {column} = {value}; there is: {present}")
        rows = kept
    return rows


def _equals(column: pd.Series, value: str) -> pd.Series:
    """Equal as a number where both are numbers (so 1 finds 1.0), else as text."""
    numbers = pd.to_numeric(column, errors="coerce")
    number = pd.to_numeric(pd.Series([value]), errors="coerce").iloc[0]
    same = (column.astype("string") == value).fillna(False).astype(bool)
    return same | (numbers == number).fillna(False).astype(bool)


def _without_missing(rows: pd.DataFrame, needed: list[str], drop: bool, cautions: list[Caution]) -> pd.DataFrame:
    missing = rows[needed].isna().any(axis=1)
    names = " or ".join(name for name in needed if rows[name].isna().any())
    if missing.any() and not drop:
        raise Refusal(
            "missing_values",
            f"{int(missing.sum())} rows have no {names}: {_named(rows[missing])}; complete the table, or leave them "
            "out with --drop-missing",
        )
    if missing.any():
        cautions.append(Caution("left_out", f"left out, {names} missing: {_named(rows[missing])}"))
    return rows[~missing]


def _refuse_non_positive(rows: pd.DataFrame) -> None:
    bad = ~(
        (rows["value"] > 0) & (rows["train_flops"] > 0) & np.isfinite(rows["value"]) & np.isfinite(rows["train_flops"])
    )
    if bad.any():
        raise Refusal(
            "non_positive",
            f"laws are fitted on logarithms, but value or train_flops is not above 0 in: {_named(rows[bad])}",
        )


def _without_repeats(rows: pd.DataFrame, cautions: list[Caution]) -> pd.DataFrame:
    identity = ["run", "step", "train_flops", "weights", *key_columns(rows)]
    repeated = rows.duplicated(identity, keep="first")
    different = rows.groupby(identity, dropna=False)["value"].transform("nunique") > 1
    if different.any():
        raise Refusal(
            "conflicting_rows",
            f"the same measurement has different values: {_named(rows[different])}; keep one of them in the table",
        )
    if repeated.any():
        cautions.append(Caution("repeated", f"identical rows counted once: {_named(rows[repeated])}"))
    return rows[~repeated]


def _refuse_mixed(rows: pd.DataFrame) -> None:
    for column in ("family", "patch"):
        values = _values(rows, column)
        if len(values) > 1:
            raise Refusal(
                "mixed_models",
                f"rows of different {column} ({', '.join(values)}) follow different laws; choose one with "
                f"--where {column}={values[0]}",
            )
    differing = {name: _values(rows, name) for name in key_columns(rows) if len(_values(rows, name)) > 1}
    if differing:
        text = "; ".join(f"{name}: {', '.join(values)}" for name, values in differing.items())
        first = next(iter(differing))
        raise Refusal(
            "mixed_keys",
            f"rows were measured in different ways and cannot be compared ({text}); choose with "
            f"--where {first}={differing[first][0]}",
        )


def _cautions(rows: pd.DataFrame) -> list[Caution]:
    found = []
    unfinished = sorted(rows.loc[rows["status"] == "unfinished", "run"].unique())
    if unfinished:
        found.append(Caution("unfinished", f"runs with steps left: {', '.join(unfinished)}"))
    for column in ("batch", "lr"):
        values = _values(rows, column)
        if len(values) > 1:
            found.append(
                Caution(
                    "mixed_recipe", f"{column} ({COLUMNS[column].meaning}) differs between runs: {', '.join(values)}"
                )
            )
    if not key_columns(rows):
        found.append(Caution("no_key", "no comparability key: nothing says that these numbers were measured alike"))
    return found


def _shared_key(rows: pd.DataFrame) -> dict[str, str]:
    return {name.removeprefix("key_"): rows[name].iloc[0] for name in key_columns(rows) if rows[name].notna().any()}


def _values(rows: pd.DataFrame, column: str) -> list[str]:
    """Different values as text; a missing one counts as a value of its own."""
    return sorted(rows[column].astype("string").fillna("missing").unique()) if len(rows) else []


def _named(rows: pd.DataFrame, most: int = 5) -> str:
    names = [f"{run} step {step}" for run, step in zip(rows["run"], rows["step"], strict=True)]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
