"""Fit a scaling law to runs, test it on the largest size, and write a report.

    python tools/fit_scaling.py runs/sweep --law offset power --metric fd --hold-out largest -o report
    python tools/fit_scaling.py runs.csv --law power --metric fd --where key_guidance=1.0 -o report

Exit code: 0 fitted, 2 refused (the report says why), 3 fitted with cautions under --strict.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fitscale.config.main import exit_code

if TYPE_CHECKING:
    from fitscale.scaling.study import Question, Study

FITTED, REFUSED, CAUTIONS = 0, 2, 3


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_code(lambda: fit_scaling(options))


def fit_scaling(options: argparse.Namespace) -> int:
    """Fit, write the report, print it in short; the exit code of this program's description."""
    from fitscale.scaling.report import write_report
    from fitscale.scaling.runs import load_table
    from fitscale.scaling.study import study

    answer = study(load_table(options.runs), _question(options))
    images = options.image or contact_sheets(options.runs)
    written = write_report(answer, options.output, images)
    _say(answer)
    print("\n".join(f"wrote {path}" for path in written))
    if not answer.answered:
        return REFUSED
    return CAUTIONS if options.strict and (answer.cautions or answer.refusals) else FITTED


def contact_sheets(paths: list[Path]) -> list[Path]:
    """Contact sheets inside the run directories."""
    folders = [path for path in paths if path.is_dir()]
    return [sheet for folder in folders for sheet in sorted(folder.rglob("samples/**/contact*.png"))]


def _question(options: argparse.Namespace) -> "Question":
    from fitscale.scaling.fitting import Loss
    from fitscale.scaling.study import Question

    wheres = [where.partition("=") for where in options.where]
    return Question(
        metric=options.metric,
        laws=tuple(dict.fromkeys(options.law)),
        points=options.points,
        hold_out=() if options.hold_out == ["none"] else tuple(options.hold_out),
        where={name: value for name, _, value in wheres},
        from_step=options.from_step,
        drop_missing=options.drop_missing,
        extrapolate=options.extrapolate,
        loss=Loss("linear" if options.linear else "log", options.huber),
        resamples=options.resamples,
        seed=options.seed,
    )


def _say(answer: "Study") -> None:
    from fitscale.scaling.wording import report_content

    for refusal in answer.refusals:
        print(f"refused ({refusal.code}): {refusal.message}", file=sys.stderr)
    for caution in answer.cautions:
        print(f"caution ({caution.code}): {caution.message}", file=sys.stderr)
    for headline in report_content(answer)["headlines"]:
        print(headline)


def _parser() -> argparse.ArgumentParser:
    from fitscale.scaling.study import CHOICES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUNS",
        help="run directories, folders of them, or one .csv or .parquet table",
    )
    add("--law", nargs="+", choices=CHOICES, default=["offset", "power"], help="laws; the best is shown first")
    add("--metric", default="fd", help="metric to fit (default: fd)")
    add("--points", choices=("frontier", "last", "all"), default="frontier", help="rows the law speaks of")
    add("--hold-out", nargs="+", default=["largest"], metavar="SIZE", help="sizes to predict: largest, none or names")
    add("--where", action="append", default=[], metavar="COLUMN=VALUE", help="keep only such rows; may be repeated")
    add("--from-step", type=int, default=0, help="leave out evaluations before this step (warm-up)")
    add("--drop-missing", action="store_true", help="leave out rows without a value instead of refusing")
    add("--extrapolate", action="store_true", help="agree to predictions at more than 10 times the fitted compute")
    add("--resamples", type=int, default=1000, help="resamples of whole runs (default: 1000)")
    add("--huber", type=float, metavar="DELTA", help="Huber's loss with this corner instead of squares")
    add("--linear", action="store_true", help="residuals of the metric itself instead of its logarithm")
    add("--seed", type=int, default=0, help="seed of the resampling")
    add("--image", action="append", type=Path, help="image for the report; default: contact sheets of the runs")
    add("--strict", action="store_true", help="exit with 3 if there is any caution")
    add("-o", "--output", required=True, type=Path, help="folder for the report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
