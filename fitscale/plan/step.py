"""What a run will need and take, before a device-hour is spent: from the config alone (no torch).

1. The images of one step: from the sizes in the shards' index, or 256 tokens each where there are no shards yet.
2. They are dealt to ranks and packs by the code that training uses (`data.packing.split`).
3. Memory of one rank (memory.py), what it sends (traffic.py), FLOPs, and from these the time of a step.

The time is computing at a given utilisation of the peak, recomputed blocks, uneven ranks and padding included, and the
communication that computing does not hide.
"""

import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fitscale.config.errors import UserError
from fitscale.config.schema import Config
from fitscale.data.packing import Packing, flops_of, padded, split
from fitscale.data.sizes import token_shares
from fitscale.model import flops
from fitscale.plan.devices import Device
from fitscale.plan.memory import RankMemory, rank_memory, recomputed_blocks
from fitscale.plan.preflight import pad_multiple
from fitscale.plan.traffic import Traffic, exposed_seconds, step_traffic

ASSUMED_TOKENS = 256  # FiTv2 at 256 x 256: at most so many
RESERVED = 2 * 2**30  # CUDA's context, cuBLAS, NCCL's channels and what the allocator loses in fragments


@dataclass(frozen=True)
class Machine:
    """What is there to train on."""

    device: Device
    gpus: int
    gpus_per_node: int

    @property
    def room_bytes(self) -> float:
        """Memory of one device that a run can fill."""
        return self.device.memory_bytes - (0 if self.device.name == "cpu" else RESERVED)


@dataclass(frozen=True)
class Images:
    """Tokens of each image of a typical global batch, and where they come from."""

    tokens_B: np.ndarray
    source: str


@dataclass(frozen=True)
class Plan:
    """One layout and what it needs and takes. `config` has its precision resolved."""

    config: Config
    machine: Machine
    images: Images
    packing: Packing
    longest_pack: int  # tokens, padding included
    memory: RankMemory
    traffic: Traffic
    train_flops: int  # of a step, over all devices; true FLOPs, attention included, nothing recomputed
    compute_s: float
    exposed_s: float  # communication that computing does not hide

    @property
    def dp_size(self) -> int:
        return self.machine.gpus // self.config.parallel.tensor_parallel_size

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def images_per_s(self) -> float:
        return len(self.images.tokens_B) / self.step_s

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation of the whole step."""
        return self.train_flops / (self.step_s * self.machine.gpus * self.machine.device.peak_flops_per_s)

    @property
    def spare_bytes(self) -> float:
        """Memory left on a device at the peak; below 0, the layout does not fit."""
        return self.machine.room_bytes - self.memory.peak

    def days(self, steps: int) -> float:
        return self.step_s * steps / 86400

    def gpu_hours(self, steps: int) -> float:
        return self.step_s * steps / 3600 * self.machine.gpus


def typical_images(config: Config) -> Images:
    """A global batch whose sizes are spread as in the config's shards, or of 256-token images where there are none."""
    batch, places = config.batch.global_batch_size, [source.shards for source in config.data.sources.values()]
    absent = [place for place in places if "://" not in place and not Path(place).exists()]
    if absent or not places:
        why = f"no shards at {', '.join(absent)}" if absent else "no data.shards"
        return Images(np.full(batch, ASSUMED_TOKENS), f"assumed: {why}")
    shares = token_shares(config.data, config.model.patch_size)
    ends = np.cumsum(list(shares.values()))
    middles_B = (np.arange(batch) + 0.5) / batch * ends[-1]  # one image from every B-th part of the distribution
    tokens_B = np.array(list(shares))[np.searchsorted(ends, middles_B, side="right")]
    return Images(tokens_B, f"sizes in {', '.join(places)}")


def plan(config: Config, machine: Machine, images: Images, utilisation: float) -> Plan:
    """Plan the layout of `config.parallel` on `machine`.

    Args:
        utilisation: share of the device's peak that it reaches while it computes.

    Raises:
        UserError: the layout does not go with the number of devices or of a node's devices.
    """
    config = _resolve(config, machine)
    _check(config.parallel.tensor_parallel_size, machine)
    dp_size = machine.gpus // config.parallel.tensor_parallel_size
    multiple, tokens_B = pad_multiple(config), images.tokens_B
    packing = split(
        tokens_B,
        flops_of(tokens_B, flops.cost(config.model)),
        dp_size=dp_size,
        pack_tokens=config.batch.pack_tokens,
        pad_multiple=multiple,
    )
    packs = [(padded(int(tokens_B[pack].sum()), multiple), len(pack)) for rank in packing.packs for pack in rank]
    longest, most_images = max(packs)
    traffic = step_traffic(config, dp_size, packing.stats.packs_per_rank, sum(tokens for tokens, _ in packs) / dp_size)
    train_flops = sum(flops.train_flops(config.model, int(n)) for n in tokens_B)
    computed = computed_flops(config, train_flops, packing) / machine.gpus
    compute_s = computed / (machine.device.peak_flops_per_s * utilisation)
    return Plan(
        config=config,
        machine=machine,
        images=images,
        packing=packing,
        longest_pack=longest,
        memory=rank_memory(config, dp_size, longest, most_images, on_cuda=machine.device.name != "cpu"),
        traffic=traffic,
        train_flops=train_flops,
        compute_s=compute_s,
        exposed_s=exposed_seconds(config, traffic, dp_size, machine.device, machine.gpus_per_node, compute_s),
    )


def computed_flops(config: Config, train_flops: float, packing: Packing) -> float:
    """FLOPs of all devices if each did as much as the most loaded: with padding and recomputed blocks."""
    again = recomputed_blocks(config) / config.model.depth / flops.TRAIN_PASSES
    return train_flops * (1 + again) * (1 + packing.stats.imbalance) / (1 - packing.stats.padding_share)


def layouts(config: Config, machine: Machine, fixed: set[str]) -> list[Config]:
    """Configs of all layouts worth a look: the keys of `parallel` in `fixed` stay, the others vary.

    Tensor parallelism that does not divide heads and MLP, or leaves a node, is left out.
    """
    config = _resolve(config, machine)
    choices: dict[str, list[Any]] = {
        "tensor_parallel_size": _tensor_parallel_sizes(config, machine),
        "sequence_parallel": [False, True],
        "zero_stage": [1, 2, 3] if config.parallel.precision == "bf16" else [0, 1, 2, 3],
        "activation_checkpoint_every": [0, 1],
    }
    values = [[getattr(config.parallel, key)] if key in fixed else options for key, options in choices.items()]
    found = []
    for combination in product(*values):
        chosen: dict[str, Any] = dict(zip(choices, combination, strict=True))
        if chosen["sequence_parallel"] and chosen["tensor_parallel_size"] == 1:
            continue
        found.append(replace(config, parallel=replace(config.parallel, **chosen)))
    return found


def measured_utilisation(steps_s: float, config: Config, machine: Machine, images: Images) -> float:
    """The utilisation at which the plan of a run's own layout takes the `steps_s` seconds that its steps took.

    Raises:
        UserError: the run's communication alone is planned to take longer.
    """
    low, high = 1e-6, 1e3
    if plan(config, machine, images, high).step_s > steps_s:
        raise UserError(
            f"--measured: steps of {steps_s:.3g} s are shorter than the communication planned for that run; "
            "check --gpus-per-node"
        )
    for _ in range(100):
        middle = math.sqrt(low * high)
        too_slow = plan(config, machine, images, middle).step_s > steps_s
        low, high = (middle, high) if too_slow else (low, middle)
    return math.sqrt(low * high)


def _resolve(config: Config, machine: Machine) -> Config:
    """`auto` precision as training resolves it on this device."""
    if config.parallel.precision != "auto":
        return config
    precision = "fp32" if machine.device.name == "cpu" else "bf16"
    return replace(config, parallel=replace(config.parallel, precision=precision))


def _tensor_parallel_sizes(config: Config, machine: Machine) -> list[int]:
    heads, width = config.model.num_heads, config.model.mlp_hidden_size
    most = min(machine.gpus, machine.gpus_per_node)
    return [tp for tp in range(1, most + 1) if not (machine.gpus % tp or heads % tp or width % tp)]


def _check(tp_size: int, machine: Machine) -> None:
    if machine.gpus % tp_size:
        raise UserError(
            f"--gpus: {machine.gpus} does not divide by parallel.tensor_parallel_size = {tp_size}; "
            f"valid: multiples of {tp_size}"
        )
    if tp_size > machine.gpus_per_node:
        raise UserError(
            f"parallel.tensor_parallel_size: {tp_size} leaves a node of {machine.gpus_per_node} devices; "
            f"valid: at most {machine.gpus_per_node}"
        )
