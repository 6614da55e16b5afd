"""Names of sizes and runs for tables that have none."""

import pandas as pd

from fitscale.scaling.rows.table import KEY, LABEL, numbers

MEASURED = ("metric", "value", "standard_error", "samples", "nfe", "weights")
GROWING = ("step", "images", "tokens", "train_flops", "paper_flops", "device_hours", "status")
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"), (1.0, ""))


def size_names(parameters: pd.Series) -> pd.Series:
    """A name for every number of parameters, as short as tells all of them apart: 412M, 1.4B; missing stays missing."""
    different = parameters.dropna().unique()
    for digits in (3, 4, 6, 9, 17):
        names = {value: _short(value, digits) for value in different}
        if len(set(names.values())) == len(different):
            break
    return parameters.map(names).astype("string")


def run_names(rows: pd.DataFrame) -> pd.Series:
    """The size, and a number where a size has several runs.

    Rows are of one run if they agree in all columns but those that are `MEASURED` and the key; and but those that are
    `GROWING` or labels in numbers, if there is a step. What then is said twice of one checkpoint comes from two runs.
    """
    names = list(map(str, rows.columns))
    own = [name for name in names if name not in MEASURED and not name.startswith(KEY)]
    counts = [name for name in own if name.startswith(LABEL) and numbers(rows[name]).notna().any()]  # as an epoch
    still = [name for name in own if name not in (*GROWING, *counts)] if "step" in rows else own
    cells = rows.astype("string")
    of_checkpoint = [*own, *(name for name in names if name.startswith(KEY) or name in ("metric", "weights"))]
    again = cells.groupby(of_checkpoint, dropna=False, sort=False).cumcount()
    run = cells.assign(again=again).groupby([*still, "again"], dropna=False, sort=False).ngroup()
    number = run.groupby(cells["size"], dropna=False).transform(lambda runs: pd.factorize(runs)[0] + 1)
    several = number.groupby(cells["size"], dropna=False).transform("max") > 1
    return cells["size"].where(~several, cells["size"] + " run " + number.astype("string"))


def _short(value: float, digits: int) -> str:
    least, unit = next(((least, unit) for least, unit in UNITS if abs(value) >= least), UNITS[-1])
    return f"{value / least:.{digits}g}{unit}"
