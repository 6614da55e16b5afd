"""Guidance by its formula on a small network, and the published guided outputs and samples."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fitscale.config.schema import ParallelConfig
from fitscale.config.schema_sampling import GuidanceConfig, SamplingConfig
from fitscale.data.encode import unpatchify
from fitscale.flow.guidance import Guided, guidance_scale
from fitscale.flow.pack import PackShape, starts
from fitscale.flow.path import INITIAL_NOISE, image_noise
from fitscale.flow.sampler import sample
from fitscale.model.backbone import parameter_table
from fitscale.model.build import build_network
from fitscale.model.common.layout import pack_layout
from fitscale.model.common.rope_config import RopeConfig
from fitscale.model.fit.config import FitConfig
from fitscale.model.weights import from_published
from fitscale.parallel.groups import init_parallel
from tests.dormand_prince import integrate

REFERENCE = Path(__file__).parent / "data" / "reference"
PACK = PackShape(torch.tensor([1, 2]), torch.tensor([[1, 3], [2, 1]]), starts([3, 2]), (7, 8))
QUARTER = torch.tensor([0.25, 0.25], dtype=torch.float64)


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
    return Guided(network, settings, no_class=5, patch_size=2, model_time=lambda t: 2 * t)


def test_no_guidance_is_one_undoubled_pass():
    network, x = Network(), torch.randn(5, 16)
    model_fn = function(network, scale=1.0)
    out = model_fn(x, QUARTER, PACK)
    assert network.tokens == [5]
    assert model_fn.passes == {7: 1, 8: 1}
    torch.testing.assert_close(out[0], x[0] * (0.5 + 10 + 100))


def test_formula_on_the_first_channels_only():
    network, x = Network(), torch.randn(5, 16)
    model_fn = function(network, scale=1.5, channels=3)
    out = model_fn(x, QUARTER, PACK)
    assert network.tokens == [10]
    assert model_fn.passes == {7: 2, 8: 2}
    for token, (label, rows) in enumerate([(1, 1)] * 3 + [(2, 2)] * 2):
        with_class, without = 0.5 + 10 * label + 100 * rows, 0.5 + 50 + 100 * rows
        torch.testing.assert_close(out[token, :12], x[token, :12] * (without + 1.5 * (with_class - without)))
        torch.testing.assert_close(out[token, 12:], x[token, 12:] * with_class)


def test_power_cosine_scale():
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(guidance_scale(GuidanceConfig(scale=4.0, power=0.0), t), torch.full((3,), 4.0))
    torch.testing.assert_close(guidance_scale(GuidanceConfig(scale=4.0, power=1.0), t), torch.tensor([4.0, 2.5, 1.0]))
    assert guidance_scale(GuidanceConfig(scale=4.0, power=2.0), t)[1] < 2.5


@pytest.mark.parametrize(("t", "guided"), [(0.2, False), (0.25, True), (0.5, True), (0.75, True), (0.8, False)])
def test_outside_its_interval_guidance_costs_and_does_nothing(t, guided):
    network, x, t_S = Network(), torch.randn(5, 16), torch.full((2,), t, dtype=torch.float64)
    model_fn = function(network, scale=3.0, interval=(0.25, 0.75))
    out = model_fn(x, t_S, PACK)
    assert network.tokens == [10 if guided else 5] and model_fn.passes == dict.fromkeys((7, 8), 1 + guided)
    expected = function(Network(), scale=3.0 if guided else 1.0)(x, t_S, PACK)
    assert torch.equal(out, expected)


def test_only_images_inside_the_interval_are_evaluated_twice():
    network, x, t_S = Network(), torch.randn(5, 16), torch.tensor([0.1, 0.5], dtype=torch.float64)
    model_fn = function(network, scale=3.0, interval=(0.25, 1.0))
    out = model_fn(x, t_S, PACK)
    assert network.tokens == [7] and model_fn.passes == {7: 1, 8: 2}
    alone = [function(Network(), scale=scale)(x, t_S, PACK) for scale in (1.0, 3.0)]
    assert torch.equal(out[:3], alone[0][:3]) and torch.equal(out[3:], alone[1][3:])


def test_every_image_can_have_a_scale_of_its_own():
    x, pack = torch.randn(5, 16), replace(PACK, scale_S=torch.tensor([1.0, 2.5], dtype=torch.float64))
    model_fn = function(Network(), scale=4.0)
    out = model_fn(x, QUARTER, pack)
    assert model_fn.passes == {7: 1, 8: 2}
    plain, strong = (function(Network(), scale=scale)(x, QUARTER, PACK) for scale in (1.0, 2.5))
    assert torch.equal(out[:3], plain[:3]) and torch.equal(out[3:], strong[3:])


def test_a_guide_answers_for_the_same_labels_and_moves_all_channels():
    main, weaker, x = Network(), Network(), torch.randn(5, 16)
    settings = GuidanceConfig(scale=3.0, guide="weaker.safetensors")
    pack = replace(PACK, scale_S=torch.tensor([1.0, 3.0], dtype=torch.float64))
    halved = lambda x, t, pack: weaker(x, t, pack) / 2  # noqa: E731
    model_fn = Guided(main, settings, no_class=5, patch_size=2, model_time=lambda t: 2 * t, guide=halved)
    out = model_fn(x, QUARTER, pack)
    assert main.tokens == [5] and weaker.tokens == [2] and model_fn.passes == {7: 1, 8: 2}
    answer = 0.5 + 20 + 200
    torch.testing.assert_close(out[3:], x[3:] * (answer / 2 + 3 * (answer - answer / 2)))
    torch.testing.assert_close(out[:3], x[:3] * (0.5 + 10 + 100))


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

    def shape(self, images=None):
        chosen = slice(images)
        lengths = self.lengths[chosen]
        return PackShape(self.tensors["y"][chosen], self.sizes_S2[chosen], starts(lengths), tuple(range(len(lengths))))

    def guided(self, **guidance):
        network = lambda x, t, pack: self.model(  # noqa: E731
            x, t, pack.labels_S, pack_layout(pack.sizes_S2, pack.cu_seqlens, x.device)
        )[-1]
        return Guided(network, GuidanceConfig(**guidance), no_class=10, patch_size=2, model_time=lambda t: t)


@pytest.fixture(scope="module", params=["fitv2_tiny", "fitv2_hr_tiny"])
def published(request):
    return Published(request.param)


@pytest.mark.parametrize("power", [0, 2])
def test_published_guided_outputs(published, power):
    with torch.no_grad():
        out = published.guided(scale=1.5, power=power)(
            published.pack("x_t"), published.tensors["t"].double(), published.shape()
        )
    torch.testing.assert_close(out, published.pack(f"cfg1.5_pow{power}"), atol=1e-5, rtol=0)


def test_published_euler_samples(published):
    """The published 20 output points are 19 steps."""
    z, expected = published.tensors["sample_z"][0], published.tensors["sample_euler20"][0]
    sampled = sample(published.guided(scale=1.5), z, SamplingConfig("euler", 19), published.shape(1), 0)
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
    return torch.no_grad()(exact.guided(scale=1.5))


def integrated(published, exactly, z, given=()):
    pack = published.shape(1)
    velocity = lambda x, t: exactly(x, torch.tensor([t], dtype=torch.float64), pack)  # noqa: E731
    return integrate(velocity, z.double(), DOPRI5.rtol, DOPRI5.atol, given)


def test_dopri5_takes_the_steps_of_its_method(published, exactly):
    z = published.tensors["sample_z"][0]
    ours = sample(exactly, z.double(), DOPRI5, published.shape(1), 0)
    theirs = integrated(published, exactly, z)
    assert ours.nfe == [2 + 6 * len(theirs.lengths)] and max(theirs.ratios) < 0.5  # no decision is a close one
    torch.testing.assert_close(ours.x_TC, theirs.x_TC, atol=1e-9, rtol=0)


def test_dopri5_in_float32_differs_by_the_length_of_its_steps_alone(published, exactly):
    z, model_fn, times = published.tensors["sample_z"][0], published.guided(scale=1.5), []
    timed = lambda x, t_S, pack: times.append(float(t_S)) or model_fn(x, t_S, pack)  # noqa: E731
    sampled = sample(timed, z, DOPRI5, published.shape(1), 0)
    tried = zip(times[2::6], times[7::6], strict=True)  # a fifth of a step after its start, and its end
    taken = {round(second - (end - second) / 4, 5): (end - second) / 0.8 for second, end in tried}
    again = integrated(published, exactly, z, list(taken.values()))
    torch.testing.assert_close(sampled.x_TC, again.x_TC.float(), atol=2e-5, rtol=0)


def test_published_dopri5_samples(published, exactly):
    again = integrated(published, exactly, published.tensors["sample_z"][0], REFERENCE_STEPS[published.name])
    torch.testing.assert_close(again.x_TC.float(), published.tensors["sample_dopri520"][0], atol=2e-5, rtol=0)


def test_a_pack_of_dopri5_gives_each_image_what_it_gets_alone(published, exactly):
    """In float64, through the guided network; the images of the reference differ in size."""
    pack, lengths = published.shape(), published.lengths
    z = image_noise(0, 0, pack.indices, lengths, 16, stream=INITIAL_NOISE).double()
    together = sample(exactly, z, DOPRI5, pack, 0)
    for place, (x, made) in enumerate(zip(z.split(lengths), together.x_TC.split(lengths), strict=True)):
        alone = sample(exactly, x, DOPRI5, pack.select([place]), 0)
        torch.testing.assert_close(made, alone.x_TC, atol=1e-6, rtol=0)
        assert alone.nfe == [together.nfe[place]]


def test_time_stands_still_after_the_end():
    seen = []
    network = lambda x, t, *rest: seen.append(t.tolist()) or x  # noqa: E731
    function(network)(torch.zeros(5, 16), torch.tensor([1.5, 0.25]), PACK)
    assert seen == [[2.0, 0.5]]


def test_published_image(published):
    rows, cols = published.sizes_S2[0].tolist()
    tensors = published.tensors
    candidates = (tensors["sample_euler20"][0], tensors["sample_dopri520"][0])
    assert any(torch.equal(unpatchify(tokens, rows, cols, 2), tensors["sample_image"][0]) for tokens in candidates)
