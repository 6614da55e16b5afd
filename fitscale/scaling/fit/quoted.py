"""The numbers of a study that people quote: constants in the field's form, the frontier, and three approaches.

Intervals hold the question's level of the resamples; the frontier's metric is what a new run would measure, by all
laws that survive.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fitscale.scaling.fit.approaches import Approach, approaches
from fitscale.scaling.fit.fitting import exp
from fitscale.scaling.fit.frontier import Cost, at_unity, frontier_of
from fitscale.scaling.fit.laws import SURFACE
from fitscale.scaling.fit.slices import tokens_per_image
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.uncertainty import central
from fitscale.scaling.rows.refusals import Refusal

if TYPE_CHECKING:
    from fitscale.scaling.fit.study import LawResult, Study

WITHIN = 3  # budgets of a frontier within the fitted compute
BEYOND = (10.0, 100.0)  # and multiples of the largest, the second if it is agreed to


@dataclass(frozen=True)
class Quantity:
    """A number with its interval; without either where the data do not identify it."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float, draws_K: Array, level: float) -> "Quantity":
        low, high = central(draws_K, level)
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True)
class FrontierPoint:
    """Compute-optimal training at one budget; `size_ratio` is to the largest size that the law is fitted to."""

    train_flops: float
    parameters: Quantity
    images: Quantity
    data_per_parameter: Quantity  # tokens where the table says how many an image has, else images
    metric: Quantity
    compute_ratio: float
    size_ratio: float


@dataclass(frozen=True)
class LawQuoted:
    """One law's constants at N = D = 1 (C = 1), and its frontier or why it has none."""

    law: str
    constants: dict[str, Quantity]
    cost: Cost | None
    data: str  # tokens or images, of `data_per_parameter`
    frontier: list[FrontierPoint]
    refused: str | None


@dataclass(frozen=True)
class Quoted:
    """Of every fitted law, and the three approaches side by side."""

    laws: list[LawQuoted]
    approaches: list[Approach]


def quoted(study: "Study") -> Quoted:
    """What is quoted of a study; laws without a frontier say why."""
    laws = [_of_law(result, study) for result in study.results]
    if not (study.isoflops or any(result.fit.law.inputs == SURFACE for result in study.results)):
        return Quoted(laws, [])
    rows = study.rows[~study.rows["held_out"]]
    return Quoted(laws, approaches(rows, study.isoflops, study.results, study.question))


def constants(result: "LawResult") -> dict[str, Quantity]:
    """A, B, E and exponents where inputs are counted from 1, and a, b and G of Hoffmann et al. 2022, equation 4.

    a, b and G are those of compute in proportion to N D: N* = G (C / 6)^a and D* = G^-1 (C / 6)^b where C = 6 N D.
    """
    best = _written(at_unity(result.fit, result.fit.theta_P[None]))
    draws = _written(at_unity(result.fit, result.resamples.theta_KP))
    found = {name: Quantity.of(values_1[0], draws[name], result.question.level) for name, values_1 in best.items()}
    if "E" in found and result.floor is not None and not result.floor.identified:
        found["E"] = Quantity(None, None, result.floor.high)
    return found


def _written(unity: dict[str, Array]) -> dict[str, Array]:
    """With A and B for their logarithms, and with a, b, G of a law of two terms."""
    found = {
        name.removeprefix("ln_"): exp(values) if name.startswith("ln_") else values for name, values in unity.items()
    }
    if "ln_B" in unity:
        alpha_K, beta_K = unity["alpha"], unity.get("beta", unity["alpha"])
        found |= {"a": beta_K / (alpha_K + beta_K), "b": alpha_K / (alpha_K + beta_K)}
        balance_K = np.log(alpha_K) + unity["ln_A"] - np.log(beta_K) - unity["ln_B"]
        found["G"] = exp(balance_K / (alpha_K + beta_K))
    return found


def _of_law(result: "LawResult", study: "Study") -> LawQuoted:
    data = "images" if tokens_per_image(result.used) is None else "tokens"
    numbers = constants(result)
    if result.fit.law.inputs != SURFACE:
        return LawQuoted(result.name, numbers, None, data, [], None)
    try:
        cost = Cost.of(result.used)
        return LawQuoted(result.name, numbers, cost, data, _frontier(result, study, cost), None)
    except Refusal as refusal:
        return LawQuoted(result.name, numbers, None, data, [], refusal.message)


def _frontier(result: "LawResult", study: "Study", cost: Cost) -> list[FrontierPoint]:
    flops, question = result.used["train_flops"].astype(float), study.question
    budgets = np.append(
        np.geomspace(flops.min(), flops.max(), WITHIN + 1)[1:],
        flops.max() * np.array(BEYOND[: 1 + question.extrapolate]),
    )
    best = frontier_of(result.fit, result.fit.theta_P[None], cost)
    draws = frontier_of(result.fit, result.resamples.theta_KP, cost)
    per_image = tokens_per_image(result.used) or 1.0
    found = []
    for budget in budgets.tolist():
        size, images = float(best.parameters(budget)[0]), float(best.images(budget)[0])
        row = pd.DataFrame({"parameters": [size], "images": [images], "train_flops": [budget]})
        low_1, high_1 = result.interval(row)
        ratio_K = per_image * draws.images_per_parameter(budget)
        found.append(
            FrontierPoint(
                budget,
                Quantity.of(size, draws.parameters(budget), question.level),
                Quantity.of(images, draws.images(budget), question.level),
                Quantity.of(per_image * images / size, ratio_K, question.level),
                Quantity(float(result.fit.metric(row)[0]), float(low_1[0]), float(high_1[0])),
                budget / float(flops.max()),
                size / float(result.used["parameters"].max()),
            )
        )
    return found
