"""Which blocks are computed again in the backward pass, instead of keeping what is inside them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run_block(block: Callable[..., Any], index: int, every: int, *inputs: Any) -> Any:
    """`block(*inputs)`, computed again in the backward pass if `index` is a multiple of `every` > 0."""
    if every and index % every == 0 and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)
