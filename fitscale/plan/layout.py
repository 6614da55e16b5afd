"""What a config's `parallel` means on so many devices of a kind: precision, ranks, and what else there is to choose.

No torch: training, `fitscale plan` and the programs that submit jobs ask here.
"""

from dataclasses import dataclass, replace
from itertools import product
from math import gcd
from typing import Any

from fitscale.config.errors import UserError
from fitscale.config.schema import Config, ParallelConfig
from fitscale.model import flops
from fitscale.plan.devices import Device

GIB = 2**30
# Training FLOPs of a run from which compiling the network's formulas pays: at some 1.1 times the speed on a CPU, where
# it takes two minutes of a core, and 1.5 times on CUDA.
COMPILED_FROM_FLOPS = {"cpu": 1e15, "cuda": 1e17}
TYPICAL_TOKENS = 256
RESERVED = 2 * GIB  # CUDA's context, cuBLAS, NCCL's channels and what the allocator loses in fragments


@dataclass(frozen=True)
class Machine:
    """What there is to train on: one rank a device."""

    device: Device
    gpus: int
    gpus_per_node: int

    def __str__(self) -> str:
        return f"{self.gpus} x {self.device.name}"

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def tp_sizes(self) -> list[int]:
        """Sizes of tensor parallelism that divide the devices and stay within a node."""
        both = gcd(self.gpus, min(self.gpus, self.gpus_per_node))
        return [n for n in range(1, both + 1) if both % n == 0]

    @property
    def has_gpus(self) -> bool:
        return self.device.name != "cpu"

    @property
    def room_bytes(self) -> float:
        """Memory of one device that a run can fill."""
        return self.device.memory_bytes - RESERVED * self.has_gpus


def resolve_precision(config: Config, on_cuda: bool) -> Config:
    """`config` with `auto` precision replaced by what it means there: bf16 on CUDA, fp32 on a CPU."""
    if config.parallel.precision != "auto":
        return config
    return replace(config, parallel=replace(config.parallel, precision="bf16" if on_cuda else "fp32"))


def resolve_compile(config: Config, on_cuda: bool) -> Config:
    """`config` with `parallel.compile` of `auto` replaced by on or off: by its own FLOPs, so that it is the same after
    every restart and on any number of ranks. Images count as if they had 256 tokens each."""
    if config.parallel.compile != "auto":
        return config
    images = config.run.steps * config.batch.global_batch_size
    run_flops = flops.train_flops(config.model, TYPICAL_TOKENS) * images
    chosen = "on" if run_flops >= COMPILED_FROM_FLOPS["cuda" if on_cuda else "cpu"] else "off"
    return replace(config, parallel=replace(config.parallel, compile=chosen))


def in_words(parallel: ParallelConfig, dp_size: int) -> str:
    """A layout for a person: dp 8 x tp 2 + sp, ZeRO 1."""
    sp = " + sp" if parallel.sequence_parallel else ""
    hpz = f", hpZ {parallel.zero_hpz_partition_size}" if parallel.zero_hpz_partition_size > 1 else ""
    return f"dp {dp_size} x tp {parallel.tensor_parallel_size}{sp}, ZeRO {parallel.zero_stage}{hpz}"


def dp_size(config: Config, machine: Machine) -> int:
    """Data-parallel ranks.

    Raises:
        UserError: tensor parallelism does not divide the devices, or leaves a node; hpZ does not divide what is left.
    """
    tp_size = config.parallel.tensor_parallel_size
    if tp_size not in machine.tp_sizes:
        raise UserError(
            f"parallel.tensor_parallel_size: {tp_size} does not divide {machine.gpus} devices, {machine.gpus_per_node} "
            f"on a node, within which it must stay; valid: {', '.join(map(str, machine.tp_sizes))}"
        )
    config.parallel.require_dp_size(machine.gpus // tp_size)
    return machine.gpus // tp_size


def layouts(config: Config, machine: Machine, fixed: set[str]) -> list[Config]:
    """Configs of all layouts worth a look: the keys of `parallel` in `fixed` stay, the others vary.

    Left out is tensor parallelism that does not divide the model, leaves a node, or leaves ranks hpZ does not divide.
    """
    divided = config.model.tp_divides.values()
    bf16 = resolve_precision(config, machine.has_gpus).parallel.precision == "bf16"
    choices: dict[str, list[Any]] = {
        "tensor_parallel_size": [n for n in machine.tp_sizes if not any(number % n for number in divided)],
        "sequence_parallel": [False, True] if config.model.cuts_tokens else [False],
        "zero_stage": [3] if config.parallel.zero_hpz_partition_size > 1 else [1, 2, 3] if bf16 else [0, 1, 2, 3],
        "activation_checkpoint_every": [0, 1],
    }
    values = [[getattr(config.parallel, key)] if key in fixed else options for key, options in choices.items()]
    combinations = [dict(zip(choices, combination, strict=True)) for combination in product(*values)]
    return [
        replace(config, parallel=replace(config.parallel, **chosen))
        for chosen in combinations
        if (chosen["tensor_parallel_size"] > 1 or not chosen["sequence_parallel"])
        and machine.gpus // chosen["tensor_parallel_size"] % config.parallel.zero_hpz_partition_size == 0
    ]
