"""Do the intervals hold what they say? Simulated sweeps of known truth, and a table of how often they do.

    python tools/check_coverage.py --sweeps 100 -o coverage.jsonl
    python tools/check_coverage.py --sweeps 200 --designs "power, t3 noise" additive -o coverage.jsonl

Every sweep's answers are appended to the output as soon as it is analysed; what was stopped goes on where it was.
"""

import argparse
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any
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
    done = read_jsonl(options.output, design=str, sweep=int, answers=list)
    if any({name: row.get(name) for name in asked} != asked for row in done):
        raise UserError(f"{options.output}: made with other --resamples or --level; give another -o")
    have = {(row["design"], row["sweep"]) for row in done}
    for name, sweep in [(name, sweep) for sweep in range(options.sweeps) for name in names]:
        if (name, sweep) not in have:
            answers = trial(DESIGNS[name], crc32(name.encode()) + sweep, **asked)
            with writing(options.output):
                append_jsonl(options.output, {"design": name, "sweep": sweep} | asked | {"answers": answers})
    print(table(read_jsonl(options.output), names))
    return 0


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown: a line per design and law that was asked for, with 90 % intervals of the shares (normal, binomial)."""
    header = ["design", "asked", "sweeps", "refused", "a new run", "the law", "width", "law's error", "answered by"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in names:
        answers = [answer for row in rows if row["design"] == name for answer in row["answers"]]
        for law in dict.fromkeys(answer["asked"] for answer in answers):
            every = [answer for answer in answers if answer["asked"] == law]
            lines.append(f"| {' | '.join([name, law, *_cells(every)])} |")
    return "\n".join(lines)


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    answered = [row for row in rows if row["refused"] is None]
    counts = [str(len(answered)), str(len(rows) - len(answered))]
    if not answered:
        return [*counts, "", "", "", "", ""]
    shares = [statistics.fmean(row[what] for row in answered) for what in ("new_run", "curve")]
    said = [f"{share:.2f} ± {1.64 * (share * (1 - share) / len(answered)) ** 0.5:.2f}" for share in shares]
    width = statistics.median(row["width"] for row in answered)
    error = statistics.fmean(row["error"] for row in answered)
    laws = Counter(row["law"] for row in answered).most_common()
    by = ", ".join(f"{law} {count / len(answered):.2f}" for law, count in laws)
    return [*counts, *said, f"{width:.4f}", f"{error:+.4f}", by]


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
