"""Do the intervals hold? Simulated sweeps with a known truth, analysed as a user's are.

Every design has sizes that are fitted and a larger one that is held out. A trial draws one sweep, answers, and looks
whether the interval holds the last checkpoint of a new run of the held-out size, and its law's curve there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from fitscale.scaling.fit.answer import Member, draws_KN, interval
from fitscale.scaling.fit.question import AUTO, Question
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.study import divide, members
from fitscale.scaling.fit.uncertainty import central

Truth = Callable[[float, Array], Array]  # parameters, images -> the metric


@dataclass(frozen=True)
class Design:
    """A sweep, and what is asked of it. Noise is the standard deviation of ln(metric) at the smallest size."""

    truth: Truth
    laws: tuple[str, ...] = (AUTO,)  # each is an answer of its own
    points: str = "frontier"
    run_noise: float = 0.005
    point_noise: float = 0.003
    growth: float = 1.0  # noise of the largest fitted size over that of the smallest
    correlation: float = 0.0  # of neighbouring checkpoints' noise (AR(1))
    t_freedom: float | None = None  # of Student's t, for checkpoints' noise; None: normal
    sizes: int = 5  # that are fitted
    size_step: float = 2.0  # parameters of a size over those of the one before
    seeds: int = 1
    checkpoints: int = 7
    images: tuple[float, float] = (1e8, 2e9)  # of the first and the last checkpoint of the smallest size
    images_by_size: float = 0.0  # images go as parameters to this power

    def sweep(self, rng: np.random.Generator) -> pd.DataFrame:
        """One row per checkpoint; `truth` has what the law says there."""
        parts = []
        for index in range(self.sizes + 1):
            parameters = SMALLEST * self.size_step**index
            scale = self.growth ** (index / (self.sizes - 1))
            images_N = np.geomspace(*self.images, self.checkpoints) * (parameters / SMALLEST) ** self.images_by_size
            for seed in range(self.seeds if index < self.sizes else 1):
                truth_N = self.truth(parameters, images_N)
                noise_N = scale * (rng.normal(0, self.run_noise) + self._of_checkpoints(rng))
                run = {"run": f"z{index}-{seed}", "size": f"z{index}", "parameters": parameters, "images": images_N}
                flops = {"train_flops": 6 * parameters * images_N, "step": np.arange(self.checkpoints)}
                parts.append(pd.DataFrame(run | flops | {"value": truth_N * np.exp(noise_N), "truth": truth_N}))
        return pd.concat(parts, ignore_index=True)

    def _of_checkpoints(self, rng: np.random.Generator) -> Array:
        count, freedom = self.checkpoints, self.t_freedom
        noise_N = (
            rng.normal(size=count)
            if freedom is None
            else rng.standard_t(freedom, count) / np.sqrt(freedom / (freedom - 2))
        )
        for index in range(1, count):
            before = self.correlation * noise_N[index - 1]
            noise_N[index] = before + np.sqrt(1 - self.correlation**2) * noise_N[index]
        return self.point_noise * noise_N


SMALLEST = 3e7  # parameters


def _power(parameters: float, images_N: Array) -> Array:
    return 18 * (6 * parameters * images_N / 1e19) ** -0.1


def _additive(parameters: float, images_N: Array) -> Array:
    return 400 * parameters**-0.34 + 410 * images_N**-0.28 + 1.7


def _distance(parameters: float, images_N: Array) -> Array:
    return 5 + 1500 * parameters**-0.5 + 3e4 * images_N**-0.4


def _anisotropic(parameters: float, images_N: Array) -> Array:
    return 20 * parameters**-0.15 + 3000 * images_N**-0.45 + 1.2


def _broken(parameters: float, images_N: Array) -> Array:
    """Smoothly broken power law (Caballero et al. 2023) of compute: its exponent goes from .05 to .10."""
    flops_N = 6 * parameters * images_N
    return 3 * (flops_N / 1e17) ** -0.05 * (1 + (flops_N / 3e18) ** 2) ** (-0.05 / 2)


POWER = Design(_power, ("power", AUTO), "all", 0.02, 0.015, images=(1e8, 1e10))
ADDITIVE = Design(_additive, ("additive", "offset", AUTO), run_noise=0.002, point_noise=0.002)
DESIGNS = {
    "power, AR(1) noise": replace(POWER, correlation=0.6),
    "power, t3 noise": replace(POWER, t_freedom=3.0),
    "power, noise grows fourfold": replace(POWER, run_noise=0.01, point_noise=0.0075, growth=4.0),
    "power, on a frontier of luck alone": replace(POWER, points="frontier"),
    "additive": ADDITIVE,
    "additive, two seeds": replace(ADDITIVE, seeds=2),
    "additive, noise grows fourfold": replace(ADDITIVE, laws=("additive", AUTO), growth=4.0),
    "additive, last points": replace(ADDITIVE, laws=("power", AUTO), points="last"),
    "distance, images grow with size": Design(_distance, ("offset", AUTO), "frontier", 0.01, 0.01, images_by_size=0.7),
    "anisotropic exponents, two seeds": Design(_anisotropic, ("offset", AUTO), seeds=2),
    "four sizes, longer runs": Design(_additive, sizes=4, checkpoints=12, images=(1e8, 4e10)),
    "broken power law": Design(_broken, ("power", AUTO), "frontier", 0.005, 0.005, images=(1e8, 1e10)),
}


def trial(design: Design, seed: int, resamples: int, level: float = 0.9) -> list[dict[str, Any]]:
    """A sweep of the design, and per law: does the interval hold a new run, and the law; its width and error in ln."""
    rows = design.sweep(np.random.default_rng(seed))
    sizes = list(dict.fromkeys(rows["size"]))
    question = Question(laws=design.laws, points=design.points, resamples=resamples, level=level, seed=seed % 2**31)
    rows = divide(rows, rows["size"] == sizes[-1], design.points)
    found, refused = members(rows, question, sizes[:-1])
    survivors = sorted((member for member in found.values() if member.weight), key=lambda member: -member.weight)
    goal = rows.iloc[[-1]].assign(chosen=True)
    answers = []
    for law in design.laws:
        own = next(iter(survivors), None) if law == AUTO else found.get(law)
        why = refused.get(law, next(iter(refused.values()), None))
        said = _said(own, survivors, goal, question) if own else {"refused": getattr(why, "code", "")}
        answers.append({"asked": law} | said)
    return answers


def _said(own: Member, survivors: list[Member], goal: pd.DataFrame, question: Question) -> dict[str, Any]:
    low, high = (float(np.log(end[0])) for end in interval(own, survivors, goal, question.seed, question.level))
    law_K = draws_KN(own, survivors, goal, question.seed, new_run=False)[:, 0]
    law_low, law_high = central(law_K, question.level)
    measured, truth = (float(goal[name].iloc[0]) for name in ("value", "truth"))
    return {
        "refused": None,
        "law": own.fit.law.name,
        "new_run": bool(low <= np.log(measured) <= high),
        "curve": bool(law_low <= truth <= law_high),
        "width": high - low,
        "error": float(np.log(own.fit.metric(goal)[0] / truth)),
        "weights": {member.fit.law.name: round(member.weight, 3) for member in survivors},
        "failed": own.verdict.failed,
    }
