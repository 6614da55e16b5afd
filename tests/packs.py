"""Packs of images without labels or sizes that mean anything, for samplers of functions in closed form."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fitscale.flow.pack import ModelFn, PackShape, starts


def pack_of(indices: Sequence[int], lengths: Sequence[int]) -> PackShape:
    """Images `indices` of so many tokens, one column each."""
    sizes_S2 = torch.tensor([[length, 1] for length in lengths], dtype=torch.int32)
    return PackShape(torch.zeros(len(lengths), dtype=torch.int64), sizes_S2, starts(lengths), tuple(indices))


def of_tokens(function: Callable[[Tensor, Tensor], Tensor]) -> ModelFn:
    """function(x_TC, t_T1) as samplers call it."""
    return lambda x_TC, t_S, pack: function(x_TC, pack.spread(t_S, x_TC))
