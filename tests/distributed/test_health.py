"""When something is wrong: a poisoned image, a rank that hangs, a rank that dies, a full disk."""

import errno
import math
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fitscale.config.errors import UserError
from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config, HealthConfig
from fitscale.data.build_index import build_index
from fitscale.data.shards import Sample, ShardSetMeta, Variant, write_shards
from fitscale.run.layout import RunDir
from fitscale.train.health import HUNG, StepHealth
from tests.distributed.spawn import run_ranks, start_ranks, train_here
from tests.tiny import tiny_config
from tests.waiting import LIMIT_S, wait_until

LATENTS = ("data.latent.kind=vae", "data.latent.factor=8", "data.latent.scaling=0.18215", "data.holdout_fraction=0")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    """64 latents of one channel; the loss of one of them is beyond float32."""
    folder = tmp_path_factory.mktemp("poisoned") / "shards"
    meta = ShardSetMeta("vae", factor=8, scaling=0.18215, channels=1, num_classes=10, recipe={})
    chance = np.random.default_rng(0)
    samples = []
    for number in range(64):
        array = chance.standard_normal((1, 4 + number % 3, 5), dtype=np.float32)
        array[0, 0, 0] = 1e30 if number == 17 else 0.0
        samples.append(Sample(f"latent-{number:02d}", number % 10, [Variant(array)]))
    write_shards(folder, samples, meta, 32)
    build_index(folder)
    return folder


@pytest.mark.parametrize(
    ("ranks", "stage", "precision"),
    [
        *((ranks, stage, "fp32") for ranks, stage in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3))),
        (2, 1, "bf16"),
        (2, 2, "bf16"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_and_its_image_named(tmp_path, poisoned, ranks, stage, precision):
    layout = (f"parallel.zero_stage={stage}", f"parallel.precision={precision}")
    overrides = ("run.steps=4", *layout, "batch.pack_tokens=60", *LATENTS)  # 4 steps: an epoch
    run_ranks(train_here, ranks, tiny_config(tmp_path, poisoned, *overrides))
    rows = read_jsonl(RunDir(tmp_path).metrics)
    (skipped,) = [row for row in rows if row.get("skipped")]
    assert skipped["loss"] is None and skipped["images_at_fault"] == ["latent-17"]
    assert all(math.isfinite(row["loss"]) for row in rows if row is not skipped)
    checkpoint = RunDir(tmp_path).checkpoints()[-1]
    assert (checkpoint.meta["step"], checkpoint.meta["optimizer_steps"]) == (4, 3)
    for file in checkpoint.weights("raw").iterdir():
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def fail_here(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train_here(config)
    return str(caught.value)


def test_too_many_bad_steps_end_the_run_with_one_message(tmp_path, poisoned):
    overrides = ("run.steps=9", "batch.global_batch_size=64", "health.max_bad_steps=3", *LATENTS)
    texts = run_ranks(fail_here, 2, tiny_config(tmp_path, poisoned, *overrides))
    assert all("3 steps in a row" in text for text in texts)
    assert [row["loss"] for row in read_jsonl(RunDir(tmp_path).metrics)] == [None] * 3


def test_bad_steps_at_the_very_end_are_no_finished_run(tmp_path, poisoned):
    """Fewer than `max_bad_steps`: the run fails all the same, and again when it is started again."""
    overrides = ("run.steps=2", "batch.global_batch_size=64", "checkpoint.every_steps=1", *LATENTS)
    for skipped in (2, 1):  # the first step is saved
        (text,) = run_ranks(fail_here, 1, tiny_config(tmp_path, poisoned, *overrides))
        assert f"{skipped} steps in a row, up to step 2, had a loss" in text and "run.steps" in text
        assert [checkpoint.step for checkpoint in RunDir(tmp_path).checkpoints()] == [1]
    assert [row["loss"] for row in read_jsonl(RunDir(tmp_path).metrics)] == [None, None]


def test_a_spike_is_a_loss_far_above_the_recent_median():
    health = StepHealth(HealthConfig(spike_factor=3.0))
    assert [health.spike(1.0) for _ in range(20)] == [None] * 20
    assert health.spike(2.9) is None
    assert health.spike(3.1) == 1.0


def hang_at_step_3(config: Config) -> None:
    """Trains, but rank 1 sleeps for ever at reading its third step, and its watchdog's clock goes on by a day."""
    import os

    from fitscale.train import health, trainer

    original, passed_s = trainer.Trainer._timed, [0.0]
    health.time = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + passed_s[0])

    def timed(self, loader, monitor):
        for batch in original(self, loader, monitor):
            if batch.step == 2 and os.environ["RANK"] == "1":
                passed_s[0] = 86400.0
                time.sleep(86400)
            yield batch

    trainer.Trainer._timed = timed
    train_here(config)


def test_a_rank_that_hangs_ends_the_job_and_is_named(tmp_path, digits_shards):
    """Its own watchdog ends it, and the other rank ends because it is lost, long before it would itself be hung."""
    config = tiny_config(tmp_path, digits_shards, "run.steps=50", "health.timeout_min=60")
    processes = start_ranks(hang_at_step_3, 2, config)
    for process in processes:
        process.join(LIMIT_S)
    assert processes[1].exitcode == HUNG
    assert not processes[0].is_alive()
    events = {row["rank"]: row["event"] for row in read_jsonl(RunDir(tmp_path).events)}
    assert "waiting for the data of step 3" in events[1]
    assert "waiting for the data" not in events[0]  # the other rank was at work in the same step, waiting for this one


def test_a_rank_that_dies_ends_the_job(tmp_path, digits_shards):
    processes = start_ranks(train_here, 2, tiny_config(tmp_path, digits_shards, "run.steps=100000"))
    wait_until(lambda: len(read_jsonl(RunDir(tmp_path).metrics)) >= 3, "three steps")
    processes[1].kill()
    processes[0].join(LIMIT_S)
    assert not processes[0].is_alive()
    (event,) = read_jsonl(RunDir(tmp_path).events)
    assert event["rank"] == 0 and "failed while" in event["event"]


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path, digits_shards):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        steps = run_ranks(train_on_a_filling_disk, 2, disk, digits_shards)[0]
    finally:
        subprocess.run(["umount", disk], check=True)
    assert steps == {"while full": [2], "at the end": [2, 6, 8]}


def test_training_stops_where_only_saves_fail(tmp_path, digits_shards):
    """A folder that cannot be written, from step 4 on."""
    overrides = ("run.steps=100", "checkpoint.every_steps=2", "checkpoint.keep_last=0")
    texts = run_ranks(fail_to_save_from_step_4, 2, tiny_config(tmp_path, digits_shards, *overrides))
    assert all("step-00000006: the checkpoint could not be saved (rank 1: " in text for text in texts)
    assert all("newest: step 2; nor could the one before it" in text for text in texts)
    assert [checkpoint.step for checkpoint in RunDir(tmp_path).checkpoints()] == [2]
    assert read_jsonl(RunDir(tmp_path).metrics)[-1]["step"] == 8  # where the save of step 6 is waited for


def fail_to_save_from_step_4(config: Config) -> str:
    import os

    from fitscale.train import saver

    write = saver._Save._write

    def no_room(self):
        if self.meta["step"] >= 4 and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self)

    saver._Save._write = no_room
    return fail_here(config)


@pytest.mark.parametrize("saves_too", [False, True])
def test_a_disk_without_room_for_metrics_ends_the_run_in_one_line(tmp_path, digits_shards, saves_too):
    """Saved if that is possible; then the run goes on as if nothing had been."""
    overrides = ("run.steps=6", "checkpoint.every_steps=2")
    calm, full = (tiny_config(tmp_path / name, digits_shards, *overrides) for name in ("calm", "full"))
    run_ranks(train_here, 2, calm)
    texts = run_ranks(train_without_room, 2, full, saves_too)
    newest = 2 if saves_too else 4
    told = f"step 4 {'could not be saved either' if saves_too else 'is saved'}"
    assert all("metrics.jsonl: cannot be written (No space left on device)" in text for text in texts)
    assert all(told in text and "\n" not in text for text in texts)
    assert [one.step for one in RunDir(tmp_path / "full").checkpoints()][-1] == newest
    run_ranks(train_here, 2, full)
    assert RunDir(tmp_path / "full").metrics.read_bytes() == RunDir(tmp_path / "calm").metrics.read_bytes()


def train_without_room(config: Config, saves_too: bool) -> str:
    """Train where there is no room for metrics at step 3, and for the checkpoint of the step that hears of it."""
    from fitscale.train import metrics, saver

    append, write = metrics.append_jsonl, saver._Save._write

    def no_room(path, row):
        if path.name == "metrics.jsonl" and row["step"] == 3:
            path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, row)

    def no_room_either(self):
        if self.meta["step"] == 4 and saves_too:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self)

    metrics.append_jsonl, saver._Save._write = no_room, no_room_either
    return fail_here(config)


def train_on_a_filling_disk(disk: Path, shards: Path) -> dict[str, list[int]]:
    """Fills the disk after the checkpoint of step 2, frees it after that of step 4 could not be written."""
    import os

    from fitscale.train import trainer

    config = tiny_config(disk / "run", shards, "run.steps=8", "checkpoint.every_steps=2", "checkpoint.keep_last=0")
    run, ballast, seen = RunDir(disk / "run"), disk / "ballast", {}
    original = trainer.Trainer._save_if_due

    def save_if_due(self, step: int, **options: Any) -> None:
        original(self, step, **options)
        self.saver.wait()
        torch.distributed.barrier()
        if os.environ["RANK"] == "0" and step == 2:
            free = os.statvfs(disk)
            ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 65536))
        if os.environ["RANK"] == "0" and step == 4:
            seen["while full"] = [checkpoint.step for checkpoint in run.checkpoints()]
            ballast.unlink()
        torch.distributed.barrier()

    trainer.Trainer._save_if_due = save_if_due
    train_here(config)
    return seen | {"at the end": [checkpoint.step for checkpoint in run.checkpoints()]}
