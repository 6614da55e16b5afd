"""Dormand and Prince's method over a pack, where every image has its own error, its own steps and its own end.

What torchdiffeq's `odeint(method="dopri5")` does, with which the published code integrates one image at a time (its
tableau, first step, acceptance and step lengths; all errors are root mean squares over an image's numbers):

1. The first step's length follows Hairer, Norsett and Wanner (Solving Ordinary Differential Equations I, II.4).
2. In a round every image tries one step of its own length: six evaluations of the pack.
3. An image whose error is at most `atol + rtol max(|x|)` takes its step; the next is 0.9 ratio^(-1/5) times as long, at
   most 10 times, at least 0.2 times, and never shorter after a step that was taken.
4. An image whose step reaches t = 1 is interpolated there (fourth order) and leaves the pack, which goes on without it.

So an image costs 2 + 6 x the steps that it tried, and its neighbours change it by the rounding of matrix products
alone. Where an error is itself little more than rounding, as in the first steps of a smooth model in float32, that
decides the length of a step, and moves the sample by less than the tolerances allow.

Times and lengths are float64 on the host. Shape suffixes: T tokens of a pack, S images of a pack, C numbers in a token.
"""

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from torchdiffeq._impl.dopri5 import Dopri5Solver  # the tableau has no public name
from torchdiffeq._impl.interp import _interp_fit

from fitscale.config.errors import UserError
from fitscale.flow.loss import segment_mean
from fitscale.flow.pack import ModelFn, PackShape

SAFETY, GROWTH, SHRINKAGE = 0.9, 10.0, 0.2  # torchdiffeq's defaults
TABLEAU, MIDDLE, ORDER = Dopri5Solver.tableau, Dopri5Solver.mid, Dopri5Solver.order


@dataclass(frozen=True)
class _Running:
    """The images that have not arrived: their places in the whole pack, where they are, and the step to try next."""

    places: list[int]
    pack: PackShape
    x_TC: Tensor
    velocity_TC: Tensor
    t_S: Tensor
    length_S: Tensor

    def without(self, arrived_S: Tensor) -> "_Running":
        if not arrived_S.any():
            return self  # with the pack's layout, which the network keeps
        kept = (~arrived_S).nonzero().flatten().tolist()
        return _Running(
            [self.places[place] for place in kept],
            self.pack.select(kept),
            self.pack.part(self.x_TC, kept),
            self.pack.part(self.velocity_TC, kept),
            self.t_S[kept],
            self.length_S[kept],
        )


def integrate(model_fn: ModelFn, x_TC: Tensor, pack: PackShape, rtol: float, atol: float) -> Tensor:
    """Carry the images of `pack` from `x_TC` at t = 0 to t = 1.

    Raises:
        UserError: an image finds no step: the model's answers are not finite, or the tolerances cannot be met.
    """
    running = _start(model_fn, x_TC, pack, rtol, atol)
    arrived: dict[int, Tensor] = {}
    while running.places:
        _require_steps(running)
        x_TC, stages = _step(model_fn, running)
        ratio_S = _error(running, x_TC, stages, rtol, atol)
        taken_S, end_S = ratio_S <= 1, running.t_S + running.length_S
        arrived_S = taken_S & (end_S >= 1)
        if arrived_S.any():
            parts = _at_the_end(running, x_TC, stages).split(running.pack.lengths)
            arrived |= {running.places[i]: parts[i] for i in arrived_S.nonzero().flatten().tolist()}
        running = _advanced(running, taken_S, ratio_S, x_TC, stages[-1]).without(arrived_S)
    return torch.cat([arrived[place] for place in range(len(pack.indices))])


def _start(model_fn: ModelFn, x_TC: Tensor, pack: PackShape, rtol: float, atol: float) -> _Running:
    """Velocities and first lengths: two evaluations."""
    t_S = torch.zeros(len(pack.indices), dtype=torch.float64)
    velocity_TC = model_fn(x_TC, t_S, pack)
    allowed_TC = atol + rtol * x_TC.abs()
    size_S, speed_S = _rms(x_TC / allowed_TC, pack), _rms(velocity_TC / allowed_TC, pack)
    still_S = (size_S < 1e-5) | (speed_S < 1e-5)
    trial_S = torch.where(still_S, 1e-6, 0.01 * size_S / speed_S)
    there_TC = model_fn(x_TC + pack.spread(trial_S, x_TC) * velocity_TC, trial_S, pack)
    bend_S = _rms((there_TC - velocity_TC) / allowed_TC, pack) / trial_S
    most_S = torch.maximum(speed_S, bend_S)
    length_S = torch.where(most_S <= 1e-15, (trial_S * 1e-3).clamp(min=1e-6), (0.01 / most_S) ** (1 / ORDER))
    length_S = torch.minimum(100 * trial_S, length_S)
    return _Running(list(range(len(t_S))), pack, x_TC, velocity_TC, t_S, length_S)


def _step(model_fn: ModelFn, running: _Running) -> tuple[Tensor, list[Tensor]]:
    """Where a step of each image's length leads, and the velocities on the way; the last is the one there."""
    length_T1 = running.pack.spread(running.length_S, running.x_TC)
    stages, x_TC = [running.velocity_TC], running.x_TC
    for node, weights in zip(TABLEAU.alpha.tolist(), TABLEAU.beta, strict=True):
        x_TC = running.x_TC + length_T1 * _weighted(weights, stages)
        stages.append(model_fn(x_TC, running.t_S + node * running.length_S, running.pack))
    return x_TC, stages


def _error(running: _Running, x_TC: Tensor, stages: list[Tensor], rtol: float, atol: float) -> Tensor:
    """Each image's error over what is allowed, (S,)."""
    allowed_TC = atol + rtol * torch.maximum(running.x_TC.abs(), x_TC.abs())
    length_T1 = running.pack.spread(running.length_S, x_TC)
    return _rms(length_T1 * _weighted(TABLEAU.c_error, stages) / allowed_TC, running.pack)


def _at_the_end(running: _Running, x_TC: Tensor, stages: list[Tensor]) -> Tensor:
    """The state at t = 1 of images whose steps, from running.x_TC to `x_TC`, reach it; any number for others."""
    length_T1 = running.pack.spread(running.length_S, x_TC)
    middle_TC = running.x_TC + length_T1 * _weighted(MIDDLE, stages)
    powers = _interp_fit(running.x_TC, x_TC, middle_TC, stages[0], stages[-1], length_T1)
    place_T1 = running.pack.spread((1 - running.t_S) / running.length_S, x_TC)
    total_TC = torch.zeros_like(x_TC)
    for coefficient_TC in reversed(powers):
        total_TC = total_TC * place_T1 + coefficient_TC
    return total_TC


def _advanced(running: _Running, taken_S: Tensor, ratio_S: Tensor, x_TC: Tensor, velocity_TC: Tensor) -> _Running:
    """Images whose step is taken are at its end; all have the length of their next."""
    taken_T1 = running.pack.spread(taken_S, x_TC).bool()
    least_S = torch.where(ratio_S < 1, torch.ones_like(ratio_S), SHRINKAGE)
    factor_S = (SAFETY * ratio_S ** (-1 / ORDER)).maximum(least_S).clamp(max=GROWTH)
    return replace(
        running,
        x_TC=torch.where(taken_T1, x_TC, running.x_TC),
        velocity_TC=torch.where(taken_T1, velocity_TC, running.velocity_TC),
        t_S=torch.where(taken_S, running.t_S + running.length_S, running.t_S),
        length_S=running.length_S * factor_S,
    )


def _require_steps(running: _Running) -> None:
    stuck_S = ~(running.t_S + running.length_S > running.t_S)
    if stuck_S.any():
        place = int(stuck_S.nonzero()[0])
        raise UserError(
            f"sampling.method: dopri5 finds no step for image {running.pack.indices[place]} at t = "
            f"{running.t_S[place]:.6g}: the model's answers are not finite there, or sampling.rtol and .atol are too "
            "small"
        )


def _weighted(weights: Tensor, stages: list[Tensor]) -> Tensor:
    """Sum of the stages, each by its weight; number by number, so that no rounding depends on the pack."""
    return reduce(torch.add, (weight * stage for weight, stage in zip(weights.tolist(), stages, strict=True)))


def _rms(values_TC: Tensor, pack: PackShape) -> Tensor:
    """Root mean square of every image's numbers, (S,)."""
    return segment_mean(values_TC.double().square().mean(1), pack.cu_seqlens).sqrt().cpu()
