"""A run of dp 2 x tp 2 whose ranks are killed at random, saves included, ends as the undisturbed one."""

import random
import time
from pathlib import Path

import pytest
import torch

from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config
from fitscale.run.layout import RunDir
from tests.distributed.spawn import run_ranks
from tests.distributed.test_health import start_ranks
from tests.distributed.test_layouts import layout_config, metric, tensors, train_here

KILLS = 20
OVERRIDES = ("run.steps=90", "batch.global_batch_size=8", "checkpoint.every_steps=3", "evaluation.points=0")
OVERRIDES += ("health.timeout_min=0.5",)


def test_twenty_kills_of_random_ranks_lose_nothing(tmp_path, digits_shards):
    calm = layout_config(tmp_path / "calm", digits_shards, 2, True, 1, *OVERRIDES)
    run_ranks(train_here, 4, calm)
    config = layout_config(tmp_path / "killed", digits_shards, 2, True, 1, *OVERRIDES)
    chance = random.Random(0)
    killed = [kill_one_rank(config, chance) for _ in range(KILLS)]
    assert sum(killed) >= 15, "the run ended before it could be killed"
    run_ranks(train_here, 4, config)
    steps = [row["step"] for row in read_jsonl(RunDir(tmp_path / "killed").metrics)]
    assert steps == list(range(1, 91))  # with the plan a function of the step: no image lost, none seen twice
    for key in ("loss", "images", "tokens"):
        assert torch.equal(metric(tmp_path / "killed", key), metric(tmp_path / "calm", key))
    ours, theirs = (tensors(tmp_path / name, 90, "weights/raw") for name in ("killed", "calm"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def kill_one_rank(config: Config, chance: random.Random) -> bool:
    """Start the run, SIGKILL a random rank some time after the next checkpoint; the others end by themselves."""
    run = RunDir(Path(config.run.dir))
    before = run.checkpoint_folders()
    processes = start_ranks(train_here, config, 4)
    while run.checkpoint_folders() == before and all(process.is_alive() for process in processes):
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.3))
    victim = chance.choice(processes)
    alive = victim.is_alive()
    victim.kill()
    for process in processes:
        process.join(60)
        if process.is_alive():
            pytest.fail("a rank outlived another by a minute")
    return alive
