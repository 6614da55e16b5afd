"""The runs table: one row per evaluated metric of one checkpoint, as a checked pandas DataFrame.

Missing stays missing (NaN, NA, an empty CSV cell), never 0. Columns whose name starts with `key_` are the comparability
key: how the number was measured. Rows whose keys differ must not be fitted together. Columns `label_` say anything else
that rows may be chosen by (`--where`), and keep no fit from being made.
"""

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from fitscale.config.errors import UserError
from fitscale.scaling.rows.refusals import listed, shown

KEY, LABEL = "key_", "label_"
MOST_COLUMNS = 1000
LONGEST_TEXT = 250  # characters of a name
LARGEST, LEAST = 1e30, 1e-30  # of a number but 0: what is beyond is a mistake, and would overflow in what follows
LARGEST_COUNT = 2**53  # up to which floats are exact
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """A column's pandas type (nullable) and what it holds."""

    dtype: Literal["string", "Int64", "float64"]
    meaning: str


COLUMNS = {
    "run": Column("string", "run directory; rows of one run are correlated"),
    "family": Column("string", "model family"),
    "size": Column("string", "name of the model size"),
    "width": Column("Int64", "hidden size"),
    "depth": Column("Int64", "blocks"),
    "heads": Column("Int64", "attention heads"),
    "patch": Column("Int64", "side of a patch in latent pixels"),
    "tokens_per_image": Column("float64", "mean over the images trained on"),
    "parameters": Column("Int64", "all trained parameters"),
    "linear_macs": Column("float64", "forward multiply-accumulates of linear layers, mean per image"),
    "attention_macs": Column("float64", "forward multiply-accumulates of attention scores and values, mean per image"),
    "batch": Column("Int64", "images per step"),
    "step": Column("Int64", "optimizer steps"),
    "images": Column("Int64", "images trained on"),
    "tokens": Column("Int64", "tokens trained on: the data of a language model, which has no images"),
    "train_flops": Column("float64", "true training FLOPs: 6 x MACs x images"),
    "paper_flops": Column("float64", "the papers' convention: 3 x G x images, G = linear MACs at 256 tokens"),
    "device_hours": Column("float64", "devices x hours of training"),
    "device": Column("string", "kind of device"),
    "seed": Column("Int64", "seed of the run"),
    "weights": Column("string", "raw or ema_<decay>"),
    "lr": Column("float64", "learning rate"),
    "metric": Column("string", "validation_loss, fd, recognised ..."),
    "value": Column("float64", "the metric"),
    "standard_error": Column("float64", "of the value, sampling noise only"),
    "samples": Column("Int64", "generated or held-out images behind the value"),
    "nfe": Column("float64", "network evaluations per generated image"),
    "status": Column("string", "finished, or unfinished if the run has steps left"),
}
REQUIRED = ("run", "size", "train_flops", "metric", "value")
VALID = {
    "string": f"printable text of at most {LONGEST_TEXT} characters",
    "Int64": f"a whole number from 0 to {LARGEST_COUNT}",
    "float64": f"a number (0, or of a size from {LEAST:g} to {LARGEST:g})",
}


def validate(table: pd.DataFrame, source: str = "runs table") -> pd.DataFrame:
    """`table` with every column of `COLUMNS`, in order and typed, then `key_` and `label_` columns as strings, sorted.

    Raises:
        UserError: an unknown, missing or repeated column, or a value that is none of its type; the text names the row
            by the index of `table`, and what it counts by the index's name.
    """
    check_names(list(table.columns), source)
    unknown = [name for name in table.columns if name not in COLUMNS and not name.startswith((KEY, LABEL))]
    if unknown:
        valid = f"{', '.join(COLUMNS)}, {KEY}<name> and {LABEL}<name>"
        advice = "collect_runs.py --guess proposes a column map for a table with other columns"
        raise UserError(f"{source}: unknown columns {listed(unknown)}; valid: {valid}; {advice}")
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        raise UserError(f"{source}: columns {', '.join(missing)} are missing")
    keys = {name: Column("string", "how the value was measured") for name in sorted(key_columns(table))}
    labels = sorted(name for name in table.columns if name.startswith(LABEL))
    wanted = COLUMNS | keys | {name: Column("string", "what rows are chosen by") for name in labels}
    whole = table.reindex(columns=list(wanted))
    return pd.DataFrame({name: _typed(whole[name], column, source) for name, column in wanted.items()})


def check_names(names: list[Any], source: str) -> None:
    """Refuse columns that are too many, have no printable name, or share one."""
    if len(names) > MOST_COLUMNS:
        raise UserError(f"{source}: {len(names)} columns; at most {MOST_COLUMNS} are read")
    for number, name in enumerate(names, 1):
        if not _is_name(name):
            raise UserError(f"{source}: column {number} is named {shown(name)}; a name is {VALID['string']}")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{source}: more than one column is named {listed(repeated)}; keep one of each name")


def key_columns(table: pd.DataFrame) -> list[str]:
    """Names of the comparability key's columns."""
    return [name for name in table.columns if str(name).startswith(KEY)]


def data_column(rows: pd.DataFrame) -> str:
    """What the rows count their data in: `tokens` where they have no images, as language models, else `images`."""
    return "tokens" if rows["images"].isna().all() and rows["tokens"].notna().any() else "images"


def data_hash(table: pd.DataFrame) -> str:
    """SHA-256 of the rows, whatever their order."""
    lines = sorted(validate(table).to_csv(index=False, header=False).splitlines())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def number(cell: Any) -> float:
    """A number, or a text that is one; NaN for anything else, infinity for what is too large."""
    if isinstance(cell, str) and NUMBER.fullmatch(cell.strip()):
        return float(cell)
    if isinstance(cell, int | float | np.integer | np.floating) and not isinstance(cell, bool):
        return math.inf if cell > LARGEST or cell < -LARGEST else float(cell)  # NaN stays so; no int is too large
    return math.nan


def numbers(cells: pd.Series) -> pd.Series:
    """The cells as float64: numbers, or texts that are one, read exactly; NaN where there is none, infinity beyond."""
    if is_numeric_dtype(cells) and not is_bool_dtype(cells):
        return pd.Series(cells.to_numpy(dtype=float, na_value=np.nan), cells.index, name=cells.name)
    return pd.Series([number(cell) for cell in cells], cells.index, dtype=float, name=cells.name)


def refuse(cells: pd.Series, wrong: NDArray[np.bool_], valid: str, source: str) -> None:
    """Refuse the first of the cells of a column that are wrong.

    Raises:
        UserError: there is one; the text names its row, its column and what would be valid.
    """
    if wrong.any():
        first = int(wrong.argmax())
        where = f"{cells.index.name or 'row'} {cells.index[first]}, column {cells.name}"
        raise UserError(f"{source}: {where}: {shown(cells.iloc[first])} is not {valid}")


def _typed(cells: pd.Series, column: Column, source: str) -> pd.Series:
    valid, missing = f"{VALID[column.dtype]} ({column.meaning})", cells.isna().to_numpy()
    if missing.all():
        return pd.Series(None, cells.index, dtype=column.dtype, name=cells.name)
    if column.dtype == "string":
        cells = cells.astype("string")
        strange = [text for text in cells[~missing].unique() if not _is_name(text)]
        refuse(cells, cells.isin(strange).to_numpy(dtype=bool), valid, source)
        return cells
    values = numbers(cells).to_numpy()
    sizes = np.abs(values)
    wrong = (np.isnan(values) & ~missing) | (sizes > LARGEST) | ((sizes > 0) & (sizes < LEAST))
    if column.dtype == "Int64":
        whole = np.round(values)
        wrong |= (values < 0) | (sizes > LARGEST_COUNT) | ~np.isclose(values, whole, rtol=1e-9, atol=0, equal_nan=True)
        values = whole
    refuse(cells, wrong, valid, source)
    return pd.Series(values, cells.index, name=cells.name).astype(column.dtype)


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and 0 < len(text) <= LONGEST_TEXT and text.isprintable()
