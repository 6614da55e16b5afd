"""Guidance by its formula on a small network, and the published guided outputs and samples."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchdiffeq import odeint

from fitscale.config.schema import GuidanceConfig, ParallelConfig, SamplingConfig
from fitscale.data.encode import unpatchify
from fitscale.flow.guidance import PackShape, guidance_scale, guided, network_evaluations
from fitscale.flow.sampler import ImageNoise, sample
from fitscale.model.backbone import parameter_table
from fitscale.model.build import build_network
from fitscale.model.common.layout import pack_layout
from fitscale.model.common.rope_config import RopeConfig
from fitscale.model.fit.config import FitConfig
from fitscale.model.weights import from_published
from fitscale.parallel.groups import init_parallel

REFERENCE = Path(__file__).parent / "data" / "reference"
PACK = PackShape(torch.tensor([1, 2]), torch.tensor([[1, 3], [2, 1]]), torch.tensor([0, 3, 5]))


class Network:
    """Answers depend on every argument, so that a swapped one shows."""

    def __init__(self):
        self.tokens = []

    def __call__(self, x_TC, t_S, pack):
        self.tokens.append(len(x_TC))
        per_image = t_S + 10 * pack.labels_S + 100 * pack.sizes_S2[:, 0]
        return x_TC * per_image.repeat_interleave(pack.cu_seqlens.diff())[:, None]


def function(network, **guidance):
    settings = GuidanceConfig(**guidance)
    return guided(network, PACK, settings, no_class=5, patch_size=2, model_time=lambda t: 2 * t)


def test_no_guidance_is_one_undoubled_pass():
    network, x = Network(), torch.randn(5, 16)
    out = function(network, scale=1.0)(x, 0.25)
    assert network.tokens == [5]
    assert network_evaluations(GuidanceConfig(scale=1.0)) == 1
    torch.testing.assert_close(out[0], x[0] * (0.5 + 10 + 100))


def test_formula_on_the_first_channels_only():
    network, x = Network(), torch.randn(5, 16)
    out = function(network, scale=1.5, channels=3)(x, 0.25)
    assert network.tokens == [10]
    assert network_evaluations(GuidanceConfig(scale=1.5)) == 2
    for token, (label, rows) in enumerate([(1, 1)] * 3 + [(2, 2)] * 2):
        with_class, without = 0.5 + 10 * label + 100 * rows, 0.5 + 50 + 100 * rows
        torch.testing.assert_close(out[token, :12], x[token, :12] * (without + 1.5 * (with_class - without)))
        torch.testing.assert_close(out[token, 12:], x[token, 12:] * with_class)


def test_power_cosine_scale():
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(guidance_scale(GuidanceConfig(scale=4.0, power=0.0), t), torch.full((3,), 4.0))
    torch.testing.assert_close(guidance_scale(GuidanceConfig(scale=4.0, power=1.0), t), torch.tensor([4.0, 2.5, 1.0]))
    assert guidance_scale(GuidanceConfig(scale=4.0, power=2.0), t)[1] < 2.5


class Published:
    """A tiny published model with its reference tensors, all images as one pack."""

    def __init__(self, name):
        self.name = name
        with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
            settings = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
        init_parallel(ParallelConfig(), "cpu")
        rope = RopeConfig(
            method=settings.get("custom_freqs", "normal"),
            decouple=settings.get("decouple", False),
            original_length=settings.get("ori_max_pe_len", 16),
        )
        self.config = FitConfig(
            depth=settings["depth"],
            hidden_size=settings["hidden_size"],
            num_heads=settings["num_heads"],
            num_classes=settings["num_classes"],
            rope=rope,
        )
        self.model = build_network(self.config, ParallelConfig())
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for entry in parameter_table(self.config):
                parameters[entry.name].copy_(from_published(entry, self.tensors[f"param.{entry.name}"]))
        self.sizes_S2 = self.tensors["size"]
        self.lengths = self.sizes_S2.prod(1).tolist()

    def pack(self, name):
        return torch.cat([image[:n] for image, n in zip(self.tensors[name], self.lengths, strict=True)])

    def guided(self, images, **guidance):
        starts = torch.tensor([0, *self.lengths[:images]]).cumsum(0).int()
        shape = PackShape(self.tensors["y"][:images], self.sizes_S2[:images], starts)
        settings = GuidanceConfig(**guidance)
        network = lambda x, t, pack: self.model(  # noqa: E731
            x, t, pack.labels_S, pack_layout(pack.sizes_S2, pack.cu_seqlens, x.device)
        )[-1]
        return guided(network, shape, settings, no_class=10, patch_size=2, model_time=lambda t: t)


@pytest.fixture(scope="module", params=["fitv2_tiny", "fitv2_hr_tiny"])
def published(request):
    return Published(request.param)


@pytest.mark.parametrize("power", [0, 2])
def test_published_guided_outputs(published, power):
    with torch.no_grad():
        model_fn = published.guided(len(published.lengths), scale=1.5, power=power)
        out = model_fn(published.pack("x_t"), published.tensors["t"])
    torch.testing.assert_close(out, published.pack(f"cfg1.5_pow{power}"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["euler20", "dopri520"])
def test_published_samples(published, name):
    """The published 20 output points are 19 Euler steps, and dopri5's own steps."""
    z, expected = published.tensors["sample_z"][0], published.tensors[f"sample_{name}"][0]
    sampling = SamplingConfig("euler", 19) if name == "euler20" else SamplingConfig("dopri5", 20)
    sampled = sample(published.guided(1, scale=1.5), z, sampling, ImageNoise(0, [0], [len(z)]))
    by_rounding = name == "dopri520" and published.name == "fitv2_tiny"  # see the next test
    torch.testing.assert_close(sampled.x_TC, expected, atol=2e-3 if by_rounding else 1e-4, rtol=0)


def test_published_dopri5_where_rounding_decides_the_steps():
    """The first steps of fitv2_tiny are so accurate that float32 rounding is their whole error estimate.

    1e-7 on the start moves the second step, and the sample by 8e-4. With the reference's second step given, the sample
    is the reference's.
    """
    published = Published("fitv2_tiny")
    z, model_fn = published.tensors["sample_z"][0], published.guided(1, scale=1.5)
    options = {"first_step": 0.0718, "step_t": torch.tensor([0.7025])}
    times = torch.linspace(0, 1, 20)
    with torch.no_grad():
        path = odeint(lambda t, x: model_fn(x, t), z, times, method="dopri5", rtol=1e-3, atol=1e-6, options=options)
    torch.testing.assert_close(path[-1], published.tensors["sample_dopri520"][0], atol=1e-4, rtol=0)


def test_time_stands_still_after_the_end():
    seen = []
    network = lambda x, t, *rest: seen.append(t.tolist()) or x  # noqa: E731
    guided(network, PACK, GuidanceConfig(), no_class=5, patch_size=2, model_time=lambda t: t)(torch.zeros(5, 16), 1.5)
    assert seen == [[1.0, 1.0]]


def test_published_image(published):
    rows, cols = published.sizes_S2[0].tolist()
    tensors = published.tensors
    candidates = (tensors["sample_euler20"][0], tensors["sample_dopri520"][0])
    assert any(torch.equal(unpatchify(tokens, rows, cols, 2), tensors["sample_image"][0]) for tokens in candidates)
