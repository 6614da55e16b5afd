"""The lines of a batch script: which ends of a job queue it again (Slurm's two commands stand in, for every case)."""

import os
import signal
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from fitscale.config.errors import PassingError, UserError
from fitscale.jobs import requeue
from fitscale.jobs.job import LOG, EvaluateJob, TrainJob
from fitscale.jobs.requeue import FAILED, FAILED_STARTS, SIGNALLED_STARTS, setup_lines, teardown_lines
from fitscale.run.attempt import Attempt, begin_attempt
from fitscale.run.claim import claim
from fitscale.run.layout import RunDir
from tests.tiny import tiny_config
from tests.waiting import LIMIT_S, has_ended, wait_until

JOB = "70"
KILLED, REFUSED, BAD_NODE = 137, 2, 1  # exit codes: of a signal, of a mistake, of anything else


def requeued(folder: Path, code: int, state: str = "RUNNING", restart: int = 0, squeue: str = "") -> bool:
    """Whether a job's script, ended so, asks Slurm to queue it again; `squeue`: what that command does, if not tell."""
    command, environment = script(folder, f"(exit {code})", squeue or f"echo {state} None", restart)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (code, "")
    return (folder / "requeued").exists()


def script(folder: Path, work: str, squeue: str, restart: int = 0) -> tuple[list[str], dict[str, str]]:
    """A job's script around `work`, and its environment, in which Slurm's commands are others."""
    for name, text in (("squeue", squeue), ("scontrol", f"touch {folder}/requeued")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    lines = "\n".join(["set -u", *setup_lines(folder), work, *teardown_lines()])
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": JOB, "SLURM_RESTART_COUNT": str(restart)}
    return ["bash", "-c", lines], environment


def begin(folder: Path, job: str, restart: int) -> Attempt:
    """What a start of training leaves in the run directory."""
    with patch.dict(os.environ, {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}):
        return begin_attempt(RunDir(folder), restart)


@pytest.mark.parametrize("code", [KILLED, REFUSED, 1])
def test_training_that_has_begun_goes_on_after_any_failure(tmp_path, code):
    begin(tmp_path, JOB, 3)
    assert requeued(tmp_path, code, restart=3)


def test_what_is_done_or_ended_by_slurm_does_not(tmp_path):
    begin(tmp_path, JOB, 0)
    assert not requeued(tmp_path, 0)
    assert not requeued(tmp_path, KILLED, state="COMPLETING")


@pytest.mark.parametrize("state", ["RUNNING", "SIGNALING"])
def test_a_job_that_slurm_is_sending_a_signal_goes_on(tmp_path, state):
    begin(tmp_path, JOB, 0)
    assert requeued(tmp_path, KILLED, state=state)


@pytest.mark.parametrize(
    ("state", "again"),
    [("COMPLETING TimeLimit", True), ("TIMEOUT TimeLimit", True), ("COMPLETING None", False), ("PENDING None", False)],
)
def test_at_a_time_limit_that_the_ranks_did_not_heed_a_job_goes_on(tmp_path, state, again):
    """Slurm sends SIGTERM to all processes; the ranks (here one that waits) would outlive it until SIGKILL."""
    begin(tmp_path, JOB, 0)
    rank = f"trap '' TERM; touch {tmp_path}/works; until [ -e {tmp_path}/killed ]; do sleep 0.05; done"
    work = f"echo $watcher >{tmp_path}/watcher; ({rank})"
    command, environment = script(tmp_path, work, f"echo {state}")
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    wait_until((tmp_path / "works").exists, "the rank")
    watcher = int((tmp_path / "watcher").read_text())
    wait_until(Path(f"/proc/{watcher}/task/{watcher}/children").read_text, "the watcher's sleep")
    os.killpg(process.pid, signal.SIGTERM)
    wait_until(lambda: has_ended(watcher), "the watcher's decision")
    assert (tmp_path / "requeued").exists() is again
    assert process.poll() is None, "the script ended before its ranks: with it Slurm ends all that it started"
    (tmp_path / "killed").touch()
    assert process.wait(LIMIT_S) == 0


@pytest.mark.parametrize(("silent", "again"), [(2, True), (3, False)])
def test_a_controller_that_does_not_answer_is_asked_again_but_not_for_ever(tmp_path, silent, again):
    begin(tmp_path, JOB, 0)
    asked = tmp_path / "asked"
    answer = f"echo >>{asked}; [ $(wc -l <{asked}) -gt {silent} ] && echo RUNNING None"
    with patch.multiple(requeue, CONTROLLER_TRIES=3, CONTROLLER_WAIT_S=0):
        assert requeued(tmp_path, KILLED, squeue=answer) is again
    assert len(asked.read_text()) == 3


def test_a_run_that_says_that_it_cannot_go_on_does_not(tmp_path):
    begin(tmp_path, JOB, 0)
    (tmp_path / FAILED).write_text("why")
    assert not requeued(tmp_path, KILLED)


@pytest.mark.parametrize(("job", "restart"), [("71", 0), (JOB, 1)])
def test_a_run_that_a_newer_start_owns_does_not(tmp_path, job, restart):
    begin(tmp_path, JOB, 0)
    begin(tmp_path, job, restart)
    assert not requeued(tmp_path, KILLED)


def test_what_a_signal_ended_before_it_began_goes_on_but_not_for_ever(tmp_path):
    begin(tmp_path, "69", 0)  # the job of the chain before it
    assert requeued(tmp_path, 140, restart=SIGNALLED_STARTS - 1)
    (tmp_path / "requeued").unlink()
    assert not requeued(tmp_path, KILLED, restart=SIGNALLED_STARTS)


def test_what_failed_before_it_began_goes_on_a_few_times_but_not_after_a_mistake(tmp_path):
    assert requeued(tmp_path, BAD_NODE, restart=FAILED_STARTS - 1)
    (tmp_path / "requeued").unlink()
    assert not requeued(tmp_path, BAD_NODE, restart=FAILED_STARTS)
    assert not requeued(tmp_path, REFUSED)
    (tmp_path / FAILED).write_text("why")
    assert not requeued(tmp_path, BAD_NODE)


def test_starts_that_began_do_not_count_against_one_that_did_not(tmp_path):
    begin(tmp_path, "69", 0)
    for restart in range(30):
        begin(tmp_path, JOB, restart).end("SIGUSR2", 0)
    assert requeued(tmp_path, BAD_NODE, restart=30 + FAILED_STARTS - 1)
    (tmp_path / "requeued").unlink()
    assert not requeued(tmp_path, BAD_NODE, restart=30 + FAILED_STARTS)


def test_an_evaluation_that_was_cut_off_too_often_does_not(tmp_path):
    assert not requeued(tmp_path, 255, restart=FAILED_STARTS)  # how submitit ends then


def test_an_earlier_start_of_the_job_is_not_taken_for_this_one(tmp_path):
    begin(tmp_path, JOB, 0)
    assert not requeued(tmp_path, REFUSED, restart=1)
    assert requeued(tmp_path, 140, restart=1)


# --- what leaves the word that a run cannot go on ------------------------------------------------


def noted(folder: Path, error: UserError, restart: int = 0) -> bool:
    """Whether a rank of JOB that meets `error` writes failed.txt."""
    (folder / FAILED).unlink(missing_ok=True)
    with patch.dict(os.environ, {"SLURM_JOB_ID": JOB, "SLURM_RESTART_COUNT": str(restart)}):
        TrainJob(folder, 10)._note(error)
    return (folder / FAILED).exists()


def test_a_lasting_mistake_is_noted_and_a_passing_one_is_not(tmp_path):
    begin(tmp_path, JOB, 0)
    assert noted(tmp_path, UserError("a corrupt image")) and (tmp_path / FAILED).read_text() == "a corrupt image\n"
    assert not noted(tmp_path, PassingError("a store that does not answer"))


def test_a_start_that_a_newer_one_has_taken_over_notes_nothing(tmp_path):
    begin(tmp_path, JOB, 0)
    assert noted(tmp_path, UserError("before this start began"), restart=1)
    begin(tmp_path, JOB, 1)
    assert not noted(tmp_path, UserError("met by a rank that was frozen"))
    assert noted(tmp_path, UserError("met by the newest"), restart=1)


def test_a_node_without_its_gpu_is_no_mistake_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    claim(tiny_config(tmp_path, tmp_path, "run.device=cuda"))
    with pytest.raises(RuntimeError, match="torch finds no CUDA device on"):
        EvaluateJob(tmp_path, 10)()
    with pytest.raises(RuntimeError, match="torch finds no CUDA device on"):
        TrainJob(tmp_path, 10)._train(0)
    assert not (tmp_path / FAILED).exists()


def test_an_evaluation_that_is_a_mistake_ends_with_the_exit_code_of_one(tmp_path):
    claim(tiny_config(tmp_path, tmp_path))
    with pytest.raises(SystemExit) as end:
        EvaluateJob(tmp_path, 10)()
    assert end.value.code == REFUSED and "error: " in (tmp_path / LOG).read_text()
