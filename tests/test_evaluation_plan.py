"""What an evaluation will take: its arithmetic against hand calculations."""

from pathlib import Path

import pytest

from fitscale.cli import main
from fitscale.config.load import load_config
from fitscale.config.schema_sampling import ODE_SAMPLERS
from fitscale.model import flops
from fitscale.plan import evaluation
from fitscale.plan.devices import DEVICES
from fitscale.plan.evaluation import EvaluationPlan, function_evaluations, plan_evaluation
from fitscale.plan.layout import Machine
from fitscale.plan.step import Images
from tests.measured import record

ROOT = Path(__file__).parents[1]
H100 = DEVICES["h100"]
SAMPLED = ("evaluation.features=f.pt", "evaluation.reference=x", "data.latent.vae=sd", "evaluation.samples=2048")


def config_of(*overrides: str):
    return load_config([f"{ROOT}/configs/model/xl.yaml", *SAMPLED, *overrides])


def planned(*overrides: str, gpus: int = 1, shares: dict[int, float] | None = None) -> EvaluationPlan:
    return plan_evaluation(config_of(*overrides), Machine(H100, gpus, 8), Images(shares or {256: 1.0}, 256, ""), 0.5)


def forward_s(config, tokens: int) -> float:
    macs = flops.linear_macs(config.model, tokens) + flops.mixing_macs(config.model, tokens)
    return 2 * macs / (0.5 * 989e12)


def test_an_image_costs_its_passes_its_pixels_and_every_feature_network():
    one = planned("sampling.steps=40", "sampling.guidance.scale=1.5", shares={64: 0.5, 256: 0.5})
    config = config_of()
    assert one.passes == 80
    assert one.network_s == pytest.approx(80 * (forward_s(config, 64) + forward_s(config, 256)) / 2)
    assert one.decode_s == pytest.approx(160 * 16**2 * 4_746_912 * 2 / (0.5 * 989e12))
    assert one.features_s == pytest.approx(5.71e9 * 2 / (0.5 * 989e12))
    two = planned(
        "evaluation.features={a: f.pt, b: g.pt}", "data.latent={kind: pixels, factor: 1, scaling: 1, vae: null}"
    )
    assert two.features_s == 2 * one.features_s and two.decode_s == 0
    assert one.seconds == pytest.approx(2048 * (one.network_s + one.decode_s + one.features_s))


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        (("sampling.method=euler",), 30),
        (("sampling.method=heun",), 60),
        (("sampling.method=ab2",), 30),
        (("sampling.method=sde",), 30),
        (("sampling.method=sde", "sampling.last_step=none"), 29),
        (("sampling.method=sde_heun",), 59),
        (("sampling.method=sde_heun", "sampling.last_step=none"), 58),
    ],
)
def test_function_evaluations_are_those_that_the_sampler_makes(overrides, number):
    """Counted by the sampler itself."""
    import torch

    from fitscale.flow.sampler import sample
    from tests.packs import pack_of

    config = config_of("sampling.steps=30", *overrides)
    assert function_evaluations(config).number == number
    drawn = sample(lambda x_TC, t, pack: -x_TC, torch.randn(4, 2), config.sampling, pack_of((0,), (4,)), 0)
    assert drawn.nfe == [number]


def test_every_method_with_steps_has_a_number():
    assert all(function_evaluations(config_of(f"sampling.method={method}")).number > 0 for method in ODE_SAMPLERS)


def test_guidance_on_an_interval_costs_its_share():
    assert planned("sampling.guidance.interval=[0.25,0.75]").passes == 50  # of no scale: not guided at all
    assert planned("sampling.guidance={scale: 2, interval: [0.25,0.75]}").passes == 75


def test_dopri5_is_measured_where_it_can_be(tmp_path):
    (tmp_path / "a").mkdir()
    adaptive = ("sampling.method=dopri5", "sampling.rtol=1e-3", "sampling.guidance.scale=1.5")
    own, other = (config_of(*adaptive, f"run.dir={tmp_path}/{name}") for name in ("a", "b"))
    assert function_evaluations(own).number == evaluation.DOPRI5_EVALUATIONS
    assert "assumed" in str(planned(*adaptive))
    for config, nfe in ((other, 90.0), (other, 110.0)):
        record(config, 10, "fd", nfe=nfe)
    record(config_of(*adaptive[:2], f"run.dir={tmp_path}/b"), 10, "fd", nfe=1.0)  # of another guidance
    found = function_evaluations(own)
    assert (found.number, found.source) == (100, "dopri5, measured in 2 rows of the runs beside it")
    record(own, 10, "fd", nfe=70.0)
    assert function_evaluations(own).source == "dopri5, measured in 1 rows of this run"
    assert planned(*adaptive, f"run.dir={tmp_path}/a").passes == 140


def test_the_busiest_rank_decides():
    alone, two, three = (planned("data.holdout_fraction=0", gpus=gpus) for gpus in (1, 2, 3))
    assert (two.seconds, three.seconds) == pytest.approx((alone.seconds / 2, alone.seconds / 2))  # four chunks
    assert three.gpu_hours == pytest.approx(1.5 * alone.gpu_hours)
    group = planned("data.holdout_fraction=0", "evaluation.tensor_parallel_size=4", gpus=4)
    assert group.network_s == alone.network_s / 4 and group.decode_s == alone.decode_s


def test_a_validation_loss_has_its_passes_too():
    only = planned("evaluation.features=null", "data.holdout_fraction=0.1", "evaluation.validation_images=1024")
    assert only.samples == 0 and only.seconds == pytest.approx(1024 * 8 * forward_s(config_of(), 256))
    nothing = planned("evaluation.features=null", "evaluation.validation_images=0")
    assert nothing.seconds == 0 and str(nothing) == "nothing is measured"


def test_a_small_network_takes_what_launching_its_kernels_takes():
    small = load_config([f"{ROOT}/configs/model/s.yaml", *SAMPLED, "batch.pack_tokens=1024", "sampling.steps=10"])
    one = plan_evaluation(small, Machine(H100, 1, 8), Images({256: 1.0}, 256, ""), 1.0)
    assert one.network_s == pytest.approx(10 * small.model.depth * 16 * 7e-6 / 4)  # four images a pack


def test_the_plan_of_a_run_says_it(capsys):
    arguments = ["sampling.steps=10", "evaluation.points=3", "run.steps=9000", "--gpus", "8"]
    assert main(["plan", f"{ROOT}/configs/model/xl.yaml", *SAMPLED, *arguments]) == 0
    out = capsys.readouterr().out
    assert "2,048 images in 4 chunks, 10 function evaluations each (euler, 10 steps)" in out
    assert "3 of them: " in out and "hours each on 1 x h100" in out
