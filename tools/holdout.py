"""Test laws on what they have not seen: every held-out point with its error, and the laws ranked.

python tools/holdout.py runs.csv --by size --law offset power additive --metric fd
python tools/holdout.py runs/sweep --by step --metric validation_loss -o errors.csv
"""

import argparse
import sys
from pathlib import Path

from fitscale.config.program import exit_code, loading


def main(arguments: list[str] | None = None) -> int:
    with loading("pandas and scipy", "scipy.stats"):
        parser = _parser()
    return exit_code(lambda: holdout(parser.parse_args(arguments)))


def holdout(options: argparse.Namespace) -> int:
    """Print (and write) the errors and the ranking; a refusal is a user's error."""
    from fitscale.config.errors import writing
    from fitscale.config.files import write_atomic
    from fitscale.scaling.fit.holdout import hold_out
    from fitscale.scaling.fit.question import question
    from fitscale.scaling.rows.runs import load_table

    asked = question(options)
    selection = asked.select(load_table(options.runs))
    for caution in selection.cautions:
        print(f"caution ({caution.code}): {caution.message}", file=sys.stderr)
    answer = hold_out(selection.rows, options.by, asked.laws, asked.points)
    for fold, law, refusal in answer.refusals:
        print(f"refused ({refusal.code}), {fold}: {law}: {refusal.message}", file=sys.stderr)
    columns = ["fold", "law", "run", "step", "train_flops", "value", "predicted", "error"]
    formats = {"error": "{:+.1%}".format, "train_flops": "{:.3g}".format, "predicted": "{:.4g}".format}
    print(answer.errors[columns].to_string(index=False, formatters=formats))
    names = {"mean_error": "mean |ln error|", "worst_error": "worst |ln error|", "folds_fitted": "folds fitted"}
    ranking = answer.ranking.rename(columns=names)
    shown = {names["mean_error"]: "{:.4f}".format, names["worst_error"]: "{:.4f}".format}
    shown |= {names["folds_fitted"]: "{:.0%}".format}
    print("\nranking by |ln(predicted / measured)|, on the folds that every law could be fitted to:")
    print(ranking.to_string(index=False, formatters=shown))
    if options.output:
        with writing(options.output):
            write_atomic(options.output, answer.errors[columns].to_csv(index=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    from fitscale.scaling.fit.holdout import BY
    from fitscale.scaling.fit.question import add_law_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_law_options(parser)
    add = parser.add_argument
    add("--by", choices=BY, default="size", help="what is held out")
    add("-o", "--output", type=Path, help="CSV file for the errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
