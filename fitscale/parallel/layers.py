"""The only door to megatron-core's layers: linears split over the tensor-parallel (TP) group, and what enters them.

A pair of linears shares its work: `ColumnLinear` holds some rows of its weight and gives every rank some output
features; `RowLinear` holds the columns that go with them and adds up the ranks' results. Between the pairs, tokens are
either whole on every rank or, with sequence parallelism (SP), cut into equal runs (`scatter_tokens`, `gather_tokens`).

A replicated parameter that is used on only some tokens, as all are under SP, has only a share of its gradient on each
rank. `enter_sharded` mends that: it is the identity, and its backward pass adds up the shares.

Both linears leave the bias to their caller (`skip_bias_add`), for three reasons: it is added where the product is read
next, without a pass of its own; under SP the row bias must enter through `enter_sharded`; and megatron-core loses a
bias's gradient where the weight is frozen.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

tp_rank = parallel_state.get_tensor_model_parallel_rank  # in the tensor-parallel group
tp_size = parallel_state.get_tensor_model_parallel_world_size


class ColumnLinear(ColumnParallelLinear):
    """Linear whose output features are split over TP: (T or T/tp, in) -> (T, out/tp); gathers the tokens under SP.

    The weight is set by whoever owns the model; megatron-core's own initialisation only marks how it is cut.
    """

    get_extra_state = nn.Module.get_extra_state  # none: megatron-core's is empty, for Transformer Engine

    def __init__(self, in_features: int, out_features: int, sequence_parallel: bool, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias, **_settings(sequence_parallel))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product, and the bias, if any, that is to be added to it: by whoever reads it anyway."""
        out, bias = super().forward(x)
        return out, _outlasting(bias)


class RowLinear(RowParallelLinear):
    """Linear whose input features are split over TP: (T, in/tp) -> (T, out), or (T/tp, out) under SP."""

    get_extra_state = nn.Module.get_extra_state  # none: megatron-core's is empty, for Transformer Engine

    def __init__(self, in_features: int, out_features: int, sequence_parallel: bool, bias: bool = True) -> None:
        settings = _settings(sequence_parallel)
        super().__init__(in_features, out_features, bias=bias, input_is_parallel=True, **settings)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `ColumnLinear.forward`."""
        out, bias = super().forward(x)
        return out, _outlasting(enter_sharded(bias) if self.sequence_parallel and bias is not None else bias)


def _outlasting(bias: Tensor | None) -> Tensor | None:
    """A bias that can be used when its module's forward pass is over: ZeRO-3 takes parameters away then."""
    if bias is None:
        return None
    return bias.clone() if hasattr(bias, "ds_id") or bias._base is not None else bias


class SplitVectors(nn.Module):
    """A weight and a bias of `numel` numbers, split over TP as the output features of a `ColumnLinear` are."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(numel // tp_size())) for _ in range(2))
        for parameter in (self.weight, self.bias):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight.clone(), self.bias.clone()  # ZeRO-3 takes them back


class _EnterSharded(torch.autograd.Function):
    """megatron-core's version sums in place, which corrupts a shared gradient, and skips strided tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def enter_sharded(x: Tensor) -> Tensor:
    """x itself, replicated over TP; its gradient is the sum of the TP ranks' gradients."""
    return _EnterSharded.apply(x, parallel_state.get_tensor_model_parallel_group())


def tp_sum(value: Tensor) -> Tensor:
    """The sum of the TP ranks' values, in place; no gradient."""
    if tp_size() > 1:
        dist.all_reduce(value, group=parallel_state.get_tensor_model_parallel_group())
    return value


def scatter_tokens(x_TD: Tensor) -> Tensor:
    """This rank's run of the tokens, (T/tp, D); T must divide by the TP size. The gradient is gathered."""
    return mappings.scatter_to_sequence_parallel_region(x_TD)


def gather_tokens(x_TD: Tensor) -> Tensor:
    """All tokens, (T, D), from every rank's run, for replicated work: the gradient is cut, not summed."""
    return mappings.gather_from_sequence_parallel_region(x_TD, tensor_parallel_output_grad=False)


def gather_tp(value: Tensor, split: int | None) -> Tensor:
    """`value`, this rank's shard of a tensor that is split in dimension `split`, joined over TP on every TP rank.

    A collective operation of the TP group; `value` must be on the group's device. None: it is whole already.
    """
    if split is None or tp_size() == 1:
        return value
    shards = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(tp_size())]
    dist.all_gather(shards, value.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards, dim=split)


def tp_shard(full: Tensor, split: int | None) -> Tensor:
    """This rank's shard of a full tensor: the inverse of `gather_tp`."""
    return full if split is None else full.chunk(tp_size(), dim=split)[tp_rank()]


def split_of(param: Tensor) -> int | None:
    """The dimension in which megatron-core's layers split a parameter over TP; None if every rank has all of it."""
    return param.partition_dim if getattr(param, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def set_value(param: Tensor, shard: Tensor) -> None:
    """Set a parameter to this rank's shard; under ZeRO-3, to the part of it that this rank keeps. Local."""
    if hasattr(param, "ds_tensor"):
        part = kept_part(param, shard)
        param.ds_tensor.data[: len(part)].copy_(part)
        param.ds_secondary_tensor = None  # type: ignore[attr-defined]  # hpZ's copy, which would be gathered instead
    else:
        param.data.copy_(shard)


def kept_part(param: Tensor, shard: Tensor) -> Tensor:
    """What this rank keeps under ZeRO-3 of a parameter's shard, flat; the last rank's is short by the padding."""
    kept = param.ds_tensor.ds_numel  # type: ignore[attr-defined]
    return shard.flatten()[kept * parallel_state.get_data_parallel_rank() :][:kept]


def _settings(sequence_parallel: bool) -> dict[str, Any]:
    """What both linears are to megatron-core: weights that it leaves as they are, a bias that it leaves to us."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=tp_size(),
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    return {"config": config, "init_method": lambda weight: None, "skip_bias_add": True}
