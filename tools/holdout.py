"""Test laws on what they have not seen: every held-out point with its error, and the laws ranked.

python tools/holdout.py runs.csv --by size --law offset power additive --metric fd
python tools/holdout.py runs/sweep --by step --metric validation_loss -o errors.csv
"""

import argparse
import sys
from pathlib import Path

from fitscale.config.main import exit_code


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: holdout(_parser().parse_args(arguments)))


def holdout(options: argparse.Namespace) -> int:
    """Print (and write) the errors and the ranking; a refusal is a user's error."""
    from fitscale.config.rundir import write_atomic
    from fitscale.scaling.holdout import hold_out
    from fitscale.scaling.runs import load_table
    from fitscale.scaling.select import select

    where = {name: value for name, _, value in (text.partition("=") for text in options.where)}
    selection = select(load_table(options.runs), options.metric, where, options.from_step, options.drop_missing)
    for caution in selection.cautions:
        print(f"caution ({caution.code}): {caution.message}", file=sys.stderr)
    answer = hold_out(selection.rows, options.by, tuple(options.law), options.points)
    for fold, law, refusal in answer.refusals:
        print(f"refused ({refusal.code}), {fold}: {law}: {refusal.message}", file=sys.stderr)
    columns = ["fold", "law", "run", "step", "train_flops", "value", "predicted", "error"]
    formats = {"error": "{:+.1%}".format, "train_flops": "{:.3g}".format, "predicted": "{:.4g}".format}
    print(answer.errors[columns].to_string(index=False, formatters=formats))
    percent = {"mean_error": "{:.2%}".format, "worst_error": "{:.2%}".format, "folds_fitted": "{:.0%}".format}
    print("\nranking, on the folds that every law could be fitted to:")
    print(answer.ranking.to_string(index=False, formatters=percent))
    if options.output:
        write_atomic(options.output, answer.errors[columns].to_csv(index=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    from fitscale.scaling.holdout import BY
    from fitscale.scaling.laws import LAWS
    from fitscale.scaling.points import POINTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS", help="run directories, folders of them, or one table")
    add("--by", choices=BY, default="size", help="what is held out")
    add("--law", nargs="+", choices=LAWS, default=["offset", "power"])
    add("--metric", default="fd")
    add("--points", choices=POINTS, default="frontier", help="rows that laws of compute speak of")
    add("--where", action="append", default=[], metavar="COLUMN=VALUE", help="keep only such rows; may be repeated")
    add("--from-step", type=int, default=0, help="leave out evaluations before this step (warm-up)")
    add("--drop-missing", action="store_true", help="leave out rows without a value instead of refusing")
    add("-o", "--output", type=Path, help="CSV file for the errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
