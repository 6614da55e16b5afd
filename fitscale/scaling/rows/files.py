"""Runs tables as files: CSV or parquet with our columns, or anybody's (a paper's table, a wandb export) by a map."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fitscale.config.errors import UserError
from fitscale.config.files import replacing
from fitscale.scaling.rows.column_map import checked
from fitscale.scaling.rows.refusals import listed, shown
from fitscale.scaling.rows.table import check_names, validate

FORMATS: dict[str, Callable[..., None]] = {".csv": pd.DataFrame.to_csv, ".parquet": pd.DataFrame.to_parquet}
MISSING = frozenset(["", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-nan", "NULL", "null", "None"])  # of cells
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
MOST_CSV_BYTES, MOST_MAP_BYTES = 2**26, 2**16  # what is larger fits into parquet
MOST_CELLS = 10**8  # of a parquet file, however few bytes they take there


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a validated table to `path`, whole or not at all; .csv or .parquet."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: a runs table is written as {' or '.join(FORMATS)}")
    with replacing(path) as temporary:
        FORMATS[path.suffix](table, temporary, index=False)


def read_table(path: Path) -> pd.DataFrame:
    """Read and validate a table that `write_table` (or anybody else, with the same columns) wrote."""
    table = validate(_parquet(path) if path.suffix == ".parquet" else _cells(path), str(path))
    return table.reset_index(drop=True)


def read_mapped(path: Path, column_map: Path) -> pd.DataFrame:
    """The runs table in the CSV or parquet at `path`, as `column_map` names its columns; a missing cell stays missing.

    Raises:
        UserError: a file cannot be read, the map names a column that is not there, or the result breaks the schema.
    """
    return mapped(read_cells(path), _yaml(column_map), path, column_map)


def mapped(source: pd.DataFrame, mapping: Any, path: Path, column_map: Path) -> pd.DataFrame:
    """`read_mapped` of what both files hold; a table to join lies beside `column_map`."""

    def beside(name: str) -> pd.DataFrame:
        if Path(name).name != name:
            raise UserError(f"{column_map}: join: {shown(name)} is no name of a file beside the map")
        return read_cells(column_map.parent / name)

    return checked(mapping, str(column_map), str(path), beside).applied(source)


def read_cells(path: Path) -> pd.DataFrame:
    """The columns of anybody's CSV, as text, or parquet; the index is the line, or the row."""
    source = _parquet(path) if path.suffix == ".parquet" else _cells(path)
    return source.drop(columns="", errors="ignore")  # where exports have their index


def _cells(path: Path) -> pd.DataFrame:
    """The cells of the CSV at `path` as text, missing ones as NA; the index is the line in the file.

    Raises:
        UserError: it is no CSV in UTF-8 with commas, or too large, or its rows have not as many cells as its header.
    """
    reader = csv.reader(io.StringIO(_text(path, MOST_CSV_BYTES), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, path)
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not CSV: {error}") from error
    for line, cells in lines:
        if len(cells) != len(header):
            raise UserError(f"{path}: line {line}: {len(cells)} cells, where the header has {len(header)} columns")
    index = pd.Index([line for line, _ in lines], name="line", dtype="int64")
    rows = [[None if cell.strip() in MISSING else cell for cell in cells] for _, cells in lines]
    return pd.DataFrame(rows, index=index, columns=header, dtype="string")


def _check_header(header: list[str], path: Path) -> None:
    if not any(header):
        raise UserError(f"{path}: line 1: no names of columns; a table begins with them")
    for separator, word in SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise UserError(f"{path}: line 1: columns are separated by {word}; save it with commas and decimal points")
    check_names([name for name in header if name], f"{path}: line 1")


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The bytes of a file; raises UserError for what cannot be read, or is larger."""
    try:
        with open(path, "rb") as file:
            data = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:  # a name with NUL is a ValueError
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error
    if len(data) > most_bytes:
        raise UserError(f"{path}: more than {most_bytes:,} bytes; larger files are not read")
    return data


def _text(path: Path, most_bytes: int) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, and without NUL."""
    data = read_bounded(path, most_bytes)
    try:
        if b"\0" in data:
            raise UnicodeDecodeError("utf-8", data, data.index(b"\0"), data.index(b"\0") + 1, "NUL")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"line {data.count(10, 0, error.start) + 1}: byte 0x{data[error.start]:02x}"
        raise UserError(f"{path}: {where} is not text in UTF-8; save the file as UTF-8") from error


def _parquet(path: Path) -> pd.DataFrame:
    """The columns of a parquet file that hold numbers or text.

    Raises:
        UserError: it is none, too large, or holds columns of another kind.
    """
    from pyarrow import ArrowException, parquet, types

    kinds = (types.is_integer, types.is_floating, types.is_string, types.is_large_string, types.is_null)
    try:
        with parquet.ParquetFile(path) as file:
            schema, cells = file.schema_arrow, file.metadata.num_rows * file.metadata.num_columns
            check_names(schema.names, str(path))
            if cells > MOST_CELLS:
                raise UserError(f"{path}: {cells} cells; at most {MOST_CELLS} are read")
            if other := [field.name for field in schema if not any(kind(field.type) for kind in kinds)]:
                raise UserError(f"{path}: columns {listed(other)} hold neither numbers nor text")
            return file.read().to_pandas(ignore_metadata=True)
    except UserError:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {shown(str(error))}") from error


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(_text(path, MOST_MAP_BYTES))
    except UserError:
        raise
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not a readable column map: {error}") from error
