"""Ladders: a sweep's cells, what they cost, and how far they are."""

import pytest

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl, write_atomic
from fitscale.config.load import load_schema
from fitscale.jobs.submission import Submission
from fitscale.jobs.sweep import SweepConfig, cells, cost_table, manifest
from fitscale.model import flops
from fitscale.plan.step import Images
from tests.measured import record

TEXT = """
name: study
dir: {dir}
base: [model.num_heads=2, run.steps=100, batch.global_batch_size=8, evaluation.first_step=25, evaluation.points=3,
       data.holdout_fraction=0.1]
cells:
  small: [model.hidden_size=32, model.depth=2]
  large: [model.hidden_size=64, model.depth=2, run.steps=200]
"""


def load(tmp_path, text=TEXT, *overrides) -> SweepConfig:
    (tmp_path / "sweep.yaml").write_text(text.replace("{dir}", str(tmp_path / "out")))
    return load_schema(SweepConfig, [str(tmp_path / "sweep.yaml"), *overrides])


def ladder_of(sweep: SweepConfig) -> list[Submission]:
    """The cells, on images of 16 and of 64 tokens."""
    return [Submission(one, Images({16: 0.5, 64: 0.5}, one.batch.global_batch_size, "a test")) for one in cells(sweep)]


def test_a_cell_is_the_base_then_its_own_arguments(tmp_path):
    small, large = ladder_of(load(tmp_path))
    assert (small.name, large.name) == ("small", "large")
    assert (small.config.run.steps, large.config.run.steps) == (100, 200)
    assert (small.config.model.hidden_size, large.config.model.hidden_size) == (32, 64)
    assert small.config.run.name == "study-small"
    assert small.run.path == tmp_path / "out/small"
    assert not (tmp_path / "out").exists()


def test_axes_make_every_combination_and_layouts_go_by_cell_or_value(tmp_path):
    text = """
dir: {dir}
base: [model.num_heads=2, evaluation.points=0]
axes:
  size: {small: [model.hidden_size=32], large: [model.hidden_size=64]}
  rate: {low: [optim.lr=1e-4], high: [optim.lr=1e-3, run.seed=7]}
layouts: {large: {nodes: 2}, large-low: {nodes: 4, tasks_per_node: 1}}
"""
    sweep = load(tmp_path, text)
    ladder = ladder_of(sweep)
    assert [cell.name for cell in ladder] == ["small-low", "small-high", "large-low", "large-high"]
    assert (ladder[3].config.model.hidden_size, ladder[3].config.optim.lr, ladder[3].config.run.seed) == (64, 1e-3, 7)
    assert [getattr(sweep.layout_of(cell.name), "nodes", None) for cell in ladder] == [None, None, 4, 2]


def test_cost_counts_every_image_with_its_own_tokens(tmp_path):
    small = ladder_of(load(tmp_path))[0]
    by_hand = sum(
        6 * (flops.linear_macs(small.config.model, n) + flops.mixing_macs(small.config.model, n)) for n in (16, 64)
    )
    assert small.train_flops == pytest.approx(by_hand / 2 * 8 * 100)


def test_table_and_manifest_hold_every_cell(tmp_path):
    sweep = load(tmp_path)
    ladder = ladder_of(sweep)
    header, small, large, total = cost_table(ladder).splitlines()
    assert f"{flops.parameters(ladder[0].config.model):,}" in small and "25 50 100" in small
    assert "1,600" in large and "40.0" in large and "2 cells" in total and "parameters" in header
    content = manifest(sweep, ladder)
    assert [cell["name"] for cell in content["cells"]] == ["small", "large"]
    assert content["cells"][1]["train_flops"] == ladder[1].train_flops
    assert content["sweep"]["cells"]["small"] == ["model.hidden_size=32", "model.depth=2"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (TEXT.replace("cells:", "cels:"), ["cels", "Did you mean", "cells"]),
        (TEXT.replace("dir: {dir}\n", ""), ["dir: must be given"]),
        ("dir: out\n", ["cells: must name at least one cell"]),
        ("dir: out\naxes: {size: {}}\n", ["cells: must name at least one cell"]),
        (TEXT + "axes: {seed: {a: [run.seed=0]}}\n", ["cells and axes: only one"]),
        (TEXT + "layouts: {lrage: {nodes: 2}}\n", ["layouts: 'lrage' is not one of large, small"]),
        (TEXT + "max_days: 0\n", ["max_days: 0.0 must be above 0"]),
        (TEXT.replace("small:", "../small:"), ["'../small' cannot be a directory's name"]),
        (TEXT + "local: {parallel_cells: 0}\n", ["local.parallel_cells"]),
        (TEXT + "local: {parallel_cells: 2, gpus: [0]}\n", ["local.gpus"]),
    ],
)
def test_a_mistake_in_a_sweep_is_named(tmp_path, text, parts):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_mistake_in_a_cell_names_the_cell(tmp_path):
    with pytest.raises(UserError, match=r"cell large: .*model\.hidden_size: 63"):
        cells(load(tmp_path, TEXT.replace("hidden_size=64", "hidden_size=63")))


def test_progress_is_read_from_the_run_directory(tmp_path):
    text = TEXT.replace("evaluation.points=3", "evaluation.points=3, evaluation.features=f.pt")
    cell = ladder_of(load(tmp_path, text))[0]
    state = cell.progress
    assert (state.step, state.loss, state.finished) == (0, None, False)
    append_jsonl(cell.run.metrics, {"step": 60, "loss": 0.5})
    record(cell.config, 25, "validation_loss", "fd")
    record(cell.config, 50, "validation_loss")
    state = cell.progress
    assert (state.step, state.pending, state.trained) == (60, [50, 100], False)
    assert str(state) == "step 60/100  loss 0.5000  evaluated 1/3"


def test_a_run_is_finished_with_its_last_checkpoint_and_all_evaluations(tmp_path):
    cell = ladder_of(load(tmp_path))[0]
    for step in (25, 50, 100):
        record(cell.config, step, "validation_loss")
    assert not cell.progress.finished
    write_atomic(cell.run.checkpoint_path(100) / "COMPLETE", '{"step": 100, "files": {}}')
    assert cell.progress.finished


@pytest.mark.parametrize("nothing", ["evaluation.validation_images=0", "data.holdout_fraction=0.0"])
def test_evaluations_that_would_measure_nothing_are_refused(tmp_path, nothing):
    text = TEXT.replace("data.holdout_fraction=0.1", f"data.holdout_fraction=0.1, {nothing}")
    with pytest.raises(UserError, match=r"cell small: evaluation.points: 3 evaluations .* give evaluation.features"):
        cells(load(tmp_path, text))
    assert len(cells(load(tmp_path, text.replace("evaluation.points=3", "evaluation.points=0")))) == 2


def evaluated_at_its_end(tmp_path, *overrides):
    text = TEXT.replace("evaluation.points=3", ", ".join(["evaluation.first_step=100", *overrides]))
    return ladder_of(load(tmp_path, text))[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"guidance": 2.0},
        {"guidance_power": 1.0},
        {"samples": 50},
        {"weights": "raw"},
        {"sampler": "heun"},
        {"steps": 250},
        {"rope": "yarn"},
        {"resolution": "256x256"},
        {"seed": 1},
        {"reference": None},
    ],
)
def test_a_distance_measured_otherwise_than_the_config_asks_does_not_count(tmp_path, changed):
    cell = evaluated_at_its_end(tmp_path, "evaluation.features=f.pt", "evaluation.validation_images=0")
    record(cell.config, 100, "fd", **changed)
    assert cell.progress.pending == [100]
    record(cell.config, 100, "fd")
    assert cell.progress.pending == []


def test_a_validation_loss_of_other_images_or_weights_does_not_count(tmp_path):
    cell = evaluated_at_its_end(tmp_path)
    record(cell.config, 100, "validation_loss", weights="raw")
    record(cell.config, 100, "validation_loss", held_out_images=8)
    assert cell.progress.pending == [100]


def test_a_line_of_an_earlier_version_is_measured_again(tmp_path):
    cell = evaluated_at_its_end(tmp_path, "evaluation.features=f.pt", "evaluation.validation_images=0")
    append_jsonl(cell.run.evaluations, {"step": 100, "metric": "fd", "value": 1.0, "key": {"guidance": 1.0}})
    assert cell.progress.pending == [100]
    record(cell.config, 100, "fd")
    assert cell.progress.pending == []
