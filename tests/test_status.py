"""slurm/status.py: what it reads from run directories, and what it refuses to guess."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fitscale.config.files import append_jsonl
from fitscale.config.load import load_config
from fitscale.config.program import exit_code
from fitscale.jobs import launch
from fitscale.run.attempt import begin_attempt
from fitscale.run.chunks import ChunkFolder
from fitscale.run.claim import claim
from fitscale.run.comparability import FILES, full_weights_name, sample_key
from fitscale.run.layout import RunDir
from tests.tiny import OVERRIDES

ROOT = Path(__file__).parents[1]


NOTED = {"time_unix_s": 0.0, "data_wait_s": 0.0}  # of a line of throughput.jsonl, besides what is shown


def show(*arguments: str | Path, path: Path = Path("/nowhere")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "slurm/status.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def status_program():
    """slurm/status.py as a module."""
    spec = importlib.util.spec_from_file_location("status_program", ROOT / "slurm" / "status.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_run(path: Path) -> RunDir:
    return claim(load_config([*OVERRIDES, f"run.dir={path}", "run.steps=10"]))


def test_a_sweep_is_one_row_a_run_and_missing_numbers_stay_missing(tmp_path):
    new_run(tmp_path / "a")
    stopped = new_run(tmp_path / "b")
    begin_attempt(stopped, 0)
    append_jsonl(stopped.metrics, {"step": 4, "loss": 0.5})
    append_jsonl(stopped.throughput, {"step": 4, "step_s": 600.0, "images_per_s": 3.0, "mfu": None, **NOTED})
    begin_attempt(stopped, 2)
    failed = new_run(tmp_path / "c")
    (failed.path / "failed.txt").write_text("data.shards: gone\n")

    result = show(tmp_path, "--json")
    assert result.returncode == 1, result.stderr  # a run has failed
    a, b, c = (json.loads(line) for line in result.stdout.splitlines())
    assert (a["state"], a["attempts"], a["step"], a["loss"], a["left_h"], a["fd"]) == ("NEW", 0, 0, None, None, None)
    assert (b["state"], b["attempts"], b["step"], b["loss"], b["left_h"], b["mfu"]) == ("STOPPED", 2, 4, 0.5, 1.0, None)
    assert (c["state"], c["error"]) == ("FAILED", ["data.shards: gone"])
    table = show(tmp_path).stdout.splitlines()
    assert [line.split()[1] for line in table[:4]] == ["state", "NEW", "STOPPED", "FAILED"]
    assert table[4].endswith("c: data.shards: gone")


def test_chunks_of_evaluations_under_way_are_counted_by_step(tmp_path):
    run = new_run(tmp_path)
    for step, what, count, done in ((4, "samples", 98, 2), (4, "validation", 8, 8), (10, "samples", 98, 0)):
        work = ChunkFolder(run.evaluation_folder / f"step-{step:08d}_{what}_beef", count)
        work.open({"step": step, "what": what})
        for number in range(done):
            work.write(number, {})
    (row,) = (json.loads(line) for line in show(tmp_path, "--json").stdout.splitlines())
    assert row["evaluations"][0] == {"step": 4, "what": "samples", "done": 2, "count": 98}
    assert show(tmp_path).stdout.splitlines()[1].endswith("4: 10/106, 10: 0/98")


def test_without_slurm_a_submitted_run_is_not_guessed_at(tmp_path):
    """What the run directory says is told, and of the queue only that it is unknown."""
    run, failed = new_run(tmp_path / "a"), new_run(tmp_path / "b")
    for one in (run, failed):
        append_jsonl(one.jobs, {"job": "1", "kind": "train", "step": 10, "time_unix_s": 0.0})
    append_jsonl(run.metrics, {"step": 4, "loss": 0.5})
    failed.failed.write_text("data.shards: gone\n")
    result = show(tmp_path, "--json")
    a, b = (json.loads(line) for line in result.stdout.splitlines())
    assert (a["state"], a["step"], a["loss"], b["state"]) == ("UNKNOWN", 4, 0.5, "FAILED")
    assert result.stderr.startswith("warning: the queue is unknown: no squeue on PATH"), result.stderr
    assert result.stderr.count("\n") == 1 and result.returncode == 1
    assert show(tmp_path, "--cancel").returncode == 2


def test_an_evaluation_that_is_held_says_nothing_of_its_run(tmp_path):
    """Its training has failed for good: nobody will release it."""
    (tmp_path / "bin").mkdir()
    for name, says in (("squeue", "1 PENDING JobHeldUser"), ("sacct", "1|PENDING")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / "bin" / name).chmod(0o755)
    run = new_run(tmp_path / "a")
    append_jsonl(run.jobs, {"job": "1", "kind": "evaluate", "step": 10, "held": True, "time_unix_s": 0.0})
    run.failed.write_text("data.shards: gone\n")
    result = show(run.path, "--json", path=tmp_path / "bin")
    assert json.loads(result.stdout)["state"] == "FAILED", result.stderr


def test_every_state_but_an_end_is_live(tmp_path, monkeypatch):
    run = new_run(tmp_path)
    live = ["PENDING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED", "STAGE_OUT", "a state of a later Slurm"]
    ended = ["COMPLETED", "CANCELLED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"]
    for state in [*live, *ended, "unknown"]:
        append_jsonl(run.jobs, {"job": state, "kind": "train", "step": 10, "time_unix_s": 0.0})
    monkeypatch.setattr(launch, "job_states", lambda ids: {state: state for state in ids if state != "unknown"})
    assert [job.state for job in launch.live_jobs([run])[0]] == live


WRONG_KINDS = '{"step": "4", "event": [], "job": 1, "kind": {}, "step_s": "x", "value": ""}'
GARBAGE = ['{"step": 4}', "[]", "\ufffd", WRONG_KINDS]


@pytest.mark.parametrize("name", ["metrics", "throughput", "attempts", "jobs", "evaluations"])
def test_garbage_in_a_file_of_the_run_is_one_line(tmp_path, capsys, name):
    run, program = new_run(tmp_path), status_program()
    path = getattr(run, name)
    for garbage in GARBAGE:
        path.write_text(garbage + "\n")
        assert exit_code(lambda: program.main([str(run.path)])) == 2
        told = capsys.readouterr()
        assert told.err.startswith(f"error: {path}, line 1: ") and told.err.count("\n") == 1 and told.out == ""


def test_the_distance_shown_is_the_one_that_the_config_asks_for(tmp_path):
    """Not the last that was measured: of stronger guidance, of fewer images, of the raw weights."""
    run = new_run(tmp_path)
    config = load_config([str(run.config)])
    files = dict.fromkeys(FILES, "0" * 16)
    asked = sample_key(config, full_weights_name(config, config.evaluation.weights)) | files
    for value, key in ((30.0, asked), (20.0, asked), (7.0, asked | {"guidance": 4.0}), (90.0, asked | {"samples": 2})):
        append_jsonl(run.evaluations, {"step": 10, "metric": "fd", "value": value, "weights": "ema", "key": key})
    (row,) = (json.loads(line) for line in show(tmp_path, "--json").stdout.splitlines())
    assert row["fd"] == 20.0


def test_a_folder_that_is_neither_is_said(tmp_path):
    result = show(tmp_path)
    assert result.returncode == 2 and "neither a run directory" in result.stderr
