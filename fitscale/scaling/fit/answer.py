"""What several laws say together of runs that nobody has made: draws that carry the laws' disagreement.

Every draw comes from one law, picked by its weight (model averaging: Buckland, Burnham and Augustin 1997), refitted to
one resample, off by its bias (survival.py), with a new run's noise. So the interval holds what any law says that the
data do not rule out, and a law that fails its tests is as uncertain as it was wrong, however many seeds there are.
Shapes: K draws, N rows, M laws.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fitscale.scaling.fit.fitting import Fit, exp
from fitscale.scaling.fit.laws import COMPUTE
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.survival import Verdict, speaks
from fitscale.scaling.fit.uncertainty import Resamples, central, new_run_KN


@dataclass(frozen=True)
class Member:
    """A law with its resamples, how it fared, and how much it counts in the answer."""

    fit: Fit
    resamples: Resamples
    verdict: Verdict
    weight: float

    def draws_KN(self, rows: pd.DataFrame, seed: int, new_run: bool) -> Array:
        """The metric at every row: of a new run, or of the law itself."""
        drawn_KN = new_run_KN(self.fit, self.resamples, rows, seed)
        if not new_run:
            drawn_KN = self.fit.metric(rows, self.resamples.theta_KP)
        off_K = np.random.default_rng([seed, 3]).normal(*self.verdict.bias, len(drawn_KN))
        return exp(np.log(drawn_KN) + off_K[:, None])

    def speaks(self, rows: pd.DataFrame) -> NDArray[np.bool_]:
        """True for the rows that the law says something of: it has their inputs and, of compute, they are `chosen`."""
        known_N = speaks(self.fit.law, rows)
        of_compute = self.fit.law.inputs == COMPUTE and "chosen" in rows
        return known_N & rows["chosen"].to_numpy(dtype=bool) if of_compute else known_N


def draws_KN(own: Member, members: list[Member], rows: pd.DataFrame, seed: int, new_run: bool = True) -> Array:
    """Draws of the metric at every row by the `members`, as they weigh; by `own` where none of them speaks."""
    own_KN = own.draws_KN(rows, seed, new_run)
    speaking = [(member, member.speaks(rows)) for member in members if member.weight]
    weight_MN = np.array([np.zeros(len(rows)), *(member.weight * speaks_N for member, speaks_N in speaking)])
    weight_MN[0] = weight_MN.sum(axis=0) == 0.0
    share_MN = np.cumsum(weight_MN, axis=0) / weight_MN.sum(axis=0)
    pick_K = np.random.default_rng([seed, 4]).permutation((np.arange(len(own_KN)) + 0.5) / len(own_KN))
    picked_KN = np.sum(pick_K[:, None, None] > share_MN.T, axis=2)
    found_KN = own_KN.copy()
    for index, (member, speaks_N) in enumerate(speaking, 1):
        if speaks_N.any():
            theirs_KN = np.zeros_like(own_KN)
            theirs_KN[:, speaks_N] = member.draws_KN(rows[speaks_N], seed, new_run)
            found_KN = np.where(picked_KN == index, theirs_KN, found_KN)
    return found_KN


def interval(own: Member, members: list[Member], rows: pd.DataFrame, seed: int, level: float) -> tuple[Array, Array]:
    """The interval of a new run at every row, low_N and high_N: the `members'`, stretched to what `own` predicts."""
    low_N, high_N = central(draws_KN(own, members, rows, seed), level)
    predicted_N = own.fit.metric(rows)
    return np.minimum(low_N, predicted_N), np.maximum(high_N, predicted_N)
