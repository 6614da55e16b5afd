"""Run directories: complete or absent, whatever crash came between."""

import json

import pytest

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl, read_jsonl, write_atomic
from fitscale.config.load import load_config, to_yaml
from fitscale.run.attempt import begin_attempt
from fitscale.run.claim import claim
from fitscale.run.layout import RunDir, read_checkpoint
from fitscale.run.progress import progress
from tests.tiny import OVERRIDES


def checkpoint(run: RunDir, step: int, files: dict[str, bytes]) -> None:
    folder = run.checkpoint_path(step)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    marker = {"step": step, "images": step * 8, "files": {name: len(data) for name, data in files.items()}}
    (folder / "COMPLETE").write_text(json.dumps(marker))


def test_checkpoints_are_found_oldest_first(tmp_path):
    run = RunDir(tmp_path)
    for step in (30, 4, 100):
        checkpoint(run, step, {"weights/raw/0.safetensors": b"1234"})
    found = run.checkpoints()
    assert [one.step for one in found] == [4, 30, 100]
    assert found[0].meta["images"] == 32
    assert found[0].weight_names() == ["raw"]
    assert (found[0].weights("raw") / "0.safetensors").read_bytes() == b"1234"


@pytest.mark.parametrize("damage", ["marker missing", "marker cut", "file missing", "file cut"])
def test_a_half_written_checkpoint_is_absent(tmp_path, damage):
    run = RunDir(tmp_path)
    for step in (1, 2):
        checkpoint(run, step, {"state/rank0": b"1234", "weights/ema_0.9/0.safetensors": b"5678"})
    folder = run.checkpoint_path(2)
    marker, file = folder / "COMPLETE", folder / "state/rank0"
    {
        "marker missing": marker.unlink,
        "marker cut": lambda: marker.write_text(marker.read_text()[:-5]),
        "file missing": file.unlink,
        "file cut": lambda: file.write_bytes(b"123"),
    }[damage]()
    with pytest.raises(UserError, match=f"^{folder}/"):
        read_checkpoint(folder)
    assert [one.step for one in run.checkpoints()] == [1]
    assert run.checkpoint_folders() == [run.checkpoint_path(1), folder]


def test_only_a_run_of_an_earlier_version_goes_on_with_logit_normal_times_of_a_ddpm(tmp_path):
    fit_v1 = ("model.family=fit", "flow.kind=ddpm", "sampling.method=ddpm", f"run.dir={tmp_path / 'run'}")
    config = load_config([*OVERRIDES, *fit_v1, "flow.time_distribution=logit_normal"])
    with pytest.raises(UserError, match=r"flow\.time_distribution: logit_normal .* uniform"):
        claim(config)
    assert not (tmp_path / "run").exists()
    write_atomic(tmp_path / "run" / "config.yaml", to_yaml(config))
    assert claim(load_config([str(tmp_path / "run" / "config.yaml")])).config.is_file()
    with pytest.raises(UserError, match=r"flow\.time_distribution: logit_normal there, uniform here"):
        claim(load_config([*OVERRIDES, *fit_v1]))


def test_folders_under_other_names_are_no_checkpoints(tmp_path):
    run = RunDir(tmp_path)
    checkpoint(run, 1, {"state/rank0": b"1"})
    run.checkpoint_path(1).rename(run.checkpoint_path(1).with_name(".step-00000001.tmp"))
    assert run.checkpoint_folders() == []


def test_jsonl_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 2})
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    append_jsonl(path, {"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", b'{"loss": 1.0}'),
        ("metrics.jsonl", b'{"step": "4", "loss": 1.0}'),
        ("metrics.jsonl", b'{"step": 4, "loss": "much"}'),
        ("metrics.jsonl", b"garbage"),
        ("attempts.jsonl", b'{"step": 4, "event": "start"}'),
        ("attempts.jsonl", b'[{"step": 4, "event": "start", "attempt": 2}]'),
        ("attempts.jsonl", b"\xff\xfe"),
        ("evaluations.jsonl", b'{"step": 4, "metric": "fd", "value": 3.0, "weights": "ema", "key": "x"}'),
    ],
)
def test_rows_that_lack_what_is_read(tmp_path, name, line):
    """Whoever reads the file next, a start or a status table, names its line."""
    run, config = RunDir(tmp_path), load_config([*OVERRIDES, f"run.dir={tmp_path}"])
    begin_attempt(run, 0)
    append_jsonl(run.metrics, {"step": 1, "loss": None})
    number = 2 if (tmp_path / name).exists() else 1
    with open(tmp_path / name, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match=rf"{name}, line {number}: "):
        begin_attempt(run, 0)
        progress(config, run)


def test_a_first_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"st')
    append_jsonl(path, {"step": 1})
    assert read_jsonl(path) == [{"step": 1}]


def test_write_atomic_leaves_no_trace_of_itself(tmp_path):
    path = tmp_path / "new/file"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_text() == "new"
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_write_atomic_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises((TypeError, AttributeError)):
        write_atomic(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"


def test_a_run_may_go_on_with_other_files_and_health_but_not_with_another_seed(tmp_path):
    config = load_config([*OVERRIDES, f"run.dir={tmp_path}"])
    claim(config)
    for key in (
        "health.timeout_min=5",
        "health.max_bad_steps=3",
        "profile.steps=2",
        "data.cache_dir=/x",
        "data.cache_gb=1",
    ):
        claim(load_config([*OVERRIDES, f"run.dir={tmp_path}", key]))
    with pytest.raises(UserError, match=r"differing keys: run\.seed: 0 there, 1 here"):
        claim(load_config([*OVERRIDES, f"run.dir={tmp_path}", "run.seed=1"]))
