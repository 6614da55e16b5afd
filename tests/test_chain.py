"""What is missing of a run: training and evaluation jobs in their order, and nothing that is there or under way."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fitscale.config.errors import UserError
from fitscale.config.files import write_atomic
from fitscale.config.load import load_config
from fitscale.jobs import chain, launch
from fitscale.jobs.chain import Link, jobs_of_same_config, missing_links, submit_missing
from fitscale.jobs.launch import LiveJob, batch_script
from fitscale.jobs.profile import ClusterConfig, LayoutConfig
from fitscale.jobs.submission import Allocation, Submission, as_told
from fitscale.plan.step import typical_images
from fitscale.run.claim import claim, claimed
from fitscale.run.layout import RunDir
from fitscale.run.progress import progress
from tests.measured import record
from tests.tiny import OVERRIDES

STEPS = ("run.steps=80", "evaluation.points=3", "evaluation.first_step=20", "evaluation.validation_images=4")


def configured(folder: Path, *overrides: str):
    return load_config([*OVERRIDES, *STEPS, f"run.dir={folder / 'run'}", *overrides])


def missing(config, *live: LiveJob) -> list[Link]:
    return missing_links(progress(config, RunDir(Path(config.run.dir))), list(live))


def looked_at(config) -> Submission:
    return Submission(config, typical_images(config))


def allocated(config, profile: ClusterConfig, *given: int) -> Allocation:
    return as_told(looked_at(config), profile, LayoutConfig(*given))


def shape(links: list[Link]) -> list[tuple[str, int, object]]:
    """Links with the step of what they wait for, or the id of that job."""
    return [(one.kind, one.step, one.after.step if isinstance(one.after, Link) else one.after) for one in links]


def save(config, *steps: int) -> None:
    for step in steps:
        write_atomic(
            Path(config.run.dir) / f"checkpoints/step-{step:08d}/COMPLETE", f'{{"step": {step}, "files": {{}}}}'
        )


def evaluate(config, *steps: int) -> None:
    for step in steps:
        record(config, step, "validation_loss")


def test_a_new_run_is_a_chain_of_training_with_an_evaluation_at_every_stop(tmp_path):
    links = missing(configured(tmp_path))
    assert shape(links) == [
        ("train", 20, None),
        ("evaluate", 20, 20),
        ("train", 40, 20),
        ("evaluate", 40, 40),
        ("train", 80, 40),
        ("evaluate", 80, 80),
    ]
    assert all(link.after is None or link.after.kind == "train" for link in links)


def test_without_evaluations_it_is_one_job(tmp_path):
    assert shape(missing(configured(tmp_path, "evaluation.points=0"))) == [("train", 80, None)]


def test_what_is_saved_or_evaluated_is_left_out(tmp_path):
    config = configured(tmp_path)
    save(config, 20, 40)
    evaluate(config, 20)
    assert shape(missing(config)) == [("evaluate", 40, None), ("train", 80, None), ("evaluate", 80, 80)]
    save(config, 80)
    evaluate(config, 40, 80)
    assert missing(config) == [] and progress(config, RunDir(tmp_path / "run")).finished


def test_what_live_jobs_will_do_is_left_out_and_waited_for(tmp_path):
    config = configured(tmp_path)
    save(config, 20)
    going_on = LiveJob("7", "train", 40, "RUNNING"), LiveJob("8", "evaluate", 20, "PENDING")
    assert shape(missing(config, *going_on)) == [("evaluate", 40, "7"), ("train", 80, "7"), ("evaluate", 80, 80)]


def test_a_job_that_saved_its_last_step_but_lives_is_still_waited_for(tmp_path):
    config = configured(tmp_path)
    save(config, 20)
    links = missing(config, LiveJob("7", "train", 20, "COMPLETING"))
    assert shape(links)[:2] == [("evaluate", 20, "7"), ("train", 40, "7")]


def test_a_run_made_longer_goes_on_and_forgets_steps_that_it_passed(tmp_path):
    config = configured(tmp_path)
    save(config, 20, 40, 80)
    evaluate(config, 20, 40, 80)
    longer = configured(tmp_path, "run.steps=200")  # to be evaluated at 20, 63, 200; of 63 there is no checkpoint
    assert shape(missing(longer)) == [("train", 200, None), ("evaluate", 200, 200)]
    save(longer, 200)
    evaluate(longer, 200)
    assert progress(longer, RunDir(tmp_path / "run")).finished


def test_the_config_stays_while_jobs_are_live(tmp_path, monkeypatch):
    live = [LiveJob("7", "train", 20, "PENDING")]
    monkeypatch.setattr(chain, "live_jobs", lambda runs: [live for _ in runs])
    config = configured(tmp_path)
    claim(config)
    assert jobs_of_same_config([looked_at(config)]) == [live]
    claim(configured(tmp_path, "parallel.precision=bf16"))  # what `auto` has become there
    jobs_of_same_config([looked_at(configured(tmp_path, "parallel.precision=auto"))])
    claim(config)
    other = looked_at(configured(tmp_path, "parallel.zero_stage=2"))
    with pytest.raises(UserError, match=r"has jobs, 7 \(PENDING\), of another config: parallel.zero_stage: 1 there, 2"):
        jobs_of_same_config([other])
    live.clear()
    jobs_of_same_config([other])


def test_a_refused_submission_gives_back_what_is_new_and_has_no_job(tmp_path):
    new, submitted, old = configs = [configured(tmp_path / name) for name in ("new", "submitted", "old")]
    claim(old)
    with pytest.raises(UserError, match="refused"), claimed(configs):
        assert all(RunDir(Path(config.run.dir)).config.exists() for config in configs)
        write_atomic(Path(new.run.dir) / "submitit/0/job.pkl", "")
        write_atomic(RunDir(Path(submitted.run.dir)).jobs, "{}")
        raise UserError("refused")
    assert not Path(new.run.dir).exists()
    assert all(RunDir(Path(config.run.dir)).config.exists() for config in (submitted, old))


def test_a_job_that_cannot_be_noted_is_cancelled(tmp_path, monkeypatch):
    """Or it would train without the next submission's knowing of it."""
    config, profile, cancelled = configured(tmp_path, "evaluation.points=0"), ClusterConfig(), []
    claim(config).jobs.mkdir()  # no line can be written there
    monkeypatch.setattr(launch.SlurmExecutor, "submit", lambda *_: SimpleNamespace(job_id="7"))
    monkeypatch.setattr(launch, "slurm", lambda *command: cancelled.append(command))
    with pytest.raises(UserError, match="cannot be written"):
        submit_missing(profile, allocated(config, profile, 1, 1), [])
    assert cancelled == [("scancel", "7")]


def test_an_evaluation_asks_for_its_part_of_a_node_and_tasks_for_their_cores(tmp_path, monkeypatch):
    config, profile = configured(tmp_path), ClusterConfig(mem_gb=800, cpus_per_task=12)
    run, scripts = claim(config), []
    monkeypatch.setattr(chain, "submit", lambda executor, job: scripts.append(batch_script(executor)) or "1")
    run.failed.write_text("why the jobs before these ended")
    submit_missing(profile, allocated(config, profile, 2, 8), [])
    assert len(scripts) == 6
    train, evaluation, *_ = scripts
    assert "#SBATCH --nodes=2" in train and "#SBATCH --nodes=1" in evaluation
    assert "#SBATCH --mem=819200M" in train and "#SBATCH --gpus-per-node=8" in train
    assert "#SBATCH --mem=102400M" in evaluation and "#SBATCH --gpus-per-node=1" in evaluation
    assert all("--kill-on-bad-exit=1 --cpus-per-task=12" in script for script in scripts)
    assert not run.failed.exists()
