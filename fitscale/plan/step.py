"""What a run will need and take, before a device-hour is spent: from the config alone (no torch).

1. The images of one step: from the sizes in the shards' index, or 256 tokens each where there are no shards yet.
2. They are dealt to ranks and packs by the code that training uses (`data.packing.split`).
3. Memory of one rank (memory.py), what it sends (traffic.py), FLOPs, and from these the time of a step.

The time is computing at a given utilisation of the peak, recomputed blocks, uneven ranks and padding included, and the
communication that computing does not hide. No step takes less than Python needs to launch its kernels: what makes a
small model slow. A GPU computes while Python runs ahead, so the longer of the two counts; on a CPU both do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fitscale.config.errors import UserError
from fitscale.config.schema import Config
from fitscale.data.batch_plan import token_shares
from fitscale.data.encoding import indices_of
from fitscale.data.index import OpenIndex, open_index
from fitscale.data.packing import Packing, split
from fitscale.model import flops
from fitscale.model.backbone import parameter_table
from fitscale.plan.layout import Machine, dp_size, resolve_compile, resolve_precision
from fitscale.plan.memory import RankMemory, block_count, rank_memory, recomputed_blocks, recomputed_share
from fitscale.plan.preflight import pack_rule
from fitscale.plan.traffic import Traffic, exposed_seconds, step_traffic

ASSUMED_TOKENS = 256  # FiTv2 at 256 x 256: at most so many
# What launching takes, whatever the size of the tensors. Kernels: of a block of FiTv2, counted in its forward pass and
# in its backward pass by tools/bench_step.py, with products and one attention; compiled, and as it is written. Seconds:
# PyTorch's 5 to 10 us a kernel on current hosts, and what DeepSpeed's hooks with one collective take for a tensor of
# ZeRO-3: estimates, to be replaced by measurements.
FORWARD_KERNELS, BACKWARD_KERNELS = {"on": 16, "off": 42}, {"on": 46, "off": 88}
KERNEL_S, GATHER_S = 7e-6, 1e-4
NEXT_TO = 1.05  # a time so many times the least counts as the same
STEP_S = 5e-3  # clipping, the optimizer, logging, once a step


@dataclass(frozen=True)
class Images:
    """The images that a config trains on: how many tokens they have, and how that is known."""

    shares: dict[int, float]  # tokens of an image: share of the images that have so many, in ascending order; add to 1
    batch_size: int
    source: str

    @cached_property
    def tokens_B(self) -> np.ndarray:
        """Tokens of each image of a typical global batch: one image from every B-th part of the distribution."""
        ends = np.cumsum(list(self.shares.values()))
        middles_B = (np.arange(self.batch_size) + 0.5) / self.batch_size * ends[-1]
        return np.array(list(self.shares))[np.searchsorted(ends, middles_B, side="right")]


@dataclass(frozen=True)
class RunPlan:
    """One layout and what it needs and takes. `config` has its precision and its compiling resolved."""

    config: Config
    machine: Machine
    images: Images
    utilisation: float  # share of the peak reached while computing
    dp_size: int
    packing: Packing
    longest_pack: int  # tokens, padding included
    memory: RankMemory
    traffic: Traffic
    train_flops: int  # of a step, over all devices; true FLOPs, attention included, nothing recomputed
    busy_s: float  # in which the most loaded device computes
    launch_s: float  # in which Python launches what it computes
    exposed_s: float  # communication that computing does not hide

    @property
    def compute_s(self) -> float:
        """From the first kernel's launch to the last one's end."""
        return max(self.busy_s, self.launch_s) if self.machine.has_gpus else self.busy_s + self.launch_s

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

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.step_s * self.config.run.steps / 86400

    @property
    def gpu_hours(self) -> float:
        return 24 * self.days * self.machine.gpus


def typical_images(config: Config, open_index: OpenIndex = open_index) -> Images:
    """Images of the sizes in the config's shards, or of 256 tokens each where there are none."""
    batch, places = config.batch.global_batch_size, [source.shards for source in config.data.sources.values()]
    absent = [place for place in places if "://" not in place and not Path(place).exists()]
    if absent or not places:
        why = f"no shards at {', '.join(absent)}" if absent else "no data.shards"
        return Images({ASSUMED_TOKENS: 1.0}, batch, f"assumed: {why}")
    shares = token_shares(config.data, config.model.patch_size, indices_of(config.data, open_index))
    return Images(shares, batch, f"sizes in {', '.join(places)}")


def plan(config: Config, machine: Machine, images: Images, utilisation: float) -> RunPlan:
    """Plan the layout of `config.parallel` on `machine`.

    Args:
        utilisation: share of the device's peak that it reaches while it computes.

    Raises:
        UserError: the layout does not go with the number of devices or of a node's devices.
    """
    config = resolve_compile(resolve_precision(config, machine.has_gpus), machine.has_gpus)
    ranks, rule, tokens_B = dp_size(config, machine), pack_rule(config), images.tokens_B
    packing = split(tokens_B, rule, ranks)
    packs = [(rule.padded(int(tokens_B[pack].sum())), len(pack)) for rank in packing.packs for pack in rank]
    longest, most_images = max(packs)
    traffic = step_traffic(config, ranks, packing.stats.packs_per_rank, sum(tokens for tokens, _ in packs) / ranks)
    train_flops = sum(flops.train_flops(config.model, int(n)) for n in tokens_B)
    # Every device computes as long as the most loaded one, padding and recomputed blocks included.
    again = recomputed_share(config) / flops.TRAIN_PASSES
    computed = train_flops * (1 + again) * (1 + packing.stats.imbalance) / (1 - packing.stats.padding_share)
    busy_s = computed / (machine.gpus * machine.device.peak_flops_per_s * utilisation)
    return RunPlan(
        config=config,
        machine=machine,
        images=images,
        utilisation=utilisation,
        dp_size=ranks,
        packing=packing,
        longest_pack=longest,
        memory=rank_memory(config, ranks, longest, most_images, on_cuda=machine.has_gpus),
        traffic=traffic,
        train_flops=train_flops,
        busy_s=busy_s,
        launch_s=launch_seconds(config, packing.stats.packs_per_rank),
        exposed_s=exposed_seconds(config, traffic, ranks, machine, busy_s),
    )


def launch_seconds(config: Config, micro_batches: int) -> float:
    """Time in which Python launches the kernels of one step; compiling must be resolved."""
    blocks, again = block_count(config), recomputed_blocks(config)
    forward, backward = FORWARD_KERNELS[config.parallel.compile], BACKWARD_KERNELS[config.parallel.compile]
    kernels = blocks * (forward + backward) + again * forward
    gathers = 2 * len(parameter_table(config.model)) if config.parallel.zero_stage == 3 else 0
    return STEP_S + micro_batches * (kernels * KERNEL_S + gathers * GATHER_S)


def simplest(plans: Sequence[RunPlan]) -> RunPlan:
    """Of the plans that are next to the fastest the one that asks least of DeepSpeed and megatron-core.

    The model of time is not as exact as the difference; a lower ZeRO stage and less tensor parallelism have fewer ways
    to be slower than planned.
    """

    def effort(one: RunPlan) -> tuple[float, ...]:
        layout = one.config.parallel
        choices = layout.zero_stage, layout.tensor_parallel_size, layout.sequence_parallel
        return (*choices, layout.activation_checkpoint_every, one.step_s)

    fastest_s = min(one.step_s for one in plans)
    return min((one for one in plans if one.step_s <= NEXT_TO * fastest_s), key=effort)


def measured_utilisation(steps_s: float, config: Config, machine: Machine, images: Images) -> float:
    """The utilisation at which the plan of a run's own layout takes the `steps_s` seconds that its steps took.

    Raises:
        UserError: the run's communication, or launching its kernels, is planned to take longer.
    """
    from scipy.optimize import brentq

    def late_s(log_share: float) -> float:
        return plan(config, machine, images, math.exp(log_share)).step_s - steps_s

    high = math.log(1e3)
    if late_s(high) > 0:
        raise UserError(
            f"--measured: steps of {steps_s:.3g} s are shorter than the communication or the launching of kernels "
            "planned for that run, whatever its utilisation; check --gpus-per-node, or measure a larger model"
        )
    alone = plan(config, machine, images, 1.0).busy_s / steps_s  # at which computing alone takes so long
    return math.exp(brentq(late_s, math.log(alone) - 0.01, high))
