"""Plans: what they cost, and whether the interval they promise is the one that a sweep would give."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.config.load import load_config, load_schema
from fitscale.jobs.sweep import SweepConfig, cells
from fitscale.model import flops
from fitscale.plan.devices import DEVICES
from fitscale.run.progress import wanted_metrics
from fitscale.scaling.fit.fitting import fit_law
from fitscale.scaling.fit.laws import OFFSET
from fitscale.scaling.fit.planner import Economics, assumed, grid, measurements, plan
from fitscale.scaling.rows.files import write_table
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.runs import collect
from tests.programs import run_tool
from tests.synthetic_runs import write_sweep

MODELS = [load_config([f"configs/model/{name}.yaml"]).model for name in ("s", "b", "l", "xl")]
TARGET_MODEL = load_config(["configs/model/xxl.yaml"]).model
ECONOMICS = Economics(
    flops_per_hour=DEVICES["h100"].peak_flops_per_s * 0.4 * 3600,
    batch=256,
    tokens=256,
    points=6,
    first_step=50_000,
    most_steps=2_000_000,
    samples=50_000,
    evaluations_per_sample=100,
)
TARGET = ECONOMICS.train_flops(TARGET_MODEL, 400_000)


@pytest.fixture(scope="module")
def planned():
    return plan(MODELS, 300, ECONOMICS, assumed(), TARGET, seed=0)


def test_costs_are_those_of_training_and_sampling():
    (cell,) = [cell for cell in grid(MODELS, 300, ECONOMICS, 0.0) if cell.name == "b"]
    macs = flops.linear_macs(cell.model, 256) + flops.mixing_macs(cell.model, 256)
    total = 6 * macs * 256 * cell.steps + 6 * 2 * macs * 50_000 * 100
    assert cell.hours(ECONOMICS) == pytest.approx(total / (989e12 * 0.4 * 3600), rel=1e-9)


@pytest.mark.parametrize("hours", [80, 300, 5000])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_no_grid_is_over_budget_nor_wastes_it(hours, gamma):
    cells = grid(MODELS, hours, ECONOMICS, gamma)
    cost = sum(cell.hours(ECONOMICS) for cell in cells)
    assert cost <= hours
    capped = all(cell.steps == ECONOMICS.most_steps for cell in cells)
    assert not cells or capped or cost > 0.95 * hours or max(cell.steps for cell in cells) == ECONOMICS.most_steps


def test_a_plan_keeps_a_size_to_hold_out_and_repeats_one(planned):
    assert planned.hours <= 300 and planned.held_out == "xl"
    assert [cell.name for cell in planned.cells] == ["s", "b", "l", "xl", "b-seed1"]
    repeated = [cell for cell in planned.cells if cell.model.name == "b"]
    assert {cell.seed for cell in repeated} == {0, 1} and len({cell.steps for cell in repeated}) == 1
    assert {what.split()[0] for what, _, _ in planned.changes} >= {"without", "s", "xl", "8"}
    assert all((hours < 0) == what.startswith("without") for what, hours, _ in planned.changes)


def test_the_promised_interval_is_that_of_an_independent_simulation(planned):
    prior, rng, goal = assumed(), np.random.default_rng(123), pd.DataFrame({"train_flops": [TARGET]})
    rows = measurements(planned.cells, ECONOMICS)
    truth = prior.fit.metric(rows)
    ratios = []
    while len(ratios) < 500:
        of_runs = {run: rng.normal(0, prior.run_noise) for run in sorted(rows["run"].unique())}
        noise = rows["run"].map(of_runs) + rng.normal(0, prior.point_noise, len(rows))
        try:
            fit = fit_law(OFFSET, rows.assign(value=truth * np.exp(noise)))
        except Refusal:
            continue
        new = prior.fit.metric(goal)[0] * np.exp(rng.normal(0, prior.run_noise) + rng.normal(0, prior.point_noise))
        ratios.append(new / fit.metric(goal)[0])
    low, high = np.quantile(ratios, [0.05, 0.95])
    assert planned.outlook.width == pytest.approx(np.log(high / low), rel=0.2)
    assert planned.outlook.low == pytest.approx(low, rel=0.05) and planned.outlook.high == pytest.approx(high, rel=0.05)


def test_more_hours_narrow_the_interval(planned):
    cheaper = plan(MODELS, 80, ECONOMICS, assumed(), TARGET, seed=0)
    assert cheaper.outlook.width > 1.1 * planned.outlook.width


def test_refusals():
    with pytest.raises(Refusal, match="2 sizes: a plan needs three"):
        plan(MODELS[:2], 300, ECONOMICS, assumed(), TARGET, seed=0)
    with pytest.raises(Refusal, match="5 device-hours do not train s, b, l, xl to twice the warm-up"):
        plan(MODELS, 5, ECONOMICS, assumed(), TARGET, seed=0)


def test_plan_sweep_from_the_shell_writes_a_sweep(tmp_path):
    out = tmp_path / "sweep.yaml"
    command = ["plan_sweep", "--gpu-hours", "300", "--sizes", "s,b,l", "-o", str(out)]
    done = run_tool(*command)
    assert done.returncode == 0, done.stderr
    assert "hold out l" in done.stdout and "for xxl at 400,000 steps" in done.stdout
    assert "add to base before it runs: data.shards, evaluation.features, evaluation.reference" in done.stdout
    assert "# Add to base: data.shards, evaluation.features, evaluation.reference." in out.read_text()
    sweep = load_schema(SweepConfig, [str(out)])
    with pytest.raises(UserError, match=r"cell s: evaluation\.points: 6 evaluations"):
        cells(sweep)
    assert list(sweep.cells) == ["s", "b", "l", "b-seed1"]
    for arguments in sweep.cells.values():
        config = load_config([*sweep.base, *arguments])
        assert config.evaluation.steps(config.run.steps)[0] == 50_000 and Path(arguments[0]).is_file()
    files = ("--features", "inception.pt", "--reference", "in256.npz", "--shards", "shards/in256")
    done = run_tool(*command, *files)
    assert done.returncode == 0 and "add to base" not in done.stdout
    for config in cells(load_schema(SweepConfig, [str(out)])):
        assert wanted_metrics(config) == ["fd"] and config.data.shards == "shards/in256"
        assert (config.evaluation.features, config.evaluation.reference) == ("inception.pt", "in256.npz")
    failed = run_tool(*command, "--target", "huge")
    assert failed.returncode == 2 and "error: size huge: not one of" in failed.stderr


def test_the_rows_of_a_prior_are_chosen_as_everywhere(tmp_path):
    write_sweep(tmp_path / "runs", lambda flops, _: 30 * (flops / 1e13) ** -0.4 + 6, run_noise=0.01, point_noise=0.01)
    table = collect([tmp_path / "runs"])
    write_table(pd.concat([table, table.assign(key_guidance="2.0")]), tmp_path / "runs.csv")
    command = ["plan_sweep", "--gpu-hours", "300", "--sizes", "s,b,l", "--prior", tmp_path / "runs.csv"]
    refused = run_tool(*command)
    assert refused.returncode == 2 and "--where key_guidance=1.0" in refused.stderr
    done = run_tool(*command, "--where", "key_guidance=1.0")
    assert done.returncode == 0, done.stderr
    for option in ("--where=key_guidance=1", "--from-step=500", "--drop-missing"):
        failed = run_tool(*command[:5], option)
        assert failed.returncode == 2 and "go with --prior" in failed.stderr


@pytest.mark.parametrize(
    ("option", "least"),
    [("points", 1), ("first-step", 1), ("tokens", 1), ("batch", 1), ("samples", 2), ("nfe", 1), ("target-steps", 1)],
)
def test_an_option_out_of_range_is_one_message(option, least):
    done = run_tool("plan_sweep", "--gpu-hours", "300", f"--{option}={least - 1}")
    message = f"error: --{option}: {least - 1} is too small, the least is {least}\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, message, "")


def test_a_plan_that_cannot_be_written_is_one_message(tmp_path):
    done = run_tool("plan_sweep", "--gpu-hours", "300", "--sizes", "s,b,l", "-o", tmp_path)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}: cannot be written (Is a directory)\n")
