"""DiMR's own regions between products, forward and backward, in the manner of `model.common.fused`.

Norms and the vectors of time that scale them are in fp32 (or fp64), whatever the network's type.

Shapes: T rows (tokens or latent pixels), S images, D width, M width of an MLP, J = K D channels of K tensors joined.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitscale.model.common.layout import Segments
from fitscale.model.common.regions import (
    Biased,
    at,
    at_least_fp32,
    biased,
    ready,
    sum_per_image,
    with_vectors,
)

RMS_EPS = 1e-8  # outside the root
LAYER_EPS = 1e-5
_LEAST = 1e-30  # in place of a root mean square of 0, which divides


def scaled_rms(x_TD: Tensor, scale_SD: Tensor, segments: Segments) -> Tensor:
    """x / (sqrt(mean x^2) + RMS_EPS) * scale."""
    return _ScaledRms.apply(x_TD, scale_SD, segments)


def add_scaled_rms(x_TD: Tensor, branch: Biased, scale_SD: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """x + branch, and `scaled_rms` of it. Who goes on with the sum takes it from here: its gradient is added here."""
    return _AddScaledRms.apply(x_TD, *ready(branch), scale_SD, segments)


def scaled_layer_norm(x_TD: Tensor, scale_SD: Tensor, shift_SD: Tensor, segments: Segments) -> Tensor:
    """LayerNorm(x) * scale + shift."""
    return _ScaledLayerNorm.apply(x_TD, scale_SD, shift_SD, segments)


def joined_linear(parts_TD: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias, where x is the parts joined along their channels, which it never is."""
    return _JoinedLinear.apply(weight, bias, *parts_TD)


def joined_layer_norm_linear(
    states_TD: Sequence[Tensor],
    scale_SJ: Tensor,
    shift_SJ: Tensor,
    weight: Tensor,
    bias: Tensor,
    segments: Segments,
) -> Tensor:
    """(LayerNorm(x) * scale + shift) weight^T + bias, where x is the states joined along their channels.

    Neither x nor its norm is ever whole: both are taken state by state, and the products added up in fp32. Nothing is
    kept but the states and two numbers of each row.
    """
    return _JoinedLayerNormLinear.apply(scale_SJ, shift_SJ, weight, bias, segments, *states_TD)


# ---------------------------------------------------------------------------------------------------------- formulas


def _rms(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled norm, and the root mean square."""
    wide = at_least_fp32(x)
    root = wide.square().mean(-1, keepdim=True).sqrt()
    return (wide / (root + RMS_EPS) * scale).to(x.dtype), root


def _rms_gradients(grad: Tensor, x: Tensor, root: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x, and the scale's before it is summed."""
    x, grad = at_least_fp32(x), at_least_fp32(grad)
    inverse = 1 / (root + RMS_EPS)
    through = grad * scale
    by_root = (through * x).mean(-1, keepdim=True) * inverse.square() / root.clamp_min(_LEAST)
    return through * inverse - x * by_root, grad * x * inverse


@with_vectors
def _rms_forward(image_T: Tensor | None, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    (scale,) = at(image_T, scale)
    return _rms(x, scale)


@with_vectors
def _rms_backward(image_T: Tensor | None, grad: Tensor, x: Tensor, root: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    (scale,) = at(image_T, scale)
    grad_x, by_scale = _rms_gradients(grad, x, root, scale)
    return grad_x.to(x.dtype), by_scale


@with_vectors
def _add_rms_forward(
    image_T: Tensor | None, x: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, ...]:
    (scale,) = at(image_T, scale)
    x = x + biased(branch, bias)
    return x, *_rms(x, scale)


@with_vectors
def _add_rms_backward(
    image_T: Tensor | None, grad: Tensor, grad_x: Tensor, x: Tensor, root: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    (scale,) = at(image_T, scale)
    through, by_scale = _rms_gradients(grad, x, root, scale)
    return (through + grad_x).to(x.dtype), by_scale


@with_vectors
def _slice_forward(
    image_T: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, ...]:
    """Normed by the statistics of what it is a slice of, scaled and shifted."""
    scale, shift = at(image_T, scale, shift)
    return (((at_least_fp32(x) - mean) * rstd * scale + shift).to(x.dtype),)


@with_vectors
def _slice_sums(
    image_T: Tensor | None, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """Sums over the slice that the gradient of the whole needs, and the scale's gradient before it is summed."""
    (scale,) = at(image_T, scale)
    normed, grad = (at_least_fp32(x) - mean) * rstd, at_least_fp32(grad)
    by_scale = grad * normed
    return (grad * scale).sum(-1, keepdim=True), (by_scale * scale).sum(-1, keepdim=True), by_scale


@with_vectors
def _slice_backward(
    image_T: Tensor | None,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    by_mean: Tensor,
    by_spread: Tensor,
    scale: Tensor,
) -> tuple[Tensor, ...]:
    (scale,) = at(image_T, scale)
    normed = (at_least_fp32(x) - mean) * rstd
    return ((rstd * (at_least_fp32(grad) * scale - by_mean - normed * by_spread)).to(x.dtype),)


# ----------------------------------------------------------------------------------------------- autograd functions


class _ScaledRms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
        out, root = _rms_forward(segments, [x], [scale])
        ctx.save_for_backward(x, root, scale)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, root, scale = ctx.saved_tensors
        grad_x, by_scale = _rms_backward(ctx.segments, [grad, x, root], [scale])
        return grad_x, sum_per_image(by_scale, ctx.segments), None


class _AddScaledRms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        x, out, root = _add_rms_forward(segments, [x, branch, bias], [scale])
        ctx.save_for_backward(x, root, scale)
        ctx.segments, ctx.has_bias = segments, bias is not None
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, root, scale = ctx.saved_tensors
        grad_x, by_scale = _add_rms_backward(ctx.segments, [grad, grad_x, x, root], [scale])
        of_bias = grad_x.sum(0) if ctx.has_bias else None
        return grad_x, grad_x, of_bias, sum_per_image(by_scale, ctx.segments), None


class _ScaledLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, segments: Segments) -> Tensor:
        mean, rstd = _statistics([x])
        ctx.save_for_backward(x, mean, rstd, scale)
        ctx.segments = segments
        return _slice_forward(segments, [x, mean, rstd], [scale, shift])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, rstd, scale = ctx.saved_tensors
        *sums, by_scale = _slice_sums(ctx.segments, [grad, x, mean, rstd], [scale])
        by_mean, by_spread = (one / x.shape[1] for one in sums)
        (grad_x,) = _slice_backward(ctx.segments, [grad, x, mean, rstd, by_mean, by_spread], [scale])
        of_vectors = (sum_per_image(one, ctx.segments) for one in (by_scale, at_least_fp32(grad)))
        return grad_x, *of_vectors, None


def _statistics(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of the states joined along their channels, (T, 1)."""
    joined = sum(x.shape[1] for x in states)
    wide = (at_least_fp32(x) for x in states)
    mean = torch.stack([x.sum(-1, keepdim=True) for x in wide]).sum(0) / joined
    squares = torch.stack([(at_least_fp32(x) - mean).square().sum(-1, keepdim=True) for x in states]).sum(0)
    return mean, (squares / joined + LAYER_EPS).rsqrt()


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        total = bias
        for x, piece in zip(parts, weight.chunk(len(parts), dim=1), strict=True):
            total = torch.addmm(total, x, piece.T)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, *parts = ctx.saved_tensors
        of_weight = torch.cat([grad.T @ x for x in parts], 1)
        return of_weight, grad.sum(0), *(grad @ piece for piece in weight.chunk(len(parts), dim=1))


def _slices(scale: Tensor, shift: Tensor, weight: Tensor, number: int) -> tuple[Sequence[Tensor], ...]:
    """What belongs to each state; the vectors as tensors of their own, laid out as those of a single norm."""
    vectors = (one.unflatten(1, (number, -1)).transpose(0, 1).contiguous().unbind() for one in (scale, shift))
    return *vectors, weight.chunk(number, dim=1)


class _JoinedLayerNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, segments: Segments, *states: Tensor
    ) -> Tensor:
        mean, rstd = _statistics(states)
        total = at_least_fp32(bias).expand(len(mean), -1)
        for x, *vectors, piece in zip(states, *_slices(scale, shift, weight, number=len(states)), strict=True):
            (normed,) = _slice_forward(segments, [x, mean, rstd], vectors)
            total = total + F.linear(normed, piece)
        ctx.save_for_backward(mean, rstd, scale, shift, weight, *states)
        ctx.segments = segments
        return total.to(bias.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mean, rstd, scale, shift, weight, *states = ctx.saved_tensors
        segments = ctx.segments
        by_mean = by_spread = torch.zeros_like(mean)
        of_weight, of_scale, of_shift, through = [], [], [], []
        scales, shifts, pieces = _slices(scale, shift, weight, number=len(states))
        for x, of, by, piece in zip(states, scales, shifts, pieces, strict=True):
            (normed,) = _slice_forward(segments, [x, mean, rstd], [of, by])
            of_weight.append(grad.T @ normed)
            through.append(grad @ piece)
            more_mean, more_spread, by_scale = _slice_sums(segments, [through[-1], x, mean, rstd], [of])
            of_scale.append(sum_per_image(by_scale, segments))
            of_shift.append(sum_per_image(at_least_fp32(through[-1]), segments))
            by_mean, by_spread = by_mean + more_mean, by_spread + more_spread
        sums = [mean, rstd, by_mean / weight.shape[1], by_spread / weight.shape[1]]
        of_states = [
            _slice_backward(segments, [one, x, *sums], [of])[0]
            for one, x, of in zip(through, states, scales, strict=True)
        ]
        joined = (torch.cat(parts, 1) for parts in (of_scale, of_shift, of_weight))
        return *joined, grad.sum(0), None, *of_states
