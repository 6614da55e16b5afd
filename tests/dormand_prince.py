"""Dormand and Prince's method written a second time, around scipy's tableau: what `sampling.method: dopri5` must do.

In float64, so that no processor's rounding decides a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import RK45
from torch import Tensor

SAFETY, GROWTH, SHRINKAGE = 0.9, 10.0, 0.2
ERROR = RK45.E * 2 / 3  # Shampine's weights (1986) are two thirds of Dormand and Prince's


class Step(RK45):
    """A step of the length that it is given, whatever its error."""

    E = np.zeros(7)


@dataclass(frozen=True)
class Integrated:
    """The sample at t = 1, and of every step that was tried: its length, and its error over what is allowed."""

    x_TC: Tensor
    lengths: list[float]
    ratios: list[float]


def integrate(
    velocity: Callable[[Tensor, float], Tensor], x_TC: Tensor, rtol: float, atol: float, given: Sequence[float] = ()
) -> Integrated:
    """From t = 0 to 1, interpolated inside the last step; the first steps are of the `given` lengths.

    A step is taken if its error is at most what is allowed (root mean square over all numbers); the next is
    0.9 ratio^(-1/5) times as long, at most 10 times, at least 0.2 times, and never shorter after one that was taken.
    """

    def derivative(t: float, y: np.ndarray) -> np.ndarray:
        return velocity(torch.from_numpy(y).view(x_TC.shape), t).numpy().ravel()

    t, y, lengths, ratios = 0.0, x_TC.double().numpy().ravel(), [], []
    length = RK45(derivative, t, y, np.inf, rtol=rtol, atol=atol).h_abs  # Hairer, Norsett and Wanner's first step
    while t < 1:
        length = given[len(lengths)] if len(lengths) < len(given) else length
        step = Step(derivative, t, y, np.inf, first_step=length)
        step.step()
        error = length * step.K.T @ ERROR
        ratio = np.sqrt(np.mean((error / (atol + rtol * np.maximum(abs(y), abs(step.y)))) ** 2))
        lengths.append(length)
        ratios.append(ratio)
        if ratio <= 1 or len(lengths) <= len(given):
            t, y, inside = step.t, step.y, step.dense_output()
        length *= np.clip(SAFETY * ratio**-0.2, 1.0 if ratio < 1 else SHRINKAGE, GROWTH)
    return Integrated(torch.from_numpy(inside(1.0)).view(x_TC.shape), lengths, ratios)
