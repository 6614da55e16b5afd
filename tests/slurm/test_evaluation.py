"""On a real Slurm: an evaluation over two nodes, one of which crashes on the way, gives the rows of one process."""

import shutil

import pytest
import torch

from fitscale.config.files import read_jsonl
from fitscale.run.chunks import chunk_progress
from fitscale.run.layout import RunDir
from tests.distributed.spawn import main_here, run_ranks
from tests.distributed.test_evaluation import Eye
from tests.slurm.cluster import write_profile
from tests.waiting import wait_until

pytestmark = pytest.mark.slurm
IMAGES = 4096


def test_an_evaluation_over_two_nodes_outlives_the_crash_of_one(slurm_cluster, tmp_path, digits_shards):
    run, eye = RunDir(tmp_path / "run"), tmp_path / "eye.pt"
    torch.jit.script(Eye()).save(str(eye))
    profile = write_profile(tmp_path / "p.yaml", tasks_per_node=1, evaluation={"nodes": 2, "tasks_per_node": 1})
    overrides = ("run.steps=4", "evaluation.points=1", "evaluation.first_step=4", "sampling.steps=25")
    overrides += (f"evaluation.samples={IMAGES}", f"evaluation.features={eye}", f"evaluation.reference={digits_shards}")
    slurm_cluster.submit(run, digits_shards, profile, *overrides, "--nodes", "1")
    (job,) = [row["job"] for row in read_jsonl(run.jobs) if row["kind"] == "evaluate"]

    def finished() -> int:
        return sum(work.done for work in chunk_progress(run.evaluation_folder) if work.what == "samples")

    wait_until(lambda: finished() >= 2, "two chunks of images")
    slurm_cluster.stop("node2")
    wait_until(lambda: slurm_cluster.state(job) == "PENDING", "the job to wait for its node")
    assert 2 <= finished() < 8 and not any(row["metric"] == "fd" for row in read_jsonl(run.evaluations))
    slurm_cluster.start()
    wait_until(lambda: slurm_cluster.state(job) == "COMPLETED", "the job's end")
    assert len(read_jsonl(run.evaluation_starts)) == 2
    assert not chunk_progress(run.evaluation_folder)
    alone = RunDir(tmp_path / "alone" / "run")
    shutil.copytree(run.path, alone.path)
    alone.evaluations.unlink()
    run_ranks(main_here, 1, "evaluate", alone.path)
    assert run.evaluations.read_bytes() == alone.evaluations.read_bytes()
