"""Fit a scaling law to runs, test it on the largest size, and write a report.

    python tools/fit_scaling.py runs/sweep --law offset power --metric fd --hold-out largest -o report
    python tools/fit_scaling.py runs.csv --law power --metric fd --where key_guidance=1.0 -o report
    python tools/fit_scaling.py runs.csv --law power --compare family -o comparison

Exit code: 0 fitted, 2 refused (the report says why), 3 fitted with cautions under --strict.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fitscale.config.errors import UserError
from fitscale.config.program import exit_code, loading

if TYPE_CHECKING:
    from fitscale.scaling.fit.question import Question
    from fitscale.scaling.fit.study import Study
    from fitscale.scaling.report.samples import SampleFolder

FITTED, REFUSED, CAUTIONS = 0, 2, 3
RESAMPLES = (20, 100_000)  # the least has one beyond either end of a 90 % interval; the most takes a minute a law


def main(arguments: list[str] | None = None) -> int:
    with loading("pandas and scipy", "scipy.stats"):
        parser = _parser()
    return exit_code(lambda: fit_scaling(parser.parse_args(arguments)))


def fit_scaling(options: argparse.Namespace) -> int:
    """Fit, write the report, print it in short; the exit code of this program's description."""
    from fitscale.config.errors import writing
    from fitscale.scaling.fit.question import require_within
    from fitscale.scaling.fit.study import study
    from fitscale.scaling.report.files import write_report
    from fitscale.scaling.rows.runs import load_table

    require_within(options, resamples=RESAMPLES, seed=0)
    require_within(options, above=(0.01, 0.99))
    if options.huber is not None and not 0 < options.huber < math.inf:
        raise UserError(f"--huber: {options.huber:g} must be a number above 0")
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"{options.output}: is a file; -o names the folder of the report")
    if options.compare is not None:
        return _compare(options)
    if options.own:
        raise UserError("--own: names keys of groups that --compare compares, which is not given")
    answer = study(load_table(options.runs), _question(options))
    folders = _sample_folders(options, answer)
    with writing(options.output):
        written = write_report(answer, options.output, folders)
    _say(answer)
    print("\n".join(f"wrote {path}" for path in written))
    if not (answer.results or answer.isoflops):
        return REFUSED
    return CAUTIONS if options.strict and (answer.cautions or answer.refusals) else FITTED


def _compare(options: argparse.Namespace) -> int:
    """One law for each group of a column, and what they differ by; the exit codes are the same."""
    from fitscale.config.errors import writing
    from fitscale.scaling.fit.compare import compare
    from fitscale.scaling.report.comparison import sentence, told, write_comparison
    from fitscale.scaling.rows.runs import load_table

    if options.samples or options.hold_out != ["largest"] or "isoflop" in options.laws:
        raise UserError("--compare: compares fitted laws of all sizes; leave out --samples, --hold-out and isoflop")
    comparison = compare(load_table(options.runs), _question(options), options.compare, options.own)
    with writing(options.output):
        written = write_comparison(comparison, options.output)
    for refusal in comparison.refusals:
        print(f"refused ({refusal.code}): {refusal.message}", file=sys.stderr)
    for caution in comparison.cautions:
        print(f"caution ({caution.code}): {caution.message}", file=sys.stderr)
    for difference in told(comparison):
        print(sentence(difference, comparison.question))
    print("\n".join(f"wrote {path}" for path in written))
    return CAUTIONS if options.strict and (comparison.cautions or comparison.refusals) else FITTED


def _sample_folders(options: argparse.Namespace, answer: "Study") -> list["SampleFolder"]:
    """Those asked for, or those inside the run directories whose checkpoint is a row of the study."""
    from fitscale.scaling.report.samples import find_folders, read_folder, row_of

    if options.samples or not len(answer.rows):
        return [read_folder(path) for path in options.samples]
    found = [(folder, row_of(answer.rows, folder)) for folder in map(read_folder, find_folders(options.runs))]
    for folder, row in found:
        if row is None:
            print(f"not drawn: {folder.path}: its checkpoint is not among the rows fitted", file=sys.stderr)
    return [folder for folder, row in found if row is not None]


def _question(options: argparse.Namespace) -> "Question":
    from fitscale.scaling.fit.fitting import ResidualLoss
    from fitscale.scaling.fit.question import question

    hold_out = () if options.hold_out == ["none"] else tuple(options.hold_out)
    loss = ResidualLoss("linear" if options.linear else "log", options.huber, options.above)
    return question(options, hold_out=hold_out, loss=loss)


def _say(answer: "Study") -> None:
    """The sentence that answers, then what was refused, then what other laws say."""
    from fitscale.scaling.report.content import answers
    from fitscale.scaling.report.optimal import isoflop_lines

    first, *others = answers(answer)
    print(first, flush=True)
    for refusal in answer.refusals:
        print(f"refused ({refusal.code}): {refusal.message}", file=sys.stderr)
    for caution in answer.cautions:
        print(f"caution ({caution.code}): {caution.message}", file=sys.stderr)
    others += isoflop_lines(answer)
    if answer.unfitted:
        others.append(f"{len(answer.unfitted)} more laws could not be fitted; the report says why")
    print("\n".join(others), end="\n" * bool(others))


def _parser() -> argparse.ArgumentParser:
    from fitscale.scaling.fit.question import add_draw_options, add_floor_option, add_law_options
    from fitscale.scaling.fit.study import CHOICES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_law_options(parser, CHOICES)
    add_floor_option(parser)
    add_draw_options(parser)
    add = parser.add_argument
    add("--hold-out", nargs="+", default=["largest"], metavar="SIZE", help="sizes to predict: largest, none or names")
    add("--resamples", type=int, default=4000, help="times that all runs are drawn anew (default: 4000)")
    add("--huber", type=float, metavar="DELTA", help="Huber's loss with this corner instead of squares")
    above = "residuals above the law count T / (1 - T) times: below .5 the law leans to the lowest (default: .5)"
    add("--above", type=float, default=0.5, metavar="T", help=above)
    add("--linear", action="store_true", help="residuals of the metric itself instead of its logarithm")
    add(
        "--samples",
        nargs="+",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="folders that `fitscale sample` wrote, for the report (default: those inside the run directories)",
    )
    optimum = "what isoflop finds the best of at a budget (tokens: images where no row says their tokens)"
    add("--optimum", choices=("parameters", "tokens"), default="parameters", help=optimum)
    add("--compare", metavar="COLUMN", help="fit one law for each value of this column, and say what they differ by")
    own = "(--compare) keys in which the groups may differ, as part of what is compared: sampler steps ..."
    add("--own", nargs="+", default=[], metavar="KEY", help=own)
    add("--strict", action="store_true", help="exit with 3 if there is any caution")
    add("-o", "--output", required=True, type=Path, help="folder for the report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
