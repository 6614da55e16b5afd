"""From noise to data: ODE, SDE and DDPM samplers over packed tokens.

`sample(model_fn, noise_TC, sampling, pack, seed)` integrates from t = 0 (noise) to t = 1 (data) and counts function
evaluations (NFE, per image; a guided one is two passes of the network, which `guidance.Guided` counts).

    method          steps means                     NFE
    euler           Euler steps                     steps
    heun            Heun steps (second order)       2 steps
    ab2             Adams-Bashforth steps of two    steps
                    velocities (second order)
    dopri5          nothing: each image has steps   2 + 6 x the steps that its tolerances ask for
                    of its own (`flow.dopri5`)
    sde             Euler-Maruyama steps + last     steps (one less if the last step is none)
    sde_heun        Heun steps + last               2 steps - 1 (2 steps - 2)
    ddpm, ddim      steps of the 1000 trained on,   steps
                    chosen by `spacing`
    dpm_solver_pp   evaluations, in steps of up     steps
                    to three (`flow.dpm_solver`)

The points of the published code's dopri5 are where it reports the path, which changes neither steps nor samples. Noise
inside a sampler comes from (seed, step, image index) alone.

Steps are equal in time, unless `sampling.shift_base_tokens` bends it for each image (`shifted`).

Shape suffixes: T tokens of a pack, S images of a pack, C numbers in a token.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise, repeat

import torch
from torch import Tensor

from fitscale.config.errors import UserError
from fitscale.config.schema_sampling import SamplingConfig
from fitscale.flow.loss import DDPM_ALPHAS_CUMPROD, DDPM_STEPS
from fitscale.flow.pack import ModelFn, PackShape
from fitscale.flow.path import SAMPLER_NOISE, image_generator, image_noise

LAST_SDE_STEP = 0.04


@dataclass(frozen=True)
class Sampled:
    """Data at t = 1 and the number of function evaluations of each image."""

    x_TC: Tensor
    nfe: list[int]


@dataclass(frozen=True)
class ImageNoise:
    """The noise that samplers add on their way: of image `index`, at a step, from (seed, step, index) alone."""

    seed: int
    indices: Sequence[int]
    lengths: Sequence[int]

    def normal(self, step: int, x_TC: Tensor) -> Tensor:
        noise_TC = image_noise(self.seed, step, self.indices, self.lengths, x_TC.shape[1], stream=SAMPLER_NOISE)
        return noise_TC.to(x_TC)

    def of_each_image(self, step: int, x_TC: Tensor) -> Tensor:
        """As `normal`, other numbers: those that ddpm has always drawn, by a torch generator of each image."""
        streams = (image_generator(self.seed, step, index, SAMPLER_NOISE) for index in self.indices)
        generators = [torch.Generator().manual_seed(int(stream.integers(2**63))) for stream in streams]
        drawn = [torch.randn(n, x_TC.shape[1], generator=g) for n, g in zip(self.lengths, generators, strict=True)]
        return torch.cat(drawn).to(x_TC)


@torch.no_grad()
def sample(model_fn: ModelFn, noise_TC: Tensor, sampling: SamplingConfig, pack: PackShape, seed: int) -> Sampled:
    """Carry `noise_TC` to data.

    Args:
        model_fn: (x_TC, flow times, pack) -> velocity (T, C), epsilon and variance (T, 2C) for ddpm and ddim, or
            epsilon for dpm_solver_pp. The pack is `pack`, or what is left of it when images have arrived.
        seed: for the methods that add noise.

    Raises:
        UserError: `sampling.steps` is impossible for the method, or dopri5 finds no step.
    """
    nfe: Counter[int] = Counter()

    def counted(x_TC: Tensor, t_S: Tensor, pack: PackShape) -> Tensor:
        nfe.update(pack.indices)
        return model_fn(x_TC, t_S, pack).to(x_TC.dtype)

    x_TC = _METHODS[sampling.method](counted, noise_TC, sampling, pack, seed)
    return Sampled(x_TC, [nfe[index] for index in pack.indices])


def ddpm_timesteps(sampling: SamplingConfig) -> list[int]:
    """The `sampling.steps` of the 1000 steps (0 = data) that ddpm and ddim take, from noise to data.

        linspace   evenly from 999 to 0, rounded     respacing "N" of the published FiT v1 and DiT
        leading    every k-th, down to 0              respacing "ddimN" there
        trailing   every 1000/N-th, down from 999     Lin et al. 2023 (arXiv 2305.08891), whose names these are

    Raises:
        UserError: more than 1000; for `leading`, a number that no whole k gives.
    """
    steps = sampling.steps
    if steps > DDPM_STEPS:
        raise UserError(f"sampling.steps: {steps} is more than the {DDPM_STEPS} steps that {sampling.method} knows")
    if sampling.timestep_spacing == "linspace":
        stride = (DDPM_STEPS - 1) / max(steps - 1, 1)
        return [round(step) for step in accumulate(repeat(stride, steps - 1), initial=0.0)][::-1]
    if sampling.timestep_spacing == "trailing":
        return [round(DDPM_STEPS - i * DDPM_STEPS / steps) - 1 for i in range(steps)]
    strides = {len(range(0, DDPM_STEPS, stride)): stride for stride in range(DDPM_STEPS - 1, 0, -1)}
    if steps not in strides:
        nearest, next_nearest = sorted(strides, key=lambda number: abs(number - steps))[:2]
        raise UserError(
            f"sampling.steps: no whole stride takes {steps} of {DDPM_STEPS} steps (sampling.spacing = leading); the "
            f"nearest that one takes are {nearest} and {next_nearest}"
        )
    return [*range(0, DDPM_STEPS, strides[steps])][::-1]


def shifted(u: float, sampling: SamplingConfig, pack: PackShape) -> Tensor:
    """Flow times (S,), float64 on the host, that stand for `u` in [0, 1]: t = u / (a - (a - 1) u).

    a = sqrt(tokens / shift_base_tokens) of the image; 1 without a shift. In noise, s = 1 - t, this is
    a s / (1 + (a - 1) s): Stable Diffusion 3 (arXiv 2403.03206), equation 23. A larger image looks less noisy at the
    same t, so its steps are closer together near the noise.
    """
    tokens_S, base = torch.tensor(pack.lengths, dtype=torch.float64), sampling.shift_base_tokens
    a_S = torch.ones_like(tokens_S) if base is None else (tokens_S / base).sqrt()
    return u / (a_S - (a_S - 1) * u)


def _steps(sampling: SamplingConfig, pack: PackShape, number: int, end: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Flow times of every image at the start and at the end of each of `number` steps from 0 to `end`."""
    return pairwise([end * shifted(i / number, sampling, pack) for i in range(number + 1)])


def _euler(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, pack: PackShape, seed: int) -> Tensor:
    for t_S, following_S in _steps(sampling, pack, sampling.steps):
        x_TC = x_TC + pack.spread(following_S - t_S, x_TC) * model_fn(x_TC, t_S, pack)
    return x_TC


def _heun(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, pack: PackShape, seed: int) -> Tensor:
    for t_S, following_S in _steps(sampling, pack, sampling.steps):
        length_T1 = pack.spread(following_S - t_S, x_TC)
        here_TC = model_fn(x_TC, t_S, pack)
        there_TC = model_fn(x_TC + length_T1 * here_TC, following_S, pack)
        x_TC = x_TC + length_T1 * (here_TC + there_TC) / 2
    return x_TC


def _ab2(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, pack: PackShape, seed: int) -> Tensor:
    """The velocity is extended as a line through this and the last; the first step is Euler's."""
    before_TC, before_S = None, torch.zeros(len(pack.indices), dtype=torch.float64)
    for t_S, following_S in _steps(sampling, pack, sampling.steps):
        length_S, velocity_TC = following_S - t_S, model_fn(x_TC, t_S, pack)
        aim_TC = velocity_TC
        if before_TC is not None:
            ahead_T1 = pack.spread(length_S / (2 * (t_S - before_S)), x_TC)  # half of this step, in last steps
            aim_TC = velocity_TC + ahead_T1 * (velocity_TC - before_TC)
        x_TC = x_TC + pack.spread(length_S, x_TC) * aim_TC
        before_TC, before_S = velocity_TC, t_S
    return x_TC


def _dopri5(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, pack: PackShape, seed: int) -> Tensor:
    from fitscale.flow.dopri5 import integrate

    return integrate(model_fn, x_TC, pack, sampling.rtol, sampling.atol)


def _dpm_solver_pp(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, pack: PackShape, seed: int) -> Tensor:
    from fitscale.flow.dpm_solver import integrate

    return integrate(model_fn, x_TC, pack, sampling.steps)


def _sde(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, pack: PackShape, seed: int) -> Tensor:
    """dx = (v + g^2/2 score) dt + g dW with g^2 = 2 (1 - t), the "sigma" form of SiT (arXiv 2401.08740).

    As in its published code (the factor 2 in g^2 is that code's), steps - 1 equal steps, of Euler-Maruyama or, noise
    first, of Heun, then the last step (`sampling.last_step`):

        mean    from t = 0.96 to 1 by the drift, without noise
        euler   from t = 0.96 to 1 by the velocity: to the data expected there. On this path "Tweedie" is the same
        none    the equal steps go to 1

    Heun's steps are of second order in the drift alone: a step's noise is that of its start.
    """
    if sampling.steps < 2:
        raise UserError(f"sampling.steps: {sampling.steps} is too few for {sampling.method}, the least is 2")
    end = 1.0 if sampling.last_step == "none" else 1.0 - LAST_SDE_STEP
    noise = ImageNoise(seed, pack.indices, pack.lengths)
    for step, (t_S, following_S) in enumerate(_steps(sampling, pack, sampling.steps - 1, end)):
        length_T1 = pack.spread(following_S - t_S, x_TC)
        noise_TC = pack.spread((2 * (1 - t_S) * (following_S - t_S)).sqrt(), x_TC) * noise.normal(step, x_TC)
        if sampling.method == "sde":
            x_TC = x_TC + length_T1 * _sde_drift(model_fn, x_TC, t_S, pack) + noise_TC
        else:
            x_TC = x_TC + noise_TC
            here_TC = _sde_drift(model_fn, x_TC, t_S, pack)
            there_TC = _sde_drift(model_fn, x_TC + length_T1 * here_TC, following_S, pack)
            x_TC = x_TC + length_T1 * (here_TC + there_TC) / 2
    if sampling.last_step == "none":
        return x_TC
    last = model_fn if sampling.last_step == "euler" else partial(_sde_drift, model_fn)
    return x_TC + LAST_SDE_STEP * last(x_TC, torch.full((len(pack.indices),), end, dtype=torch.float64), pack)


def _sde_drift(model_fn: ModelFn, x_TC: Tensor, t_S: Tensor, pack: PackShape) -> Tensor:
    """v + (1 - t) score, where the score is (t v - x) / (1 - t) (SiT, equation 9)."""
    velocity_TC = model_fn(x_TC, t_S, pack)
    return velocity_TC + (pack.spread(t_S, x_TC) * velocity_TC - x_TC)


def _ddpm(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, pack: PackShape, seed: int) -> Tensor:
    """Ancestral sampling with the learned variance (Nichol & Dhariwal 2021), without noise in the last step.

    The schedule is float64: in fp32, as in diffusers' scheduler, 1 - alpha_0 = 1e-4 has an error of 6e-4, and so have
    the noise's variances of the steps next to data.
    """
    timesteps = ddpm_timesteps(sampling)
    alphas_cumprod = [*DDPM_ALPHAS_CUMPROD[timesteps].tolist(), 1.0]  # 1: data
    noise = ImageNoise(seed, pack.indices, pack.lengths)
    for step, (index, (alpha, alpha_prev)) in enumerate(zip(timesteps, pairwise(alphas_cumprod), strict=True)):
        epsilon_TC, place_TC = model_fn(x_TC, _ddpm_time(index, pack), pack).chunk(2, dim=1)
        beta = 1 - alpha / alpha_prev
        data_TC = (x_TC - (1 - alpha) ** 0.5 * epsilon_TC) / alpha**0.5
        data_share, x_share = alpha_prev**0.5 * beta / (1 - alpha), (1 - beta) ** 0.5 * (1 - alpha_prev) / (1 - alpha)
        mean_TC = data_share * data_TC + x_share * x_TC
        if step + 1 == len(timesteps):
            return mean_TC
        log_most, log_least = math.log(beta), math.log(beta * (1 - alpha_prev) / (1 - alpha))
        log_variance_TC = log_least + (place_TC + 1) / 2 * (log_most - log_least)
        x_TC = mean_TC + (log_variance_TC / 2).exp() * noise.of_each_image(step, x_TC)
    return x_TC


def _ddim(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, pack: PackShape, seed: int) -> Tensor:
    """Deterministic sampling (eta = 0; Song et al. 2021, arXiv 2010.02502); the learned variance is not used."""
    timesteps = ddpm_timesteps(sampling)
    alphas_cumprod = [*DDPM_ALPHAS_CUMPROD[timesteps].tolist(), 1.0]  # 1: data
    for index, (alpha, alpha_prev) in zip(timesteps, pairwise(alphas_cumprod), strict=True):
        epsilon_TC = model_fn(x_TC, _ddpm_time(index, pack), pack)[:, : x_TC.shape[1]]
        data_TC = (x_TC - (1 - alpha) ** 0.5 * epsilon_TC) / alpha**0.5
        x_TC = alpha_prev**0.5 * data_TC + (1 - alpha_prev) ** 0.5 * epsilon_TC
    return x_TC


def _ddpm_time(index: int, pack: PackShape) -> Tensor:
    return torch.full((len(pack.indices),), 1 - index / DDPM_STEPS, dtype=torch.float64)


_METHODS: dict[str, Callable[[ModelFn, Tensor, SamplingConfig, PackShape, int], Tensor]] = {
    "euler": _euler,
    "heun": _heun,
    "ab2": _ab2,
    "dopri5": _dopri5,
    "sde": _sde,
    "sde_heun": _sde,
    "ddpm": _ddpm,
    "ddim": _ddim,
    "dpm_solver_pp": _dpm_solver_pp,
}
