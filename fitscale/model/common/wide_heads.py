"""q and k whose norm reaches over all heads, those of other tensor-parallel ranks included, and RoPE after it.

LayerNorm over the full width with weight and bias, as Flag-DiT has it (arXiv 2405.05945). A rank knows its own heads:
forward, the ranks tell each other the mean and the spread of theirs, backward the two means that the norm's gradient
needs. So the result is that of one rank, which norms over local heads are not.

Shapes: T tokens of the pack, D width of this rank's heads, H heads of this rank, K head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from fitscale.model.common.compiler import formula
from fitscale.model.common.fused import turn
from fitscale.model.common.regions import at_least_fp32
from fitscale.model.common.rope import Rope
from fitscale.parallel.layers import gather_tp

WIDE_EPS = 1e-5
Affine = tuple[Tensor, Tensor]  # weight and bias (D,)


def wide_turned_heads(
    q_TD: Tensor, k_TD: Tensor, q_affine: Affine, k_affine: Affine, rope: Rope
) -> tuple[Tensor, Tensor]:
    """q and k (T, H, K): normalised over the width of all ranks, times weight plus bias, turned by RoPE."""
    return _WideHeads.apply(q_TD, k_TD, *q_affine, *k_affine, *rope)


@formula
def _own_statistics(x: Tensor) -> Tensor:
    """Mean and mean squared deviation of each row, (T, 2)."""
    x = at_least_fp32(x)
    mean = x.mean(-1, keepdim=True)
    return torch.cat((mean, (x - mean).square().mean(-1, keepdim=True)), dim=-1)


@formula
def _heads_forward(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    normed = (at_least_fp32(x) - mean) * rstd * weight + bias
    return turn(normed.unflatten(-1, (-1, 2 * cos.shape[-1])), cos[:, None], sin[:, None]).to(x.dtype)


@formula
def _own_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of what was turned (T, D), it times the norm, and means of both, times the weight, (T, 2)."""
    grad = turn(grad, cos[:, None], -sin[:, None]).flatten(1)
    normed = (at_least_fp32(x) - mean) * rstd
    by_weight, through = grad * normed, grad * weight
    means = torch.cat((through.mean(-1, keepdim=True), (through * normed).mean(-1, keepdim=True)), dim=-1)
    return grad, by_weight, means


@formula
def _norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, means: Tensor) -> Tensor:
    normed = (at_least_fp32(x) - mean) * rstd
    return (rstd * (grad * weight - means[:, :1] - normed * means[:, 1:])).to(x.dtype)


class _WideHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        q_bias: Tensor,
        k_weight: Tensor,
        k_bias: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        means, spreads = _ranks([_own_statistics(q), _own_statistics(k)]).unbind(-1)  # (ranks, 2, T)
        mean = means.mean(0)
        rstd = (spreads.mean(0) + (means - mean).square().mean(0) + WIDE_EPS).rsqrt()
        statistics = [(mean[i][:, None], rstd[i][:, None]) for i in range(2)]
        ctx.save_for_backward(q, k, q_weight, k_weight, mean, rstd, cos, sin)
        out_q = _heads_forward(q, *statistics[0], q_weight, q_bias, cos, sin)
        return out_q, _heads_forward(k, *statistics[1], k_weight, k_bias, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, q_weight, k_weight, mean, rstd, cos, sin = ctx.saved_tensors
        kept = [(x, mean[i][:, None], rstd[i][:, None], (q_weight, k_weight)[i]) for i, x in enumerate((q, k))]
        own = [_own_backward(grad.contiguous(), *one, cos, sin) for grad, one in zip(grads, kept, strict=True)]
        means = _ranks([part[2] for part in own]).mean(0)
        grad_q, grad_k = (
            _norm_backward(grad, *one, mean) for (grad, _, _), one, mean in zip(own, kept, means, strict=True)
        )
        affine = [part.sum(0) for grad, by_weight, _ in own for part in (by_weight, grad)]
        return grad_q, grad_k, *affine, None, None


def _ranks(parts: list[Tensor]) -> Tensor:
    """The stacked parts of every tensor-parallel rank, (ranks, parts, T, ...)."""
    return gather_tp(torch.stack(parts)[None], 0)
