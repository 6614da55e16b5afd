"""Collect run directories, or anybody's CSV, into one checked table of evaluations.

    python tools/collect_runs.py runs/sweep -o runs.csv
    python tools/collect_runs.py runs/a runs/b --check
    python tools/collect_runs.py runs/sweep --ema-share 0.1 --infinity fd --tuned fd -o runs.csv
    python tools/collect_runs.py wandb_export.csv --guess > map.yaml
    python tools/collect_runs.py wandb_export.csv --columns map.yaml -o runs.parquet

--check lists the problems that the table has; the exit code is then 3 if there are any. --guess prints a column map
(docs/scaling.md) to read, correct and use, and as comments the first rows as it understands them; the exit code is 3 if
it does not work yet.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fitscale.config.errors import UserError
from fitscale.config.program import exit_code, loading

if TYPE_CHECKING:
    import pandas as pd

PROBLEMS = 3
MOST_NAMED = 12  # sizes in the closing line
FIRST_ROWS = 6


def main(arguments: list[str] | None = None) -> int:
    with loading("pandas and scipy", "scipy.stats"):
        parser = _parser()
    return exit_code(lambda: collect_runs(parser.parse_args(arguments)))


def collect_runs(options: argparse.Namespace) -> int:
    """Write and/or check the table, and say what it holds."""
    from fitscale.config.errors import writing
    from fitscale.scaling.rows.files import write_table
    from fitscale.scaling.rows.refusals import listed
    from fitscale.scaling.rows.selection import problems, summary

    if options.guess:
        return _guess(options.runs)
    if not options.output and not options.check:
        raise UserError("nothing to do: give -o FILE, --check or --guess")
    table = _derived(_table(options.runs, options.columns), options)
    if options.output:
        with writing(options.output):
            write_table(table, options.output)
        sizes = listed(list(table["size"].dropna().unique()), MOST_NAMED)
        print(f"{options.output}: {len(table)} evaluations of {table['run'].nunique()} runs, sizes {sizes}")
    if not options.check:
        return 0
    found = problems(table)
    print("\n".join([*summary(table), *(f"problem: {problem}" for problem in found)]))
    return PROBLEMS if found else 0


def _derived(table: "pd.DataFrame", options: argparse.Namespace) -> "pd.DataFrame":
    """The table with the rows that were asked for besides the measured ones."""
    import pandas as pd

    from fitscale.scaling.rows.fid import ema_rule, infinity, tuned_guidance
    from fitscale.scaling.rows.table import validate

    if options.ema_share is not None:
        table = ema_rule(table, options.ema_share)
    parts = [table]
    if options.infinity:
        parts.append(infinity(table[table["metric"] == options.infinity]))
    if options.tuned:
        parts.append(tuned_guidance(table[table["metric"] == options.tuned]))
    return validate(pd.concat(parts, ignore_index=True)) if len(parts) > 1 else table


def _table(runs: list[Path], columns: Path | None) -> "pd.DataFrame":
    from fitscale.scaling.rows.files import read_mapped
    from fitscale.scaling.rows.runs import load_table

    if columns is None:
        return load_table(runs)
    if len(runs) > 1:
        raise UserError("--columns goes with one CSV or parquet file")
    return read_mapped(runs[0], columns)


def _guess(tables: list[Path]) -> int:
    """Print a column map for one table, and its first rows by it."""
    import yaml

    from fitscale.scaling.rows.files import mapped, read_cells
    from fitscale.scaling.rows.guess import guessed
    from fitscale.scaling.rows.selection import problems

    if len(tables) > 1:
        raise UserError("--guess goes with one CSV or parquet file")
    source = read_cells(tables[0])
    mapping = guessed(source)
    print(f"# {tables[0].name}: {len(source)} rows; columns: {', '.join(source)}")
    print(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=1000), end="")
    try:
        table = mapped(source, mapping, tables[0], tables[0])
    except UserError as error:
        print(f"# does not work yet: {error}")
        return PROBLEMS
    first = table[table["metric"] == table["metric"].iloc[0]] if len(table) else table
    lines = first.loc[:, table.notna().any()].head(FIRST_ROWS).to_string(index=False, max_colwidth=24).splitlines()
    lines += [f"problem: {problem}" for problem in problems(table)]
    if not {"run", "step"} & set(mapping):
        lines.append("every row is a run of its own; if some are checkpoints of one, say so with run: or step:")
    print(f"# {len(table)} evaluations of {table['run'].nunique()} runs, {table['size'].nunique()} sizes; the first:")
    print("\n".join(f"# {line}" for line in lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    from fitscale.scaling.fit.question import add_runs_option

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runs_option(parser)
    add = parser.add_argument
    add("--columns", type=Path, help="column map (YAML) that says what the columns of a table are")
    add("--guess", action="store_true", help="print a column map for a table with other columns")
    add("--infinity", metavar="METRIC", help="add FID-infinity of this metric, from its sample counts")
    add("--tuned", metavar="METRIC", help="add this metric at every checkpoint's best guidance")
    add("--ema-share", type=float, metavar="F", help="keep the EMA whose length is nearest F of training")
    add("--check", action="store_true", help="list the table's problems")
    add("-o", "--output", type=Path, help="the table to write, .csv or .parquet")
    return parser


if __name__ == "__main__":
    sys.exit(main())
