"""`fitscale tune`: which sampling is the best for a checkpoint, and how much that matters.

Every point of a grid is an evaluation like any other (evaluate.py): its rows stay in evaluations.jsonl, points that are
there are not measured again, and any number of ranks share the work. All points draw the same images from the same
noise, so that they differ by the sampling alone.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from fitscale.config.checks import given
from fitscale.config.errors import UserError, writing
from fitscale.config.files import replacing
from fitscale.config.load import load_config
from fitscale.config.program import aligned
from fitscale.config.schema_sampling import SamplingConfig
from fitscale.data.index import open_index
from fitscale.eval.checkpoints import find_checkpoint, open_run
from fitscale.eval.commands import MOST_IMAGES, MOST_SEED, within
from fitscale.eval.evaluate import EvaluationOptions, Evaluator
from fitscale.eval.ranks import is_first

MEASURED = ("value", "standard_error", "nfe")  # of every point
POINTS = 7  # of a range that says no number
MOST_POINTS = 1000
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A sampling, by the settings in which it differs from the run's."""

    settings: dict[str, str]
    sampling: SamplingConfig


def run_tune(arguments: argparse.Namespace) -> None:
    """Measure every point of the grid, and say which is best."""
    config, run = open_run(arguments.run)
    points = list(grid(arguments.over, [str(run.config)]))
    within("--samples", arguments.samples, 2, MOST_IMAGES)
    within("--seed", arguments.seed, 0, MOST_SEED)
    if not config.evaluation.networks:
        raise UserError("evaluation.features: needed, and evaluation.reference, to tell what is better")
    chosen = {name: getattr(arguments, name) for name in ("samples", "weights", "tensor_parallel_size")}
    config = replace(config, evaluation=given(config.evaluation, **chosen))
    step = find_checkpoint(run, arguments.step).step
    options = EvaluationOptions(config.model, None, arguments.seed, arguments.device, False, cache(open_index))
    evaluator, rows = Evaluator(config, run, options), []
    for point in points:
        for _ in evaluator.samples(step, point.sampling):
            pass
        known = {row["metric"]: row for row in evaluator.known(step, point.sampling)}
        if arguments.metric not in known:
            raise UserError(f"--metric: {arguments.metric} is not among {', '.join(known)}")
        rows.append(point.settings | {name: known[arguments.metric][name] for name in MEASURED})
    if is_first():
        print(aligned([[*rows[0]], *([_word(cell) for cell in row.values()] for row in rows)]))
        print(verdict(rows, arguments.metric))
        out = arguments.out or run.path / "tune" / f"step-{step:08d}_{arguments.metric.replace('/', '-')}"
        with writing(out):
            write(rows, arguments.metric, out)
        print(f"table and plot: {out}")


def grid(over: list[str], base: list[str]) -> Iterator[Point]:
    """The points of KEY=VALUES, keys below `sampling`; values are a, b, c or first:last or first:last:number.

    Raises:
        UserError: no such key, no such values, or a sampling that cannot be.
    """
    axes = {}
    for text in over:
        key, found, values = text.partition("=")
        if not found:
            raise UserError(f"--over: {text}: must be KEY=VALUES, such as guidance.scale=1:4 or steps=10,20")
        axes[key] = _values(text, values)
    if (number := int(np.prod([len(values) for values in axes.values()], dtype=object))) > MOST_POINTS:
        raise UserError(f"--over: {number:,} points; valid: at most {MOST_POINTS:,}")
    for point in product(*axes.values()):
        settings = dict(zip(axes, point, strict=True))
        config = load_config([*base, *(f"sampling.{key}={_yaml(value)}" for key, value in settings.items())])
        yield Point({key: _yaml(value) for key, value in settings.items()}, config.sampling)


def _values(text: str, values: str) -> list[Any]:
    ends = values.split(":")
    try:
        numbers = [float(end) for end in ends[:2]] + [int(end) for end in ends[2:]] if len(ends) > 1 else []
        found = yaml.safe_load(f"[{values}]") if len(ends) == 1 else None
    except (ValueError, yaml.YAMLError, RecursionError):
        numbers, found = [], None
    if len(ends) in (2, 3) and numbers and all(map(isfinite, numbers)):
        first, last, number = (*numbers, POINTS)[:3]
        if not 1 <= number <= MOST_POINTS:
            raise UserError(f"--over: {text}: {number:,} points; valid: 1 to {MOST_POINTS:,}")
        return [float(f"{value:.6g}") for value in np.linspace(first, last, int(number))]
    if not found:
        raise UserError(f"--over: {text}: values are a,b,c or first:last or first:last:number")
    return list(found)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _word(cell: Any) -> str:
    return f"{cell:.5g}" if isinstance(cell, float) else str(cell)


def verdict(rows: list[Row], metric: str) -> str:
    """What the best point costs, and how flat it is around it; the least value is the best."""
    best = min(rows, key=lambda row: row["value"])
    near = [row for row in rows if row["value"] <= best["value"] + (best["standard_error"] or 0.0)]
    cheapest = min(near, key=lambda row: row["nfe"])
    text = f"best: {_named(best)}: {metric} {best['value']:.5g}, {best['nfe']:g} function evaluations an image"
    text += f"; {len(near)} of {len(rows)} points are within its standard error"
    return text + (f", {_named(cheapest)} with {cheapest['nfe']:g}" if cheapest["nfe"] < best["nfe"] else "")


def _named(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.items() if name not in MEASURED)


def write(rows: list[Row], metric: str, out: Path) -> None:
    """table.csv and tune.png in the folder `out`: one line for every setting of the keys but the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with replacing(out / "table.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    first = next(iter(rows[0]))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(_named({name: value for name, value in row.items() if name != first}), []).append(row)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, line in lines.items():
        x, errors = [_number(row[first]) for row in line], [row["standard_error"] or 0.0 for row in line]
        axes.errorbar(x, [row["value"] for row in line], errors, marker="o", capsize=3, label=label or None)
    axes.set(xlabel=f"sampling.{first}", ylabel=metric)
    if len(lines) > 1:
        axes.legend()
    with replacing(out / "tune.png") as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
