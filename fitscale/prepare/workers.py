"""Which part of a divided job this process does, from the environment that started it."""

from collections.abc import Mapping
from dataclasses import dataclass

from fitscale.config.errors import UserError


@dataclass(frozen=True)
class WorkerRank:
    """Worker `rank` of `workers`, counted from 0, and what says so."""

    rank: int
    workers: int
    said_by: str

    def __str__(self) -> str:
        return f"worker {self.rank} of {self.workers} ({self.said_by})"


def find_worker(environment: Mapping[str, str]) -> WorkerRank:
    """The rank that torchrun or srun gave, the place in a Slurm array, or both together; else the only worker.

    Array ids may start anywhere and go in steps (`--array=1-32`, `--array=0-62:2`).

    Raises:
        UserError: the array's ids have gaps, so that no id tells its place.
    """
    array, step = _in_array(environment), _in_step(environment)
    if array is None or step is None:
        return array or step or WorkerRank(0, 1, "the only one")
    said_by = f"{array.said_by}; {step.said_by}"
    return WorkerRank(array.rank * step.workers + step.rank, array.workers * step.workers, said_by)


def _in_step(environment: Mapping[str, str]) -> WorkerRank | None:
    if "WORLD_SIZE" in environment:
        rank = int(environment["RANK"])
        return WorkerRank(rank, int(environment["WORLD_SIZE"]), f"torchrun, rank {rank}")
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # srun's; SLURM_NTASKS is there without srun as well
        task = int(environment["SLURM_PROCID"])
        return WorkerRank(task, int(environment["SLURM_STEP_NUM_TASKS"]), f"srun, task {task}")
    return None


def _in_array(environment: Mapping[str, str]) -> WorkerRank | None:
    if "SLURM_ARRAY_TASK_COUNT" not in environment:
        return None
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    own, count, first, last, step = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
    if first + (count - 1) * step != last:
        raise UserError(
            f"this Slurm array has {count} tasks with ids {first} to {last}, so id {own} does not tell which part is "
            f"its own; choose ids without gaps (--array=0-{count - 1}), or give --worker and --workers"
        )
    return WorkerRank((own - first) // step, count, f"Slurm array, task {own}")
