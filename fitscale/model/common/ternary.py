"""Ternary linears (TerDiT, arXiv 2405.14854): every weight is -1, 0 or 1 times one learnable number of its matrix.

`model.quantise` says how a backbone's large linears hold their weights:

    none     as they are
    ternary  whole, for training: made ternary in every forward pass, with gradients straight through
    packed   ternary already, four weights a byte, for sampling: unpacked in the forward pass of each linear

A weight W is sign and zero by gamma = mean |W| of the whole matrix, all tensor-parallel ranks' parts included:
T = clip(round(W / (gamma + 1e-6)), -1, 1), and what is applied is alpha T.

A byte holds -1, 0 or 1, plus one, of four output rows, the first in bits 7-6: consecutive rows here, so that tensor
parallelism cuts the bytes in one piece; published, rows r, r + out/4, r + out/2 and r + 3 out/4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fitscale.model.common.regions import at_least_fp32
from fitscale.parallel.layers import ColumnLinear, RowLinear, split_of, tp_size, tp_sum

GAMMA_EPS = 1e-6
_SHIFTS = (6, 4, 2, 0)  # of the four values of a byte


def ternary_values(weight: Tensor, sharded: bool = False) -> Tensor:
    """-1, 0 or 1 for every weight, in fp32 or more.

    Args:
        sharded: `weight` is this tensor-parallel rank's part of the matrix; a collective of the ranks then.
    """
    total, numel = weight.abs().sum(dtype=torch.float64), weight.numel()
    if sharded:
        total, numel = tp_sum(total), numel * tp_size()
    weight = at_least_fp32(weight)
    gamma = (total / numel).to(weight.dtype)
    return (weight / (gamma + GAMMA_EPS)).round_().clamp_(-1, 1)


class _Ternary(torch.autograd.Function):
    """alpha T(W); the gradient of W is alpha times that of the result, everywhere."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alphas: Tensor, sharded: bool) -> Tensor:
        values = ternary_values(weight, sharded)
        ctx.save_for_backward(values.to(torch.int8), alphas.clone())  # ZeRO-3 takes the parameter back
        ctx.sharded = sharded
        return (values * alphas).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, alphas = ctx.saved_tensors
        of_alphas = (at_least_fp32(grad) * values).sum().view(1)
        return grad * alphas, (tp_sum(of_alphas) if ctx.sharded else of_alphas).to(alphas.dtype), None


def effective_weight(layer: nn.Module) -> Tensor:
    """alpha T of a linear below: of its `weight`, or of what is packed in it."""
    weight, alphas = layer.get_parameter("weight"), layer.get_parameter("alphas")
    if weight.dtype == torch.uint8:
        return unpack(weight).to(alphas.dtype) * alphas
    return _Ternary.apply(weight, alphas, split_of(weight) is not None)


class _TernaryParallel(nn.Module):
    """Beside a linear layer of megatron-core's, which applies its weight by `_forward_impl`."""

    def __init__(self, *arguments: Any, packed: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _make_ternary(self, packed)

    def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        applied = effective_weight(self)
        return super()._forward_impl(input, applied, **settings)  # type: ignore[misc]  # the layer's beside it


class TernaryColumnLinear(_TernaryParallel, ColumnLinear):
    """Output features are split over the tensor-parallel ranks."""


class TernaryRowLinear(_TernaryParallel, RowLinear):
    """Input features are split over the tensor-parallel ranks."""


class TernaryLinear(nn.Linear):
    """That every tensor-parallel rank has whole."""

    def __init__(self, in_features: int, out_features: int, packed: bool = False) -> None:
        super().__init__(in_features, out_features)
        _make_ternary(self, packed)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, effective_weight(self), self.bias)


def _make_ternary(layer: nn.Module, packed: bool) -> None:
    layer.alphas = nn.Parameter(torch.ones(1))
    if packed:
        whole = layer.get_parameter("weight")
        layer.weight = nn.Parameter(
            torch.zeros(len(whole) // 4, whole.shape[1], dtype=torch.uint8), requires_grad=False
        )
        vars(layer.weight).update(vars(whole))  # how megatron-core splits it


def pack(values: Tensor) -> Tensor:
    """-1, 0 and 1 (out, in) as uint8 (out / 4, in): of each byte, four consecutive rows."""
    return _packed((values + 1).to(torch.uint8).unflatten(0, (-1, 4)).unbind(1))


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`, int8 (out, in)."""
    return torch.stack(_parts(packed), dim=1).flatten(0, 1)


def pack_quarters(values: Tensor) -> Tensor:
    """-1, 0 and 1 (out, in) as uint8 (out / 4, in), as published: of each byte, a row of each quarter."""
    return _packed((values + 1).to(torch.uint8).chunk(4))


def unpack_quarters(packed: Tensor) -> Tensor:
    """The inverse of `pack_quarters`, int8 (out, in)."""
    return torch.cat(_parts(packed))


def _packed(parts: Sequence[Tensor]) -> Tensor:
    packed = torch.zeros_like(parts[0])
    for part, shift in zip(parts, _SHIFTS, strict=True):
        packed |= part << shift
    return packed


def _parts(packed: Tensor) -> list[Tensor]:
    return [((packed >> shift) & 3).to(torch.int8) - 1 for shift in _SHIFTS]


@dataclass(frozen=True)
class Linears:
    """How the large linears of a network are made: output features split, input features split, and whole."""

    column: Callable[..., ColumnLinear]
    row: Callable[..., RowLinear]
    whole: Callable[..., nn.Linear]


def linears(quantise: str) -> Linears:
    """Those of `model.quantise`; the arguments are `ColumnLinear`'s, `RowLinear`'s and `nn.Linear`'s."""
    if quantise == "none":
        return Linears(ColumnLinear, RowLinear, nn.Linear)
    packed = quantise == "packed"
    return Linears(
        partial(TernaryColumnLinear, packed=packed),
        partial(TernaryRowLinear, packed=packed),
        partial(TernaryLinear, packed=packed),
    )
