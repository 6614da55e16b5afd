"""What a block does besides matrix products and attention, forward and backward, with few passes over memory.

Each region is one autograd function around two formulas, which a compiler makes one kernel each (`compiler`); as they
are written they are a few operators. Kept for the backward pass are a region's inputs and the statistics of its norms:
what follows from them is computed again where it is used.

Shapes: T tokens of this rank, S images, D hidden size, M width of the MLP, H heads of this rank, K head dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitscale.model.common.compiler import formula
from fitscale.model.common.layout import Segments
from fitscale.model.common.regions import (
    Biased,
    at,
    at_least_fp32,
    bias_gradient,
    biased,
    ready,
    sum_per_image,
    with_vectors,
)
from fitscale.model.common.rope import Rope

NORM_EPS = 1e-6
RMS_EPS = 1e-5  # RMSNorm's, as Flag-DiT has it


def modulate(
    x_TD: Tensor, shift_SD: Tensor, scale_SD: Tensor, segments: Segments, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """x and norm(x) * (1 + scale) + shift. Who goes on with x takes it from here: its gradient is added here.

    The norm is LayerNorm or, if `rms`, x / sqrt(mean(x^2) + RMS_EPS); a weight of its own is part of `scale_SD`.
    """
    return _Modulate.apply(x_TD, shift_SD, scale_SD, segments, rms)


def gate(x_TD: Tensor, branch: Biased, gate_SD: Tensor, segments: Segments) -> Tensor:
    """x + gate * branch."""
    return _Gate.apply(x_TD, *ready(branch), gate_SD, segments)


def gate_modulate(
    x_TD: Tensor,
    branch: Biased,
    gate_SD: Tensor,
    shift_SD: Tensor,
    scale_SD: Tensor,
    segments: Segments,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """`modulate` of `gate`."""
    return _GateModulate.apply(x_TD, *ready(branch), gate_SD, shift_SD, scale_SD, segments, rms)


def swiglu(gate_TM: Biased, up_TM: Biased) -> Tensor:
    """SiLU(gate) * up."""
    return _Gated.apply(False, *ready(gate_TM), *ready(up_TM))


def geglu(gate_TM: Biased, up_TM: Biased) -> Tensor:
    """GELU(gate) * up; exact GELU."""
    return _Gated.apply(True, *ready(gate_TM), *ready(up_TM))


def turned_heads(
    qkv: Biased, heads: tuple[int, int], rope: Rope, norms: tuple[Tensor, Tensor] | None, normed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (T, H, K): q and k LayerNormed over K, if `normed`, and turned by RoPE.

    Args:
        qkv: rows head by head, (T, H 3 K); the two numbers of a pair that RoPE turns are K/2 apart.
        heads: H and K.
        norms: the norms' weights (K,).
    """
    product, bias = ready(qkv)
    shape = (heads[0], 3, heads[1])
    bias = None if bias is None else bias.view(shape)
    return _TurnedHeads.apply(product.unflatten(-1, shape), bias, *rope, *(norms or (None, None)), normed)


# ---------------------------------------------------------------------------------------------------------- formulas


@with_vectors
def _modulate_forward(image_T: Tensor | None, x: Tensor, shift: Tensor, scale: Tensor, rms: bool) -> tuple[Tensor, ...]:
    shift, scale = at(image_T, shift, scale)
    return _norm(x, shift, scale, rms)


@with_vectors
def _modulate_backward(
    image_T: Tensor | None,
    grad: Tensor,
    grad_x: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    rms: bool,
) -> tuple[Tensor, ...]:
    (scale,) = at(image_T, scale)
    return _norm_backward(grad, grad_x, x, mean, rstd, scale, rms)


@with_vectors
def _gate_forward(
    image_T: Tensor | None, x: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor
) -> tuple[Tensor, ...]:
    (gate,) = at(image_T, gate)
    return (torch.addcmul(x, biased(branch, bias), gate),)


@with_vectors
def _gate_backward(image_T: Tensor | None, grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    (gate,) = at(image_T, gate)
    return grad * gate, grad * branch


@with_vectors
def _gate_modulate_forward(
    image_T: Tensor | None,
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    rms: bool,
) -> tuple[Tensor, ...]:
    gate, shift, scale = at(image_T, gate, shift, scale)
    x = torch.addcmul(x, biased(branch, bias), gate)
    return x, *_norm(x, shift, scale, rms)


@with_vectors
def _gate_modulate_backward(
    image_T: Tensor | None,
    grad: Tensor,
    grad_x: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch: Tensor,
    scale: Tensor,
    gate: Tensor,
    rms: bool,
) -> tuple[Tensor, ...]:
    scale, gate = at(image_T, scale, gate)
    grad_x, by_normed = _norm_backward(grad, grad_x, x, mean, rstd, scale, rms)
    return grad_x, by_normed, grad_x * gate, grad_x * branch


@formula
def _gate_and_bias(gate: Tensor, grad_gate: Tensor, sums: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return (gate * sums).sum(0), torch.addcmul(grad_gate, sums, bias)


@formula
def _gated_forward(gelu: bool, g: Tensor, g_bias: Tensor | None, u: Tensor, u_bias: Tensor | None) -> Tensor:
    return (F.gelu if gelu else F.silu)(biased(g, g_bias)) * biased(u, u_bias)


@formula
def _gated_backward(
    gelu: bool, grad: Tensor, g: Tensor, g_bias: Tensor | None, u: Tensor, u_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    g, u = biased(g, g_bias), biased(u, u_bias)
    if gelu:
        return torch.ops.aten.gelu_backward(grad * u, g), grad * F.gelu(g)
    return torch.ops.aten.silu_backward(grad * u, g), grad * F.silu(g)


@formula
def _heads_forward(
    qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, weights: Tensor | None, normed: bool
) -> tuple[Tensor, Tensor]:
    """q and k, (T, H, 2, K), and v."""
    qkv = biased(qkv, bias)
    qk = qkv[:, :, :2]
    if normed:
        qk = _layer_norm(qk)[0]
        qk = qk if weights is None else qk * weights
    return turn(qk, cos[:, None, None], sin[:, None, None]).to(qkv.dtype), qkv[:, :, 2].contiguous()


@formula
def _heads_backward(
    grads: list[Tensor],
    qkv: Tensor | None,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of qkv (only norms need its value), and those of the weights, not summed over tokens and heads yet."""
    *turned, grad_v = grads
    cos, sin, parts, by_weight = cos[:, None], sin[:, None], [], []
    for number, grad in enumerate(turned):
        grad = turn(grad, cos, -sin)
        if qkv is not None:
            x = at_least_fp32(biased(qkv[:, :, number], None if bias is None else bias[:, number]))
            normed, mean, rstd = _layer_norm(x)
            if weights is not None:
                by_weight.append((grad * normed).to(grad_v.dtype))
                grad = grad * weights[number]
            grad = _layer_norm_backward(grad, x, normed, mean, rstd)
        parts.append(grad.to(grad_v.dtype))
    return torch.stack([*parts, grad_v], dim=2), by_weight


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (first half, second half of the last dimension) by their angles, in fp32 or more."""
    pairs = at_least_fp32(x).unflatten(-1, (2, -1))
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    signed = torch.where(torch.arange(2, device=sin.device)[:, None] == 0, -sin, sin)
    return torch.addcmul(pairs * cos, pairs.flip(-2), signed).flatten(-2)


def _layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm without weights: normalised x, its mean and 1 / standard deviation.

    torch's own operator is the fastest as it stands, but compiles to Welford's recurrence, which is slow on CPUs.
    """
    if not torch.compiler.is_compiling():
        return torch.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
    x = at_least_fp32(x)
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rstd = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return centred * rstd, mean, rstd


def _layer_norm_backward(grad: Tensor, x: Tensor, normed: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of x, the input of a `_layer_norm`."""
    if not torch.compiler.is_compiling():
        return torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
    grad = at_least_fp32(grad)
    by_mean, by_spread = grad.mean(-1, keepdim=True), (grad * normed).mean(-1, keepdim=True)
    return rstd * (grad - by_mean - normed * by_spread)


def _rms_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm without weights, in fp32 or more, as `_layer_norm`; its mean is 0."""
    x = at_least_fp32(x)
    rstd = (x.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()
    return x * rstd, torch.zeros_like(rstd), rstd


def _rms_norm_backward(grad: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    grad = at_least_fp32(grad)
    return rstd * (grad - normed * (grad * normed).mean(-1, keepdim=True))


def _norm(x: Tensor, shift: Tensor, scale: Tensor, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Modulated, and the norm's mean and 1 / standard deviation."""
    normed, mean, rstd = _rms_norm(x) if rms else _layer_norm(x)
    return torch.addcmul(shift.to(normed.dtype), normed, 1 + scale).to(x.dtype), mean, rstd


def _norm_backward(
    grad: Tensor, grad_x: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, rms: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x, added to `grad_x`; and grad * norm(x), the scale's before it is summed."""
    normed, scaled = (x - mean) * rstd, grad * (1 + scale)
    through = _rms_norm_backward(scaled, normed, rstd) if rms else _layer_norm_backward(scaled, x, normed, mean, rstd)
    return (through + grad_x).to(x.dtype), (grad * normed).to(x.dtype)


# ----------------------------------------------------------------------------------------------- autograd functions


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, segments: Segments, rms: bool
    ) -> tuple[Tensor, Tensor]:
        out, mean, rstd = _modulate_forward(segments, [x], [shift, scale], rms)
        ctx.save_for_backward(x, mean, rstd, scale)
        ctx.segments, ctx.rms = segments, rms
        return x.view_as(x), out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, rstd, scale = ctx.saved_tensors
        segments = ctx.segments
        grad_x, by_normed = _modulate_backward(segments, [grad, grad_x, x, mean, rstd], [scale], ctx.rms)
        return grad_x, sum_per_image(grad, segments), sum_per_image(by_normed, segments), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor, segments: Segments) -> Tensor:
        (out,) = _gate_forward(segments, [x, branch, bias], [gate])
        ctx.save_for_backward(branch, bias, gate)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        branch, bias, gate = ctx.saved_tensors
        grad_branch, by_branch = _gate_backward(ctx.segments, [grad, branch], [gate])
        return grad, grad_branch, *_gate_gradients(grad, by_branch, bias, gate, ctx.segments), None


class _GateModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        segments: Segments,
        rms: bool,
    ) -> tuple[Tensor, Tensor]:
        x, out, mean, rstd = _gate_modulate_forward(segments, [x, branch, bias], [gate, shift, scale], rms)
        ctx.save_for_backward(x, mean, rstd, branch, bias, gate, scale)
        ctx.segments, ctx.rms = segments, rms
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, rstd, branch, bias, gate, scale = ctx.saved_tensors
        segments = ctx.segments
        grad_x, by_normed, grad_branch, by_branch = _gate_modulate_backward(
            segments, [grad, grad_x, x, mean, rstd, branch], [scale, gate], ctx.rms
        )
        of_bias_and_gate = _gate_gradients(grad_x, by_branch, bias, gate, segments)
        of_norm = sum_per_image(grad, segments), sum_per_image(by_normed, segments)
        return grad_x, grad_branch, *of_bias_and_gate, *of_norm, None, None


def _gate_gradients(
    grad: Tensor, by_branch: Tensor, bias: Tensor | None, gate: Tensor, segments: Segments
) -> tuple[Tensor | None, Tensor]:
    """Gradients of a branch's bias and of its gate, from that of x + gate * (branch + bias), and it times branch."""
    grad_gate = sum_per_image(by_branch, segments)
    if bias is None:
        return None, grad_gate
    return _gate_and_bias(gate, grad_gate, sum_per_image(grad, segments), bias)


class _TurnedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        normed: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = None if q_weight is None or k_weight is None else torch.stack((q_weight, k_weight))
        qk, v = _heads_forward(qkv, bias, cos, sin, weights, normed)
        ctx.save_for_backward(*((qkv, bias) if normed else (None, None)), cos, sin, weights)
        return qk[:, :, 0], qk[:, :, 1], v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = ctx.saved_tensors
        grad, by_weight = _heads_backward([grad.contiguous() for grad in grads], *kept)
        of_bias = grad.sum(0) if ctx.needs_input_grad[1] else None
        of_weights = [by.sum((0, 1)) for by in by_weight] or [None, None]
        return grad, of_bias, None, None, *of_weights, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gelu: bool, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.gelu = gelu
        return _gated_forward(gelu, *inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = ctx.saved_tensors
        _, g_bias, _, u_bias = kept
        grad_g, grad_u = _gated_backward(ctx.gelu, grad, *kept)
        return None, grad_g, bias_gradient(grad_g, g_bias), grad_u, bias_gradient(grad_u, u_bias)
