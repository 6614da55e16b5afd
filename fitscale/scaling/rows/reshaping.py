"""What a column map does to a whole table before it reads columns: columns to rows, and another table's columns."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from fitscale.config.errors import UserError
from fitscale.scaling.rows.refusals import listed, shown

MOST_CELLS = 5 * 10**7  # that a map may make, however few signs it has
MADE = ("column", "cell")  # by melting


def melted(source: pd.DataFrame, rule: Any, path: str, table: str) -> pd.DataFrame:
    """`source` with the columns that `rule` names (one * in a text, or a list) as rows: `column` and `cell`.

    Raises:
        UserError: it names no columns of the table, or the table has those that it makes.
    """
    names = list(map(str, source.columns))
    if isinstance(rule, str) and rule.count("*") == 1:
        before, after = rule.split("*")
        ends = len(before) + len(after)
        columns = [each for each in names if each.startswith(before) and each.endswith(after) and len(each) > ends]
    elif isinstance(rule, list) and all(isinstance(name, str) for name in rule):
        before, after, columns = "", "", list(dict.fromkeys(rule))
    else:
        raise UserError(f"{path}: melt: holds names of columns with one * in them, or a list of columns")
    for name in columns or [rule]:
        _require(name, names, "to melt", table)
    kept = [name for name in names if name not in columns]
    if taken := [name for name in MADE if name in kept]:
        raise UserError(f"{table}: column {listed(taken)} is there, and melt makes one of that name")
    refuse_many(len(source) * len(columns) * (len(kept) + 2), path, table)
    rows = source.melt(kept, columns, *MADE, ignore_index=False)
    short = {name: name[len(before) : len(name) - len(after)] for name in columns}
    rows = rows.assign(column=rows["column"].map(short).astype("string"))
    return rows[rows["cell"].notna()]


def joined(source: pd.DataFrame, rule: Any, read: Callable[[str], pd.DataFrame], path: str, table: str) -> pd.DataFrame:
    """`source` with the columns of the table that `rule` names, where its row agrees; where both have one ours stands.

    Raises:
        UserError: it is no rule, names a column that is not there, or several of the other's rows agree.
    """
    name, pairs = _join_rule(rule, path)
    other = read(name)
    for our, their in pairs.items():
        _require(our, list(source.columns), "to join by", table)
        _require(their, list(other.columns), "to join by", name)
    theirs = list(pairs.values())
    again = other.duplicated(theirs)
    if again.any():
        twice = other.loc[again, theirs].iloc[0].astype("string").fillna("missing")
        raise UserError(f"{name}: {listed(theirs)} {listed(list(twice))} stands in more than one row; one is joined")
    other = other.rename(columns={their: our for our, their in pairs.items()})
    other = other.drop(columns=[column for column in other if column in source and column not in pairs])
    refuse_many(len(source) * (source.shape[1] + other.shape[1]), path, table)
    return source.merge(other, "left", on=list(pairs)).set_axis(source.index)


def refuse_many(cells: int, path: str, table: str) -> None:
    """Refuse a map that makes more than `MOST_CELLS` of a table."""
    if cells > MOST_CELLS:
        raise UserError(f"{path}: makes {cells} cells of {table}; at most {MOST_CELLS} are made")


def _join_rule(rule: Any, path: str) -> tuple[str, dict[str, str]]:
    """The name of the other table, and pairs of columns, ours and theirs."""
    if isinstance(rule, dict) and set(rule) == {"table", "by"}:
        name, by = rule["table"], rule["by"]
        pairs = {by: by} if isinstance(by, str) else by
        if isinstance(pairs, dict) and pairs and all(isinstance(text, str) for text in (name, *pairs, *pairs.values())):
            return name, pairs
    raise UserError(f"{path}: join: holds table: FILE.csv, and by: COLUMN or by: {{OURS: THEIRS}}")


def _require(name: Any, names: list[str], what_for: str, table: str) -> None:
    if name not in names:
        raise UserError(f"{table}: no column {shown(name)} {what_for}; it has: {listed(names, 20)}")
