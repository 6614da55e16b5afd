"""Parameters, MACs and FLOPs from the config alone, against the model itself and the papers' numbers."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fitscale.config.load import load_config
from fitscale.config.schema import ModelConfig, ParallelConfig
from fitscale.model import flops
from fitscale.model.build import build_network
from fitscale.parallel.groups import init_parallel
from tests.reference import CONFIGS, load_reference

PRESETS = Path(__file__).parent.parent / "configs" / "model"


def preset(name: str) -> ModelConfig:
    return load_config([str(PRESETS / f"{name}.yaml")]).model


@pytest.mark.parametrize(
    "name", ["s", "b", "l", "xl", "xxl", "fit_b", "fit_xl", "flag_xs", "flag_7b", "terdit_s", "terdit_4b"]
)
def test_parameters_are_the_models_own(name):
    init_parallel(ParallelConfig(), "cpu")
    config = preset(name)
    with torch.device("meta"):
        model = build_network(config, ParallelConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == flops.parameters(config)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("b", 128.149), ("xl", 671.046), ("xxl", 2971.928), ("fit_xl", 824), ("fit_b", 159)],
)
def test_parameters_are_the_published_ones(name, millions):
    decimals = len(str(millions).partition(".")[2])
    assert round(flops.parameters(preset(name)) / 1e6, decimals) == millions


@pytest.mark.parametrize(
    ("name", "linear", "attention", "paper"),
    [("b", 27.2, 1.5, 27.3), ("xl", 146.8, 5.4, 147), ("xxl", 652.3, 12.1, 653)],
)
def test_macs_are_the_measured_ones(name, linear, attention, paper):
    config = preset(name)
    assert flops.linear_macs(config, 256) / 1e9 == pytest.approx(linear, rel=0.005)
    assert flops.mixing_macs(config, 256) / 1e9 == pytest.approx(attention, rel=0.01)  # given to 2 digits
    assert flops.paper_macs(config) / 1e9 == pytest.approx(paper, rel=0.005)


def test_forward_flops_of_b_are_the_measured_ones():
    assert round(flops.FLOPS_PER_MAC * flops.linear_macs(preset("b"), 256) / 1e9, 2) == 54.41
    assert flops.paper_macs(preset("fit_xl")) / 1e9 == pytest.approx(153, rel=0.005)


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_torch_counts(name):
    init_parallel(ParallelConfig(), "cpu")
    reference = load_reference(name)
    config, images = reference.config, reference.images
    # The plain kernel, made of batched products: torch's counter does not know the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        reference.model()(*reference.inputs(images))
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    lengths = reference.tensors["size"].prod(1).tolist()
    assert attention == 2 * sum(flops.mixing_macs(config, n) for n in lengths)
    assert counter.get_total_flops() - attention == 2 * sum(flops.linear_macs(config, n) for n in lengths)


def test_costs_add_up():
    config = preset("b")
    a, b = flops.cost(config)
    conditioning = flops.linear_macs(config, 0)
    for tokens in (1, 256, 1024):
        total = flops.linear_macs(config, tokens) + flops.mixing_macs(config, tokens)
        assert a * tokens + b * tokens**2 + conditioning == total
        assert flops.train_flops(config, tokens) == 6 * total
