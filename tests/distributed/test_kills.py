"""A run of dp 2 x tp 2 whose ranks are killed at random, saves included, ends as the undisturbed one."""

import random
import signal

import torch

from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config
from fitscale.run.layout import RunDir
from tests.distributed.spawn import run_ranks, start_ranks, train_here
from tests.distributed.test_layouts import layout_config, metric, tensors
from tests.kills import SAVE_CALLS, STEP_CALLS, train_and_die
from tests.waiting import LIMIT_S

KILLS = 8
OVERRIDES = ("run.steps=40", "batch.global_batch_size=8", "checkpoint.every_steps=3", "evaluation.points=0")


def test_kills_of_random_ranks_lose_nothing(tmp_path, digits_shards):
    calm = layout_config(tmp_path / "calm", digits_shards, 2, True, 1, *OVERRIDES)
    run_ranks(train_here, 4, calm)
    config = layout_config(tmp_path / "killed", digits_shards, 2, True, 1, *OVERRIDES)
    chance = random.Random(0)
    assert all(kill_one_rank(config, chance) for _ in range(KILLS)), "the run ended before it could be killed"
    run_ranks(train_here, 4, config)
    steps = [row["step"] for row in read_jsonl(RunDir(tmp_path / "killed").metrics)]
    assert steps == list(range(1, 41))  # with the plan a function of the step: no image lost, none seen twice
    for key in ("loss", "images", "tokens"):
        assert torch.equal(metric(tmp_path / "killed", key), metric(tmp_path / "calm", key))
    ours, theirs = (tensors(tmp_path / name, 40, "weights/raw") for name in ("killed", "calm"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def kill_one_rank(config: Config, chance: random.Random) -> bool:
    """Run until a random rank ends by SIGKILL, at a random point of a save or of some steps; the others follow."""
    victim, in_save = chance.randrange(4), chance.random() < 0.5
    calls = chance.randrange(SAVE_CALLS if in_save else 3 * STEP_CALLS)
    processes = start_ranks(train_and_die, 4, config, in_save, calls, victim)
    for process in processes:
        process.join(LIMIT_S)
        assert not process.is_alive(), "a rank outlived another for ever"
    return bool(processes[victim].exitcode == -signal.SIGKILL)
