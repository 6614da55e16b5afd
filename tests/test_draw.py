"""Packs of requests through the sampler: guidance per image, and the guide of autoguidance from file to image."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fitscale.config.errors import UserError
from fitscale.config.load import load_config, to_yaml
from fitscale.config.schema import ParallelConfig
from fitscale.config.schema_sampling import GuidanceConfig, SamplingConfig
from fitscale.eval.checkpoints import load_networks
from fitscale.eval.draw import Networks, draw_pack, packs
from fitscale.eval.requests import Request
from fitscale.model.build import build_network
from fitscale.model.weights import published_items, stored, write_tensors
from fitscale.parallel.groups import init_parallel
from fitscale.run.checkpoint import write_marker
from tests.tiny import OVERRIDES

REQUESTS = [Request(i, i % 10, 3 + i % 4, 4 + i % 3) for i in range(9)]


@pytest.fixture(scope="module")
def config():
    return load_config(OVERRIDES)


def random_model(config, seed=0):
    """A tiny network of random weights, so that every input shows in the output."""
    init_parallel(ParallelConfig(), "cpu")
    model, chance = build_network(config.model, ParallelConfig()), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data.copy_(torch.randn(parameter.shape, generator=chance) * scale)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model(config):
    return random_model(config)


def sampled(config, **settings):
    guidance = {name: settings.pop(name) for name in list(settings) if name in GuidanceConfig.__dataclass_fields__}
    return replace(config, sampling=SamplingConfig(**settings, guidance=GuidanceConfig(**guidance)))


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_packs_are_full_whatever_the_method(config, method):
    config = replace(sampled(config, method=method), batch=replace(config.batch, pack_tokens=60))
    made = list(packs(REQUESTS, config))
    assert [request for pack in made for request in pack] == REQUESTS and len(made) > 2
    assert all(sum(request.tokens for request in pack) <= 60 for pack in made)
    assert all(sum(r.tokens for r in pack) + after[0].tokens > 60 for pack, after in pairwise(made))
    assert list(packs(REQUESTS[:2], replace(config, batch=replace(config.batch, pack_tokens=1)))) == [
        [request] for request in REQUESTS[:2]
    ]


def test_a_pack_of_dopri5_draws_each_image_as_alone(model, config):
    """In float64, where no rounding decides a step's length."""
    exact, config = random_model(config).double(), sampled(config, method="dopri5", scale=1.5)
    together = draw_pack(Networks(exact), config, REQUESTS, seed=3)
    assert together.network_evaluations == [2 * nfe for nfe in together.nfe]  # the config's scale, at every time
    for place in (2, 7):
        alone = draw_pack(Networks(exact), config, [REQUESTS[place]], seed=3)
        torch.testing.assert_close(together.tokens[place], alone.tokens[0], atol=1e-6, rtol=0)
        assert alone.nfe == [together.nfe[place]]


def test_requests_with_scales_of_their_own_in_one_pack(model, config):
    config = sampled(config, method="heun", steps=3, scale=4.0)
    requests = [replace(request, guidance=scale) for request, scale in zip(REQUESTS, (None, 1.0, 2.5), strict=False)]
    drawn = draw_pack(Networks(model), config, requests, seed=0)
    assert drawn.nfe == [6] * 3 and drawn.network_evaluations == [12, 6, 12]
    for place, scale in enumerate((4.0, 1.0, 2.5)):
        alone = draw_pack(Networks(model), sampled(config, method="heun", steps=3, scale=scale), [REQUESTS[place]], 0)
        torch.testing.assert_close(drawn.tokens[place], alone.tokens[0], atol=1e-5, rtol=1e-5)


def test_an_interval_of_guidance_is_counted_as_it_is_computed(model, config):
    config = sampled(config, steps=10, scale=3.0, interval=(0.25, 0.75))
    drawn = draw_pack(Networks(model), config, REQUESTS[:2], seed=0)
    assert drawn.nfe == [10] * 2 and drawn.network_evaluations == [15] * 2  # 0.3 to 0.7: five of ten
    falling = sampled(config, steps=10, scale=3.0, power=2.0, method="heun")
    counted = draw_pack(Networks(model), falling, REQUESTS[:1], seed=0)
    assert counted.network_evaluations == [39]  # of 20, the last, at t = 1, has scale 1


def written(path, model):
    """The weights of `model` in a .safetensors file; returns its checksum."""
    return write_tensors(path, {name: stored(tensor) for name, tensor in published_items(model)}, {})


@pytest.fixture
def weak_run(tmp_path, config):
    """A run directory with a smaller model and one checkpoint, of step 5."""
    smaller = load_config([*OVERRIDES, "model.depth=1", "model.hidden_size=16", f"run.dir={tmp_path / 'weak'}"])
    folder = tmp_path / "weak" / "checkpoints" / "step-00000005"
    (tmp_path / "weak").mkdir()
    (tmp_path / "weak" / "config.yaml").write_text(to_yaml(smaller))
    model = random_model(smaller, seed=1)
    file = "weights/ema_0.9/00000.safetensors"
    write_marker(folder, {"step": 5}, {file: written(folder / file, model)})
    return tmp_path / "weak", model


def test_a_smaller_run_guides(model, config, weak_run, tmp_path):
    path, guide = weak_run
    written(tmp_path / "main.safetensors", model)
    config = sampled(config, steps=4, scale=2.0, guide=str(path), guide_step=5)
    networks = load_networks(config, tmp_path / "main.safetensors", "cpu")
    made = draw_pack(networks, config, REQUESTS[:3], seed=0)
    expected = draw_pack(Networks(model, guide), config, REQUESTS[:3], seed=0)
    unguided = draw_pack(Networks(model), sampled(config, steps=4), REQUESTS[:3], seed=0)
    for tokens, same, other in zip(made.tokens, expected.tokens, unguided.tokens, strict=True):
        assert torch.equal(tokens, same) and (tokens - other).abs().max() > 1e-2
    assert made.network_evaluations == [8] * 3


def test_a_file_of_the_same_model_guides(model, config, tmp_path):
    for name, seed in (("main", 0), ("weak", 1)):
        written(tmp_path / f"{name}.safetensors", random_model(config, seed))
    config = sampled(config, steps=2, scale=2.0, guide=str(tmp_path / "weak.safetensors"))
    networks = load_networks(config, tmp_path / "main.safetensors", "cpu")
    made = draw_pack(networks, config, REQUESTS[:1], seed=0)
    expected = draw_pack(Networks(model, random_model(config, 1)), config, REQUESTS[:1], seed=0)
    assert torch.equal(made.tokens[0], expected.tokens[0])
    stretched = replace(config, model=config.model.with_positions("yarn", False))
    with pytest.raises(UserError, match=r"guide: its positions are normal, those that are drawn with yarn"):
        draw_pack(networks, stretched, REQUESTS[:1], seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide_step": 6}, "no complete checkpoint of step 6; it has 5"),
        ({"guide_step": 5, "guide_weights": "raw"}, "has no raw; it has ema_0.9"),
        ({"guide_step": 5, "guide": "nowhere"}, "not a run directory"),
        ({"guide": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_a_guide_that_is_not_there(config, weak_run, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    config = sampled(config, **{"guide": str(weak_run[0]), **settings})
    with pytest.raises(UserError, match=message):
        load_networks(config, tmp_path / "main.safetensors", "cpu")


def test_a_guide_has_the_tokens_and_classes_of_the_model(config, weak_run, tmp_path):
    guided = sampled(config, guide=str(weak_run[0]), guide_step=5)
    for changed in ({"num_classes": 11}, {"patch_size": 2}, {"in_channels": 3}):
        other = replace(guided, model=replace(config.model, **changed))
        with pytest.raises(UserError, match=f"sampling.guidance.guide: .* has {next(iter(changed))} = "):
            load_networks(other, tmp_path / "main.safetensors", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["dopri5", "ab2", "sde_heun"])
def test_a_gpu_draws_what_the_cpu_does(config, method):
    """In float64, guided on an interval; in bf16 to a tenth of the spread of the numbers."""
    config = sampled(config, method=method, steps=10, scale=1.5, interval=(0.2, 0.8))
    exact = random_model(config).double()
    on_cpu = draw_pack(Networks(exact), config, REQUESTS, seed=3)
    on_gpu = draw_pack(Networks(exact.cuda()), config, REQUESTS, seed=3)
    assert on_gpu.nfe == on_cpu.nfe and on_gpu.network_evaluations == on_cpu.network_evaluations
    for there, here in zip(on_gpu.tokens, on_cpu.tokens, strict=True):
        torch.testing.assert_close(there.cpu(), here, atol=1e-5, rtol=0)
    rough = draw_pack(Networks(exact.bfloat16()), config, REQUESTS, seed=3)
    for there, here in zip(rough.tokens, on_cpu.tokens, strict=True):
        assert (there.cpu() - here).square().mean().sqrt() < 0.1 * here.std()
