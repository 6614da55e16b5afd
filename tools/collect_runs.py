"""Collect run directories into one table of evaluations.

python tools/collect_runs.py runs/sweep -o runs.csv
python tools/collect_runs.py runs/a runs/b -o runs.parquet
"""

import argparse
import sys
from pathlib import Path

from fitscale.config.main import exit_code


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run directories, or folders of them")
    parser.add_argument("-o", "--output", required=True, type=Path, help="the table to write, .csv or .parquet")
    options = parser.parse_args(arguments)
    return exit_code(lambda: collect_runs(options.runs, options.output))


def collect_runs(runs: list[Path], output: Path) -> int:
    """Write the table of `runs` to `output` and say what it holds."""
    from fitscale.scaling.runs import collect
    from fitscale.scaling.table import write_table

    table = collect(runs)
    write_table(table, output)
    print(
        f"{output}: {len(table)} evaluations of {table.run.nunique()} runs, sizes {', '.join(table['size'].unique())}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
