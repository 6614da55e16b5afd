"""Training objectives: what the network is shown, and how its answer is scored.

1. `prepare` makes the network's inputs and target of the images and what chance decides of them (`path.draws`).
2. The network answers.
3. `loss_S` scores the answer per image: mean over the image's tokens and channels.
4. `image_weights` turns per-image losses into shares of the global batch's loss, so that the sum over all packs of all
   ranks is the loss of the batch, however it was cut.

Shape suffixes: T tokens of a pack, S images of a pack, C numbers in a token.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fitscale.config.schema import FlowConfig, ModelConfig
from fitscale.flow.path import PADDING_SLOT, Draws, interpolate, lengths_of, per_token, velocity
from fitscale.flow.transfer import send

DDPM_STEPS = 1000
DDPM_BETAS = (1e-4, 0.02)
DDPM_BETA = torch.linspace(*DDPM_BETAS, DDPM_STEPS, dtype=torch.float64)
DDPM_ALPHAS_CUMPROD = torch.cumprod(1 - DDPM_BETA, dim=0)
SCALED_LINEAR_BETA = torch.linspace(0.00085**0.5, 0.012**0.5, DDPM_STEPS, dtype=torch.float64) ** 2
SCALED_LINEAR_ALPHAS_CUMPROD = torch.cumprod(1 - SCALED_LINEAR_BETA, dim=0)


@dataclass(frozen=True)
class Inputs:
    """One pack as the network sees it; `t_S` is in the network's own unit, `target` is what it should answer."""

    x_TC: Tensor
    t_S: Tensor
    labels_S: Tensor
    target: Tensor


class Objective(ABC):
    """What is learned, by a network that answers at the scales of `model`; label `num_classes` is "no class"."""

    def __init__(self, flow: FlowConfig, model: ModelConfig) -> None:
        self.flow, self.model = flow, model

    def prepare(self, tokens_TC: Tensor, labels_S: Tensor, cu_seqlens: Tensor, drawn: Draws) -> Inputs:
        """Inputs of a training step; all but `cu_seqlens` on one device."""
        labels_S = torch.where(drawn.drop_S, self.model.num_classes, labels_S)
        return self.prepare_at(tokens_TC, labels_S, cu_seqlens, drawn.t_S, drawn.noise_TC)

    @abstractmethod
    def prepare_at(
        self, tokens_TC: Tensor, labels_S: Tensor, cu_seqlens: Tensor, t_S: Tensor, noise_TC: Tensor
    ) -> Inputs:
        """Inputs at given times `t_S` in [0, 1] (0 = noise) and noise."""

    @abstractmethod
    def model_time(self, t_S: Tensor) -> Tensor:
        """Flow time in [0, 1] in the unit that the network takes."""

    def loss_S(self, outputs: Sequence[Tensor], inputs: Inputs, cu_seqlens: Tensor) -> Tensor:
        """Loss of every image (S,), float32: mean over its tokens and channels, summed over the scales.

        Args:
            outputs: the network's, one (T, numbers) a scale.
        """
        losses_T = (
            weight * self.token_loss(output_TC.float(), self._at_scale(inputs, scale), cu_seqlens)
            for output_TC, (scale, weight) in zip(outputs, self.model.scales, strict=True)
        )
        return segment_mean(sum(losses_T, torch.zeros((), device=inputs.x_TC.device)), cu_seqlens)

    def _at_scale(self, inputs: Inputs, scale: int) -> Inputs:
        """With a target of one number for `scale` x `scale` pixels: their sum / scale, so that noise keeps its variance
        (DiMR, arXiv 2406.09416)."""
        if scale == 1:
            return inputs
        side = self.model.patch_size // scale
        pixels = inputs.target.unflatten(1, (-1, side, scale, side, scale))
        return replace(inputs, target=pixels.sum((3, 5)).flatten(1) / scale)

    @abstractmethod
    def token_loss(self, output_TC: Tensor, inputs: Inputs, cu_seqlens: Tensor) -> Tensor:
        """Loss of every token (T,), mean over channels."""


class RectifiedFlow(Objective):
    """Velocity of the straight path from noise to data (FiTv2); the network takes t in [0, 1] as it is."""

    def prepare_at(
        self, tokens_TC: Tensor, labels_S: Tensor, cu_seqlens: Tensor, t_S: Tensor, noise_TC: Tensor
    ) -> Inputs:
        t_T1 = per_token(t_S, cu_seqlens, len(tokens_TC))
        return Inputs(interpolate(tokens_TC, noise_TC, t_T1), t_S, labels_S, velocity(tokens_TC, noise_TC))

    def model_time(self, t_S: Tensor) -> Tensor:
        return t_S

    def token_loss(self, output_TC: Tensor, inputs: Inputs, cu_seqlens: Tensor) -> Tensor:
        return mse_loss(output_TC, inputs.target, reduction="none").mean(1)


class Epsilon(Objective):
    """Epsilon prediction on 1000 steps of noise, n = 1 (data) to 1000, by mean squared error (arXiv 2006.11239).

    Betas are those of latent diffusion (arXiv 2112.10752), linear in their square root from 0.00085 to 0.012. The
    network takes n. In training, flow time t maps to n = floor(1000 (1 - t)) + 1, so uniform t gives uniform n;
    samplers may ask at any n = 1000 (1 - t), whole or not.
    """

    alphas_cumprod = SCALED_LINEAR_ALPHAS_CUMPROD

    def __init__(self, flow: FlowConfig, model: ModelConfig) -> None:
        super().__init__(flow, model)
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()

    def prepare_at(
        self, tokens_TC: Tensor, labels_S: Tensor, cu_seqlens: Tensor, t_S: Tensor, noise_TC: Tensor
    ) -> Inputs:
        step_S = ddpm_step(t_S)
        scales = (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        data_T1, noise_T1 = self._at(step_S, cu_seqlens, len(tokens_TC), *scales)
        return Inputs(data_T1 * tokens_TC + noise_T1 * noise_TC, self.step_time(step_S), labels_S, noise_TC)

    def step_time(self, step_S: Tensor) -> Tensor:
        """Step 0 (data) to 999 in the unit that the network takes."""
        return step_S + 1

    def model_time(self, t_S: Tensor) -> Tensor:
        return (1 - t_S) * DDPM_STEPS

    def token_loss(self, output_TC: Tensor, inputs: Inputs, cu_seqlens: Tensor) -> Tensor:
        return mse_loss(output_TC, inputs.target, reduction="none").mean(1)

    def _at(self, step_S: Tensor, cu_seqlens: Tensor, tokens: int, *tables: Tensor) -> list[Tensor]:
        """Values of per-step tables at every token's step, float32 (T, 1)."""
        on_device = (send(table.float(), step_S.device) for table in tables)
        return [per_token(table[step_S.long()], cu_seqlens, tokens) for table in on_device]


class DdpmEpsilon(Epsilon):
    """Epsilon prediction with learned variance (FiT v1): the hybrid loss of Nichol & Dhariwal 2021 (arXiv 2102.09672).

    The network answers (T, 2C): epsilon, then the place v in [-1, 1] of ln variance between its two bounds (their
    equation 15). Loss: epsilon MSE + L_vlb (their equation 16; 1000 steps x weight 0.001 = 1), in bits per number,
    where L_vlb sees epsilon detached and so trains the variance alone. Betas are linear; the network takes the DDPM
    step, 0 (data) to 999 (noise), in training and sampling.
    """

    alphas_cumprod = DDPM_ALPHAS_CUMPROD

    def __init__(self, flow: FlowConfig, model: ModelConfig) -> None:
        super().__init__(flow, model)
        beta, alphas_cumprod = DDPM_BETA, DDPM_ALPHAS_CUMPROD
        alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior_variance = beta * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        posterior_variance[0] = posterior_variance[1]  # at step 0 it is 0; its logarithm is needed
        self.sqrt_recip_alphas = 1 / (1 - beta).sqrt()
        self.epsilon_to_mean = beta / ((1 - alphas_cumprod).sqrt() * (1 - beta).sqrt())
        self.log_least = posterior_variance.log()
        self.log_most = beta.log()

    def step_time(self, step_S: Tensor) -> Tensor:
        return step_S

    def model_time(self, t_S: Tensor) -> Tensor:
        return ddpm_step(t_S)

    def token_loss(self, output_TC: Tensor, inputs: Inputs, cu_seqlens: Tensor) -> Tensor:
        epsilon_TC, variance_TC = output_TC.chunk(2, dim=1)
        simple_T = mse_loss(epsilon_TC, inputs.target, reduction="none").mean(1)
        return simple_T + self._bound(epsilon_TC.detach(), variance_TC, inputs, cu_seqlens).mean(1)

    def _bound(self, epsilon_TC: Tensor, variance_TC: Tensor, inputs: Inputs, cu_seqlens: Tensor) -> Tensor:
        """One term of the variational bound, bits (T, C): KL at steps above 0, the decoder's likelihood at step 0."""
        scales = (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod, self.sqrt_recip_alphas)
        tables = (*scales, self.epsilon_to_mean, self.log_least, self.log_most)
        rows = self._at(inputs.t_S, cu_seqlens, len(epsilon_TC), *tables)
        data_T1, noise_T1, recip_T1, to_mean, log_least, log_most = rows
        place_TC = (variance_TC + 1) / 2
        log_variance_TC = place_TC * log_most + (1 - place_TC) * log_least
        gap_TC = to_mean * (epsilon_TC - inputs.target)  # between the means of p and q
        kl_TC = 0.5 * (
            log_variance_TC - log_least - 1 + (log_least - log_variance_TC).exp()
            + gap_TC.square() * (-log_variance_TC).exp()
        )  # fmt: skip
        data_TC = (inputs.x_TC - noise_T1 * inputs.target) / data_T1
        mean_TC = recip_T1 * inputs.x_TC - to_mean * epsilon_TC
        step_T1 = per_token(inputs.t_S, cu_seqlens, len(epsilon_TC))
        return torch.where(step_T1 == 0, _decoder_nats(data_TC, mean_TC, log_variance_TC), kl_TC) / math.log(2)


def ddpm_step(t_S: Tensor) -> Tensor:
    """The step of 1000, 0 (data) to 999, that stands for flow time t: floor(1000 (1 - t))."""
    step = ((1 - t_S.double()) * DDPM_STEPS + 1e-4).floor()  # 1e-4: t = 1 - k / 1000 is step k in spite of rounding
    return step.clamp(0, DDPM_STEPS - 1).to(t_S.dtype)


OBJECTIVES: dict[str, type[Objective]] = {"rectified": RectifiedFlow, "ddpm": DdpmEpsilon, "scaled_linear": Epsilon}


def make_objective(flow: FlowConfig, model: ModelConfig) -> Objective:
    """The objective of a config."""
    return OBJECTIVES[flow.kind](flow, model)


def segment_mean(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over the tokens of every image, (T,) -> (S,), summed in float64: a pack's layout leaves no trace."""
    offsets = send(cu_seqlens.long(), values_T.device)
    means_S = torch.segment_reduce(values_T.double(), "mean", offsets=offsets, unsafe=True)
    return means_S.to(values_T.dtype)


def image_weights(reduction: str, cu_seqlens: Tensor, slots_S: Tensor, total_images: int, total_tokens: int) -> Tensor:
    """Weights (S,) with which `loss_S` sums to the loss of the global batch, over all packs of all ranks.

    Args:
        reduction: "image": every image 1 / total_images; "token": its tokens / total_tokens.
        slots_S: padding (slot -1) weighs 0.
        total_images, total_tokens: of the global batch, padding left out.
    """
    if reduction == "image":
        weights_S = torch.full(slots_S.shape, 1 / total_images, device=slots_S.device)
    else:
        assert reduction == "token", reduction
        weights_S = lengths_of(cu_seqlens) / total_tokens
    return weights_S * (slots_S != PADDING_SLOT)


def _decoder_nats(data_TC: Tensor, mean_TC: Tensor, log_variance_TC: Tensor) -> Tensor:
    """-ln probability of the data's 2/255 wide bin under a Gaussian (Ho et al. 2020, arXiv 2006.11239, eq. 13)."""
    inverse_TC = (-0.5 * log_variance_TC).exp()
    upper_TC = _normal_cdf((data_TC - mean_TC + 1 / 255) * inverse_TC)
    lower_TC = _normal_cdf((data_TC - mean_TC - 1 / 255) * inverse_TC)
    upper_TC = torch.where(data_TC > 0.999, 1.0, upper_TC)
    lower_TC = torch.where(data_TC < -0.999, 0.0, lower_TC)
    return -(upper_TC - lower_TC).clamp_min(1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """Of the standard normal distribution, by the approximation that the published implementations train with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
