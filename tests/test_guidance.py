"""Guidance by its formula on a small network, and the published guided outputs and samples."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

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
from tests.dormand_prince import integrate

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


def test_published_euler_samples(published):
    """The published 20 output points are 19 steps."""
    z, expected = published.tensors["sample_z"][0], published.tensors["sample_euler20"][0]
    sampled = sample(published.guided(1, scale=1.5), z, SamplingConfig("euler", 19), ImageNoise(0, [0], [len(z)]))
    torch.testing.assert_close(sampled.x_TC, expected, atol=1e-5, rtol=0)


# dopri5 chooses its steps by its error estimate. Along the first step and into the second, fitv2_tiny is so smooth that
# in float32 the estimate is mostly rounding: another CPU, or 1e-7 on the start, gives the second step another length,
# and the sample moves by up to 1.5e-3. So the steps are compared in float64, and float32 with its own steps given.
DOPRI5 = SamplingConfig("dopri5", 20)
REFERENCE_STEPS = {"fitv2_tiny": (0.0719, 0.6306), "fitv2_hr_tiny": ()}  # by the rounding of the CPU that made it


@pytest.fixture(scope="module")
def exactly(published):
    """The guided velocity in float64."""
    exact = Published(published.name)
    exact.model.double()
    return torch.no_grad()(exact.guided(1, scale=1.5))


def integrated(exactly, z, given=()):
    return integrate(exactly, z.double(), DOPRI5.rtol, DOPRI5.atol, given)


def test_dopri5_takes_the_steps_of_its_method(published, exactly):
    z = published.tensors["sample_z"][0]
    ours, theirs = sample(exactly, z.double(), DOPRI5, ImageNoise(0, [0], [len(z)])), integrated(exactly, z)
    assert ours.nfe == 2 + 6 * len(theirs.lengths) and max(theirs.ratios) < 0.5  # no decision is a close one
    torch.testing.assert_close(ours.x_TC, theirs.x_TC, atol=1e-9, rtol=0)


def test_dopri5_in_float32_differs_by_the_length_of_its_steps_alone(published, exactly):
    z, model_fn, times = published.tensors["sample_z"][0], published.guided(1, scale=1.5), []
    sampled = sample(lambda x, t: times.append(float(t)) or model_fn(x, t), z, DOPRI5, ImageNoise(0, [0], [len(z)]))
    tried = zip(times[2::6], times[7::6], strict=True)  # a fifth of a step after its start, and its end
    taken = {round(second - (end - second) / 4, 5): (end - second) / 0.8 for second, end in tried}
    again = integrated(exactly, z, list(taken.values()))
    torch.testing.assert_close(sampled.x_TC, again.x_TC.float(), atol=2e-5, rtol=0)


def test_published_dopri5_samples(published, exactly):
    again = integrated(exactly, published.tensors["sample_z"][0], REFERENCE_STEPS[published.name])
    torch.testing.assert_close(again.x_TC.float(), published.tensors["sample_dopri520"][0], atol=2e-5, rtol=0)


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
