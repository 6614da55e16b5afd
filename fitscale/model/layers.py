"""The parts of a FiT block and of its ends, with the names of the published checkpoints.

Conditioning (time + class) is one vector per image; everything derived from it stays per image (S rows) and meets the
tokens (T rows) only where it scales or shifts them, in `scale_tokens` and `spread`.

The weights are set afterwards, by `initial.py` or from a file.

Shapes: T tokens of the pack, S images, D hidden size, C numbers in a token.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitscale.config.schema import ModelConfig
from fitscale.model.attention import NORM_EPS, Attention, PackLayout
from fitscale.parallel.layers import ColumnLinear, RowLinear, enter_sharded

TIME_CHANNELS = 256
_TIME_MAX_PERIOD = 10000.0


class TokenEmbedder(nn.Module):
    """Tokens (T, C) -> (T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.token_channels, config.hidden_size)

    def forward(self, tokens_TC: Tensor) -> Tensor:
        return self.proj(tokens_TC.to(self.proj.weight.dtype))


class TimeEmbedder(nn.Module):
    """Times (S,) -> (S, D): cosines then sines of 128 frequencies, then an MLP. Times enter as they are."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t_S: Tensor) -> Tensor:
        half = TIME_CHANNELS // 2
        index = torch.arange(half, dtype=torch.float32, device=t_S.device)
        angles = t_S.float()[:, None] * torch.exp(-math.log(_TIME_MAX_PERIOD) * index / half)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        first: nn.Module = self.mlp[0]
        return self.mlp(waves.to(first.get_parameter("weight").dtype))


class ClassEmbedder(nn.Module):
    """Labels (S,) -> (S, D); label `num_classes` is "no class"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, labels_S: Tensor) -> Tensor:
        return self.embedding_table(labels_S)


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1_g x) * fc1_x x); its width is split over the tensor-parallel ranks."""

    def __init__(self, config: ModelConfig, sequence_parallel: bool) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.mlp_hidden_size
        self.fc1_g = ColumnLinear(hidden, width, sequence_parallel)
        self.fc1_x = ColumnLinear(hidden, width, sequence_parallel)
        self.fc2 = RowLinear(width, hidden, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))


class Block(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the image's conditioning (AdaLN).

    The six vectors come from AdaLN-LoRA (FiTv2: low-rank per block, plus a part shared by all blocks) or from a full
    linear per block (FiT).
    """

    def __init__(self, config: ModelConfig, sequence_parallel: bool) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.attn = Attention(config, sequence_parallel)
        self.mlp = SwiGLU(config, sequence_parallel)
        hidden, rank = config.hidden_size, config.adaln_rank
        if rank is None:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, rank), nn.Linear(rank, 6 * hidden))

    def forward(self, x_TD: Tensor, c_SD: Tensor, shared_S6D: Tensor | None, layout: PackLayout) -> Tensor:
        mods_S6D = self.adaLN_modulation(c_SD)
        if shared_S6D is not None:
            mods_S6D = mods_S6D + shared_S6D
        if self.sequence_parallel:
            mods_S6D = enter_sharded(mods_S6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = mods_S6D.chunk(6, dim=-1)
        image_T = layout.own_image_T
        x_TD = x_TD + scale_tokens(self.attn(modulate(x_TD, shift1, scale1, image_T), layout), gate1, image_T)
        return x_TD + scale_tokens(self.mlp(modulate(x_TD, shift2, scale2, image_T)), gate2, image_T)


class FinalLayer(nn.Module):
    """Tokens (T, D) -> (T, patch^2 * out_channels), channel order `(c p1 p2)`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.linear = nn.Linear(hidden, config.patch_size**2 * config.out_channels)

    def forward(self, x_TD: Tensor, c_SD: Tensor, layout: PackLayout) -> Tensor:
        shift, scale = self.adaLN_modulation(c_SD).chunk(2, dim=-1)
        return self.linear(modulate(x_TD, shift, scale, layout.image_T))


def modulate(x_TD: Tensor, shift_SD: Tensor, scale_SD: Tensor, image_T: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, with each token's image's scale and shift."""
    normed = F.layer_norm(x_TD, x_TD.shape[-1:], eps=NORM_EPS)
    return scale_tokens(normed, 1 + scale_SD, image_T) + spread(shift_SD, image_T)


def spread(x_SD: Tensor, image_T: Tensor) -> Tensor:
    """Each token's image's row: (S, D) -> (T, D)."""
    return _Spread.apply(x_SD, image_T)


def scale_tokens(x_TD: Tensor, factor_SD: Tensor, image_T: Tensor) -> Tensor:
    """x * spread(factor), which keeps factor per image, not per token, for the backward pass."""
    return _ScaleTokens.apply(x_TD, factor_SD, image_T)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, image_T: Tensor) -> Tensor:
        ctx.save_for_backward(image_T)
        ctx.images = len(x_SD)
        return x_SD.index_select(0, image_T)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (image_T,) = ctx.saved_tensors
        return _sum_per_image(grad_TD, image_T, ctx.images), None


class _ScaleTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, factor_SD: Tensor, image_T: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, factor_SD, image_T)
        return x_TD * factor_SD.index_select(0, image_T)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x_TD, factor_SD, image_T = ctx.saved_tensors
        grad_x_TD = grad_TD * factor_SD.index_select(0, image_T)
        return grad_x_TD, _sum_per_image(grad_TD * x_TD, image_T, len(factor_SD)), None


def _sum_per_image(x_TD: Tensor, image_T: Tensor, images: int) -> Tensor:
    if not x_TD.is_cuda:
        return x_TD.new_zeros(images, x_TD.shape[-1]).index_add_(0, image_T, x_TD)
    # On CUDA index_add_ adds in no fixed order, rounding to bf16 each time; a product with a 0/1 matrix does neither.
    image_S = torch.arange(images, device=x_TD.device)
    return (image_S[:, None] == image_T).to(x_TD.dtype) @ x_TD
