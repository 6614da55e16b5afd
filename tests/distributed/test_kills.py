"""A run whose ranks are killed at random, saves included, ends as the undisturbed one, whatever the backbone."""

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config
from fitscale.run.layout import RunDir
from tests import test_dimr_training
from tests.distributed import test_flag_layouts
from tests.distributed.spawn import run_ranks, start_ranks, train_here
from tests.distributed.test_layouts import layout_config, metric, tensors
from tests.kills import SAVE_CALLS, STEP_CALLS, train_and_die
from tests.shard_sets import indexed_set
from tests.waiting import LIMIT_S


def fitv2(run: Path, shards: Path) -> Config:
    settings = ("run.steps=24", "batch.global_batch_size=8", "checkpoint.every_steps=3", "evaluation.points=0")
    model = ("model.patch_size=2", "model.in_channels=3", "model.num_classes=7")
    return layout_config(run, shards, 2, True, 1, *settings, *model)


def terdit(run: Path, shards: Path) -> Config:
    settings = ("run.steps=12", "checkpoint.every_steps=3", "run.init_weights=null", "evaluation.points=0")
    layout = ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true", "parallel.zero_stage=3")
    return test_flag_layouts.config_of(shards.parent, "terdit", run, *layout, *settings)


def dimr(run: Path, shards: Path) -> Config:
    settings = ("run.steps=12", "checkpoint.every_steps=3", "evaluation.points=0", "parallel.zero_stage=2")
    return test_dimr_training.tiny(run, shards, *settings)


RUNS: dict[str, tuple[Callable[[Path, Path], Config], int, int]] = {  # config, ranks, kills
    "FiTv2, dp2 tp2 sp ZeRO-1": (fitv2, 4, 5),
    "TerDiT, tp2 sp ZeRO-3": (terdit, 2, 2),
    "DiMR, dp2 ZeRO-2": (dimr, 2, 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_kills_of_random_ranks_lose_nothing(tmp_path, name):
    config_of, ranks, kills = RUNS[name]
    indexed_set(tmp_path / "shards", 40)
    calm, config = (config_of(tmp_path / one, tmp_path / "shards") for one in ("calm", "killed"))
    run_ranks(train_here, ranks, calm)
    chance = random.Random(0)
    assert all(kill_one_rank(config, ranks, chance) for _ in range(kills)), "the run ended before it could be killed"
    run_ranks(train_here, ranks, config)
    last, rows = config.run.steps, read_jsonl(RunDir(tmp_path / "killed").metrics)
    assert [row["step"] for row in rows] == list(range(1, last + 1))  # so no image was lost, and none seen twice
    for key in ("loss", "images", "tokens"):
        assert torch.equal(metric(tmp_path / "killed", key), metric(tmp_path / "calm", key))
    ours, theirs = (tensors(tmp_path / one, last, "weights/raw") for one in ("killed", "calm"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def kill_one_rank(config: Config, ranks: int, chance: random.Random) -> bool:
    """Run until a random rank ends by SIGKILL, at a random point of a save or of some steps; the others follow."""
    victim, in_save = chance.randrange(ranks), chance.random() < 0.5
    calls = chance.randrange(SAVE_CALLS if in_save else 3 * STEP_CALLS)
    processes = start_ranks(train_and_die, ranks, config, in_save, calls, victim)
    for process in processes:
        process.join(LIMIT_S)
        assert not process.is_alive(), "a rank outlived another for ever"
    return bool(processes[victim].exitcode == -signal.SIGKILL)
