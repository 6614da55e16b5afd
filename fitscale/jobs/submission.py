"""A run that a command is about to start: looked at once, given its part of a cluster, and passed along.

A run is given the layout that it is told, or the smallest that does. Without one, `fitscale plan` decides: the fewest
nodes (1, 2, 4 ...) on which some layout fits into memory and trains in the time there is, and of those the fastest.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError
from fitscale.config.schema import Config
from fitscale.data.index import OpenIndex
from fitscale.jobs.profile import ClusterConfig, LayoutConfig
from fitscale.model import flops
from fitscale.plan.evaluation import EvaluationPlan, plan_evaluation
from fitscale.plan.layout import GIB, Machine, dp_size, in_words, layouts
from fitscale.plan.preflight import open_data, require_files
from fitscale.plan.step import Images, RunPlan, plan, simplest, typical_images
from fitscale.run.layout import RunDir
from fitscale.run.progress import Progress, progress

_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, ""))


@dataclass(frozen=True)
class Submission:
    """One run, of a sweep or by itself."""

    config: Config
    images: Images

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.config.run.dir))

    @property
    def name(self) -> str:
        """The run directory's, and the cell's in a sweep."""
        return self.run.path.name

    @property
    def progress(self) -> Progress:
        """As the run directory has it now."""
        return progress(self.config, self.run)

    @property
    def train_flops(self) -> float:
        """FLOPs of the whole training run: 6 per multiply-accumulate, each image with its own number of tokens."""
        model, shares = self.config.model, self.images.shares
        per_image = sum(share * flops.train_flops(model, tokens) for tokens, share in shares.items())
        return per_image * self.images.batch_size * self.config.run.steps

    @property
    def costs(self) -> dict[str, str]:
        """What a person is told of it before it starts."""
        run, images, evaluated = self.config.run, self.images, self.config.evaluation.steps(self.config.run.steps)
        shown = evaluated if len(evaluated) <= 4 else [*evaluated[:2], "...", evaluated[-1]]
        return self._sizes | {
            "images": f"{run.steps * images.batch_size:,}",
            "tokens/image": f"{sum(tokens * share for tokens, share in images.shares.items()):.1f}",
            "evaluated at steps": " ".join(map(str, shown)) or "-",
        }

    @property
    def _sizes(self) -> dict[str, str]:
        parameters = flops.parameters(self.config.model)
        scale, unit = next((scale, unit) for scale, unit in _UNITS if parameters >= scale)
        steps, train_flops = f"{self.config.run.steps:,}", f"{self.train_flops:.3g}"
        return {"params": f"{parameters / scale:.3g}{unit}", "steps": steps, "FLOPs": train_flops}

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest of a sweep says of it."""
        run, parameters = self.config.run, flops.parameters(self.config.model)
        return {"run_dir": run.dir, "parameters": parameters, "steps": run.steps, "train_flops": self.train_flops}


@dataclass(frozen=True)
class Allocation(Submission):
    """A run and what it is given. `config` has the layout's keys of `parallel`; `auto` precision stays for training."""

    plan: RunPlan
    evaluation: EvaluationPlan

    def machine_of(self, kind: str) -> Machine:
        """The devices of its jobs of a kind, train or evaluate."""
        return self.plan.machine if kind == "train" else self.evaluation.machine

    def __str__(self) -> str:
        machine, ranks = self.plan.machine, self.plan.dp_size
        return (
            f"{machine.nodes} nodes x {machine.gpus_per_node} tasks = {machine.gpus} ranks: "
            f"{in_words(self.config.parallel, ranks)}; {self.images.batch_size / ranks:.4g} images a rank and step"
        )

    @property
    def evaluate_gpu_hours(self) -> float:
        """All evaluations."""
        return len(self.config.evaluation.steps(self.config.run.steps)) * self.evaluation.gpu_hours

    @property
    def costs(self) -> dict[str, str]:
        machine, layout = self.plan.machine, self.config.parallel
        sp = "+sp" if layout.sequence_parallel else ""
        hpz = f" hpZ{layout.zero_hpz_partition_size}" if layout.zero_hpz_partition_size > 1 else ""
        return self._sizes | {
            "nodes": f"{machine.nodes} x {machine.gpus_per_node}",
            "layout": f"dp{self.plan.dp_size} tp{layout.tensor_parallel_size}{sp} ZeRO{layout.zero_stage}{hpz}",
            "GiB": f"{self.plan.memory.peak / GIB:.1f}",
            "s/step": f"{self.plan.step_s:.3g}",
            "days": f"{self.plan.days:.3g}",
            "GPU-hours": f"{self.plan.gpu_hours:,.3g}",
            "evaluate": f"{self.evaluate_gpu_hours:,.3g}" if self.evaluate_gpu_hours else "-",
        }

    @property
    def record(self) -> dict[str, Any]:
        nodes, tasks = self.plan.machine.nodes, self.plan.machine.gpus_per_node
        return super().record | {"nodes": nodes, "tasks_per_node": tasks, "gpu_hours": self.plan.gpu_hours}

    @property
    def memory_lack(self) -> str | None:
        """By how much it is too large for its GPUs; None if it fits, or on CPUs, whose memory is not known."""
        machine = self.plan.machine
        if self.plan.spare_bytes >= 0 or not machine.has_gpus:
            return None
        return (
            f"the given layout needs {self.plan.memory.peak / GIB:.1f} GiB of a {machine.device.name}'s "
            f"{machine.room_bytes / GIB:.1f}; more tasks, a higher parallel.zero_stage, "
            "parallel.activation_checkpoint_every=1 or fewer batch.pack_tokens need less"
        )


def look_at(config: Config, open_index: OpenIndex) -> Submission:
    """Look at all that the run of `config` and its evaluations will read.

    Args:
        open_index: opens each shard set once, however many runs of the command share it.

    Raises:
        UserError: something is not there, or does not fit: what is wrong is said here, not in the job.
    """
    open_data(config, open_index)
    require_files(config)
    return Submission(config, typical_images(config, open_index))


def as_told(one: Submission, profile: ClusterConfig, given: LayoutConfig) -> Allocation:
    """The nodes and tasks that are `given`, with the config's own layout.

    Raises:
        UserError: more nodes or GPUs than the profile has; ranks that tensor parallelism cannot divide, or not within a
            node; more ranks than images in a batch.
    """
    config, tasks = profile.on_its_devices(one.config), given.tasks_per_node or profile.tasks_per_node
    if not 1 <= given.nodes <= profile.max_nodes:
        raise UserError(f"--nodes: {given.nodes}, but profile {profile.name} has 1 to {profile.max_nodes} (max_nodes)")
    if tasks < 1 or (profile.gpus_per_node and tasks > profile.gpus_per_node):
        raise UserError(
            f"--tasks-per-node: {tasks}, but a node of profile {profile.name} has {profile.gpus_per_node} GPUs "
            "(gpus_per_node), one for each task"
        )
    machine = profile.machine(given.nodes, tasks)
    if (ranks := dp_size(config, machine)) > one.images.batch_size:
        raise UserError(
            f"--nodes: {given.nodes} x {tasks} tasks are {ranks} data-parallel ranks for {one.images.batch_size} images"
        )
    planned = plan(config, machine, one.images, profile.utilisation)
    return Allocation(config, one.images, planned, _evaluation(one, profile))


def _evaluation(one: Submission, profile: ClusterConfig) -> EvaluationPlan:
    machine, tp = profile.evaluation_machine, one.config.evaluation.tensor_parallel_size
    if tp not in machine.tp_sizes:
        raise UserError(
            f"evaluation.tensor_parallel_size: {tp} does not divide the {machine.gpus} tasks of an evaluation on "
            f"profile {profile.name}, {machine.gpus_per_node} on a node (its evaluation.tasks_per_node)"
        )
    return plan_evaluation(one.config, machine, one.images, profile.utilisation)


def allocate(one: Submission, profile: ClusterConfig, given: LayoutConfig | None, max_days: float | None) -> Allocation:
    """The nodes and the layout for a run on the devices of `profile`.

    Raises:
        UserError: the given layout does not fit the cluster or the config, or its memory; nothing fits at all.
    """
    if given is None and not profile.gpus_per_node:
        given = LayoutConfig()  # nothing to choose between on CPUs: one node, the config's own layout
    if given is not None:
        told = as_told(one, profile, given)
        if told.memory_lack:
            raise UserError(told.memory_lack)
        return told
    largest = None
    days = math.inf if max_days is None else max_days
    for largest in _smallest_first(one, profile, days):
        if largest.plan.spare_bytes >= 0 and largest.plan.days <= days:
            return largest
    if largest is None:
        raise UserError(f"no layout of profile {profile.name} goes with the model's heads, hpZ and the batch")
    nodes, machine = largest.plan.machine.nodes, largest.plan.machine
    if largest.plan.spare_bytes < 0:
        raise UserError(
            f"no layout fits on 1 to {nodes} nodes of profile {profile.name}: the nearest needs "
            f"{largest.plan.memory.peak / GIB:.1f} GiB of {machine.room_bytes / GIB:.1f}; lower batch.pack_tokens"
        )
    raise UserError(
        f"max_days: {max_days:g}, but {nodes} nodes of profile {profile.name} take {largest.plan.days:.3g} days at "
        f"{profile.utilisation:.0%} of the peak"
    )


def _smallest_first(one: Submission, profile: ClusterConfig, days: float) -> Iterator[Allocation]:
    """Of every number of nodes the simplest layout that fits and is about as fast as any, or the one that lacks least;
    of those that fit, if there are, of those that take at most so many days."""
    nodes, tasks, batch = 1, profile.tasks_per_node, one.images.batch_size
    config, evaluation = profile.on_its_devices(one.config), _evaluation(one, profile)
    while nodes <= min(profile.max_nodes, batch):  # beyond, a rank would have no image
        machine = profile.machine(nodes, tasks)
        found = [
            Allocation(layout, one.images, plan(layout, machine, one.images, profile.utilisation), evaluation)
            for layout in layouts(config, machine, set())
            if machine.gpus // layout.parallel.tensor_parallel_size <= batch
        ]
        fitting = [each for each in found if each.plan.spare_bytes >= 0]
        in_time = [each for each in fitting if each.plan.days <= days]
        if best := in_time or fitting:
            chosen = simplest([each.plan for each in best])
            yield next(each for each in best if each.plan is chosen)
        elif found:
            yield max(found, key=lambda each: each.plan.spare_bytes)
        nodes *= 2
