"""Damage to a run directory: noticed wherever it is, told in one line, kept aside, and the run goes on before it."""

import contextlib
import importlib.util
import io
import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from fitscale import api
from fitscale.cli import main
from fitscale.config.errors import UserError
from fitscale.config.schema import Config
from fitscale.model.weights import list_tensors
from fitscale.run.layout import RunDir
from tests.conftest import ROOT
from tests.distributed.spawn import run_ranks, train_here
from tests.test_train import train_and_fail, weights_of
from tests.tiny import tiny_config

STEPS = 6
OVERRIDES = ("checkpoint.every_steps=2", "checkpoint.keep_last=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_shards) -> Path:
    """Saved by two ranks after steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(train_here, 2, tiny_config(folder, digits_shards, f"run.steps={STEPS}", *OVERRIDES))
    return folder


@pytest.fixture
def run(tmp_path, trained) -> RunDir:
    return RunDir(Path(shutil.copytree(trained, tmp_path / "run")))


def flip_exponents(file: Path) -> None:
    """Flip an exponent bit of 50 numbers."""
    content, chance = bytearray(file.read_bytes()), random.Random(0)
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for place in chance.sample(range((len(content) - start) // 4), 50):
        content[start + 4 * place + 3] ^= 1 << chance.randrange(6)
    file.write_bytes(content)


def put_nan(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4] + struct.pack("<f", float("nan")))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def one_step_less(marker: Path) -> None:
    """Damage that is JSON still, of a number that every later step would depend on."""
    marker.write_text(re.sub(r'"optimizer_steps": \d', '"optimizer_steps": 3', marker.read_text()))


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "exponents": ("optimizer/exp_avg_sq/00001.safetensors", flip_exponents),
    "nan": ("weights/ema_0.9/00000.safetensors", put_nan),
    "weight": ("weights/raw/00001.safetensors", flip_a_bit),
    "marker": ("COMPLETE", one_step_less),
    "cut": ("optimizer/exp_avg/00000.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-4])),
    "lost": ("optimizer/exp_avg/00001.safetensors", Path.unlink),
    "empty list": ("COMPLETE", lambda file: file.write_text("[]")),
    "no step": ("COMPLETE", lambda file: file.write_text('{"files": {}, "model": {}}')),
    "no model": ("COMPLETE", lambda file: file.write_text('{"files": {}, "step": 6}')),
    "outside": ("COMPLETE", lambda file: file.write_text('{"files": {"../../config.yaml": 1}, "step": 6}')),
    "unreadable": ("COMPLETE", lambda file: file.write_bytes(b"\xff" * 100)),
}


def damage(run: RunDir, step: int, kind: str) -> Path:
    name, harm = DAMAGE[kind]
    harm(run.checkpoint_path(step) / name)
    return run.checkpoint_path(step) / name


def trained_text(config: Config) -> str:
    """Train; what is told on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        train_here(config)
    return told.getvalue()


@pytest.mark.parametrize("kind", ["exponents", "nan", "weight", "marker", "lost", "empty list", "no step", "no model"])
def test_training_goes_on_from_the_newest_intact_checkpoint(run, trained, digits_shards, kind):
    file = damage(run, STEPS, kind)
    harmed = file.read_bytes() if file.exists() else None
    config = tiny_config(run.path, digits_shards, f"run.steps={STEPS}", *OVERRIDES)
    told, quiet = run_ranks(trained_text, 2, config)
    assert str(file) in told and told.count("skipped") == 1 and "skipped" not in quiet
    assert [one.step for one in run.checkpoints()] == [2, 4, 6]
    (aside,) = set(run.checkpoint_folder.iterdir()) - set(run.checkpoint_folders())
    kept = aside / file.relative_to(run.checkpoint_path(STEPS))
    assert (kept.read_bytes() if kept.exists() else None) == harmed
    assert run.metrics.read_bytes() == RunDir(trained).metrics.read_bytes()
    for name in ("raw", "ema_0.9"):
        ours, theirs = weights_of(run.path, name), weights_of(trained, name)
        assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_without_an_intact_checkpoint_nothing_is_begun_anew(run, digits_shards):
    for step, kind in ((2, "weight"), (4, "lost"), (6, "nan")):
        file = damage(run, step, kind)
    before = sorted(run.path.rglob("*"))
    texts = run_ranks(train_and_fail, 2, tiny_config(run.path, digits_shards, "run.steps=8", *OVERRIDES))
    assert all(f"no checkpoint is intact, the newest: {file}: damaged" in text for text in texts)
    assert sorted(run.path.rglob("*")) == before


def train_and_tell_what_was_read(config: Config) -> list[str]:
    from fitscale.run import checkpoint

    read, original = [], checkpoint.Checkpoint.damage

    def reading(self, names):
        read.extend(names)
        return original(self, names)

    checkpoint.Checkpoint.damage = reading  # type: ignore[method-assign]
    train_here(config)
    return read


def test_the_ranks_share_the_reading(run, digits_shards):
    config = tiny_config(run.path, digits_shards, f"run.steps={STEPS}", *OVERRIDES)
    first, second = run_ranks(train_and_tell_what_was_read, 2, config)
    files = json.loads((run.checkpoint_path(STEPS) / "COMPLETE").read_text())["files"]
    assert len(first) == len(second) == len(files) // 2 == 4
    assert sorted(first + second) == sorted(files)


def check(path: Path) -> tuple[int, dict[str, str]]:
    """The exit code of `fitscale check`, and what it says of each part."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = main(["check", str(path)])
    lines = told.getvalue().splitlines()
    return code, {line[8:].split()[0]: line[:8].strip() + line[8:] for line in lines}


def test_check_finds_nothing_wrong_with_a_sound_run(run):
    code, told = check(run.path)
    assert code == 0 and all(line.startswith("ok") for line in told.values())
    checkpoints = {f"checkpoints/step-{step:08d}" for step in (2, 4, 6)}
    files = {"config.yaml", "environment.json", "attempt.json", "attempts.jsonl", "metrics.jsonl", "throughput.jsonl"}
    assert set(told) == files | checkpoints
    assert not any("unverified" in line for line in told.values())


@pytest.mark.parametrize("kind", DAMAGE)
def test_check_names_what_is_damaged(run, kind):
    file = damage(run, 4, kind)
    code, told = check(run.path)
    wrong = {part for part, line in told.items() if line.startswith("not ok")}
    assert code == 2 and wrong == {"checkpoints/step-00000004"}
    assert str(file) in told["checkpoints/step-00000004"]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("config.yaml", lambda content: content.replace(b"optim:", b"optin:")),
        ("attempts.jsonl", lambda content: b"garbage\n" + content),
        ("attempts.jsonl", lambda content: content.replace(b'"attempt": 1', b'"attempt": "1"')),
        ("metrics.jsonl", lambda content: content.replace(b'"step": 3', b'"step": 9')),
        ("metrics.jsonl", lambda content: content.replace(b'"step": 3', b'"stop": 3')),
        ("metrics.jsonl", lambda content: content.replace(b'"loss": 1.', b'"loss": 2.', 1)),
        ("metrics.jsonl", lambda content: content[: len(content) // 2]),
        ("throughput.jsonl", lambda content: content[:40] + b"\xff" + content[41:]),
        ("attempt.json", lambda content: content[:-3]),
    ],
)
def test_check_names_the_file_that_is_damaged(run, name, harm):
    path = run.path / name
    path.write_bytes(harm(path.read_bytes()))
    code, told = check(run.path)
    assert code == 2 and {part for part, line in told.items() if line.startswith("not ok")} == {name}


def test_check_misses_what_was_deleted_and_tells_what_was_put_there(run):
    run.metrics.unlink()
    (run.checkpoint_path(2) / "weights" / "raw" / "more.safetensors").touch()
    code, told = check(run.path)
    wrong = {part for part, line in told.items() if line.startswith("not ok")}
    assert code == 2 and wrong == {"metrics.jsonl", "checkpoints/step-00000002"}


def test_check_says_that_an_earlier_version_saved_no_checksums(tmp_path):
    code, told = check(Path(shutil.copytree(ROOT / "tests/data/version_0_1/runs/fitv2", tmp_path / "run")))
    assert code == 0 and "unverified" in told["checkpoints/step-00000004"]


def test_check_of_no_run_directory(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "not a run directory (no config.yaml there)" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "mistyped")]) == 2
    assert "not a run directory (no such file or folder)" in capsys.readouterr().err


def test_a_file_without_a_marker_or_outside_of_weights_is_nobodys(tmp_path, trained):
    """An exported file, or one whose folders happen to hold a file called COMPLETE, has no checksum to compare."""
    name = "weights/raw/00000.safetensors"
    copy = shutil.copy(trained / "checkpoints" / "step-00000006" / name, tmp_path / "raw.safetensors")
    (tmp_path / "COMPLETE").write_text("[]")
    assert list_tensors(Path(copy))


def test_the_benchmark_of_checksums_runs(tmp_path, capsys):
    specification = importlib.util.spec_from_file_location("bench", ROOT / "tools" / "bench_checkpoint.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    assert tool.main(["--gb", "0.001", "--scratch", str(tmp_path)]) == 0
    assert "| verify | " in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_whatever_reads_weights_refuses_damaged_ones(run, tmp_path, capsys, digits_shards):
    file = damage(run, STEPS, "nan")
    with safe_open(file, "np") as opened:
        assert any(np.isnan(opened.get_tensor(name)).any() for name in opened.keys())  # noqa: SIM118
    with pytest.raises(UserError, match=r"ema_0\.9/00000\.safetensors: damaged"):
        api.load(run.path, device="cpu")
    assert api.load(run.path, weights="raw", device="cpu") and api.load(run.path, step=4, device="cpu")
    for command in (["evaluate"], ["sample", "--height", "8", "--width", "8"]):
        assert main([*command, str(run.path), "--device", "cpu"]) == 2
        assert f"{file}: damaged" in capsys.readouterr().err
    start = f"run.init_weights={file.parent}"
    (text,) = run_ranks(train_and_fail, 1, tiny_config(tmp_path / "next", digits_shards, "run.steps=1", start))
    assert f"{file}: damaged" in text
