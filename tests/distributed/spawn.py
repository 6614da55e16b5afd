"""Runs a function on several gloo ranks, each a process of its own.

The processes are forked from a server that has imported torch, megatron-core and DeepSpeed once (10 s), so that a
spawn costs a fraction of a second.
"""

import atexit
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from tests.waiting import LIMIT_S

PRELOAD = ["tests.distributed.preload"]


def context() -> Any:
    """The forkserver all tests share."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def train_here(config: Any) -> None:
    """To run on ranks: `fitscale train`."""
    from fitscale.train.trainer import train

    train(config)


def main_here(*arguments: object) -> None:
    """To run on ranks: `fitscale ARGUMENTS`, which has to end well."""
    from fitscale.cli import main

    code = main([str(argument) for argument in arguments])
    assert code == 0, f"exit code {code}"


def start_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Processes of `function(*args)`, one a rank, with torchrun's environment; each has the end of a pipe, `answer`.

    As under torchrun they meet at a store of the process that starts them, whose port nobody else can have taken.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [_start(function, args, rank, world_size, store) for rank in range(world_size)]


def _start(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, store: Any) -> Any:
    server = context()
    answer, sender = server.Pipe(duplex=False)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": store.host}
    environment |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    process = server.Process(target=_rank, args=(sender, environment, function, args))
    process.start()
    sender.close()
    process.answer, process.store = answer, store  # the store lives as long as its ranks
    atexit.register(process.kill)  # else a rank that a failed test leaves behind is waited for
    return process


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`[function(*args) on rank 0, on rank 1, ...]`; `function` finds torchrun's environment and must be importable.

    Raises:
        AssertionError: a rank raised (its traceback is the text), died, or hangs.
    """
    processes = start_ranks(function, world_size, *args)
    try:
        return [_receive(rank, process.answer) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(rank: int, pipe: Any) -> Any:
    assert pipe.poll(LIMIT_S), f"rank {rank} gave no answer in {LIMIT_S:.0f} s"
    try:
        result, error = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    assert error is None, f"rank {rank}:\n{error}"
    return result


def _rank(sender: Any, environment: dict[str, Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        sender.send((function(*args), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
