"""Runs a function on several gloo ranks, each a process of its own.

The processes are forked from a server that has imported torch, megatron-core and DeepSpeed once (10 s), so that a
spawn costs a fraction of a second.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

PRELOAD = ["torch", "deepspeed", "megatron.core.tensor_parallel", "fitscale.train.trainer"]


def context() -> Any:
    """The forkserver all tests share."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """`[function(*args) on rank 0, on rank 1, ...]`; `function` finds torchrun's environment and must be importable.

    Raises:
        AssertionError: a rank raised (its traceback is the text), died, or took longer than `timeout_s`.
    """
    server = context()
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = server.Pipe(duplex=False)
        process = server.Process(target=_rank, args=(sender, rank, world_size, port, function, args))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return [_receive(rank, pipe, timeout_s) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(rank: int, pipe: Any, timeout_s: float) -> Any:
    assert pipe.poll(timeout_s), f"rank {rank} gave no answer in {timeout_s} s"
    try:
        result, error = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    assert error is None, f"rank {rank}:\n{error}"
    return result


def _rank(
    sender: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        sender.send((function(*args), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
