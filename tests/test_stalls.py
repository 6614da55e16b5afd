"""A store that stalls: hidden by reading ahead, and told as "waiting for data" where it is not.

The store and training know of each other by files in the folder `met`, so the order of events is the test's own.
"""

import contextlib
import io
import multiprocessing
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config
from fitscale.data.batch_plan import open_plan
from fitscale.prepare.digits import write_digits
from fitscale.run.layout import RunDir
from fitscale.train.metrics import WAITING_LONGEST_S
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny_config
from tests.waiting import wait_until

# Shards of 4 steps each; 29 shards.
OVERRIDES = ("batch.global_batch_size=16", "data.num_workers=2", "run.log_every=10", "checkpoint.every_steps=1000")


class Stalling(LocalFileSystem):
    """stalling:///path is the file /path; the file `slow` of a set comes when training asks for the step `until`."""

    protocol = "stalling"
    slow, until, stall_s, met = "", 0, 0.0, Path()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("stalling://"))

    def get_file(self, rpath, lpath, **kwargs):
        cls = type(self)
        if rpath.endswith(f"/{cls.slow}"):
            (cls.met / "stalled").touch()
            wait_until(
                (cls.met / f"waiting for the data of step {cls.until + 1}").exists, "the step that ends the stall"
            )
            time.sleep(cls.stall_s)
        return super().get_file(rpath, lpath, **kwargs)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stalls") / "shards"
    write_digits(folder, (1.0,), 64)
    return folder


def train_stalling(config: Config, slow: str, until: int, stall_s: float, met: Path) -> str:
    """Train; what a user sees on the terminal."""
    from fitscale.train import health, trainer

    doing = health.Watchdog.doing

    def noted(self, activity: str) -> None:
        doing(self, activity)
        (met / activity).touch()
        if activity == f"waiting for the data of step {until}":  # so the stall begins before its end
            wait_until((met / "stalled").exists, "the fetch of the slow file")

    health.Watchdog.doing = noted
    multiprocessing.set_start_method("fork", force=True)  # as where no test's server has started this process
    Stalling.slow, Stalling.until, Stalling.stall_s, Stalling.met = slow, until, stall_s, met
    fsspec.register_implementation("stalling", Stalling, clobber=True)
    with contextlib.redirect_stderr(io.StringIO()) as seen:
        trainer.train(config)
    return seen.getvalue()


def first_steps(config: Config) -> dict[str, int]:
    """The step that first needs each shard, by name."""
    plan = open_plan(config.data, seed=config.run.seed, global_batch_size=16, patch_size=1)
    index, first = plan.streams[0].index, {}
    for step in range(config.run.steps):
        for shard in index.images["shard"][plan.step(step).images_B].tolist():
            first.setdefault(index.meta.shards[shard].name, step)
    return first


def run(tmp_path, shards, window: int, steps: int, slow_from: int, ahead: int, stall_s: float):
    """Train where the first shard that is needed only from step `slow_from` on (counted from 0) comes late.

    Its fetch ends `stall_s` after training has asked for the step `ahead` steps before; it has to begin a step earlier.

    Returns:
        rows of throughput.jsonl, the terminal's text, and the step that needs the slow shard.
    """
    options = (*OVERRIDES, f"run.steps={steps}", f"data.window_shards={window}", f"data.cache_dir={tmp_path / 'cache'}")
    first = first_steps(tiny_config(tmp_path / "run", shards, *options))
    slow_step, slow = min((step, name) for name, step in first.items() if step >= slow_from)
    (tmp_path / "met").mkdir()
    config = tiny_config(tmp_path / "run", f"stalling://{shards}", *options)
    (text,) = run_ranks(train_stalling, 1, config, slow, slow_step - ahead, stall_s, tmp_path / "met")
    return read_jsonl(RunDir(tmp_path / "run").throughput), text, slow_step


def test_a_stall_is_hidden_where_reading_ahead_can(tmp_path, shards):
    """The window after the first is fetched while the first, 90 steps long, is trained on.

    Of these, 49 at the least are trained on while one file of the next stalls.
    """
    rows, _, slow_step = run(tmp_path, shards, window=25, steps=110, slow_from=80, ahead=50, stall_s=0)
    assert 80 <= slow_step < 110 and rows[-1]["step"] == 110


def test_a_stall_that_cannot_be_hidden_is_told(tmp_path, shards):
    """Windows of one shard, 4 steps: one of them ahead is not enough for a file that comes after its step is due."""
    stall_s = 1.5 * WAITING_LONGEST_S
    rows, text, slow_step = run(tmp_path, shards, window=1, steps=40, slow_from=22, ahead=0, stall_s=stall_s)
    row = rows[slow_step // 10]
    assert row["waiting_for_data"] and row["data_wait_longest_s"] > stall_s
    assert row["data_wait_longest_s"] <= 10 * row["data_wait_s"] < 10 * row["step_s"]
    assert ": waiting for data took " in text


def waits_of_two_ranks() -> dict[str, dict[str, float]]:
    """What each rank reads after rank 1 waited longer than rank 0."""
    import torch

    from fitscale.config.schema import ParallelConfig
    from fitscale.parallel.groups import init_parallel
    from fitscale.train.timing import PhaseTimer

    topology = init_parallel(ParallelConfig(), "cpu")
    timer = PhaseTimer(torch.device("cpu"))
    for seconds in (0.125, 0.25) if topology.rank == 0 else (1.5, 0.5):
        timer.waits.append(seconds)
    return {"first": timer.read(4), "then": timer.read(4)}


def test_every_rank_tells_the_wait_of_the_one_that_waited_longest():
    for told in run_ranks(waits_of_two_ranks, 2):
        names = ("data_wait_s", "data_wait_longest_s", "data_wait_rank")
        assert [told["first"][name] for name in names] == [0.5, 1.5, 1]
        assert [told["then"][name] for name in names] == [0.0, 0.0, 0]
