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
from fitscale.jobs.profile import ClusterConfig, EvaluationLayoutConfig, LayoutConfig, read_profile
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


def test_beside_a_training_that_keeps_its_nodes_evaluations_wait_for_their_checkpoints(tmp_path):
    config = configured(tmp_path)
    links = missing_links(progress(config, RunDir(tmp_path / "run")), [], "beside")
    assert shape(links) == [("train", 80, None), ("evaluate", 20, None), ("evaluate", 40, None), ("evaluate", 80, 80)]
    assert [(link.steps, link.held) for link in links] == [(80, False), (0, True), (0, True), (0, False)]
    save(config, 20)
    going_on = [LiveJob("7", "train", 80, "RUNNING"), LiveJob("9", "evaluate", 40, launch.HELD)]
    links = missing_links(progress(config, RunDir(tmp_path / "run")), going_on, "beside")
    assert [(link.step, link.after, link.held) for link in links] == [(20, None, False), (80, "7", False)]


def test_after_a_training_that_keeps_its_nodes_all_evaluations_wait_for_its_end(tmp_path):
    config = configured(tmp_path)
    save(config, 20)
    links = missing_links(progress(config, RunDir(tmp_path / "run")), [], "after")
    assert shape(links) == [("train", 80, None), ("evaluate", 20, 80), ("evaluate", 40, 80), ("evaluate", 80, 80)]


def test_a_training_that_passes_a_step_is_not_started_a_second_time(tmp_path):
    """Submitted to train only, or beside its evaluations, then again with stops."""
    links = missing(configured(tmp_path), LiveJob("7", "train", 80, "PENDING"))
    assert shape(links) == [("evaluate", 20, "7"), ("evaluate", 40, "7"), ("evaluate", 80, "7")]


def test_a_held_evaluation_that_nobody_released_is(tmp_path, monkeypatch):
    config, profile, said = configured(tmp_path), ClusterConfig(), []
    claim(config)
    save(config, 20, 80)
    evaluate(config, 80)
    monkeypatch.setattr(chain, "slurm", lambda *command: said.append(command))
    held = [LiveJob(str(step), "evaluate", step, launch.HELD) for step in (20, 120)]
    assert submit_missing(profile, allocated(config, profile, 1, 1), held, "beside") == {}
    assert said == [("scontrol", "release", "20")]


def test_a_job_is_given_the_time_that_the_plan_says_with_a_margin_and_within_the_profile(tmp_path):
    config, profile = configured(tmp_path, "run.steps=100000000"), ClusterConfig(time_min=1440, signal_before_end_s=120)
    one = allocated(config, profile, 1, 8)
    day_s = one.plan.step_s * 20_000_000
    short, long = Link("train", 40, steps=int(3600 / one.plan.step_s)), Link("train", 40, steps=20_000_000)
    assert day_s > 86400 and chain.limit_min(profile, one, long) == 1440
    assert chain.limit_min(profile, one, short) == pytest.approx(60 * 1.5 + 2 + 15, abs=1)
    of_evaluation = chain.limit_min(profile, one, Link("evaluate", 40))  # an hour besides what is planned
    assert of_evaluation == pytest.approx((3600 + one.evaluation.seconds) / 60 * 1.5 + 2 + 15, abs=1)
    script = batch_script(chain.executor_of(profile, one, short))
    assert f"#SBATCH --time={chain.limit_min(profile, one, short)}" in script
    assert "#SBATCH --hold" in batch_script(chain.executor_of(profile, one, Link("evaluate", 40, held=True)))


def test_the_table_of_a_chain_has_every_job_with_its_cost(tmp_path):
    config, profile = configured(tmp_path), ClusterConfig()
    one = allocated(config, profile, 2, 8)
    links = missing(config)
    header, *rows, total = chain.chain_table(profile, one, links).splitlines()
    assert len(rows) == 6 and "GPU-hours" in header and "2 x 8" in rows[0] and "1 x 1" in rows[1]
    evaluated = 3 * one.evaluation.gpu_hours
    assert evaluated > 0
    assert rows[0].split()[:2] == ["train", "20"] and "train 20" in rows[1].split("1 x 1")[0]
    assert f"6 jobs, {16 * 80 * one.plan.step_s / 3600 + evaluated:,.3g} GPU-hours" in total


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
    monkeypatch.setattr(chain, "submit", lambda executor, job, held: scripts.append(batch_script(executor)) or "1")
    run.failed.write_text("why the jobs before these ended")
    submit_missing(profile, allocated(config, profile, 2, 8), [])
    assert len(scripts) == 6
    train, evaluation, *_ = scripts
    assert "#SBATCH --nodes=2" in train and "#SBATCH --nodes=1" in evaluation
    assert "#SBATCH --mem=819200M" in train and "#SBATCH --gpus-per-node=8" in train
    assert "#SBATCH --mem=102400M" in evaluation and "#SBATCH --gpus-per-node=1" in evaluation
    srun = "--export=ALL --distribution=block:block --cpus-per-task=12"
    assert f"--kill-on-bad-exit=1 {srun}" in train and f"--kill-on-bad-exit=0 --wait=0 {srun}" in evaluation
    assert all(srun in script for script in scripts)
    assert not any(word in script for word in ("wckey", "--gpu-bind", "--gpus-per-task") for script in scripts)
    assert not run.failed.exists()


def test_an_evaluation_takes_the_nodes_and_tasks_that_the_profile_gives_it(tmp_path, monkeypatch):
    layout = EvaluationLayoutConfig(nodes=2, tasks_per_node=4)
    config, profile = configured(tmp_path), ClusterConfig(mem_gb=800, evaluation=layout)
    one, scripts = allocated(config, profile, 4, 2), []
    monkeypatch.setattr(chain, "submit", lambda executor, job, held: scripts.append(batch_script(executor)) or "1")
    claim(config)
    submit_missing(profile, one, [], "after")
    train, evaluation, *_ = scripts
    assert "#SBATCH --nodes=4" in train and "#SBATCH --ntasks-per-node=2" in train
    assert "#SBATCH --nodes=2" in evaluation and "#SBATCH --ntasks-per-node=4" in evaluation
    assert "#SBATCH --mem=409600M" in evaluation and "#SBATCH --gpus-per-node=4" in evaluation
    assert one.evaluate_gpu_hours == pytest.approx(3 * 8 * one.evaluation.seconds / 3600)
    table = chain.chain_table(profile, one, missing(config))
    assert "4 x 2" in table.splitlines()[1] and "2 x 4" in table.splitlines()[2]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ("{tasks_per_node: 9}", "evaluation.tasks_per_node: 9 is more than gpus_per_node = 8"),
        ("{nodes: 2000}", "evaluation.nodes: 2000 is more than max_nodes = 1024"),
        ("{nodes: 0}", "evaluation.nodes: 0 is too small"),
        ("{gpus: 2}", "evaluation.gpus: Key 'gpus' not in 'EvaluationLayoutConfig'"),
    ],
)
def test_a_layout_of_evaluations_that_cannot_be_is_refused(tmp_path, evaluation, message):
    path = tmp_path / "profile.yaml"
    path.write_text(f"evaluation: {evaluation}")
    with pytest.raises(UserError, match=message):
        read_profile(str(path))


def test_what_a_profile_leaves_out_of_its_evaluations_is_one_task(tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text("evaluation: {nodes: 2}")
    assert read_profile(str(path)).evaluation_machine.gpus == 2
    path.write_text("evaluation: {nodes: 2, tasks_per_node: null}")
    assert read_profile(str(path)).evaluation_machine.gpus == 16  # as many as a training's


def test_a_model_that_several_ranks_draw_with_needs_them_on_a_node(tmp_path):
    config = configured(tmp_path, "evaluation.tensor_parallel_size=2", "model.hidden_size=48")
    with pytest.raises(UserError, match=r"evaluation\.tensor_parallel_size: 2 does not divide the 1 tasks"):
        allocated(config, ClusterConfig(), 1, 8)
    assert allocated(config, ClusterConfig(evaluation=EvaluationLayoutConfig(1, 2)), 1, 8).evaluation.groups == 1
