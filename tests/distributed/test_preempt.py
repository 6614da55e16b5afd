"""Signals, attempts and who may write: ranks that are told to stop save together, and an older attempt is kept out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl, read_jsonl
from fitscale.config.schema import Config
from fitscale.parallel.groups import Topology
from fitscale.run.attempt import IDLE_ATTEMPTS, TakenOverError, begin_attempt
from fitscale.run.layout import RunDir
from fitscale.train import step, trainer
from fitscale.train.metrics import Monitor
from tests.distributed.spawn import context, run_ranks, start_ranks, train_here
from tests.distributed.test_layouts import tensors
from tests.tiny import OVERRIDES as TINY
from tests.tiny import tiny_config
from tests.waiting import LIMIT_S, wait_until

STEPS = 15
OVERRIDES = (f"run.steps={STEPS}", "checkpoint.every_steps=1000")


def train_and_exit(config: Config) -> None:
    """`train_here`, which waits after 5 steps for the file `signalled`; a file holds training's own exit code."""
    from fitscale.train.preempt import Preempted

    take_step = step.Stepper.take

    def take_when_signalled(self, batch, votes):
        if batch.step == 5:
            wait_until(Path(config.run.dir, "signalled").exists, "the signal")
        return take_step(self, batch, votes)

    step.Stepper.take = take_when_signalled
    try:
        train_here(config)
    except Preempted as stop:
        Path(config.run.dir, f"exit-{os.environ['RANK']}").write_text(str(stop.code))


def wait_for_steps(run: RunDir, steps: int) -> None:
    wait_until(lambda: len(read_jsonl(run.metrics)) >= steps, f"{steps} steps")


@pytest.fixture(scope="module")
def calm(tmp_path_factory, digits_shards):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    run_ranks(train_here, 2, tiny_config(folder, digits_shards, *OVERRIDES))
    return folder


@pytest.mark.parametrize("signum", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_makes_all_save_and_no_step_is_lost(tmp_path, digits_shards, calm, signum):
    config = tiny_config(tmp_path / "stopped", digits_shards, *OVERRIDES)
    run = RunDir(tmp_path / "stopped")
    processes = start_ranks(train_and_exit, 2, config)
    wait_for_steps(run, 3)
    os.kill(processes[1].pid, signum)  # rank 0 hears nothing
    (run.path / "signalled").touch()
    for process in processes:
        process.join(LIMIT_S)
    assert [(run.path / f"exit-{rank}").read_text() for rank in (0, 1)] == [str(128 + signum)] * 2
    steps = read_jsonl(run.metrics)[-1]["step"]
    assert 3 <= steps <= 6 and run.checkpoints()[-1].step == steps

    run_ranks(train_here, 2, config)
    first, end, second, last = read_jsonl(run.attempts)
    assert (first["event"], end["reason"], end["step"]) == ("start", signum.name, steps)
    assert (second["step"], second["previous_ended"], second["lost_steps"]) == (steps, signum.name, 0)
    assert (last["reason"], last["step"]) == (f"reached step {STEPS}", STEPS)
    assert run.metrics.read_bytes() == RunDir(calm).metrics.read_bytes()
    ours, theirs = (tensors(folder, STEPS, "weights/raw") for folder in (run.path, calm))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def train_until_interrupted_twice(config: Config) -> None:
    """`train_and_exit`, which notes every signal that it has heard."""
    from fitscale.train import preempt

    hear = preempt.Preemption._hear

    def noted(self, signum, frame):
        hear(self, signum, frame)
        Path(config.run.dir, "heard").touch()

    preempt.Preemption._hear = noted
    train_and_exit(config)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_leaves_at_once(tmp_path, digits_shards, second):
    """Torchrun hands a second Ctrl-C on as SIGTERM. The step under way never ends here."""
    run = RunDir(tmp_path)
    (process,) = start_ranks(train_until_interrupted_twice, 1, tiny_config(tmp_path, digits_shards, *OVERRIDES))
    wait_for_steps(run, 5)
    os.kill(process.pid, signal.SIGINT)
    wait_until((tmp_path / "heard").exists, "the first Ctrl-C to be heard")
    os.kill(process.pid, second)
    process.join(LIMIT_S)
    assert process.exitcode == 130 and not run.checkpoints()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_lets_training_save_before_its_readers_end(tmp_path, digits_shards, signum):
    """Torchrun sends it to every process, and so does Slurm on some clusters; torch's own handler ends a reader."""
    run = RunDir(tmp_path / "run")
    arguments = [*TINY, f"run.dir={run.path}", f"data.shards={digits_shards}", "run.steps=100000"]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fitscale")
    command = [*torchrun, "train", *arguments, "data.num_workers=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_steps(run, 3)
    process.send_signal(signum)
    _, told = process.communicate(timeout=LIMIT_S)
    assert told.count(f"{signum.name}: training saves") == 1
    steps = read_jsonl(run.metrics)[-1]["step"]
    assert run.checkpoints()[-1].step == steps
    assert [row["reason"] for row in read_jsonl(run.attempts)[1:]] == [signum.name]


def test_an_attempt_that_was_taken_over_while_it_was_being_built_leaves_metrics_alone(
    tmp_path, digits_shards, monkeypatch
):
    config = tiny_config(tmp_path, digits_shards, "run.steps=4")
    run, make_engine = RunDir(tmp_path), trainer.make_engine

    def meanwhile(*arguments):
        begin_attempt(run, 0)
        append_jsonl(run.metrics, {"step": 1, "loss": 0.5})
        return make_engine(*arguments)

    monkeypatch.setattr(trainer, "make_engine", meanwhile)
    with pytest.raises(TakenOverError):
        train_here(config)
    assert read_jsonl(run.metrics) == [{"step": 1, "loss": 0.5}] and not run.environment.exists()


def test_a_row_that_was_measured_before_a_newer_start_is_not_written(tmp_path):
    config, run = tiny_config(tmp_path, tmp_path), RunDir(tmp_path)
    totals = {"step": 0, "images": 0, "tokens": 0, "train_flops": 0}
    monitor = Monitor(config, begin_attempt(run, 0), totals, Topology(0, 1, 0, 1, 0, 1, torch.device("cpu")))
    row = {"step": 1, "images": 16, "tokens": 700, "train_flops": 1, "loss": 0.5}
    waits = {"data_wait_s": 0.0, "data_wait_longest_s": 0.0, "data_wait_rank": 0}
    begin_attempt(run, 0)
    with pytest.raises(TakenOverError):
        monitor.log(row, waits)
    assert read_jsonl(run.metrics) == read_jsonl(run.throughput) == []


def test_a_stale_attempt_can_write_nothing_more(tmp_path, digits_shards):
    config = tiny_config(tmp_path, digits_shards, "run.steps=100000", "checkpoint.every_steps=2")
    run = RunDir(tmp_path)
    (stale,) = start_ranks(train_here, 1, config)
    wait_for_steps(run, 5)
    os.kill(stale.pid, signal.SIGSTOP)  # a node that Slurm gave up, with its processes still there
    newer = begin_attempt(run, run.checkpoints()[-1].step)
    before = snapshot(run)
    os.kill(stale.pid, signal.SIGCONT)
    stale.join(LIMIT_S)
    assert not stale.is_alive()
    assert snapshot(run) == before
    newer.end("finished", 0)  # the newer one may


def snapshot(run: RunDir) -> dict[str, int]:
    """Names and sizes of all that a later start reads."""
    files = [*run.path.glob("checkpoints/step-*/**/*"), run.metrics, run.attempts, run.path / "attempt.json"]
    return {str(path): path.stat().st_size for path in files if path.is_file()}


def test_the_newest_attempt_owns_the_directory(tmp_path):
    first = begin_attempt(RunDir(tmp_path), 0)
    with first.writing():
        pass
    second = begin_attempt(RunDir(tmp_path), 0)
    with pytest.raises(TakenOverError, match=r"attempt 2 .* has taken over; this is attempt 1"), first.writing():
        raise AssertionError("it was let in")
    with second.writing():
        pass


def hold(path: Path, ready: object) -> None:
    with begin_attempt(RunDir(path), 0).writing():
        ready.set()  # type: ignore[attr-defined]
        time.sleep(1)
        (path / "written").touch()


def test_a_new_attempt_waits_for_a_write_under_way(tmp_path):
    ready = context().Manager().Event()
    process = context().Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(LIMIT_S)
    begin_attempt(RunDir(tmp_path), 0)
    assert (tmp_path / "written").exists()
    process.join()


def test_a_job_that_makes_no_progress_stops_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for _ in range(IDLE_ATTEMPTS):
        begin_attempt(RunDir(tmp_path), 10)
    with pytest.raises(UserError, match="job 7 made no progress in 5 attempts, all from step 10"):
        begin_attempt(RunDir(tmp_path), 10)
    begin_attempt(RunDir(tmp_path), 11)
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # submitted anew
    begin_attempt(RunDir(tmp_path), 10)
