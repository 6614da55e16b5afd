"""Small collectives on Python objects, for what happens once per run."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from fitscale.config.errors import UserError

Result = TypeVar("Result")


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0 and give its result, or its UserError, to every rank."""
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[1], UserError):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]
