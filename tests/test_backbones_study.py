"""The study of four backbones on digits: what is compared costs the same, and the rest is the same."""

from dataclasses import replace

import numpy as np
import pytest

from fitscale.config.load import load_config, load_schema
from fitscale.jobs.sweep import SweepConfig
from fitscale.model import flops
from fitscale.prepare.digits import digit_variants
from tests.conftest import ROOT

SWEEP = ROOT / "configs" / "sweep" / "backbones_digits.yaml"


@pytest.fixture(scope="module")
def configs():
    sweep = load_schema(SweepConfig, [str(SWEEP)])
    return {
        name: load_config([str(ROOT / sweep.base[0]), *sweep.base[1:], *cell]) for name, cell in sweep.cells.items()
    }


def test_three_sizes_of_every_backbone_at_equal_flops(configs):
    images = [variant.array_CHW for digit in digit_variants(multiple=2) for variant in digit.variants]
    tokens, counts = np.unique([image.size // 4 for image in images], return_counts=True)  # patches of 2 x 2 pixels
    spent = {}
    for name, config in configs.items():
        per_image = [flops.train_flops(config.model, int(count)) for count in tokens]
        of_run = np.average(per_image, weights=counts) * config.batch.global_batch_size * config.run.steps
        spent.setdefault(name.split("-")[1], {})[config.model.kind] = of_run
    assert set(spent) == {"xs", "s", "m"}
    for of_size in spent.values():
        assert set(of_size) == {"fitv2", "flag_dit", "large_dit-ternary", "dimr"}
        assert np.ptp(np.log(list(of_size.values()))) < 0.002


def test_families_differ_in_the_model_the_objective_its_sampler_and_the_number_of_steps_alone(configs):
    first = next(iter(configs.values()))
    for config in configs.values():
        sampling = replace(config.sampling, method=first.sampling.method, steps=first.sampling.steps)
        run = replace(config.run, steps=first.run.steps)
        assert replace(config, model=first.model, flow=first.flow, sampling=sampling, run=run) == first
