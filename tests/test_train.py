"""Training on real digits: the loss does not depend on the packs, and a killed run ends as an undisturbed one."""

import contextlib
import gzip
import io
import json
import os
import random
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from fitscale.config.errors import UserError
from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config
from fitscale.data.loader import make_loader
from fitscale.flow.path import draws
from fitscale.plan.preflight import open_data, pack_rule
from fitscale.run.layout import RunDir
from tests.distributed.spawn import context, run_ranks, train_here
from tests.kills import SAVE_CALLS, STEP_CALLS, train_and_die
from tests.tiny import tiny_config


def train_and_fail(config: Config) -> str:
    """In a spawned process: the text of the UserError that training ends with."""
    with pytest.raises(UserError) as caught:
        train_here(config)
    return str(caught.value)


def weights_of(run_dir: Path, name: str = "raw") -> dict:
    """All tensors of the newest checkpoint's weights."""
    folder = RunDir(run_dir).checkpoints()[-1].weights(name)
    return {key: tensor for path in sorted(folder.iterdir()) for key, tensor in load_file(path).items()}


def column(run_dir: Path, key: str) -> list[float]:
    return [row[key] for row in read_jsonl(RunDir(run_dir).metrics)]


def test_loss_is_the_same_for_one_pack_many_packs_and_two_ranks(tmp_path, digits_shards):
    runs = {"one": (1, 16384), "many": (1, 120), "ranks": (2, 240)}
    for name, (ranks, pack_tokens) in runs.items():
        config = tiny_config(tmp_path / name, digits_shards, "run.steps=6", f"batch.pack_tokens={pack_tokens}")
        run_ranks(train_here, ranks, config)
    assert set(column(tmp_path / "one", "packs")) == {1}
    assert min(column(tmp_path / "many", "packs")) > 3
    for name in ("many", "ranks"):
        for key in ("loss", "grad_norm"):
            assert column(tmp_path / name, key) == pytest.approx(column(tmp_path / "one", key), rel=1e-6, abs=1e-6)


def test_the_first_loss_is_that_of_the_noise_of_the_runs_own_seed(tmp_path, digits_shards):
    """A fresh network says zero: its loss is the mean over images of the mean square of data - noise."""
    config = tiny_config(tmp_path / "run", digits_shards, "run.steps=1", "run.seed=5")
    run_ranks(train_here, 1, config)
    draw = partial(draws, 5, channels=1, times=config.flow.times, label_drop=config.flow.label_drop)
    (batch,) = make_loader(open_data(config), pack_rule(config), range(1), draw=draw)
    per_image = []
    for pack in batch.packs:
        squares_T = (pack.tokens_TC - pack.drawn.noise_TC).square().mean(dim=1)
        ends = pack.cu_seqlens.tolist()
        images = zip(pack.slots_S.tolist(), ends, ends[1:], strict=False)
        per_image += [squares_T[start:end].mean().item() for slot, start, end in images if slot >= 0]
    assert len(per_image) == config.batch.global_batch_size
    assert column(tmp_path / "run", "loss") == pytest.approx([np.mean(per_image)], rel=1e-5)


@pytest.mark.parametrize("label_drop", [0, 0.9999999])
def test_labels_are_dropped_as_often_as_the_config_says(tmp_path, digits_shards, label_drop):
    """What a run never meets keeps its value: "no class" if no label is dropped, the classes if all are."""
    overrides = (f"flow.label_drop={label_drop}", "optim.weight_decay=0")
    for folder, steps in (("first", 1), ("last", 4)):  # in the first step nothing reaches the labels
        run_ranks(train_here, 1, tiny_config(tmp_path / folder, digits_shards, f"run.steps={steps}", *overrides))
    first, last = (weights_of(tmp_path / name)["y_embedder.embedding_table.weight"] for name in ("first", "last"))
    *classes, no_class = (first != last).any(dim=1).tolist()
    assert (any(classes), no_class) == (label_drop == 0, label_drop > 0)


def test_learning_reduces_the_loss(tmp_path, digits_shards):
    run_ranks(train_here, 1, tiny_config(tmp_path / "run", digits_shards, "run.steps=70", "optim.lr=3e-3"))
    loss = column(tmp_path / "run", "loss")
    assert sum(loss[-8:]) < 0.8 * sum(loss[:8])


def test_a_run_killed_six_times_ends_bit_identical(tmp_path, digits_shards):
    overrides = ("run.steps=80", "checkpoint.every_steps=4", "checkpoint.keep_last=2")
    run_ranks(train_here, 1, tiny_config(tmp_path / "calm", digits_shards, *overrides))
    config = tiny_config(tmp_path / "killed", digits_shards, *overrides)
    chance = random.Random(0)
    kills = [kill_once(config, chance, in_save=attempt % 2 == 0) for attempt in range(6)]
    assert kills.count("saving") >= 2
    run_ranks(train_here, 1, config)
    calm, killed = RunDir(tmp_path / "calm"), RunDir(tmp_path / "killed")
    assert killed.metrics.read_bytes() == calm.metrics.read_bytes()
    for name in ("raw", "ema_0.9"):
        ours, theirs = weights_of(killed.path, name), weights_of(calm.path, name)
        assert all(ours[key].equal(theirs[key]) for key in theirs)


def kill_once(config: Config, chance: random.Random, in_save: bool) -> str:
    """Run until SIGKILL, at a random point of a save or of some steps; tells what the run was doing."""
    calls = chance.randrange(SAVE_CALLS if in_save else 4 * STEP_CALLS)
    process = context().Process(target=train_and_die, args=(config, in_save, calls))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    return "saving" if any(Path(config.run.dir).glob("checkpoints/.saving-*")) else "training"


def test_a_half_written_checkpoint_is_skipped_with_a_warning(tmp_path, digits_shards):
    run_ranks(train_here, 1, tiny_config(tmp_path, digits_shards, "run.steps=4", "checkpoint.every_steps=2"))
    newest = RunDir(tmp_path).checkpoints()[-1]
    file = newest.weights("raw") / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    run_ranks(train_here, 1, tiny_config(tmp_path, digits_shards, "run.steps=4", "checkpoint.every_steps=2"))
    assert [checkpoint.step for checkpoint in RunDir(tmp_path).checkpoints()] == [2, 4]
    assert list(newest.path.parent.glob("step-00000004.incomplete-*"))  # kept, not deleted
    assert column(tmp_path, "step") == [1, 2, 3, 4]


def test_a_checkpoint_before_the_first_logged_step_is_saved(tmp_path, digits_shards):
    run_ranks(
        train_here,
        1,
        tiny_config(tmp_path, digits_shards, "run.steps=2", "run.log_every=10", "checkpoint.every_steps=1"),
    )
    assert [checkpoint.step for checkpoint in RunDir(tmp_path).checkpoints()] == [1, 2]
    assert column(tmp_path, "step") == [2]


def told_by(config: Config, until: int | None = None) -> tuple[str, str]:
    """In a spawned process: train; what is told on standard output, and on standard error."""
    from fitscale.train.trainer import train

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        train(config, until)
    return out.getvalue(), err.getvalue()


def test_a_run_without_a_terminal_tells_its_progress_in_lines_and_a_finished_one_what_would_change_it(
    tmp_path, digits_shards
):
    config = tiny_config(tmp_path, digits_shards, "run.steps=4")
    ((_, told),) = run_ranks(told_by, 1, config)
    lines = [line for line in told.splitlines() if line.startswith("run: step ")]
    assert "\r" not in told and lines[0].startswith("run: step 1/4, loss ") and "step 4/4" in lines[-1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    ((told, _),) = run_ranks(told_by, 1, config)
    assert told == f"{tmp_path}: all 4 steps are trained, nothing is left to do; a larger run.steps trains it further\n"
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert read_jsonl(RunDir(tmp_path).attempts)[-1]["reason"] == "finished before"
    longer = tiny_config(tmp_path, digits_shards, "run.steps=6")
    ((told, _),) = run_ranks(told_by, 1, longer, 4)
    assert told == f"{tmp_path}: trained up to step 4 of 6, as far as was asked\n"


def test_retention_keeps_the_newest_and_the_evaluation_steps(tmp_path, digits_shards):
    overrides = ("run.steps=9", "checkpoint.every_steps=1", "checkpoint.keep_last=2")
    overrides += ("evaluation.points=2", "evaluation.first_step=3")
    run_ranks(train_here, 1, tiny_config(tmp_path, digits_shards, *overrides))
    assert [checkpoint.step for checkpoint in RunDir(tmp_path).checkpoints()] == [3, 8, 9]


def test_post_training_starts_from_weights_and_moves_only_what_is_trainable(tmp_path, digits_shards):
    run_ranks(train_here, 1, tiny_config(tmp_path / "base", digits_shards, "run.steps=2"))
    start = RunDir(tmp_path / "base").checkpoints()[-1].weights("raw")
    overrides = ("run.steps=2", f"run.init_weights={start}", "optim.trainable=[x_embedder,bias,adaLN,final_layer]")
    run_ranks(train_here, 1, tiny_config(tmp_path / "post", digits_shards, *overrides))
    before, after = weights_of(tmp_path / "base"), weights_of(tmp_path / "post")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved
    assert all(any(part in name for part in ("x_embedder", "bias", "adaLN", "final_layer")) for name in moved)
    ema = weights_of(tmp_path / "post", "ema_0.9")
    assert ema.keys() == before.keys()  # whole, frozen tensors too
    assert ema["blocks.0.mlp.fc2.weight"].equal(before["blocks.0.mlp.fc2.weight"])


def test_reset_parameters_start_afresh_and_the_others_as_loaded(tmp_path, digits_shards):
    """With a learning rate of 0 the weights at the end are those at the start, and so is their EMA."""
    run_ranks(train_here, 1, tiny_config(tmp_path / "base", digits_shards, "run.steps=3"))
    start = RunDir(tmp_path / "base").checkpoints()[-1].weights("raw")
    still = ("run.steps=2", "optim.lr=0", "run.seed=5")
    run_ranks(train_here, 1, tiny_config(tmp_path / "fresh", digits_shards, *still))
    reset = (*still, f"run.init_weights={start}", "run.reset=[x_embedder,bias,adaLN,final_layer]")
    config = tiny_config(tmp_path / "reset", digits_shards, *reset)
    run_ranks(train_here, 2, replace(config, parallel=replace(config.parallel, zero_stage=3)))
    loaded, fresh = weights_of(tmp_path / "base"), weights_of(tmp_path / "fresh")
    for name in ("raw", "ema_0.9"):
        found = weights_of(tmp_path / "reset", name)
        for key in found:
            is_reset = any(part in key for part in ("x_embedder", "bias", "adaLN", "final_layer"))
            assert found[key].equal((fresh if is_reset else loaded)[key]), key
    assert not fresh["x_embedder.proj.weight"].equal(loaded["x_embedder.proj.weight"])
    assert not fresh["final_layer.linear.weight"].any() and loaded["final_layer.linear.weight"].any()


def test_a_reset_run_that_goes_on_keeps_what_it_has_learnt(tmp_path, digits_shards):
    run_ranks(train_here, 1, tiny_config(tmp_path / "base", digits_shards, "run.steps=1"))
    start = RunDir(tmp_path / "base").checkpoints()[-1].weights("raw")
    overrides = (f"run.init_weights={start}", "run.reset=[final_layer]")
    for steps, folder in ((2, "halves"), (4, "halves"), (4, "whole")):
        run_ranks(train_here, 1, tiny_config(tmp_path / folder, digits_shards, *overrides, f"run.steps={steps}"))
    halves, whole = weights_of(tmp_path / "halves"), weights_of(tmp_path / "whole")
    assert all(halves[key].equal(whole[key]) for key in whole)


def train_by_a_clock_of_its_own(config: Config) -> None:
    """Train; time passes in these functions alone, on rank 1 a second more in each but saving."""
    from fitscale.train import metrics, step, timing, trainer

    now, rank = [0.0], int(os.environ["RANK"])
    clock = SimpleNamespace(perf_counter=lambda: now[0], time=time.time)
    metrics.time = timing.time = trainer.time = clock

    def taking(seconds: float, function: Any) -> Any:
        def slow(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    make_loader, own = trainer.make_loader, step.Stepper
    trainer.make_loader = lambda *args, **kwargs: map(
        taking(7 + rank, lambda batch: batch), make_loader(*args, **kwargs)
    )
    step.optimizer_step = taking(5 + rank, step.optimizer_step)
    own._loss, own._count = taking(2 + rank, own._loss), taking(13 + rank, own._count)
    trainer.Saver.save = taking(11, trainer.Saver.save)
    trainer.train(config)


def test_the_time_of_a_step_is_accounted_for(tmp_path, digits_shards):
    config = tiny_config(tmp_path, digits_shards, "run.steps=6", "checkpoint.every_steps=3")
    run_ranks(train_by_a_clock_of_its_own, 2, config)
    rows = read_jsonl(RunDir(tmp_path).throughput)
    for row in rows:
        parts = {name: row[f"{name}_s"] for name in ("forward", "backward", "optimizer", "save")}  # of rank 0
        saved = 11 if row["step"] == 4 else 0  # after the row of step 3
        assert parts == {"forward": 2, "backward": 0, "optimizer": 5, "save": saved}
        waited = 0 if row["step"] == 1 else 7  # until the first batch it is the readers' start
        assert row["step_s"] == sum(parts.values()) + waited + 13 and row["images_per_s"] == 16 / row["step_s"]
        assert row["time_imbalance"] == pytest.approx(3 / 2.5 - 1)
    assert [(row["data_wait_s"], row["data_wait_longest_s"]) for row in rows] == [(0, 0), *[(8, 8)] * 5]
    assert [row["data_wait_rank"] for row in rows[1:]] == [1] * 5


def test_chosen_steps_are_profiled(tmp_path, digits_shards):
    overrides = ("run.steps=4", "profile.first_step=2", "profile.steps=2")
    run_ranks(train_here, 2, tiny_config(tmp_path, digits_shards, *overrides))
    for rank in (0, 1):
        with gzip.open(tmp_path / "profile" / f"rank-{rank:05d}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert "aten::scaled_dot_product_attention" in names


def test_wandb_offline_mirrors_the_run_in_its_directory(tmp_path, digits_shards):
    run_ranks(train_here, 1, tiny_config(tmp_path, digits_shards, "run.steps=2", "wandb.mode=offline"))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.in_channels=4", "model.in_channels: the config says 4"),
        ("model.num_classes=3", "model.num_classes: 3, but the shards"),
        ("batch.pack_tokens=20", "pack_tokens"),
        ("model.patch_size=3", "patch_size"),
        ("optim.trainable=[bias,adaNL]", "optim.trainable: 'adaNL' is part of no parameter's name"),
        ("run={init_weights: w, reset: [biasses]}", "run.reset: 'biasses' is part of no parameter's name"),
    ],
)
def test_a_config_that_cannot_be_right_writes_nothing(tmp_path, digits_shards, override, message):
    config = tiny_config(tmp_path / "run", digits_shards, override)
    (text,) = run_ranks(train_and_fail, 1, config)
    assert message in text
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_config_is_refused(tmp_path, digits_shards):
    run_ranks(train_here, 1, tiny_config(tmp_path, digits_shards, "run.steps=1"))
    (text,) = run_ranks(train_and_fail, 1, tiny_config(tmp_path, digits_shards, "run.steps=1", "optim.lr=1"))
    assert "optim.lr" in text and "belongs to" in text
