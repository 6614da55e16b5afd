"""What a run will need and take, before a device-hour is spent: from the config alone (no torch).

1. The images of one step: from the sizes in the shards' index, or 256 tokens each where there are no shards yet.
2. They are dealt to ranks and packs by the code that training uses (`data.packing.split`).
3. Memory of one rank (memory.py), what it sends (traffic.py), FLOPs, and from these the time of a step.

The time is computing at a given utilisation of the peak, recomputed blocks, uneven ranks and padding included, and the
communication that computing does not hide.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fitscale.config.errors import UserError
from fitscale.config.schema import Config
from fitscale.data.batch_plan import OpenIndex, token_shares
from fitscale.data.index import open_index
from fitscale.data.packing import Packing, split
from fitscale.model import flops
from fitscale.plan.layout import Machine, dp_size, resolve_precision
from fitscale.plan.memory import RankMemory, rank_memory, recomputed_share
from fitscale.plan.preflight import pack_rule
from fitscale.plan.traffic import Traffic, exposed_seconds, step_traffic

ASSUMED_TOKENS = 256  # FiTv2 at 256 x 256: at most so many


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
    """One layout and what it needs and takes. `config` has its precision resolved."""

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
    compute_s: float
    exposed_s: float  # communication that computing does not hide

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
    shares = token_shares(config.data, config.model.patch_size, open_index)
    return Images(shares, batch, f"sizes in {', '.join(places)}")


def plan(config: Config, machine: Machine, images: Images, utilisation: float) -> RunPlan:
    """Plan the layout of `config.parallel` on `machine`.

    Args:
        utilisation: share of the device's peak that it reaches while it computes.

    Raises:
        UserError: the layout does not go with the number of devices or of a node's devices.
    """
    config = resolve_precision(config, machine.has_gpus)
    ranks, rule, tokens_B = dp_size(config, machine), pack_rule(config), images.tokens_B
    packing = split(tokens_B, rule, ranks)
    packs = [(rule.padded(int(tokens_B[pack].sum())), len(pack)) for rank in packing.packs for pack in rank]
    longest, most_images = max(packs)
    traffic = step_traffic(config, ranks, packing.stats.packs_per_rank, sum(tokens for tokens, _ in packs) / ranks)
    train_flops = sum(flops.train_flops(config.model, int(n)) for n in tokens_B)
    # Every device computes as long as the most loaded one, padding and recomputed blocks included.
    again = recomputed_share(config) / flops.TRAIN_PASSES
    computed = train_flops * (1 + again) * (1 + packing.stats.imbalance) / (1 - packing.stats.padding_share)
    compute_s = computed / (machine.gpus * machine.device.peak_flops_per_s * utilisation)
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
        compute_s=compute_s,
        exposed_s=exposed_seconds(config, traffic, ranks, machine, compute_s),
    )


def measured_utilisation(steps_s: float, config: Config, machine: Machine, images: Images) -> float:
    """The utilisation at which the plan of a run's own layout takes the `steps_s` seconds that its steps took.

    Raises:
        UserError: the run's communication alone is planned to take longer.
    """
    from scipy.optimize import brentq

    def late_s(log_share: float) -> float:
        return plan(config, machine, images, math.exp(log_share)).step_s - steps_s

    high = math.log(1e3)
    if late_s(high) > 0:
        raise UserError(
            f"--measured: steps of {steps_s:.3g} s are shorter than the communication planned for that run; "
            "check --gpus-per-node"
        )
    alone = plan(config, machine, images, 1.0).compute_s / steps_s  # at which computing alone takes so long
    return math.exp(brentq(late_s, math.log(alone) - 0.01, high))
