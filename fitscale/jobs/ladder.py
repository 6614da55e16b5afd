"""From a sweep to its cells: cheap enough to look at before an hour is spent.

1. `cells` resolves every cell's config, so a mistake in the largest is found before the smallest starts.
2. `cost_table` says what each cell will cost.
3. `manifest` is what the sweep directory records of itself.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fitscale.config.errors import UserError, mistakes_in
from fitscale.config.load import load_config
from fitscale.config.program import aligned
from fitscale.config.schema import Config
from fitscale.jobs.submission import Submission
from fitscale.jobs.sweep import SweepConfig
from fitscale.run.progress import wanted_metrics


def cells(sweep: SweepConfig) -> list[Config]:
    """The configs of the cells, in the sweep's order.

    Raises:
        UserError: a cell's config cannot be right, or its evaluations would measure nothing (a sweep is paid for them:
            it would end as finished, without a row); the text starts with the cell's name.
    """
    found = []
    for name, arguments in sweep.arguments.items():
        with mistakes_in(f"cell {name}"):
            config = load_config(arguments)
            if config.evaluation.points and not wanted_metrics(config):
                raise UserError(
                    f"evaluation.points: {config.evaluation.points} evaluations would measure nothing; give "
                    "evaluation.features and evaluation.reference for the Frechet distance, data.holdout_fraction "
                    "above 0 (with evaluation.validation_images) for the validation loss, or evaluation.points=0"
                )
        found.append(config)
    return found


def cost_table(ladder: Sequence[Submission]) -> str:
    """What every cell will cost, as aligned text; of allocated ones also what they are given."""
    rows = [("cell", *ladder[0].costs), *((cell.name, *cell.costs.values()) for cell in ladder)]
    total = sum(cell.train_flops for cell in ladder)
    return f"{aligned(rows)}\n{len(ladder)} cells, {total:.3g} training FLOPs together"


def manifest(sweep: SweepConfig, ladder: Sequence[Submission]) -> dict[str, Any]:
    """What manifest.json holds: the sweep as written, and every cell's run directory, arguments and cost; of allocated
    ones also what a cluster is asked for."""
    cells = [{"name": cell.name, "arguments": sweep.arguments[cell.name], **cell.record} for cell in ladder]
    return {"sweep": asdict(sweep), "cells": cells}
