"""A sweep: the ladder of sizes of one study, and where its runs go."""

from dataclasses import dataclass, field
from itertools import product

from fitscale.config.errors import UserError


@dataclass(frozen=True)
class LocalConfig:
    """Cells on this machine."""

    parallel_cells: int = 1  # cells that run at the same time; the cores are divided among them
    gpus: list[int] = field(default_factory=list)  # CUDA devices, one a cell; [] = the cells run on the CPU

    def __post_init__(self) -> None:
        if self.parallel_cells < 1:
            raise UserError(f"local.parallel_cells: {self.parallel_cells} is too small, the least is 1")
        if self.gpus and len(self.gpus) < self.parallel_cells:
            raise UserError(
                f"local.gpus: {len(self.gpus)} for local.parallel_cells = {self.parallel_cells}; each needs its own"
            )


@dataclass(frozen=True)
class LayoutConfig:
    """Processes of a cell's training job on a cluster."""

    nodes: int = 1
    tasks_per_node: int | None = None  # None = the cluster profile's


@dataclass(frozen=True)
class SweepConfig:
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
    max_days: float | None = None  # a cell is given nodes enough to train in this time
    local: LocalConfig = field(default_factory=LocalConfig)

    @property
    def all_cells(self) -> dict[str, list[str]]:
        """Every cell's own arguments, by its name."""
        return self.cells or {name: own for name, (_, own) in self._combinations().items()}

    def layout_of(self, cell: str) -> LayoutConfig | None:
        """The layout given for a cell, by its name or by one of its axes' values."""
        values = () if self.cells else self._combinations()[cell][0]
        return next((self.layouts[name] for name in (cell, *values) if name in self.layouts), None)

    def _combinations(self) -> dict[str, tuple[tuple[str, ...], list[str]]]:
        """Of the axes: name of a cell -> its values and its arguments."""
        if not self.axes:
            return {}
        combinations = [
            tuple(zip(*chosen, strict=True)) for chosen in product(*(a.items() for a in self.axes.values()))
        ]
        return {"-".join(values): (values, [one for own in owns for one in own]) for values, owns in combinations}

    def __post_init__(self) -> None:
        if not self.dir:
            raise UserError("dir: must be given (the sweep directory)")
        if self.cells and self.axes:
            raise UserError("cells and axes: only one of the two may be given")
        if not self.all_cells or (self.axes and not all(self.axes.values())):
            raise UserError("cells: must name at least one cell, e.g. cells: {s: [configs/model/s.yaml]}")
        if self.max_days is not None and not self.max_days > 0:
            raise UserError(f"max_days: {self.max_days} must be above 0")
        known = {*self.all_cells, *(value for axis in self.axes.values() for value in axis)}
        for name in self.layouts:
            if name not in known:
                raise UserError(
                    f"layouts.{name}: no such cell or value of an axis; there are {', '.join(sorted(known))}"
                )
        for name in self.all_cells:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                raise UserError(f"cells: {name!r} cannot be a directory's name; use letters, digits, '-', '_' and '.'")
