"""What a run is given of a cluster: as it is told, or the fewest nodes that the plan says will do."""

import pytest

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.jobs.profile import ClusterConfig, LayoutConfig
from fitscale.jobs.submission import Allocation, Submission, allocate
from fitscale.jobs.sweep import cost_table
from fitscale.model import flops
from fitscale.plan.step import plan, typical_images

H100 = ClusterConfig("h100", max_nodes=16)


def recipe(size: str, *overrides: str):
    return load_config([f"configs/model/{size}.yaml", "configs/recipe/fitv2_256.yaml", *overrides])


def given(config, profile: ClusterConfig, layout: LayoutConfig | None, max_days: float | None = None) -> Allocation:
    return allocate(Submission(config, typical_images(config)), profile, layout, max_days)


def test_a_given_layout_is_taken_as_it_is():
    config = recipe("b", "parallel.zero_stage=2", "run.device=cuda")
    found = given(config, H100, LayoutConfig(nodes=2, tasks_per_node=4))
    assert (found.plan.machine.nodes, found.plan.machine.gpus_per_node, found.config) == (2, 4, config)


def test_a_node_without_its_gpus_must_not_train_on_its_cores():
    assert given(recipe("b"), H100, LayoutConfig()).config.run.device == "cuda"
    assert given(recipe("b", "run.device=cpu"), H100, LayoutConfig()).config.run.device == "cpu"
    cpus = ClusterConfig("c", device="cpu", gpus_per_node=0, tasks_per_node=2)
    assert given(recipe("b"), cpus, None).config.run.device == "auto"


def test_the_fewest_nodes_that_keep_the_time_and_the_fastest_layout_on_them():
    config = recipe("xxl")
    roomy = given(config, H100, None)
    assert roomy.plan.machine.nodes == 1 and roomy.plan.spare_bytes >= 0
    days = roomy.plan.days
    tight = given(config, H100, None, days / 2.2)
    assert tight.plan.machine.nodes == 4 and tight.plan.days <= days / 2.2
    assert roomy.plan.step_s <= 1.05 * plan(config, roomy.plan.machine, typical_images(config), 0.4).step_s
    assert roomy.config.parallel.precision == config.parallel.precision


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_a_small_model_is_not_given_zero_3_without_need(size):
    chosen = given(recipe(size), H100, None).config.parallel
    assert chosen.zero_stage < 3 and chosen.tensor_parallel_size == 1 and chosen.activation_checkpoint_every == 0


def test_the_table_of_a_sweep_has_memory_and_time_and_fits_120_columns():
    name = "run.dir=sweep/a-name-that-is-so-long-that-it-alone-would-take-a-line-of-the-table-and-more-than-one"
    ladder = [given(recipe(size, name, "run.steps=4000000"), H100, LayoutConfig(nodes=16)) for size in ("s", "xxl")]
    header, *rows, _ = cost_table(ladder).splitlines()
    assert header.split()[-6:] == ["layout", "GiB", "s/step", "days", "GPU-hours", "evaluate"]
    assert all(len(line) <= 120 for line in (header, *rows)) and "..." in rows[0] and "dp128 tp1 ZeRO" in rows[0]
    assert f"{ladder[1].plan.memory.peak / 2**30:.1f}" in rows[1] and f"{ladder[1].plan.step_s:.3g}" in rows[1]


def test_a_time_that_no_number_of_nodes_keeps_is_refused():
    with pytest.raises(UserError, match=r"max_days: 0.001, but 16 nodes of profile h100 take"):
        given(recipe("xxl"), H100, None, 0.001)


def test_a_layout_that_does_not_fit_the_memory_is_refused():
    too_long = recipe("xxl", "batch.pack_tokens=131072", "batch.global_batch_size=4096")
    with pytest.raises(UserError, match=r"the given layout needs \d+\.\d GiB of a h100's 77.1; more tasks"):
        given(too_long, H100, LayoutConfig())


def test_on_cpus_a_cell_gets_one_node_and_its_own_layout():
    found = given(recipe("b"), ClusterConfig("c", device="cpu", gpus_per_node=0, tasks_per_node=2), None)
    assert (found.plan.machine.nodes, found.plan.machine.gpus_per_node) == (1, 2)


def test_evaluations_cost_their_function_evaluations():
    sampled = ("evaluation.features=f.pt", "evaluation.reference=x", "evaluation.points=3", "evaluation.samples=1000")
    config = recipe("b", *sampled, "sampling.method=euler", "sampling.steps=50", "sampling.guidance.scale=1.5")
    found = given(config, H100, LayoutConfig())
    forward = flops.train_flops(config.model, 256) / 3
    decoded, seen = 256 * 16**2 * 4_746_912 * 2, 5.71e9 * 2  # of a VAE's latents, by Inception
    per_hour = 989e12 * 0.4 * 3600
    points = len(config.evaluation.steps(config.run.steps))
    of_image = 50 * 2 * forward + decoded + seen
    assert found.evaluate_gpu_hours == pytest.approx(points * 1000 * of_image / per_hour, rel=0.02)


def test_a_profile_whose_device_does_not_go_with_its_gpus_is_refused():
    with pytest.raises(UserError, match=r"device: h100 does not go with gpus_per_node = 0"):
        ClusterConfig(gpus_per_node=0)
    with pytest.raises(UserError, match=r"'h1000' is not a known device"):
        ClusterConfig(device="h1000")
