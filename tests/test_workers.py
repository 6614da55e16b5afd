"""Each process of a divided job finds its own part: under torchrun, srun, a Slurm array, or several of them."""

import pytest

from fitscale.config.errors import UserError
from fitscale.prepare.workers import find_worker


def array(own: int, ids: range) -> dict[str, str]:
    """What Slurm sets for task `own` of `--array=FIRST-LAST:STEP`."""
    values = {"ID": own, "COUNT": len(ids), "MIN": ids[0], "MAX": ids[-1], "STEP": ids.step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def srun(task: int, tasks: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(task), "SLURM_NTASKS": str(tasks), "SLURM_STEP_NUM_TASKS": str(tasks)}


def torchrun(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}


LAUNCHES = {
    "alone": [{}],
    "torchrun": [torchrun(rank, 3) for rank in range(3)],
    "srun": [srun(task, 4) for task in range(4)],
    "array from 0": [array(own, range(5)) for own in range(5)],
    "array from 7": [array(own, range(7, 12)) for own in range(7, 12)],
    "array in steps": [array(own, range(3, 16, 4)) for own in range(3, 16, 4)],
    "array of one": [array(6, range(6, 7))],
    "array of srun": [array(own, range(1, 4)) | srun(task, 2) for own in range(1, 4) for task in range(2)],
    "array of torchrun": [array(own, range(1, 3)) | torchrun(rank, 2) for own in (1, 2) for rank in range(2)],
    "torchrun under srun": [srun(0, 1) | torchrun(rank, 2) for rank in range(2)],
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_processes_of_a_launch_share_the_work(launch):
    found = [find_worker(environment) for environment in LAUNCHES[launch]]
    assert [(one.rank, one.workers) for one in found] == [(n, len(found)) for n in range(len(found))]


def test_a_batch_script_that_starts_no_tasks_is_one_worker():
    """sbatch --ntasks=4 sets the first two for the script itself, which is one process."""
    assert find_worker({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}).workers == 1


def test_a_worker_says_which_it_is_and_how_it_knows():
    assert str(find_worker(array(9, range(7, 12)))) == "worker 2 of 5 (Slurm array, task 9)"
    both = array(2, range(1, 4)) | srun(1, 2)
    assert str(find_worker(both)) == "worker 3 of 6 (Slurm array, task 2; srun, task 1)"


def test_array_ids_with_gaps_are_refused():
    environment = array(3, range(1, 4)) | {"SLURM_ARRAY_TASK_MAX": "7"}
    with pytest.raises(UserError, match=r"3 tasks with ids 1 to 7.*--array=0-2\), or give --worker and --workers"):
        find_worker(environment)
