"""Starts of an evaluation's job: as many as finish chunks, and five that do not."""

import pytest

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl
from fitscale.run.chunks import ChunkFolder
from fitscale.run.evaluation_start import IDLE_STARTS, finished, note_start, require_new_chunks
from fitscale.run.layout import RunDir

STEP = 20


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a job anew: refused, or noted."""

    def begin(restart: int, job: str = "7", step: int = STEP) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        require_new_chunks(RunDir(tmp_path), step)
        note_start(RunDir(tmp_path), step)

    return begin


def chunks(folder, step: int = STEP) -> ChunkFolder:
    made = ChunkFolder(RunDir(folder).evaluation_folder / f"step-{step:08d}_samples_beef", 100)
    made.open({"step": step, "what": "samples"})
    return made


def test_a_job_that_finishes_chunks_is_started_for_as_long_as_it_does(tmp_path, start):
    work = chunks(tmp_path)
    for restart in range(4 * IDLE_STARTS):
        start(restart)
        if restart % IDLE_STARTS == IDLE_STARTS - 1:
            work.write(restart, {})
    assert finished(RunDir(tmp_path), STEP) == (0, 4)


def test_five_starts_without_a_new_chunk_are_the_last(tmp_path, start):
    chunks(tmp_path).write(0, {})
    other = chunks(tmp_path, 40)
    for restart in range(IDLE_STARTS):
        start(restart)
        other.write(restart, {})  # of another step: no help
    with pytest.raises(UserError, match="job 7 finished no chunk of the evaluation of step 20 in 5 starts"):
        start(IDLE_STARTS)
    start(0, job="8")  # submitted anew


def test_ranks_that_look_after_the_first_has_begun_come_to_the_same(tmp_path, start):
    work = chunks(tmp_path)
    for restart in range(IDLE_STARTS):
        start(restart)
    for _ in range(2):
        with pytest.raises(UserError):
            start(IDLE_STARTS)
    work.write(0, {})
    for _ in range(2):  # the second finds the line of the first
        start(IDLE_STARTS)


def test_rows_are_progress_whose_chunks_are_cleared_away(tmp_path, start):
    work, run = chunks(tmp_path), RunDir(tmp_path)
    work.write(0, {})
    for restart in range(IDLE_STARTS):
        start(restart)
    work.clear()
    append_jsonl(run.evaluations, {"step": STEP, "metric": "validation_loss", "value": 1.0, "key": {}})
    start(IDLE_STARTS)


def test_without_slurm_there_is_no_job_to_count_for(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for _ in range(2 * IDLE_STARTS):
        require_new_chunks(RunDir(tmp_path), STEP)
        note_start(RunDir(tmp_path), STEP)
