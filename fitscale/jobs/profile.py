"""A cluster profile, configs/cluster/*.yaml: all that differs from one Slurm cluster to another, and nothing else."""

import re
from dataclasses import dataclass, field, replace
from math import ceil

from fitscale.config.checks import Section, number
from fitscale.config.errors import UserError
from fitscale.config.load import load_schema
from fitscale.config.schema import Config
from fitscale.plan.devices import find_device
from fitscale.plan.layout import Machine

EVALUATE = ("between", "beside", "after")  # where evaluations stand in a run's jobs (chain.py)
MARGIN = 1.5  # a job may take so many times its planned time; training that takes longer is queued again
START_MIN = 15  # to import and read what a job needs; below 10, submitit takes every USR2 for a time limit


@dataclass(frozen=True)
class LayoutConfig(Section):
    """Processes of a run's training job on a cluster."""

    nodes: int = number(1, least=1)
    tasks_per_node: int | None = number(None, least=1)  # None = the cluster profile's


@dataclass(frozen=True)
class EvaluationLayoutConfig(LayoutConfig, path="evaluation"):
    """Processes of a run's evaluation jobs, each with one GPU if there are any, that share the images of each."""

    tasks_per_node: int | None = number(1, least=1)


@dataclass(frozen=True)
class ClusterConfig(Section):
    """How jobs are asked for. What is None is left to the cluster."""

    name: str = "cluster"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    device: str = "h100"  # what trains, as `fitscale plan` knows it; cpu = a core for each task
    utilisation: float = number(0.4, above=0)  # share of the peak while computing; measure it with a first run
    gpus_per_node: int = number(8, least=0)  # what a node has; 0 = train on its CPUs
    tasks_per_node: int = number(8, least=1)  # ranks on a node, each with one GPU if there are any
    max_nodes: int = number(1024, least=1)  # most nodes of one job
    evaluation: EvaluationLayoutConfig = field(default_factory=EvaluationLayoutConfig)  # of each evaluation's job
    cpus_per_task: int = number(8, least=1)
    mem_gb: float | None = number(None, above=0)  # per node
    time_min: int = number(1440, least=1)  # most of one job; training that needs longer is queued again at its end
    signal_before_end_s: int = number(120, least=1)  # USR2 comes so early: a step and a checkpoint have to fit in
    constraint: str | None = None
    exclude: str | None = None  # nodes
    sbatch: dict[str, str] = field(default_factory=dict)  # further options of sbatch, without their dashes
    srun: list[str] = field(default_factory=list)  # further arguments of srun, such as a container plugin's
    environment: dict[str, str] = field(default_factory=dict)  # NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, PYTHONPATH ...
    setup: list[str] = field(default_factory=list)  # shell lines before the job: module load ...
    python: str | None = None  # command that starts Python, e.g. in a container; None = the one that submits

    def limit_min(self, planned_s: float) -> int:
        """The time limit of a job that is planned to take so long: with a margin, and at most `time_min`.

        Slurm's backfill starts a short job in a gap that a day does not fit into.
        """
        return min(self.time_min, START_MIN + ceil((self.signal_before_end_s + MARGIN * planned_s) / 60))

    def machine(self, nodes: int, tasks_per_node: int) -> Machine:
        """The devices of a job, as `fitscale plan` sees them."""
        return Machine(find_device(self.device), nodes * tasks_per_node, tasks_per_node)

    @property
    def evaluation_machine(self) -> Machine:
        """The devices of an evaluation's job."""
        return self.machine(self.evaluation.nodes, self.evaluation.tasks_per_node or self.tasks_per_node)

    def on_its_devices(self, config: Config) -> Config:
        """`config` for these nodes: where they have GPUs, one that has lost its own must not train on its cores, as
        `run.device: auto` would have it."""
        if not self.gpus_per_node or config.run.device != "auto":
            return config
        return replace(config, run=replace(config.run, device="cuda"))

    def __post_init__(self) -> None:
        super().__post_init__()
        find_device(self.device)
        asked = self.evaluation.tasks_per_node or self.tasks_per_node
        for key, value in (*self.environment.items(), *self.sbatch.items()):
            if not isinstance(value, str):  # omegaconf lets lists pass
                raise UserError(f"{key}: {value!r} must be a text")
        for key in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise UserError(f"environment: {key!r} is no name of a variable; valid: letters, digits and _")
        for key in self.sbatch:
            if not re.fullmatch(r"[a-z]+(-[a-z]+)*", key):
                raise UserError(f"sbatch: {key!r} is no option of sbatch; valid: its long names, such as mail-type")
        if (self.device == "cpu") != (self.gpus_per_node == 0):
            raise UserError(f"device: {self.device} does not go with gpus_per_node = {self.gpus_per_node}")
        if self.utilisation > 1:
            raise UserError(f"utilisation: {self.utilisation} is not a share; valid: above 0, at most 1")
        if self.signal_before_end_s >= 60 * self.time_min:
            raise UserError(
                f"signal_before_end_s: {self.signal_before_end_s} must be below time_min = {self.time_min} min"
            )
        for key, tasks in (("tasks_per_node", self.tasks_per_node), ("evaluation.tasks_per_node", asked)):
            if self.gpus_per_node and tasks > self.gpus_per_node:
                raise UserError(f"{key}: {tasks} is more than gpus_per_node = {self.gpus_per_node}")
        if self.evaluation.nodes > self.max_nodes:
            raise UserError(f"evaluation.nodes: {self.evaluation.nodes} is more than max_nodes = {self.max_nodes}")


def read_profile(path: str) -> ClusterConfig:
    """The cluster profile at `path`; a mistake in it is named with the file."""
    try:
        return load_schema(ClusterConfig, [path])
    except UserError as error:
        raise UserError(str(error) if path in str(error) else f"{path}: {error}") from error
