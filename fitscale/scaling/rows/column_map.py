"""Anybody's table as a runs table, by a map of columns.

A column map is YAML; left a column of the runs table, right where it comes from:

    run: Name                                              # a column
    size: "={family} {model}"                              # a text, with the cells of columns in it
    parameters: params_m * 1e6                             # an expression (expressions.py)
    train_flops: [6.0e9, gmacs, images_seen]               # a product of numbers, columns and expressions
    tokens: C / (6 * N)
    patch: {model: {S/2: 2, S/4: 4}}                       # by the cell of another column
    seed: 3                                                # a number
    metrics: {fd: eval/fd, validation_loss: eval/loss}     # one row per metric where its cell is not empty

With `metrics`, the columns metric and value come from it; without, they are mapped like the others. Before the columns:

    melt: "* - eval/fd"                                    # columns that are runs: each becomes rows of its own, whose
                                                           # `column` is what the * stands for, and `cell` the value;
                                                           # or a list of columns
    join: {table: sizes.csv, by: model}                    # columns of another CSV beside the map; by: {ours: theirs}
                                                           # where the names differ
    where: role != "other" and step >= 50000               # a condition, or a list of them

Without `size` sizes are named by their parameters. Without `run` rows that agree in all but what grows with training
and what was measured are one run if the map has `step`; else every row is a run.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.rows.expressions import numbers_of, truth_of
from fitscale.scaling.rows.made_names import run_names, size_names
from fitscale.scaling.rows.refusals import listed, shown
from fitscale.scaling.rows.reshaping import joined, melted, refuse_many
from fitscale.scaling.rows.table import COLUMNS, MOST_COLUMNS, numbers, refuse, validate

ROUNDED = 1e-3  # of a number: so far from whole may it be where whole ones are meant, as C / (6 N) of tokens is
NAME = re.compile(r"\{([^{}]*)\}")
STEPS = ("melt", "join", "where", "metrics")
Rule = str | int | float | list[Any] | dict[str, Any]


@dataclass(frozen=True)
class ColumnMap:
    """A checked map. `path` and `table` begin messages; `read` gives the cells of a CSV beside the map by its name."""

    path: str
    table: str
    read: Callable[[str], pd.DataFrame]
    columns: dict[str, Rule]
    steps: dict[str, Any]  # of STEPS, those it has

    def applied(self, source: pd.DataFrame) -> pd.DataFrame:
        """The runs table in `source`, cells with the line as their index.

        Raises:
            UserError: the map names a column that is not there, or the result breaks the schema.
        """
        if "melt" in self.steps:
            source = melted(source, self.steps["melt"], self.path, self.table)
        if "join" in self.steps:
            source = joined(source, self.steps["join"], self.read, self.path, self.table)
        for condition in self._listed(self.steps.get("where", [])):
            source = source[truth_of(self._text(condition, "where"), source, self.table, "where")]
        metrics = self.steps.get("metrics")
        refuse_many(len(source) * (len(self.columns) + 3) * max(len(metrics or {}), 1), self.path, self.table)
        made = {name: self._cells(source, name, rule) for name, rule in self.columns.items()}
        shared = pd.DataFrame(made, index=source.index)
        if metrics is not None:
            values = {metric: self._cells(source, metric, rule) for metric, rule in metrics.items()}
            parts = [shared.assign(metric=metric, value=cells)[cells.notna()] for metric, cells in values.items()]
            shared = pd.concat(parts)
        return validate(self._named(shared), self.table).reset_index(drop=True)

    def _named(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows with sizes and runs, if the map has none."""
        if "size" not in rows and "parameters" in rows:
            rows = rows.assign(size=size_names(numbers(rows["parameters"])))
        if "run" not in rows and "size" in rows:
            rows = rows.assign(run=run_names(rows))
        return rows

    def _cells(self, source: pd.DataFrame, name: str, rule: Any) -> pd.Series:
        """The cells that `rule` makes of the columns of `source`."""
        column, made = COLUMNS.get(name), self._made(source, name, rule)
        if column is None or column.dtype != "Int64":
            return made
        values = numbers(made)
        whole = values.round()
        return made.astype(object).mask((values - whole).abs() <= ROUNDED * values.abs(), whole)

    def _made(self, source: pd.DataFrame, name: str, rule: Any) -> pd.Series:
        if isinstance(rule, list) and not any(isinstance(factor, list | dict) for factor in rule):
            factors = [self._made(source, name, factor) for factor in rule]
            for cells in factors:
                refuse(cells, (numbers(cells).isna() & cells.notna()).to_numpy(dtype=bool), "a number", self.table)
            return math.prod(map(numbers, factors), start=pd.Series(1.0, source.index))
        if isinstance(rule, dict) and len(rule) == 1:
            ((by, table),) = rule.items()
            if isinstance(table, dict):
                return self._looked_up(source, name, by, table)
        if isinstance(rule, int | float) and not isinstance(rule, bool):
            return pd.Series(rule, source.index, name=name)
        if not isinstance(rule, str):
            kind = type(rule).__name__
            what = "column, number, =text or list of them, and no expression or {COLUMN: {CELL: VALUE}}"
            raise UserError(f"{self.path}: {name}: {kind} is no {what}")
        if rule in source.columns:
            return source[rule]
        if rule.startswith("="):
            return self._filled(source, name, rule[1:])
        return numbers_of(rule, source, self.table, name).rename(name)

    def _looked_up(self, source: pd.DataFrame, name: str, by: str, table: dict[Any, Any]) -> pd.Series:
        cells = self._column(source, name, by)
        values = {str(cell): value for cell, value in table.items()}
        if any(isinstance(value, bool | list | dict) for value in values.values()):
            raise UserError(f"{self.path}: {name}: {by}: holds cells, and of each a number or a text")
        unknown = sorted(set(cells.dropna().astype(str)) - set(values))
        if unknown:
            raise UserError(
                f"{self.path}: {name}: {by}: nothing is said of {listed([shown(cell) for cell in unknown])}"
            )
        return cells.astype(object).map(lambda cell: None if pd.isna(cell) else values[str(cell)]).rename(name)

    def _filled(self, source: pd.DataFrame, name: str, text: str) -> pd.Series:
        """The text with the cells of the columns that it names in braces; missing where one of them is."""
        parts = NAME.split(text)
        filled = pd.Series(parts[0], source.index, dtype="string", name=name)
        for column, rest in zip(parts[1::2], parts[2::2], strict=True):
            filled = filled + self._column(source, name, column).astype("string") + rest
        return filled

    def _column(self, source: pd.DataFrame, name: str, column: str) -> pd.Series:
        if column not in source.columns:
            has = listed(list(source.columns), 20)
            raise UserError(f"{self.table}: no column {shown(column)} for {name}; it has: {has}")
        return source[column]

    def _text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise UserError(f"{self.path}: {name}: {shown(value)} is no text; valid: a condition, or a list of them")
        return value

    @staticmethod
    def _listed(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]


def checked(mapping: Any, path: str, table: str, read: Callable[[str], pd.DataFrame]) -> ColumnMap:
    """The map that a YAML document holds.

    Raises:
        UserError: it holds none.
    """
    metrics = mapping.get("metrics", {}) if isinstance(mapping, dict) else None
    if not isinstance(metrics, dict) or not all(isinstance(name, str) for name in [*mapping, *metrics]):
        raise UserError(f"{path}: a column map holds `column: source` pairs, and `metrics` pairs of its own")
    if "metrics" in mapping and not metrics:
        raise UserError(f"{path}: metrics: names no column that holds a metric")
    if len(mapping) + len(metrics) > MOST_COLUMNS:
        raise UserError(f"{path}: {len(mapping) + len(metrics)} entries; at most {MOST_COLUMNS} are read")
    steps = {name: mapping[name] for name in STEPS if name in mapping}
    return ColumnMap(path, table, read, {name: mapping[name] for name in mapping if name not in STEPS}, steps)
