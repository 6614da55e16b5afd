"""The three approaches of Hoffmann et al. 2022 to N*(C) = k C^a and D*(C) = h C^b, side by side.

1. The envelope of training curves: at each compute the run that is lowest there.
2. isoFLOP: the minimum over sizes at each budget (compute_optimal.py).
3. A fitted law of size and data (frontier.py).

D is counted in tokens where the table says how many an image has, else in images.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fitscale.scaling.fit.compute_optimal import IsoFlop, isoflop
from fitscale.scaling.fit.fitting import exp
from fitscale.scaling.fit.frontier import Cost, frontier_of
from fitscale.scaling.fit.laws import SURFACE
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.slices import along, data_column, tokens_per_image, with_tokens
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.uncertainty import central
from fitscale.scaling.rows.refusals import Refusal

if TYPE_CHECKING:
    from fitscale.scaling.fit.study import LawResult

GRID = 1500  # compute budgets at which the envelope is read, as Hoffmann et al. do
DRAWS = 200
MOST_DRAWS = 0.8  # share of the draws that have to have an envelope, or the interval is not estimated
LEAST_BEST = 3  # sizes that have to be the best somewhere inside

Interval = tuple[float, float]


@dataclass(frozen=True)
class PowerLaw:
    """coefficient x C^exponent; intervals at the question's level, None where they are not estimated."""

    exponent: float
    coefficient: float
    exponent_interval: Interval | None
    coefficient_interval: Interval | None

    @classmethod
    def of(cls, exponent: float, constant: float, draws_K2: Array | None, level: float) -> "PowerLaw":
        """From exponent and ln(coefficient), and draws of both."""
        coefficient = float(exp(np.asarray(constant)))
        if draws_K2 is None:
            return cls(float(exponent), coefficient, None, None)
        low, high = central(draws_K2, level)
        coefficients = tuple(exp(np.array([low[1], high[1]])).tolist())
        return cls(float(exponent), coefficient, (float(low[0]), float(high[0])), coefficients)


@dataclass(frozen=True)
class Approach:
    """One approach's answer, or why it has none."""

    name: str
    parameters: PowerLaw | None = None
    data: PowerLaw | None = None
    refused: str | None = None


def approaches(
    rows: pd.DataFrame, isoflops: list[IsoFlop], results: "list[LawResult]", question: Question
) -> list[Approach]:
    """All that the fitted rows allow: 1, 2 by the first of `isoflops`, 3 by every law of size and data."""
    answers: dict[str, Callable[[], tuple[PowerLaw, PowerLaw]]] = {
        "1: envelope of training curves": partial(envelope, rows, question.seed, question.level)
    }
    answers |= {f"2: isoFLOP by {iso.method}": partial(_of_isoflop, iso, question.seed) for iso in isoflops[:1]}
    surfaces = [result for result in results if result.fit.law.inputs == SURFACE]
    answers |= {f"3: {result.name} law": partial(_of_law, result) for result in surfaces}
    found = []
    for name, answer in answers.items():
        try:
            found.append(Approach(name, *answer()))
        except Refusal as refusal:
            found.append(Approach(name, refused=refusal.message))
    return found


def envelope(rows: pd.DataFrame, seed: int, level: float = 0.9) -> tuple[PowerLaw, PowerLaw]:
    """Approach 1: N and D of the lowest run at each compute, where it is neither the smallest nor the largest there.

    The interval comes from runs drawn with replacement.

    Raises:
        Refusal: too few sizes are the best anywhere inside.
    """
    runs = [run for _, run in with_tokens(rows).groupby("run", sort=True) if len(run) > 1]
    if not runs or rows["parameters"].isna().any():
        raise Refusal("too_few_points", "no training curves of runs whose parameters are known")
    grid = np.geomspace(rows["train_flops"].min(), rows["train_flops"].max(), GRID)
    curves = [along(run, grid).set_index("budget").reindex(grid) for run in runs]
    names = ("value", data_column(rows))
    value_RG, data_RG = (np.stack([curve[name].to_numpy(dtype=float) for curve in curves]) for name in names)
    size_R = np.array([float(run["parameters"].iloc[0]) for run in runs])
    fitted_22 = _regressed(grid, size_R, value_RG, data_RG)
    if fitted_22 is None:
        text = f"fewer than {LEAST_BEST} sizes are the best at some compute that smaller and larger ones reach as well"
        raise Refusal("edge_optimum", text)
    rng = np.random.default_rng([seed, 2])
    drawn_K = [np.unique(rng.integers(len(runs), size=len(runs))) for _ in range(DRAWS)]
    again_K = [_regressed(grid, size_R[drawn], value_RG[drawn], data_RG[drawn]) for drawn in drawn_K]
    draws_K22 = np.array([again for again in again_K if again is not None])
    enough = len(draws_K22) >= MOST_DRAWS * DRAWS
    (a, ln_k), (b, ln_h) = fitted_22.tolist()
    of_size, of_data = (draws_K22[:, 0], draws_K22[:, 1]) if enough else (None, None)
    return PowerLaw.of(a, ln_k, of_size, level), PowerLaw.of(b, ln_h, of_data, level)


def _regressed(grid: Array, size_R: Array, value_RG: Array, data_RG: Array) -> Array | None:
    """Exponent and ln(coefficient) of N, and of D, along the envelope of runs; None with too few sizes on it."""
    reached_RG = np.isfinite(value_RG)
    sizes_RG = np.where(reached_RG, size_R[:, None], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of computes that no run reaches
        smallest_G, largest_G = np.nanmin(sizes_RG, axis=0), np.nanmax(sizes_RG, axis=0)
    best_G = np.argmin(np.where(reached_RG, value_RG, np.inf), axis=0)
    inside_G = (size_R[best_G] > smallest_G) & (size_R[best_G] < largest_G)
    if len(np.unique(size_R[best_G[inside_G]])) < LEAST_BEST:
        return None
    amounts_2G = np.stack([size_R[best_G], data_RG[best_G, np.arange(len(grid))]])[:, inside_G]
    return np.polyfit(np.log(grid[inside_G]), np.log(amounts_2G).T, 1).T


def _of_isoflop(iso: IsoFlop, seed: int) -> tuple[PowerLaw, PowerLaw]:
    """Approach 2: N as it is, D by the same method over data."""
    both = [
        iso if iso.of == of else isoflop(iso.slices, iso.method, seed, of, iso.level)
        for of in ("parameters", data_column(iso.slices))
    ]
    size, data = (
        PowerLaw(found.exponent, found.coefficient, found.interval, found.coefficient_interval) for found in both
    )
    return size, data


def _of_law(result: "LawResult") -> tuple[PowerLaw, PowerLaw]:
    """Approach 3: by the law's compute-optimal frontier."""
    cost, tokens = Cost.of(result.used), tokens_per_image(result.used) or 1.0
    level = result.question.level
    draws = frontier_of(result.fit, result.resamples.theta_KP, cost)
    best = frontier_of(result.fit, result.fit.theta_P[None], cost)
    size = PowerLaw.of(best.a_K[0], best.ln_g_K[0], np.stack([draws.a_K, draws.ln_g_K], axis=1), level)
    data = np.stack([draws.b_K, draws.ln_h_K + np.log(tokens)], axis=1)
    return size, PowerLaw.of(best.b_K[0], best.ln_h_K[0] + np.log(tokens), data, level)
