"""The process groups of a run: who is which data-parallel and tensor-parallel rank, and on what device.

1. The world comes from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without one it
   is a world of one, kept in memory, so that nothing listens on a port.
2. megatron-core's parallel_state divides it: consecutive ranks form a tensor-parallel group, the rest is data-parallel.
3. On the CPU, megatron-core's `torch.cuda.current_device()` is answered with the CPU: all that sequence parallelism
   lacks there.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from fitscale.config.errors import UserError
from fitscale.config.schema import ParallelConfig

Result = TypeVar("Result")
_cuda_current_device: Callable[[], int] = torch.cuda.current_device


@dataclass(frozen=True)
class Topology:
    """This process's place in the run."""

    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    rank: int
    world_size: int
    device: torch.device


def init_parallel(config: ParallelConfig, device: str = "auto", timeout: timedelta = timedelta(minutes=30)) -> Topology:
    """Join the world and divide it; a later call keeps the world, and divides it anew if the division changed.

    Args:
        config: its `tensor_parallel_size` divides the world, its `zero_hpz_partition_size` the data-parallel ranks.
        device: cpu (gloo), cuda (nccl) or auto (cuda where there is one).
        timeout: how long a collective operation waits for the other ranks.

    Raises:
        UserError: cuda is asked for and absent, or the world does not divide as `config` asks.
    """
    own_device = _choose_device(device)
    world_size = launched_ranks()
    if world_size % config.tensor_parallel_size:
        valid = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"parallel.tensor_parallel_size: {config.tensor_parallel_size} does not divide the world size of "
            f"{world_size} processes; valid: {valid}"
        )
    config.require_dp_size(world_size // config.tensor_parallel_size)
    _prepare(own_device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": world_size}
        backend = "nccl" if own_device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, **alone)  # type: ignore[arg-type]
    _divide_world(config.tensor_parallel_size, timeout)
    return Topology(
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=own_device,
    )


def launched_ranks() -> int:
    """How many processes a launcher has started as one world; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shutdown() -> None:
    """Leave the world; harmless where there is none."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.cuda.current_device = _cuda_current_device  # type: ignore[assignment]


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0 and give its result, or its UserError, to every rank; a collective over all ranks."""
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


def tp_place() -> tuple[int, int]:
    """This process's rank in its tensor-parallel group, and the group's size."""
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def tp_broadcast(number: int) -> int:
    """The number of the tensor-parallel group's first rank; a collective over the group."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return number
    told = [number]
    group = parallel_state.get_tensor_model_parallel_group()
    dist.broadcast_object_list(told, src=parallel_state.get_tensor_model_parallel_src_rank(), group=group)
    return told[0]


def _choose_device(device: str) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("run.device: cuda is asked for, but torch finds no CUDA device; valid here: cpu, auto")
    if device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _prepare(device: torch.device) -> None:
    """Settings that megatron-core, DeepSpeed and NCCL read from the process."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core overlaps by the order of launches
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.current_device = _cuda_current_device  # type: ignore[assignment]
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def _divide_world(tp_size: int, timeout: timedelta) -> None:
    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_tensor_model_parallel_world_size() == tp_size:
            return
        parallel_state.destroy_model_parallel()
    minutes = max(1, round(timeout.total_seconds() / 60))
    parallel_state.initialize_model_parallel(
        tp_size, distributed_timeout_minutes=minutes, create_gloo_process_groups=False
    )
