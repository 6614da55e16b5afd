"""Adaptive layer norm (AdaLN): per-image vectors (S rows) meet the tokens (T rows) only where they scale or shift them.

Shapes: T tokens of the pack, S images, D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


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
