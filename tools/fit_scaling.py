"""Fit a scaling law to runs, test it on the largest size, and write a report.

    python tools/fit_scaling.py runs/sweep --law offset power --metric fd --hold-out largest -o report
    python tools/fit_scaling.py runs.csv --law power --metric fd --where key_guidance=1.0 -o report

Exit code: 0 fitted, 2 refused (the report says why), 3 fitted with cautions under --strict.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fitscale.config.errors import UserError, writing
from fitscale.config.program import exit_code

if TYPE_CHECKING:
    from fitscale.scaling.samples import SampleFolder
    from fitscale.scaling.study import Question, Study

FITTED, REFUSED, CAUTIONS = 0, 2, 3
LEAST_RESAMPLES = 20  # one of them beyond either end of a 90 % interval


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_code(lambda: fit_scaling(options))


def fit_scaling(options: argparse.Namespace) -> int:
    """Fit, write the report, print it in short; the exit code of this program's description."""
    from fitscale.scaling.arguments import require_at_least
    from fitscale.scaling.report import write_report
    from fitscale.scaling.runs import load_table
    from fitscale.scaling.study import study

    require_at_least(options, resamples=LEAST_RESAMPLES, seed=0)
    if options.huber is not None and not options.huber > 0:
        raise UserError(f"--huber: {options.huber:g} must be above 0")
    answer = study(load_table(options.runs), _question(options))
    folders = _sample_folders(options, answer)
    with writing(options.output):
        written = write_report(answer, options.output, folders)
    _say(answer)
    print("\n".join(f"wrote {path}" for path in written))
    if not answer.answered:
        return REFUSED
    return CAUTIONS if options.strict and (answer.cautions or answer.refusals) else FITTED


def _sample_folders(options: argparse.Namespace, answer: "Study") -> list["SampleFolder"]:
    """Those asked for, or those inside the run directories whose checkpoint is a row of the study."""
    from fitscale.scaling.samples import find_folders, read_folder, row_of

    if options.samples or not len(answer.rows):
        return [read_folder(path) for path in options.samples]
    found = [(folder, row_of(answer.rows, folder)) for folder in map(read_folder, find_folders(options.runs))]
    for folder, row in found:
        if row is None:
            print(f"not drawn: {folder.path}: its checkpoint is not among the rows fitted", file=sys.stderr)
    return [folder for folder, row in found if row is not None]


def _question(options: argparse.Namespace) -> "Question":
    from fitscale.scaling.arguments import conditions
    from fitscale.scaling.fitting import Loss
    from fitscale.scaling.study import Question

    return Question(
        metric=options.metric,
        laws=tuple(dict.fromkeys(options.law)),
        points=options.points,
        hold_out=() if options.hold_out == ["none"] else tuple(options.hold_out),
        where=conditions(options.where),
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
    from fitscale.scaling.arguments import add_row_options
    from fitscale.scaling.study import CHOICES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_row_options(parser)
    add = parser.add_argument
    add("--law", nargs="+", choices=CHOICES, default=["offset", "power"], help="laws; the best is shown first")
    add("--hold-out", nargs="+", default=["largest"], metavar="SIZE", help="sizes to predict: largest, none or names")
    add("--extrapolate", action="store_true", help="agree to predictions at more than 10 times the fitted compute")
    add("--resamples", type=int, default=4000, help="times that the luck of all runs is drawn anew (default: 4000)")
    add("--huber", type=float, metavar="DELTA", help="Huber's loss with this corner instead of squares")
    add("--linear", action="store_true", help="residuals of the metric itself instead of its logarithm")
    add("--seed", type=int, default=0, help="seed of the resampling")
    add(
        "--samples",
        nargs="+",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="folders that `fitscale sample` wrote, for the report (default: those inside the run directories)",
    )
    add("--strict", action="store_true", help="exit with 3 if there is any caution")
    add("-o", "--output", required=True, type=Path, help="folder for the report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
