"""A cluster profile, configs/cluster/*.yaml: all that differs from one Slurm cluster to another, and nothing else."""

from dataclasses import dataclass, field, replace

from fitscale.config.checks import Section, number
from fitscale.config.errors import UserError
from fitscale.config.schema import Config
from fitscale.plan.devices import find_device
from fitscale.plan.layout import Machine


@dataclass(frozen=True)
class LayoutConfig(Section):
    """Processes of a run's training job on a cluster."""

    nodes: int = number(1, least=1)
    tasks_per_node: int | None = number(None, least=1)  # None = the cluster profile's


@dataclass(frozen=True)
class ClusterConfig(Section):
    """How jobs are asked for. What is None is left to the cluster."""

    name: str = "cluster"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    device: str = "h100"  # what trains, as `fitscale plan` knows it; cpu = a core for each task
    utilisation: float = number(
        0.4, above=0
    )  # share of the peak while computing, for plans; measure it with a first run
    gpus_per_node: int = number(8, least=0)  # what a node has; 0 = train on its CPUs
    tasks_per_node: int = number(8, least=1)  # ranks on a node, each with one GPU if there are any
    max_nodes: int = number(1024, least=1)  # most nodes of one job
    cpus_per_task: int = number(8, least=1)
    mem_gb: float | None = None  # per node
    time_min: int = number(
        1440, least=1
    )  # what needs longer is queued again at its end; Slurm's limits are whole minutes
    signal_before_end_s: int = number(120, least=1)  # USR2 comes so early: a step and a checkpoint have to fit in
    constraint: str | None = None
    exclude: str | None = None  # nodes
    sbatch: dict[str, str] = field(default_factory=dict)  # further options of sbatch, without their dashes
    srun: list[str] = field(default_factory=list)  # further arguments of srun, such as a container plugin's
    environment: dict[str, str] = field(default_factory=dict)  # NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, PYTHONPATH ...
    setup: list[str] = field(default_factory=list)  # shell lines before the job: module load ...
    python: str | None = None  # command that starts Python, e.g. in a container; None = the one that submits

    def machine(self, nodes: int, tasks_per_node: int) -> Machine:
        """The devices of a job, as `fitscale plan` sees them."""
        return Machine(find_device(self.device), nodes * tasks_per_node, tasks_per_node)

    def on_its_devices(self, config: Config) -> Config:
        """`config` for these nodes: where they have GPUs, one that has lost its own must not train on its cores, as
        `run.device: auto` would have it."""
        if not self.gpus_per_node or config.run.device != "auto":
            return config
        return replace(config, run=replace(config.run, device="cuda"))

    def __post_init__(self) -> None:
        super().__post_init__()
        find_device(self.device)
        if (self.device == "cpu") != (self.gpus_per_node == 0):
            raise UserError(f"device: {self.device} does not go with gpus_per_node = {self.gpus_per_node}")
        if self.utilisation > 1:
            raise UserError(f"utilisation: {self.utilisation} is not a share; valid: above 0, at most 1")
        if self.signal_before_end_s >= 60 * self.time_min:
            raise UserError(
                f"signal_before_end_s: {self.signal_before_end_s} must be below time_min = {self.time_min} min"
            )
        if self.gpus_per_node and self.tasks_per_node > self.gpus_per_node:
            raise UserError(f"tasks_per_node: {self.tasks_per_node} is more than gpus_per_node = {self.gpus_per_node}")
