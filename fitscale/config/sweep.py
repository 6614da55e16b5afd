"""A sweep: the ladder of sizes of one study, and where its runs go."""

from dataclasses import dataclass, field

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
class SweepConfig:
    """A cell's config is `base`, its own arguments, run.name and run.dir: all of them arguments of `fitscale train`."""

    name: str = "sweep"
    dir: str = ""  # sweep directory; a cell's run directory is <dir>/<cell>
    base: list[str] = field(default_factory=list)  # what all cells share: YAML files and key=value overrides
    cells: dict[str, list[str]] = field(default_factory=dict)  # name of a cell: what it adds
    local: LocalConfig = field(default_factory=LocalConfig)

    def __post_init__(self) -> None:
        if not self.dir:
            raise UserError("dir: must be given (the sweep directory)")
        if not self.cells:
            raise UserError("cells: must name at least one cell, e.g. cells: {s: [configs/model/s.yaml]}")
        for name in self.cells:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                raise UserError(f"cells: {name!r} cannot be a directory's name; use letters, digits, '-', '_' and '.'")
