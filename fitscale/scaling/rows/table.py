"""The runs table: one row per evaluated metric of one checkpoint, as a checked pandas DataFrame.

Missing stays missing (NaN, NA, an empty CSV cell), never 0. Columns whose name starts with `key_` are the comparability
key: how the number was measured. Rows whose keys differ must not be fitted together.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from fitscale.config.errors import UserError

KEY = "key_"


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


def validate(table: pd.DataFrame, source: str = "runs table") -> pd.DataFrame:
    """`table` with every column of `COLUMNS`, in order and typed, then its `key_` columns as strings, sorted by name.

    Raises:
        UserError: an unknown or missing column, or a value of the wrong type.
    """
    unknown = [name for name in table.columns if name not in [*COLUMNS, *key_columns(table)]]
    if unknown:
        raise UserError(f"{source}: unknown columns {', '.join(unknown)}; valid: {', '.join(COLUMNS)} and {KEY}<name>")
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        raise UserError(f"{source}: columns {', '.join(missing)} are missing")
    keys = {name: Column("string", "how the value was measured") for name in sorted(key_columns(table))}
    whole = table.reindex(columns=[*COLUMNS, *keys])
    return pd.DataFrame({name: _typed(whole[name], column, source) for name, column in (COLUMNS | keys).items()})


def key_columns(table: pd.DataFrame) -> list[str]:
    """Names of the comparability key's columns."""
    return [name for name in table.columns if str(name).startswith(KEY)]


def data_hash(table: pd.DataFrame) -> str:
    """SHA-256 of the rows, whatever their order."""
    lines = sorted(validate(table).to_csv(index=False, header=False).splitlines())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _typed(values: pd.Series, column: Column, source: str) -> pd.Series:
    try:
        return (values if column.dtype == "string" else pd.to_numeric(values)).astype(column.dtype)
    except (TypeError, ValueError) as error:
        text = f"{source}: column {values.name} must hold {column.dtype} ({column.meaning}): {error}"
        raise UserError(text) from error
