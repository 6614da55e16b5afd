"""Which part of a divided job this process does, from the environment that started it."""

from collections.abc import Mapping
from dataclasses import dataclass

from fitscale.config.errors import UserError


@dataclass(frozen=True)
class Place:
    """Worker `worker` of `workers`, counted from 0, and what says so."""

    worker: int
    workers: int
    said_by: str

    def __str__(self) -> str:
        return f"worker {self.worker} of {self.workers} ({self.said_by})"


def find_place(environment: Mapping[str, str]) -> Place:
    """The rank that torchrun or srun gave, the place in a Slurm array, or both together; else the only worker.

    Array ids may start anywhere and go in steps (`--array=1-32`, `--array=0-62:2`).

    Raises:
        UserError: the array's ids have gaps, so that no id tells its place.
    """
    array, rank = _array_place(environment), _rank_place(environment)
    if array is None or rank is None:
        return array or rank or Place(0, 1, "the only one")
    worker = array.worker * rank.workers + rank.worker
    return Place(worker, array.workers * rank.workers, f"{array.said_by}; {rank.said_by}")


def _rank_place(environment: Mapping[str, str]) -> Place | None:
    if "WORLD_SIZE" in environment:
        return Place(int(environment["RANK"]), int(environment["WORLD_SIZE"]), f"torchrun, rank {environment['RANK']}")
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # srun's; SLURM_NTASKS is there without srun as well
        task = int(environment["SLURM_PROCID"])
        return Place(task, int(environment["SLURM_STEP_NUM_TASKS"]), f"srun, task {task}")
    return None


def _array_place(environment: Mapping[str, str]) -> Place | None:
    if "SLURM_ARRAY_TASK_COUNT" not in environment:
        return None
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    own, count, first, last, step = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
    if first + (count - 1) * step != last:
        raise UserError(
            f"this Slurm array has {count} tasks with ids {first} to {last}, so id {own} does not tell which part is "
            f"its own; choose ids without gaps (--array=0-{count - 1}), or give --worker and --workers"
        )
    return Place((own - first) // step, count, f"Slurm array, task {own}")
