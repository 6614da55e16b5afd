"""From a sweep to its cells: pure, and cheap enough to look at before an hour is spent.

1. `cells` resolves every cell's config, so a mistake in the largest is found before the smallest starts.
2. `table` says what each cell will cost.
3. `manifest` is what the sweep directory records of itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import Config
from fitscale.jobs.sweep import SweepConfig
from fitscale.model import flops
from fitscale.run.layout import RunDir
from fitscale.run.progress import wanted_metrics

TokenShares = Mapping[int, float]  # tokens of an image: share of the images that have so many; shares sum to 1
Tokens = Callable[[Config], TokenShares]  # of the data that a config names


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    arguments: list[str]  # of `fitscale train`
    config: Config

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.config.run.dir))


def cells(sweep: SweepConfig) -> list[Cell]:
    """The cells in the sweep's order.

    Raises:
        UserError: a cell's config cannot be right, or its evaluations would measure nothing; the text starts with the
            cell's name.
    """
    return [_cell(sweep, name, own) for name, own in sweep.all_cells.items()]


def _cell(sweep: SweepConfig, name: str, own: list[str]) -> Cell:
    run_dir = Path(sweep.dir) / name
    arguments = [*sweep.base, *own, f"run.name={sweep.name}-{name}", f"run.dir={run_dir}"]
    try:
        config = load_config(arguments)
        _require_metric(config)
    except UserError as error:
        raise UserError(f"cell {name}: {error}") from error
    return Cell(name, arguments, config)


def _require_metric(config: Config) -> None:
    """A sweep is paid for its evaluations: it would end as finished, without a row."""
    if config.evaluation.points and not wanted_metrics(config):
        raise UserError(
            f"evaluation.points: {config.evaluation.points} evaluations would measure nothing; give "
            "evaluation.features and evaluation.reference for the Frechet distance, data.holdout_fraction above 0 "
            "(with evaluation.validation_images) for the validation loss, or evaluation.points=0"
        )


def train_flops(config: Config, tokens: Tokens) -> float:
    """FLOPs of the whole training run: 6 per multiply-accumulate, each image with its own number of tokens."""
    per_image = sum(share * flops.train_flops(config.model, count) for count, share in tokens(config).items())
    return per_image * config.batch.global_batch_size * config.run.steps


def table(ladder: list[Cell], tokens: Tokens, cost: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """What every cell will cost, as aligned text; `cost`: further columns, by cell."""
    header = ("cell", "parameters", "steps", "images", "tokens/image", "training FLOPs", "evaluated at steps")
    further = list(cost[ladder[0].name]) if cost else []
    rows = [(*header, *further)]
    for cell in ladder:
        rows.append((*_row(cell.name, cell.config, tokens), *(cost[cell.name].values() if cost else ())))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    total = sum(train_flops(cell.config, tokens) for cell in ladder)
    return "\n".join([*lines, f"{len(ladder)} cells, {total:.3g} training FLOPs together"])


def _row(name: str, config: Config, tokens: Tokens) -> tuple[str, ...]:
    mean = sum(count * share for count, share in tokens(config).items())
    return (
        name,
        f"{flops.parameters(config.model):,}",
        f"{config.run.steps:,}",
        f"{config.run.steps * config.batch.global_batch_size:,}",
        f"{mean:.1f}",
        f"{train_flops(config, tokens):.3g}",
        " ".join(str(step) for step in config.evaluation.steps(config.run.steps)) or "-",
    )


def manifest(
    sweep: SweepConfig, ladder: list[Cell], tokens: Tokens, submitted: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """What manifest.json holds: the sweep as written, and every cell's run directory, arguments and cost.

    `submitted`: what a cluster was asked for, by cell.
    """
    return {
        "sweep": asdict(sweep),
        "cells": [
            {
                "name": cell.name,
                "run_dir": cell.config.run.dir,
                "arguments": cell.arguments,
                "parameters": flops.parameters(cell.config.model),
                "steps": cell.config.run.steps,
                "train_flops": train_flops(cell.config, tokens),
                **(submitted[cell.name] if submitted else {}),
            }
            for cell in ladder
        ],
    }
