"""Runs tables as files: CSV or parquet with our columns, or anybody's CSV (a paper's table, a wandb export) by a map.

A column map is YAML; left a column of the runs table, right where it comes from:

    run: Name                          # a column
    size: "=XL"                        # the same text in every row
    parameters: [1.0e6, params_m]      # a product of numbers and columns
    train_flops: [6.0e9, gmacs, images]
    metrics: {fd: eval/fd, validation_loss: eval/loss}     # one row per metric where its cell is not empty

With `metrics`, the columns metric and value come from it; without, they are mapped like the others.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fitscale.config.errors import UserError
from fitscale.config.files import replacing
from fitscale.scaling.rows.table import COLUMNS, KEY, validate

FORMATS: dict[str, Callable[..., None]] = {".csv": pd.DataFrame.to_csv, ".parquet": pd.DataFrame.to_parquet}


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a validated table to `path`, whole or not at all; .csv or .parquet."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: a runs table is written as {' or '.join(FORMATS)}")
    with replacing(path) as temporary:
        FORMATS[path.suffix](table, temporary, index=False)


def read_table(path: Path) -> pd.DataFrame:
    """Read and validate a table that `write_table` (or anybody else, with the same columns) wrote."""
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            texts = {name for name, column in COLUMNS.items() if column.dtype == "string"}
            header = pd.read_csv(path, nrows=0).columns
            dtypes = {name: "string" for name in header if name in texts or name.startswith(KEY)}
            table = pd.read_csv(path, dtype=dtypes, float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable runs table: {error}") from error
    return validate(table, str(path))


def read_mapped(path: Path, column_map: Path) -> pd.DataFrame:
    """The runs table in the CSV at `path`, as `column_map` names its columns; a missing cell stays missing.

    Raises:
        UserError: a file cannot be read, the map names a column that is not there, or the result breaks the schema.
    """
    mapping = _read_map(column_map)
    try:
        source = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable CSV: {error}") from error
    metrics = mapping.pop("metrics", None)
    columns = {name: _column(source, name, rule, path) for name, rule in mapping.items()}
    shared = pd.DataFrame(columns, index=source.index)
    if metrics is None:
        return validate(shared, str(path))
    values = {metric: _column(source, metric, column, path) for metric, column in metrics.items()}
    parts = [shared.assign(metric=metric, value=cells)[cells.notna()] for metric, cells in values.items()]
    return validate(pd.concat(parts, ignore_index=True), str(path))


def _read_map(path: Path) -> dict[str, Any]:
    try:
        mapping = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable column map: {error}") from error
    if not isinstance(mapping, dict) or not isinstance(mapping.get("metrics", {}), dict):
        raise UserError(f"{path}: a column map holds `column: source` pairs, and `metrics` pairs of its own")
    return mapping


def _column(source: pd.DataFrame, name: str, rule: Any, path: Path) -> Any:
    if isinstance(rule, list):
        return math.prod((_column(source, name, factor, path) for factor in rule), start=1.0)
    if not isinstance(rule, str):
        return rule
    if rule.startswith("="):
        return pd.Series(rule[1:], index=source.index)
    if rule not in source.columns:
        raise UserError(f"{path}: no column {rule!r} for {name}; it has: {', '.join(map(str, source.columns))}")
    return source[rule]
