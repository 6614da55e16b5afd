"""The whole chain on handwritten digits, from nothing to a scaling law, on two CPU cores.

What `make demo` and `make demo-backbones` run:

1. Shards: scikit-learn's digits, cropped to their ink, at several scales.
2. A classifier: the eye of the Frechet distance, as Inception is for FID.
3. A sweep, trained, and evaluated at log-spaced steps: four sizes of FiTv2, or three of every backbone at equal FLOPs.
4. Guided samples, and the share that the classifier recognises.
5. Contact sheets; of the largest FiTv2 also at image sizes that no training image has.
6. One table of all evaluations.
7. The law, with the largest size held out, and its report; or the backbones compared, each with a law of its own.

Every step is a command that a person could type. A step is skipped if it succeeded after the steps before it last did.

    python tools/demo.py
    python tools/demo.py backbones
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fitscale.config.errors import UserError
from fitscale.config.files import read_jsonl, write_atomic
from fitscale.config.load import load_config, load_schema
from fitscale.config.program import aligned, exit_code
from fitscale.jobs.sweep import SweepConfig
from fitscale.model import flops
from fitscale.run.layout import RunDir

CLASSIFIER = Path("demo/classifier.pt")
# Height and width in pixels; the unseen ones are those of no training image.
SHEETS = {"trained": (10, 8), "unseen-between": (9, 7), "unseen-larger": (12, 9)}
STRETCH = {"unseen-larger": " --rope ntk-aware --decouple"}  # beyond the longest side trained on
# Of the closing table: metric of evaluations.jsonl, how it is written, and its column.
METRICS = {
    "validation_loss": (".4f", "validation loss"),
    "fd": (".2f", "FD"),
    "precision": (".1%", "precision"),
    "recall": (".1%", "recall"),
    "kid": (".4f", "KID"),
}
COLUMNS = ("size", "parameters", "training FLOPs", *(column for _, column in METRICS.values()), "recognised (guided)")
PROGRAMS = {"python": [sys.executable], "fitscale": [sys.executable, "-m", "fitscale"]}


@dataclass(frozen=True)
class Study:
    """What is studied: a sweep, the digits that it needs, and the question asked of its runs."""

    sweep: str
    out: Path
    digits: str  # options of its shards
    asked: str  # of the runs table
    answer: Path  # the figure that shows the answer, under `out`
    largest: str  # cells that end so are drawn and guided as well ("" = all)
    unseen: bool  # whether the last of them is drawn at sizes of no training image
    guidance: float  # of what is drawn


STUDIES = {
    "digits": Study("configs/sweep/digits.yaml", Path("demo"), "", "", Path("report/curves.png"), "", True, 2.0),
    "backbones": Study(
        "configs/sweep/backbones_digits.yaml",
        Path("demo/backbones"),
        " --multiple 2",
        " --law power --compare family --own sampler steps rope",
        Path("report/comparison.png"),
        "-m",
        False,
        4.0,  # Flag-DiT's and TerDiT's own
    ),
}


@dataclass(frozen=True)
class Step:
    """One command, as a person would type it; a stamp says when it last succeeded."""

    out: Path
    title: str
    command: str
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()  # besides what the steps before it leave

    @property
    def stamp(self) -> Path:
        return self.out / ".done" / re.sub(r"\W+", "-", self.title)

    def finished(self, since: float) -> bool:
        """Whether it succeeded after `since` (the last success of the steps before it), and its outputs are there."""
        if not self.stamp.exists() or not all(path.exists() for path in self.outputs):
            return False
        newest_input = max([since, *(path.stat().st_mtime for path in self.inputs)])
        return self.stamp.stat().st_mtime >= newest_input

    def run(self) -> None:
        """Run the command; its output goes to the terminal.

        Raises:
            UserError: it failed.
        """
        program, *arguments = shlex.split(self.command)
        # Networks this small gain nothing from a second thread, and lose much on a machine that has other work.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        result = subprocess.run([*PROGRAMS[program], *arguments], env=environment, check=False)
        if result.returncode:
            raise UserError(f"demo: {self.title}: `{self.command}` ended with exit code {result.returncode}")
        write_atomic(self.stamp, self.command)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES, default="digits", help="what is studied (digits)")
    name = parser.parse_args(argv).study
    return exit_code(lambda: run_demo(STUDIES[name]))


def run_demo(study: Study) -> None:
    """Take every step that is not finished, then show what came out."""
    start = time.perf_counter()
    sweep = load_schema(SweepConfig, [study.sweep])
    runs = {name: RunDir(Path(sweep.dir) / name) for name in reversed(sweep.cells)}  # smallest first
    last = {name: load_config([*sweep.base, *overrides]).run.steps for name, overrides in sweep.cells.items()}
    files = {name for names in [sweep.base, *sweep.cells.values()] for name in names if name.endswith(".yaml")}
    take(all_steps(study, runs, last, tuple(map(Path, [study.sweep, *sorted(files)]))))
    print(f"\n{aligned([COLUMNS, *(result(name, run, last[name], study.guidance) for name, run in runs.items())])}\n")
    for name, path in products(study, drawn(study, runs)).items():
        print(f"{name:<28}{path}")
    print(f"{'time':<28}{time.perf_counter() - start:.0f} s")


def take(steps: list[Step]) -> None:
    """Run the steps in their order, without those that are finished."""
    since = 0.0
    for number, step in enumerate(steps, 1):
        done = step.finished(since)
        print(
            f"\n[{number}/{len(steps)}] {step.title}{' (done before)' if done else ''}\n    {step.command}", flush=True
        )
        if not done:
            began = time.perf_counter()
            step.run()
            print(f"    {time.perf_counter() - began:.0f} s", flush=True)
        since = max(since, step.stamp.stat().st_mtime)


def all_steps(study: Study, runs: dict[str, RunDir], last: dict[str, int], configs: tuple[Path, ...]) -> list[Step]:
    """The chain."""
    out, shards, table = study.out, study.out / "shards", study.out / "runs.csv"
    finished = tuple(run.checkpoint_path(last[name]) / "COMPLETE" for name, run in runs.items())
    guided = [
        Step(
            out,
            f"guided samples of size {name}",
            f"fitscale evaluate {run.path} --step {last[name]} --guidance {study.guidance:g}",
            (run.evaluations,),
        )
        for name, run in runs.items()
        if name.endswith(study.largest)
    ]
    sheets = drawn(study, runs)
    folders = " ".join(str(run.path) for run in runs.values())
    samples = "" if study.asked else f" --samples {' '.join(str(sheet(*one).parent) for one in sheets)}"
    fit = f"python tools/fit_scaling.py {table} --metric fd --where key_guidance=1.0{study.asked}{samples}"
    return [
        Step(
            out,
            "shards of cropped digits",
            f"python tools/make_shards.py digits {shards}{study.digits}",
            (shards / "index.json",),
        ),
        Step(out, "classifier", f"python tools/train_digits_classifier.py {CLASSIFIER}", (CLASSIFIER,)),
        Step(out, "sweep over the sizes", f"python slurm/sweep.py {study.sweep}", finished, configs),
        *guided,
        *(sheet_step(study, *one) for one in sheets),
        Step(out, "one table of all evaluations", f"python tools/collect_runs.py {folders} -o {table}", (table,)),
        Step(out, "what the runs say", f"{fit} -o {out / study.answer.parent}", (out / study.answer,)),
    ]


def drawn(study: Study, runs: dict[str, RunDir]) -> list[tuple[RunDir, str]]:
    """Contact sheets of a study: of which run, of which of `SHEETS`."""
    chosen = [run for name, run in runs.items() if name.endswith(study.largest)]
    return [(run, "trained") for run in chosen] + [(chosen[-1], kind) for kind in [*SHEETS][1:] if study.unseen]


def sheet_step(study: Study, run: RunDir, kind: str) -> Step:
    height, width = SHEETS[kind]
    return Step(
        study.out,
        f"samples of {height} x {width} pixels, {kind}, by size {run.path.name}",
        f"fitscale sample {run.path} --height {height} --width {width} --count 40 --guidance {study.guidance:g} "
        f"--out {sheet(run, kind).parent}{STRETCH.get(kind, '')}",
        (sheet(run, kind),),
    )


def sheet(run: RunDir, kind: str) -> Path:
    return run.samples / kind / "contact_sheet.png"


def result(name: str, run: RunDir, step: int, guidance: float) -> tuple[str, ...]:
    """A size's line of the closing table; a figure that was not measured is a dash."""
    rows = [row for row in read_jsonl(run.evaluations) if row["step"] == step]
    plain = {row["metric"]: row for row in rows if row["key"].get("guidance", 1.0) == 1.0}
    guided = [row for row in rows if row["metric"] == "recognised" and row["key"]["guidance"] == guidance]
    return (
        name,
        f"{flops.parameters(load_config([str(run.config)]).model):,}",
        f"{plain['fd']['train_flops']:.3g}",
        *(f"{plain[name]['value']:{how}}" if name in plain else "-" for name, (how, _) in METRICS.items()),
        f"{guided[-1]['value']:.1%}" if guided else "-",
    )


def products(study: Study, sheets: list[tuple[RunDir, str]]) -> dict[str, Path | str]:
    """What there is to look at."""
    accuracy = json.loads(CLASSIFIER.with_suffix(".json").read_text())["accuracy"]
    figure = study.out / study.answer
    return {
        "classifier, held-out digits": f"{accuracy:.1%} recognised",
        "report": figure.with_name("comparison.html" if study.asked else "report.html"),
        "figure": figure,
        **{f"sheet {run.path.name}, {kind}": sheet(run, kind) for run, kind in sheets},
    }


if __name__ == "__main__":
    sys.exit(main())
