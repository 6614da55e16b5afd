"""From noise to data: ODE, SDE and DDPM samplers over packed tokens.

`sample(model_fn, noise_TC, sampling, ...)` integrates from t = 0 (noise) to t = 1 (data) and counts function
evaluations (NFE, per image; with guidance each is two passes of the network, see `guidance.network_evaluations`).

    method          steps means                     NFE
    euler           Euler steps                     steps
    heun            Heun steps (second order)       2 steps
    dopri5          output points; step size is     as many as the tolerances ask for
                    its own
    sde             Euler-Maruyama steps + last     steps
    ddpm, ddim      steps of the 1000 trained on    steps

dopri5 chooses its steps from the error over all it integrates, so it takes one image at a time: a neighbour in the pack
must not change an image. Noise inside a sampler comes from (seed, step, image index) alone.

Shape suffixes: T tokens of a pack, C numbers in a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fitscale.config.errors import UserError
from fitscale.config.schema import ADAPTIVE_SAMPLERS, SamplingConfig
from fitscale.flow.guidance import ModelFn
from fitscale.flow.loss import DDPM_BETAS, DDPM_STEPS
from fitscale.flow.path import SAMPLER_NOISE, image_generator, image_noise, score

LAST_SDE_STEP = 0.04


@dataclass(frozen=True)
class Sampled:
    """Data at t = 1 and the number of function evaluations per image."""

    x_TC: Tensor
    nfe: int


@dataclass(frozen=True)
class ImageNoise:
    """The noise that samplers add on their way: of image `index`, at a step, from (seed, step, index) alone."""

    seed: int
    indices: Sequence[int]
    lengths: Sequence[int]

    def normal(self, step: int, x_TC: Tensor) -> Tensor:
        channels = x_TC.shape[1]
        noise_TC = image_noise(self.seed, step, self.indices, self.lengths, channels, stream=SAMPLER_NOISE)
        return noise_TC.to(x_TC)

    def generators(self, step: int) -> list[torch.Generator]:
        """One torch generator per image, for libraries that draw themselves."""
        streams = (image_generator(self.seed, step, index, SAMPLER_NOISE) for index in self.indices)
        return [torch.Generator().manual_seed(int(stream.integers(2**63))) for stream in streams]


def one_image_per_pack(method: str) -> bool:
    """Whether a method may only see packs of a single image."""
    return method in ADAPTIVE_SAMPLERS


@torch.no_grad()
def sample(model_fn: ModelFn, noise_TC: Tensor, sampling: SamplingConfig, noise: ImageNoise) -> Sampled:
    """Carry `noise_TC` to data.

    Args:
        model_fn: (x_TC, flow time) -> velocity (T, C), or epsilon and variance (T, 2C) for ddpm and ddim.
        noise: for the methods that add noise.

    Raises:
        UserError: `sampling.steps` is impossible for the method.
    """
    counted = _Counted(model_fn)
    x_TC = _METHODS[sampling.method](counted, noise_TC, sampling, noise)
    return Sampled(x_TC, counted.calls)


class _Counted:
    def __init__(self, model_fn: ModelFn) -> None:
        self.model_fn = model_fn
        self.calls = 0

    def __call__(self, x_TC: Tensor, t: float | Tensor) -> Tensor:
        self.calls += 1
        return self.model_fn(x_TC, t).to(x_TC.dtype)


def _grid(end: float, steps: int) -> list[float]:
    return [end * i / steps for i in range(steps + 1)]


def _euler(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, noise: ImageNoise) -> Tensor:
    times = _grid(1.0, sampling.steps)
    for t, following in pairwise(times):
        x_TC = x_TC + (following - t) * model_fn(x_TC, t)
    return x_TC


def _heun(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, noise: ImageNoise) -> Tensor:
    times = _grid(1.0, sampling.steps)
    for t, following in pairwise(times):
        here_TC = model_fn(x_TC, t)
        there_TC = model_fn(x_TC + (following - t) * here_TC, following)
        x_TC = x_TC + (following - t) * (here_TC + there_TC) / 2
    return x_TC


def _dopri5(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, noise: ImageNoise) -> Tensor:
    from torchdiffeq import odeint

    assert len(noise.lengths) == 1, "dopri5 integrates one image at a time"
    times = torch.linspace(0.0, 1.0, max(sampling.steps, 2), device=x_TC.device)
    path = odeint(lambda t, x: model_fn(x, t), x_TC, times, method="dopri5", rtol=sampling.rtol, atol=sampling.atol)
    return path[-1]


def _sde(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, noise: ImageNoise) -> Tensor:
    """Euler-Maruyama for dx = (v + g^2/2 score) dt + g dW with g^2 = 2 (1 - t), the "sigma" form of SiT.

    steps - 1 equal steps from 0 to 0.96, then one without noise over the last 0.04 ("Mean"): SiT, arXiv 2401.08740; the
    factor 2 in g^2 is its published code's.
    """
    if sampling.steps < 2:
        raise UserError(f"sampling.steps: {sampling.steps} is too few for sde, the least is 2")
    times = _grid(1.0 - LAST_SDE_STEP, sampling.steps - 1)
    for step, (t, following) in enumerate(pairwise(times)):
        dt = following - t
        spread = (2 * (1 - t) * dt) ** 0.5
        x_TC = x_TC + dt * _sde_drift(model_fn, x_TC, t) + spread * noise.normal(step, x_TC)
    return x_TC + LAST_SDE_STEP * _sde_drift(model_fn, x_TC, times[-1])


def _sde_drift(model_fn: ModelFn, x_TC: Tensor, t: float) -> Tensor:
    velocity_TC = model_fn(x_TC, t)
    return velocity_TC + (1 - t) * score(velocity_TC, x_TC, t)


def _ddpm(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, noise: ImageNoise) -> Tensor:
    """Ancestral sampling with the learned variance, on evenly spaced steps (Nichol & Dhariwal 2021)."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    _check_ddpm_steps(sampling)
    scheduler = DDPMScheduler(
        DDPM_STEPS, *DDPM_BETAS, "linear", variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(sampling.steps)
    lengths = list(noise.lengths)
    for step, index in enumerate(scheduler.timesteps.tolist()):
        output = model_fn(x_TC, 1 - index / DDPM_STEPS)
        images = zip(output.split(lengths), x_TC.split(lengths), noise.generators(step), strict=True)
        parts = [scheduler.step(out, index, x, generator, return_dict=False)[0] for out, x, generator in images]
        x_TC = torch.cat(parts)
    return x_TC


def _ddim(model_fn: ModelFn, x_TC: Tensor, sampling: SamplingConfig, noise: ImageNoise) -> Tensor:
    """Deterministic sampling (eta = 0; Song et al. 2021, arXiv 2010.02502); the learned variance is not used."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    _check_ddpm_steps(sampling)
    if DDPM_STEPS % sampling.steps:
        raise UserError(
            f"sampling.steps: ddim needs a divisor of {DDPM_STEPS} (such as 50, 100, 250), not {sampling.steps}"
        )
    scheduler = DDIMScheduler(DDPM_STEPS, *DDPM_BETAS, "linear", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(sampling.steps)
    for index in scheduler.timesteps.tolist():
        epsilon_TC = model_fn(x_TC, 1 - index / DDPM_STEPS)[:, : x_TC.shape[1]]
        x_TC = scheduler.step(epsilon_TC, index, x_TC, return_dict=False)[0]
    return x_TC


def _check_ddpm_steps(sampling: SamplingConfig) -> None:
    if sampling.steps > DDPM_STEPS:
        raise UserError(
            f"sampling.steps: {sampling.steps} is more than the {DDPM_STEPS} steps that {sampling.method} knows"
        )


_METHODS: dict[str, Callable[[ModelFn, Tensor, SamplingConfig, ImageNoise], Tensor]] = {
    "euler": _euler,
    "heun": _heun,
    "dopri5": _dopri5,
    "sde": _sde,
    "ddpm": _ddpm,
    "ddim": _ddim,
}
