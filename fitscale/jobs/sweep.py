"""A sweep: the ladder of sizes of one study, where its runs go, and what it costs, before an hour is spent.

1. `cells` resolves every cell's config, so a mistake in the largest is found before the smallest starts.
2. `cost_table` says what each cell will cost.
3. `manifest` is what the sweep directory records of itself.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from fitscale.config.checks import Section, choice, number
from fitscale.config.errors import UserError, mistakes_in
from fitscale.config.load import load_config
from fitscale.config.program import aligned
from fitscale.config.schema import Config
from fitscale.jobs.profile import LayoutConfig
from fitscale.jobs.submission import Submission
from fitscale.run.progress import wanted_metrics


@dataclass(frozen=True)
class LocalConfig(Section, path="local"):
    """Cells on this machine."""

    parallel_cells: int = number(1, least=1)  # cells that run at the same time; the cores are divided among them
    gpus: list[int] = field(default_factory=list)  # CUDA devices, one a cell; [] = the cells run on the CPU

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus and len(self.gpus) < self.parallel_cells:
            raise UserError(
                f"local.gpus: {len(self.gpus)} for local.parallel_cells = {self.parallel_cells}; each needs its own"
            )


@dataclass(frozen=True)
class SweepConfig(Section):
    """A cell's config is `base`, its own arguments, run.name and run.dir: all of them arguments of `fitscale train`.

    Cells are named one by one, or as every combination of the values of `axes`: {size: {b: [...], l: [...]},
    seed: {"0": [run.seed=0], "1": [run.seed=1]}} makes b-0, b-1, l-0 and l-1.
    """

    name: str = "sweep"
    dir: str = ""  # sweep directory; a cell's run directory is <dir>/<cell>
    base: list[str] = field(default_factory=list)  # what all cells share: YAML files and key=value overrides
    cells: dict[str, list[str]] = field(default_factory=dict)  # name of a cell: what it adds
    axes: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # axis: {value: arguments}, not `cells`
    layouts: dict[str, LayoutConfig] = field(default_factory=dict)  # by cell or an axis's value; else from the plan
    max_days: float | None = number(None, above=0)  # a cell is given nodes enough to train in this time
    local: LocalConfig = field(default_factory=LocalConfig)

    @property
    def arguments(self) -> dict[str, list[str]]:
        """Every cell's arguments of `fitscale train`, by its name."""
        own = self.cells or {cell: [one for _, added in chosen for one in added] for cell, chosen in self._combined()}
        return {
            cell: [*self.base, *added, f"run.name={self.name}-{cell}", f"run.dir={Path(self.dir) / cell}"]
            for cell, added in own.items()
        }

    def layout_of(self, cell: str) -> LayoutConfig | None:
        """The layout given for a cell, by its name or by one of its axes' values."""
        values = [value for value, _ in dict(self._combined()).get(cell, ())]
        return next((self.layouts[name] for name in (cell, *values) if name in self.layouts), None)

    def _combined(self) -> list[tuple[str, tuple[tuple[str, list[str]], ...]]]:
        """Of the axes: name of a cell, and its (value, arguments) of every axis."""
        chosen = product(*(axis.items() for axis in self.axes.values())) if self.axes else ()
        return [("-".join(value for value, _ in one), one) for one in chosen]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dir:
            raise UserError("dir: must be given (the sweep directory)")
        if self.cells and self.axes:
            raise UserError("cells and axes: only one of the two may be given")
        if not self.arguments:
            raise UserError("cells: must name at least one cell, e.g. cells: {s: [configs/model/s.yaml]}")
        known = {*self.arguments, *(value for axis in self.axes.values() for value in axis)}
        for name in self.layouts:
            choice("layouts", name, tuple(sorted(known)))
        for name in self.arguments:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise UserError(f"cells: {name!r} cannot be a directory's name; use letters, digits, '-', '_' and '.'")


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
