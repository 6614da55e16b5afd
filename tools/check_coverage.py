"""Do the intervals hold what they say? Simulated sweeps of known truth, and a table of how often they do.

    python tools/check_coverage.py --sweeps 100 -o coverage.jsonl
    python tools/check_coverage.py --sweeps 200 --designs "power, t3 noise" additive -o coverage.jsonl

Every simulated sweep is one line of the output as soon as it is analysed; a run that was stopped goes on where it was.
"""

import argparse
import sys
from pathlib import Path
from zlib import crc32

from fitscale.config.errors import UserError
from fitscale.config.program import exit_code


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: check(_parser().parse_args(arguments)))


def check(options: argparse.Namespace) -> int:
    """Simulate what is missing in the output, and print the table of all that is there."""
    from fitscale.config.errors import writing
    from fitscale.config.files import append_jsonl, read_jsonl
    from fitscale.scaling.fit.coverage import DESIGNS, trial
    from fitscale.scaling.fit.question import LEVELS, require_within

    require_within(options, sweeps=1, resamples=(20, 100_000), level=LEVELS)
    names = options.designs or list(DESIGNS)
    if unknown := [name for name in names if name not in DESIGNS]:
        raise UserError(f"--designs {unknown[0]}: no such design; valid: {'; '.join(DESIGNS)}")
    asked = {"resamples": options.resamples, "level": options.level}
    done = read_jsonl(options.output, design=str, sweep=int, resamples=int)
    if any({name: row.get(name) for name in asked} != asked for row in done):
        raise UserError(f"{options.output}: made with other --resamples or --level; give another -o")
    have = {(row["design"], row["sweep"]) for row in done}
    for sweep in range(options.sweeps):
        for name in names:
            if (name, sweep) not in have:
                row = (
                    {"design": name, "sweep": sweep}
                    | asked
                    | trial(DESIGNS[name], crc32(name.encode()) + sweep, **asked)
                )
                with writing(options.output):
                    append_jsonl(options.output, row)
    print(table([row for row in read_jsonl(options.output) if row["design"] in names], names))
    return 0


def table(rows: list[dict], names: list[str]) -> str:
    """Markdown: a line per design."""
    lines = [
        "| design | sweeps | refused | a new run | the law | width of ln | law's error | answered by |",
        "|---|" + "---|" * 7,
    ]
    for name in names:
        every = [row for row in rows if row["design"] == name]
        of = [row for row in every if row["refused"] is None]
        if not of:
            continue
        counts = [len(of), len(every) - len(of)]
        shares = [f"{sum(row[what] for row in of) / len(of):.3f}" for what in ("new_run", "curve")]
        width = sorted(row["width"] for row in of)[len(of) // 2]
        error = sum(row["error"] for row in of) / len(of)
        laws = sorted({row["law"] for row in of}, key=lambda law: -sum(row["law"] == law for row in of))
        said = ", ".join(f"{law} {sum(row['law'] == law for row in of) / len(of):.2f}" for law in laws)
        cells = [name, *map(str, counts), *shares, f"{width:.4f}", f"{error:+.4f}", said]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sweeps", type=int, default=100, help="simulated sweeps of every design (default: 100)")
    add("--designs", nargs="+", metavar="NAME", help="some of the designs (default: all)")
    add("--resamples", type=int, default=200, help="resamples of every sweep (default: 200)")
    add("--level", type=float, default=0.9, help="of the intervals (default: 0.9)")
    add("-o", "--output", required=True, type=Path, help="JSON lines, one per sweep; goes on where it ends")
    return parser


if __name__ == "__main__":
    sys.exit(main())
