"""A store that stalls for two seconds: hidden by reading ahead, and told as "waiting for data" where it is not."""

import contextlib
import io
import multiprocessing
import time

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config
from fitscale.data.batch_plan import open_plan
from fitscale.prepare.digits import write_digits
from fitscale.run.layout import RunDir
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny_config

STALL_S = 2.0
# Steps of some 50 ms, with shards of 4 steps each; 29 shards.
SLOWER = ("model.depth=4", "model.hidden_size=64", "batch.global_batch_size=16", "data.num_workers=2")


class Stalling(LocalFileSystem):
    """stalling:///path is the file /path; one file of a set takes `STALL_S` to come."""

    protocol = "stalling"
    slow = ""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("stalling://"))

    def get_file(self, rpath, lpath, **kwargs):
        if rpath.endswith(f"/{type(self).slow}"):
            time.sleep(STALL_S)
        return super().get_file(rpath, lpath, **kwargs)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stalls") / "shards"
    write_digits(folder, (1.0,), 64)
    return folder


def train_stalling(config: Config, slow: str) -> str:
    """Train; what a user sees on the terminal."""
    from fitscale.train.trainer import train

    multiprocessing.set_start_method("fork", force=True)  # as where no test's server has started this process
    Stalling.slow = slow
    fsspec.register_implementation("stalling", Stalling, clobber=True)
    with contextlib.redirect_stderr(io.StringIO()) as seen:
        train(config)
    return seen.getvalue()


def first_steps(config: Config) -> dict[str, int]:
    """The step that first needs each shard, by name."""
    plan = open_plan(config.data, seed=config.run.seed, global_batch_size=16, patch_size=1)
    index, first = plan.streams[0].index, {}
    for step in range(config.run.steps):
        for shard in index.images["shard"][plan.step(step).images_B].tolist():
            first.setdefault(index.meta.shards[shard].name, step)
    return first


def run(tmp_path, shards, window: int, steps: int, slow_from: int):
    """Rows of throughput.jsonl and the terminal's text, where the first shard needed from `slow_from` on is slow."""
    options = (*SLOWER, f"run.steps={steps}", "run.log_every=10", f"data.window_shards={window}")
    options += (f"data.cache_dir={tmp_path / 'cache'}", "checkpoint.every_steps=1000")
    first = first_steps(tiny_config(tmp_path / "run", shards, *options))
    slow_step, slow = min((step, name) for name, step in first.items() if step >= slow_from)
    (text,) = run_ranks(train_stalling, 1, tiny_config(tmp_path / "run", f"stalling://{shards}", *options), slow)
    return read_jsonl(RunDir(tmp_path / "run").throughput), text, slow_step


def test_a_stall_is_hidden_where_reading_ahead_can(tmp_path, shards):
    """The window after the first is fetched while the first, 90 steps long, is trained on."""
    rows, _, slow_step = run(tmp_path, shards, window=25, steps=110, slow_from=80)
    assert slow_step < 110 and sum(row["step_s"] * 10 for row in rows) > STALL_S  # there was something to hide
    assert sum(row["data_wait_s"] * 10 for row in rows) < 0.25 * STALL_S


def test_a_stall_that_cannot_be_hidden_is_told(tmp_path, shards):
    """Windows of one shard, 4 steps: one of them ahead is not enough."""
    rows, text, slow_step = run(tmp_path, shards, window=1, steps=40, slow_from=22)
    row = rows[slow_step // 10]
    assert row["waiting_for_data"] and row["data_wait_longest_s"] > 0.5 * STALL_S
    assert row["data_wait_longest_s"] <= 10 * row["data_wait_s"] < 10 * row["step_s"]
    assert row["data_wait_longest_s"] == max(other["data_wait_longest_s"] for other in rows)
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
        timer.waited(seconds)
    return {"first": timer.read(4), "then": timer.read(4)}


def test_every_rank_tells_the_wait_of_the_one_that_waited_longest():
    for told in run_ranks(waits_of_two_ranks, 2):
        names = ("data_wait_s", "data_wait_longest_s", "data_wait_rank")
        assert [told["first"][name] for name in names] == [0.5, 1.5, 1]
        assert [told["then"][name] for name in names] == [0.0, 0.0, 0]
