"""DPM-Solver++, single-step and of order three (Lu et al. 2022, arXiv 2211.01095), on the scaled linear schedule.

N evaluations on a grid of N + 1 times, equal in t = n / 1000 from 1 (noise) to 0.001, where the samples are taken as
they are. A step of order k takes k evaluations: as many steps of three as N leaves room for, and what remains last.
Between whole n, log alpha is linear in t. With lambda = log(alpha / sigma), h its growth over a step from s to t, r_j
the share of h up to the j-th time in between, and D the data that epsilon says at a point, f(z) = exp(-z) - 1:

    order 1     x_t = sigma_t / sigma_s x - alpha_t f(h) D
    order 2     the same, and - alpha_t f(h) / (2 r_1) (D_1 - D)
    order 3     the same as order 1, and + alpha_t / r_2 (f(h) / h + 1) (D_2 - D), where x_2, at which D_2 is, takes
                + r_2 / r_1 alpha_2 (f(r_2 h) / (r_2 h) + 1) (D_1 - D)

All of it is worked out in fp64 on the host, but the points. Shape suffixes: T tokens of a pack, C numbers in a token.
"""

import math
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from fitscale.flow.loss import DDPM_STEPS, SCALED_LINEAR_ALPHAS_CUMPROD
from fitscale.flow.pack import ModelFn, PackShape

LAST_TIME = 1 / DDPM_STEPS
_LOG_ALPHA = np.concatenate([[0.0], SCALED_LINEAR_ALPHAS_CUMPROD.log().numpy() / 2])  # at n = 0 to 1000


def orders(evaluations: int) -> list[int]:
    """The orders of the steps that so many evaluations make."""
    threes, rest = divmod(evaluations, 3)
    if rest == 0:
        return [3] * (threes - 1) + [2, 1]
    return [3] * threes + [rest]


def integrate(model_fn: ModelFn, x_TC: Tensor, pack: PackShape, evaluations: int) -> Tensor:
    """Carry noise to data; `model_fn` answers with epsilon."""
    times = np.linspace(1.0, LAST_TIME, evaluations + 1).tolist()
    ends = accumulate(orders(evaluations), initial=0)
    for start, end in pairwise(ends):
        x_TC = _step(model_fn, x_TC, pack, [_Point(time) for time in times[start : end + 1]])
    return x_TC


class _Point:
    """A time n / 1000 and what the schedule says there."""

    def __init__(self, time: float) -> None:
        self.time = time
        log_alpha = float(np.interp(time * DDPM_STEPS, np.arange(DDPM_STEPS + 1), _LOG_ALPHA))
        self.alpha, self.sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))
        self.log_snr = log_alpha - math.log(self.sigma)


def _step(model_fn: ModelFn, x_TC: Tensor, pack: PackShape, points: list[_Point]) -> Tensor:
    """From the first of the points to the last; an evaluation at each but that."""

    def data(x_TC: Tensor, at: _Point) -> Tensor:
        t_S = torch.full((len(pack.indices),), 1 - at.time, dtype=torch.float64)
        return (x_TC - at.sigma * model_fn(x_TC, t_S, pack)) / at.alpha

    def first_order(to: _Point) -> Tensor:
        return to.sigma / start.sigma * x_TC - to.alpha * math.expm1(start.log_snr - to.log_snr) * data_TC

    start, *between, end = points
    h = end.log_snr - start.log_snr
    data_TC = data(x_TC, start)
    if not between:
        return first_order(end)
    first = between[0]
    share = (first.log_snr - start.log_snr) / h
    bend_TC = data(first_order(first), first) - data_TC
    if len(between) == 1:
        return first_order(end) - end.alpha * math.expm1(-h) / (2 * share) * bend_TC
    second = between[1]
    reach = second.log_snr - start.log_snr
    x_2_TC = first_order(second) + reach / h / share * second.alpha * _phi(reach) * bend_TC
    return first_order(end) + end.alpha * h / reach * _phi(h) * (data(x_2_TC, second) - data_TC)


def _phi(z: float) -> float:
    return math.expm1(-z) / z + 1
