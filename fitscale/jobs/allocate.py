"""How much of a cluster a run is given: the layout that its sweep names, or the smallest that does.

Without one, `fitscale plan` decides: the fewest nodes (1, 2, 4 ...) on which some layout fits into memory and trains in
the time there is, and of those that do, the fastest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fitscale.config.errors import UserError
from fitscale.config.schema import Config
from fitscale.jobs.launch import Layout, make_layout, on_its_devices
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.sweep import LayoutConfig
from fitscale.model import flops
from fitscale.plan.devices import find_device
from fitscale.plan.step import Machine, Plan, layouts, plan, typical_images

GIB = 2**30


@dataclass(frozen=True)
class Allocation:
    """What a run is given. `config` has the layout's keys of `parallel`."""

    config: Config
    layout: Layout
    plan: Plan

    @property
    def train_gpu_hours(self) -> float:
        return self.plan.gpu_hours(self.config.run.steps)

    @property
    def evaluate_gpu_hours(self) -> float:
        """All evaluations on one device each: function evaluations of the samples, and nothing else."""
        config = self.config
        points = len(config.evaluation.steps(config.run.steps))
        if config.evaluation.features is None or not points:
            return 0.0
        per_image = self.plan.train_flops / len(self.plan.images.tokens_B) / flops.TRAIN_PASSES
        guided = 1 if config.sampling.guidance.scale == 1.0 else 2
        stages = 2 if config.sampling.method == "heun" else 1
        sampled = points * config.evaluation.samples * config.sampling.steps * guided * stages * per_image
        return sampled / (self.plan.train_flops / (self.plan.compute_s * self.plan.machine.gpus)) / 3600


def allocate(config: Config, profile: ClusterConfig, given: LayoutConfig | None, max_days: float | None) -> Allocation:
    """The nodes and the layout for `config` on the devices of `profile`.

    Raises:
        UserError: the given layout does not fit the cluster or the config, or its memory; nothing fits at all.
    """
    config = on_its_devices(config, profile)
    if given is None and not profile.gpus_per_node:
        given = LayoutConfig()  # nothing to choose between on CPUs: one node, the config's own layout
    if given is not None:
        layout = make_layout(profile, config, given.nodes, given.tasks_per_node)
        found = plan(config, machine_of(profile, layout), typical_images(config), profile.utilisation)
        if lack := memory_lack(found):
            raise UserError(lack)
        return Allocation(config, layout, found)
    one = None
    for one in _smallest_first(config, profile):
        if one.plan.spare_bytes >= 0 and (max_days is None or one.plan.days(config.run.steps) <= max_days):
            return one
    raise UserError(_nothing_fits(one, profile, max_days))


def machine_of(profile: ClusterConfig, layout: Layout) -> Machine:
    """The devices of a job, as `fitscale plan` sees them."""
    return Machine(find_device(profile.device), layout.world_size, layout.tasks_per_node)


def memory_lack(found: Plan) -> str | None:
    """By how much a plan is too large for its GPUs; None if it fits, or on CPUs, whose memory is not known."""
    if found.spare_bytes >= 0 or found.machine.device.name == "cpu":
        return None
    return (
        f"the given layout needs {found.memory.peak / GIB:.1f} GiB of a {found.machine.device.name}'s "
        f"{found.machine.room_bytes / GIB:.1f}; more tasks, a higher parallel.zero_stage, "
        "parallel.activation_checkpoint_every=1 or fewer batch.pack_tokens need less"
    )


def _smallest_first(config: Config, profile: ClusterConfig) -> Iterator[Allocation]:
    """Of every number of nodes the fastest layout that fits, or the one that lacks least."""
    images, nodes = typical_images(config), 1
    most_ranks = config.batch.global_batch_size * profile.tasks_per_node  # beyond, a rank would have no image
    while nodes <= profile.max_nodes and nodes * profile.tasks_per_node <= most_ranks:
        layout = Layout(nodes, profile.tasks_per_node)
        machine = machine_of(profile, layout)
        plans = [
            plan(one, machine, images, profile.utilisation)
            for one in layouts(config, machine, set())
            if layout.world_size // one.parallel.tensor_parallel_size <= config.batch.global_batch_size
        ]
        if plans:
            best = min(plans, key=lambda one: (one.spare_bytes < 0, max(-one.spare_bytes, 0.0), one.step_s))
            yield Allocation(_with_layout(config, best), layout, best)
        nodes *= 2


def _with_layout(config: Config, best: Plan) -> Config:
    """`config` with the plan's layout; `auto` precision stays for training to resolve."""
    return replace(config, parallel=replace(best.config.parallel, precision=config.parallel.precision))


def _nothing_fits(largest: Allocation | None, profile: ClusterConfig, max_days: float | None) -> str:
    if largest is None:
        return f"no layout of profile {profile.name} goes with the model's heads and the batch"
    found = largest.plan
    if found.spare_bytes < 0:
        return (
            f"no layout fits on 1 to {largest.layout.nodes} nodes of profile {profile.name}: the nearest needs "
            f"{found.memory.peak / GIB:.1f} GiB of {found.machine.room_bytes / GIB:.1f}; lower batch.pack_tokens"
        )
    days = found.days(largest.config.run.steps)
    return (
        f"max_days: {max_days:g}, but {largest.layout.nodes} nodes of profile {profile.name} take {days:.3g} days at "
        f"{profile.utilisation:.0%} of the peak"
    )
