"""The lines of a batch script: which ends of a job queue it again (Slurm's two commands stand in, for every case)."""

import os
import signal
import subprocess
from pathlib import Path
from shlex import quote
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from fitscale.config.errors import PassingError, UserError
from fitscale.config.files import append_jsonl, read_jsonl, write_atomic
from fitscale.config.program import USER_ERROR
from fitscale.jobs.job import EvaluateJob, Stop, TrainJob, rendezvous
from fitscale.jobs.launch import make_executor
from fitscale.jobs.profile import ClusterConfig, LayoutConfig
from fitscale.jobs.submission import Submission, as_told
from fitscale.plan.step import Images
from fitscale.run.attempt import Attempt, begin_attempt
from fitscale.run.chunks import ChunkFolder
from fitscale.run.claim import claim
from fitscale.run.evaluation_start import note_start
from fitscale.run.layout import RunDir
from tests.measured import record
from tests.tiny import tiny_config
from tests.waiting import LIMIT_S, has_ended, wait_until

JOB = "70"
EVALUATED = ("run.steps=10", "evaluation.points=1")
ALONE = SimpleNamespace(
    raw_job_id=JOB, global_rank=0, local_rank=0, num_tasks=1, num_nodes=1, hostnames=["node1"]
)  # a job of one task
KILLED, REFUSED, BAD_NODE = 137, USER_ERROR, 1  # exit codes: of a signal, of a mistake, of anything else
SIGNALLED_STARTS, FAILED_STARTS = 20, 5  # that a job may have before training begins
CPUS = ClusterConfig(device="cpu", gpus_per_node=0, tasks_per_node=1)


def requeued(
    folder: Path, code: int, state: str = "RUNNING", restart: int = 0, squeue: str = "", work: str = ""
) -> bool:
    """Whether a job's script, ended so, asks Slurm to queue it again; `squeue`: what that command does, if not tell."""
    command, environment = script(folder, work or f"(exit {code})", squeue or f"echo {state} None", restart)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (code, "")
    return (folder / "requeued").exists()


def script(folder: Path, work: str, squeue: str, restart: int = 0) -> tuple[list[str], dict[str, str]]:
    """A job's script around `work`, and its environment, in which Slurm's commands are others."""
    for name, text in (("squeue", squeue), ("scontrol", f"touch {quote(str(folder))}/requeued")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    config = tiny_config(folder, folder)
    one = as_told(Submission(config, Images({16: 1.0}, 16, "a test")), CPUS, LayoutConfig())
    asked = make_executor(CPUS, one, TrainJob(one.run, 10), 60, {}).parameters
    lines = "\n".join(["set -u", *asked["setup"], work, *asked["teardown"]])
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


def test_a_run_directory_may_have_any_name(tmp_path):
    folder = tmp_path / 'it\'s $HOME; "a run" {x}'
    begin(folder, JOB, 3)
    assert requeued(folder, REFUSED, restart=3)
    RunDir(folder).failed.write_text("why")
    (folder / "requeued").unlink()
    assert not requeued(folder, REFUSED, restart=3)


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


@pytest.mark.parametrize(("silent", "times", "again"), [(2, 3, True), (30, 30, False)])
def test_a_controller_that_does_not_answer_is_asked_again_but_not_for_ever(tmp_path, silent, times, again):
    begin(tmp_path, JOB, 0)
    asked = tmp_path / "asked"
    answer = f"echo >>{asked}; [ $(wc -l <{asked}) -gt {silent} ] && echo RUNNING None"
    no_waits = 'sleep() { [ "$BASHPID" = $$ ] || command sleep "$@"; }'  # but those of the watcher, a process apart
    assert requeued(tmp_path, KILLED, squeue=answer, work=f"{no_waits}; (exit {KILLED})") is again
    assert len(asked.read_text()) == times


def test_a_run_that_says_that_it_cannot_go_on_does_not(tmp_path):
    begin(tmp_path, JOB, 0)
    RunDir(tmp_path).failed.write_text("why")
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
    RunDir(tmp_path).failed.write_text("why")
    assert not requeued(tmp_path, BAD_NODE)


def test_starts_that_began_do_not_count_against_one_that_did_not(tmp_path):
    begin(tmp_path, "69", 0)
    for restart in range(30):
        begin(tmp_path, JOB, restart).end("SIGUSR2", 0)
    assert requeued(tmp_path, BAD_NODE, restart=30 + FAILED_STARTS - 1)
    (tmp_path / "requeued").unlink()
    assert not requeued(tmp_path, BAD_NODE, restart=30 + FAILED_STARTS)


def test_an_end_of_submitit_is_no_signal(tmp_path):
    assert not requeued(tmp_path, 255, restart=FAILED_STARTS)  # how submitit ends


def evaluates(folder: Path, restart: int, job: str = JOB) -> None:
    """What a start of an evaluation leaves in the run directory."""
    with patch.dict(os.environ, {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}):
        note_start(RunDir(folder), 10)


def test_an_evaluation_that_has_begun_goes_on_after_anything_but_a_mistake(tmp_path):
    """Its next start refuses itself, if nothing comes of it."""
    begin(tmp_path, "69", 0)  # its training
    RunDir(tmp_path).failed.write_text("why training ended")
    for restart in range(31):
        evaluates(tmp_path, restart)
    for code in (KILLED, BAD_NODE, 255):
        assert requeued(tmp_path, code, restart=30)
        (tmp_path / "requeued").unlink()
    assert not requeued(tmp_path, REFUSED, restart=30)
    assert requeued(tmp_path, KILLED, restart=30 + SIGNALLED_STARTS)  # before it begins, as training
    (tmp_path / "requeued").unlink()
    assert not requeued(tmp_path, KILLED, restart=31 + SIGNALLED_STARTS)


def test_an_earlier_start_of_the_job_is_not_taken_for_this_one(tmp_path):
    begin(tmp_path, JOB, 0)
    assert not requeued(tmp_path, REFUSED, restart=1)
    assert requeued(tmp_path, 140, restart=1)


# --- evaluations that were submitted held -------------------------------------------------------


def test_evaluations_are_released_when_their_checkpoints_are_there_each_once(tmp_path):
    """By the watcher while the job runs, and by its end; one whose checkpoint is not there stays held."""
    for job, kind, step, held in (("7", "train", 30, False), ("8", "evaluate", 10, True), ("9", "evaluate", 20, True)):
        append_jsonl(RunDir(tmp_path).jobs, {"job": job, "kind": kind, "step": step, "held": held, "time_unix_s": 0.5})
    append_jsonl(RunDir(tmp_path).jobs, {"job": "10", "kind": "evaluate", "step": 10, "held": False, "time_unix_s": 0})
    write_atomic(RunDir(tmp_path).checkpoint_path(10) / "COMPLETE", "{}")
    saved = f"mkdir -p {tmp_path}/checkpoints/step-00000020; touch {tmp_path}/checkpoints/step-00000020/COMPLETE"
    released = f"{tmp_path}/released"
    command, environment = script(
        tmp_path, f"until [ -s {released} ]; do sleep 0.05; done; {saved}", "echo RUNNING None"
    )
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{released}\n')
    assert subprocess.run(command, env=environment, timeout=LIMIT_S, check=False).returncode == 0
    told = (tmp_path / "released").read_text().splitlines()
    assert told[0] == "release 8" and set(told[1:]) == {"release 8", "release 9"}


# --- where ranks meet ---------------------------------------------------------------------------


def test_a_rank_takes_the_only_gpu_that_slurm_shows_it_or_that_of_its_place(monkeypatch):
    place = SimpleNamespace(
        raw_job_id="7", global_rank=5, local_rank=1, num_tasks=8, num_nodes=2, hostnames=["node1", "node2"]
    )
    for seen, device in ((1, "0"), (4, "1"), (0, "1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert rendezvous(place)["LOCAL_RANK"] == device


# --- what leaves the word that a run cannot go on ------------------------------------------------


def noted(folder: Path, error: UserError, restart: int = 0) -> bool:
    """Whether a rank of JOB that meets `error` writes failed.txt."""
    RunDir(folder).failed.unlink(missing_ok=True)
    with patch.dict(os.environ, {"SLURM_JOB_ID": JOB, "SLURM_RESTART_COUNT": str(restart)}):
        TrainJob(RunDir(folder), 10)._note(error)
    return RunDir(folder).failed.exists()


def test_a_lasting_mistake_is_noted_and_a_passing_one_is_not(tmp_path):
    begin(tmp_path, JOB, 0)
    assert noted(tmp_path, UserError("a corrupt image")) and RunDir(tmp_path).failed.read_text() == "a corrupt image\n"
    assert not noted(tmp_path, PassingError("a store that does not answer"))


def test_a_start_that_a_newer_one_has_taken_over_notes_nothing(tmp_path):
    begin(tmp_path, JOB, 0)
    assert noted(tmp_path, UserError("before this start began"), restart=1)
    begin(tmp_path, JOB, 1)
    assert not noted(tmp_path, UserError("met by a rank that was frozen"))
    assert noted(tmp_path, UserError("met by the newest"), restart=1)


def test_a_node_without_its_gpu_is_no_mistake_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    claim(tiny_config(tmp_path, tmp_path, "run.device=cuda", *EVALUATED))
    with pytest.raises(RuntimeError, match="torch finds no CUDA device on"):
        EvaluateJob(RunDir(tmp_path), 10)._evaluate(ALONE)
    with pytest.raises(RuntimeError, match="torch finds no CUDA device on"):
        TrainJob(RunDir(tmp_path), 10)._train(0)
    assert not RunDir(tmp_path).failed.exists()


def test_an_evaluation_that_is_a_mistake_ends_with_the_exit_code_of_one(tmp_path):
    claim(tiny_config(tmp_path, tmp_path, *EVALUATED))
    with pytest.raises(SystemExit) as end:
        EvaluateJob(RunDir(tmp_path), 10)._evaluate(ALONE)
    assert end.value.code == REFUSED and "error: " in RunDir(tmp_path).log.read_text()


def test_an_evaluation_whose_rows_are_there_is_over_at_once(tmp_path):
    """As on ranks that start again after one of them was killed, and the others had done its part: here without a GPU,
    and without a checkpoint."""
    config = tiny_config(tmp_path, tmp_path, "run.device=cuda", *EVALUATED)
    run = claim(config)
    record(config, 10, "validation_loss")
    EvaluateJob(run, 10)._evaluate(ALONE)
    assert not run.log.exists() and not run.evaluation_starts.exists()
    ChunkFolder(run.evaluation_folder / "step-00000010_samples_beef", 3).open({"step": 10, "what": "samples"})
    with pytest.raises(RuntimeError, match="no CUDA device"):  # chunks wait there to become rows
        EvaluateJob(run, 10)._evaluate(ALONE)


def test_every_rank_of_an_evaluation_runs_the_command_in_its_place(tmp_path, monkeypatch, capfd):
    run, seen = claim(tiny_config(tmp_path, tmp_path, *EVALUATED)), []
    monkeypatch.setattr(Stop, "run", lambda self, command, **how: seen.append((command[3:], how)) or 0)
    for rank in (0, 3):
        EvaluateJob(run, 10)._evaluate(SimpleNamespace(**{**vars(ALONE), "num_tasks": 4, "global_rank": rank}))
    (first, of_first), (fourth, of_fourth) = seen
    assert first == fourth == ["evaluate", str(run.path), "--step", "10"]
    places = [(how["env"]["RANK"], how["env"]["WORLD_SIZE"], how["env"]["MASTER_PORT"]) for _, how in seen]
    assert places[0][:2] == ("0", "4") and places[1][:2] == ("3", "4") and places[0][2] == places[1][2]
    assert of_first["stdout"].name == str(run.log) and of_fourth["stdout"] is None
    assert [row["step"] for row in read_jsonl(run.evaluation_starts)] == [10]  # rank 0's
