"""Which runs to pay for: a grid under a budget, and the interval that it will give for the target.

1. One run per size serves every budget (constant learning rate): its evaluations are log-spaced in steps. The largest
   size is the one to hold out, the second smallest is run twice to measure the variance between runs.
2. Steps go as parameters^-gamma, scaled to fill the budget; every gamma is simulated, the narrowest interval wins.
3. A simulation draws the sweep's measurements from an assumed law with run and checkpoint noise, fits the law again and
   predicts the target. Dropping or repeating a cell is simulated the same way.

Costs are training and sampling for the Frechet distance, in device-hours at a given utilisation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fitscale.config.schema import EvaluationConfig, ModelConfig
from fitscale.model import flops
from fitscale.scaling.fit.fitting import Fit, FittedPoints, ResidualLoss
from fitscale.scaling.fit.laws import OFFSET
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.uncertainty import central, refits
from fitscale.scaling.rows.refusals import Refusal

GAMMAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STEP_UNIT = 1000
SWEEPS = 1000  # simulated


@dataclass(frozen=True)
class Prior:
    """The law that the simulation takes for true, and its noise (standard deviations of ln(metric))."""

    fit: Fit
    run_noise: float
    point_noise: float


@dataclass(frozen=True)
class Economics:
    """What a run costs and how it is evaluated."""

    flops_per_hour: float  # of one device: peak x utilisation x 3600
    batch: int
    tokens: int  # per image
    points: int  # evaluations of a run
    first_step: int  # earlier checkpoints are warm-up
    most_steps: int  # of any run: more would repeat the data beyond use
    samples: int  # images per Frechet distance
    evaluations_per_sample: int  # network evaluations of one sample (NFE), guidance included

    def train_flops(self, model: ModelConfig, steps: int) -> float:
        return float(flops.train_flops(model, self.tokens)) * steps * self.batch

    def steps_evaluated(self, steps: int) -> list[int]:
        return EvaluationConfig(points=self.points, first_step=min(self.first_step, steps // 2)).steps(steps)


@dataclass(frozen=True)
class PlannedRun:
    """One planned run."""

    name: str
    model: ModelConfig
    seed: int
    steps: int

    def hours(self, economics: Economics) -> float:
        """Device-hours of training, and of sampling for its evaluations: a forward pass is a third of training's."""
        per_image = flops.train_flops(self.model, economics.tokens)
        evaluations = len(economics.steps_evaluated(self.steps)) * economics.evaluations_per_sample
        sampling = per_image / flops.TRAIN_PASSES * economics.samples * evaluations
        return (economics.train_flops(self.model, self.steps) + sampling) / economics.flops_per_hour


@dataclass(frozen=True)
class Outlook:
    """Measured / predicted at the target lies between `low` and `high` in 90 % of simulated sweeps."""

    low: float
    high: float

    @property
    def width(self) -> float:
        """Of the interval, in ln(metric)."""
        return float(np.log(self.high / self.low))


@dataclass(frozen=True)
class SweepPlan:
    """A grid of runs with its cost, its outlook for the target, and what changing one cell would do."""

    cells: list[PlannedRun]
    hours: float
    gamma: float
    outlook: Outlook
    held_out: str
    held_out_outlook: Outlook
    changes: list[tuple[str, float, Outlook]]  # what, hours more or less, outlook then


def assumed() -> Prior:
    """SiT/2 at 256 x 256 without guidance (Ma et al. 2024, tables 1 and 7), fitted with an offset law.

    Noise: 2 % between runs and 1.5 % between checkpoints of a run.
    """
    empty = np.zeros(0)
    none = FittedPoints(np.zeros((0, 1)), empty, empty.astype(str), np.log([1e20]), empty, empty)
    theta_P = np.array([np.log(9.54), 0.518, 5.74])
    return Prior(Fit(OFFSET, ResidualLoss(), none, theta_P, objective=0.0, starts=0, reached=1.0), 0.02, 0.015)


def plan(
    models: list[ModelConfig], hours: float, economics: Economics, prior: Prior, target: float, seed: int
) -> SweepPlan:
    """The grid for `models` (ascending) under `hours` device-hours that predicts `target` training FLOPs best.

    Raises:
        Refusal: fewer than three sizes, or the budget does not pay for runs beyond the warm-up.
    """
    if len(models) < 3:
        raise Refusal("one_size", f"{len(models)} sizes: a plan needs three at least, two to fit and one to hold out")
    grids = [(gamma, grid(models, hours, economics, gamma)) for gamma in GAMMAS]
    affordable = [(gamma, cells) for gamma, cells in grids if cells]
    if not affordable:
        raise Refusal("too_few_points", _too_small(models, hours, economics))

    def simulate(cells: list[PlannedRun], costs: Economics = economics, goal: float = target) -> Outlook:
        return outlook(cells, costs, prior, goal, seed)

    options = [(gamma, cells, simulate(cells)) for gamma, cells in affordable]
    gamma, cells, best = min(options, key=lambda option: option[2].width)
    largest = [cell for cell in cells if cell.model == models[-1]]
    held_out_flops = max(economics.train_flops(cell.model, cell.steps) for cell in largest)
    return SweepPlan(
        cells=cells,
        hours=sum(cell.hours(economics) for cell in cells),
        gamma=gamma,
        outlook=best,
        held_out=models[-1].name,
        held_out_outlook=simulate([cell for cell in cells if cell not in largest], goal=held_out_flops),
        changes=_changes(cells, economics, simulate),
    )


def grid(models: list[ModelConfig], hours: float, economics: Economics, gamma: float) -> list[PlannedRun]:
    """Cells with steps ~ parameters^-gamma that cost at most `hours`; empty if a run ends within twice the warm-up."""
    shares = np.array([flops.parameters(model) for model in models], dtype=float) ** -gamma
    low, high = 0.0, 1e12 / shares.max()
    for _ in range(200):
        middle = (low + high) / 2
        cost = sum(cell.hours(economics) for cell in _cells(models, shares * middle, economics.most_steps))
        low, high = (middle, high) if cost <= hours else (low, middle)
    cells = _cells(models, shares * low, economics.most_steps)
    return cells if all(cell.steps >= 2 * economics.first_step for cell in cells) else []


def _cells(models: list[ModelConfig], steps: Array, most: int) -> list[PlannedRun]:
    rounded = [max(int(min(count, most) // STEP_UNIT) * STEP_UNIT, STEP_UNIT) for count in steps]
    runs = [PlannedRun(model.name, model, 0, count) for model, count in zip(models, rounded, strict=True)]
    return [*runs, replace(runs[1], name=f"{runs[1].name}-seed1", seed=1)]


def measurements(cells: list[PlannedRun], economics: Economics) -> pd.DataFrame:
    """The rows that the sweep will yield: run, size, train_flops; the value is yet unknown."""
    rows = [
        {"run": cell.name, "size": cell.model.name, "train_flops": economics.train_flops(cell.model, step)}
        for cell in cells
        for step in economics.steps_evaluated(cell.steps)
    ]
    return pd.DataFrame(rows)


def outlook(cells: list[PlannedRun], economics: Economics, prior: Prior, target: float, seed: int) -> Outlook:
    """Simulate `SWEEPS` sweeps and predict a new measurement at `target` training FLOPs from each."""
    rows = measurements(cells, economics)
    law, centre_F = prior.fit.law, prior.fit.points.centre_F
    fit = replace(prior.fit, points=FittedPoints.of(law, rows.assign(value=prior.fit.metric(rows)), centre_F))
    rng = np.random.default_rng(seed)
    theta_KP = refits(
        fit, rng, np.full(SWEEPS, prior.run_noise**2), np.full(SWEEPS, prior.point_noise**2), np.zeros(SWEEPS)
    )
    goal = pd.DataFrame({"train_flops": [target]})
    new_K = rng.normal(0, np.hypot(prior.run_noise, prior.point_noise), SWEEPS)
    ratio_K = new_K - (fit.log_metric(goal, theta_KP)[:, 0] - fit.log_metric(goal)[0])
    return Outlook(*central(np.exp(ratio_K)))


def _changes(
    cells: list[PlannedRun], economics: Economics, simulate: Callable[..., Outlook]
) -> list[tuple[str, float, Outlook]]:
    found = []
    for cell in cells:
        rest = [other for other in cells if other is not cell]
        if len({other.model.name for other in rest}) >= 2:
            found.append((f"without {cell.name}", -cell.hours(economics), simulate(rest)))
    for cell in [cell for cell in cells if cell.seed == 0]:
        again = replace(cell, name=f"{cell.name}-again", seed=9)
        found.append((f"{cell.name} once more", cell.hours(economics), simulate([*cells, again])))
    denser = replace(economics, points=economics.points + 2)
    more = sum(cell.hours(denser) - cell.hours(economics) for cell in cells)
    return [*found, (f"{denser.points} evaluations a run", more, simulate(cells, denser))]


def _too_small(models: list[ModelConfig], hours: float, economics: Economics) -> str:
    shortest = _cells(models, np.full(len(models), 2.0 * economics.first_step), economics.most_steps)
    least = sum(cell.hours(economics) for cell in shortest)
    return (
        f"{hours:g} device-hours do not train {', '.join(model.name for model in models)} to twice the warm-up of "
        f"{economics.first_step} steps; that takes {least:.0f}: give more hours or fewer sizes"
    )
