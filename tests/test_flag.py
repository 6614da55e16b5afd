"""Flag-DiT and Large-DiT against the published implementations, and what they cost."""

import pytest
import torch

from fitscale.config.schema import ParallelConfig
from fitscale.config.schema_sampling import SamplingConfig
from fitscale.flow.loss import make_objective
from fitscale.flow.sampler import sample
from fitscale.model import flops
from fitscale.model.common.rope import rope_tables
from fitscale.parallel.groups import init_parallel
from tests.flag_reference import SIZES, call, load_flag_reference, pack_of, relative, tokens_of
from tests.test_flops import preset

NEAR = 1e-5
PACKS = [[size] for size in SIZES] + [list(SIZES)]


@pytest.fixture(autouse=True, scope="module")
def world():
    init_parallel(ParallelConfig(), "cpu")


@pytest.fixture(scope="module")
def flag():
    return load_flag_reference("flag_dit_tiny")


@pytest.mark.parametrize("sizes", PACKS, ids="+".join)
def test_outputs_and_losses_are_the_published_ones(flag, sizes):
    x_TC, t_S, pack = flag.pack(sizes)
    inputs, cu_seqlens = flag.inputs(sizes, "x1", "x0")
    assert relative(inputs.x_TC, x_TC) < 1e-6
    with torch.no_grad():
        output_TC = call(flag.model(), x_TC, t_S, pack)
    assert relative(output_TC, flag.tokens("output", sizes)) < NEAR
    loss_S = make_objective(flag.flow, flag.config).loss_S([output_TC], inputs, cu_seqlens)
    assert relative(loss_S, flag.joined("loss_per_image", sizes)) < NEAR


@pytest.mark.parametrize(("mode", "checkpoint_every"), [("eager", 0), ("eager", 2), ("compiled", 2)], indirect=["mode"])
def test_every_gradient_is_the_published_one(flag, mode, checkpoint_every):
    model = flag.model(ParallelConfig(activation_checkpoint_every=checkpoint_every))
    sizes = SIZES[:2]
    x_TC, t_S, pack = flag.pack(sizes)
    inputs, cu_seqlens = flag.inputs(sizes, "x1", "x0")
    output_TC = call(model, x_TC, t_S, pack)
    make_objective(flag.flow, flag.config).loss_S([output_TC], inputs, cu_seqlens).mean().backward()
    expected = flag.group("grad")
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert expected[name].any() and relative(parameter.grad, expected[name]) < NEAR, name


def test_half_of_the_last_linear_never_trains(flag):
    rows = flag.tensors["grad.final_layer.linear.weight"].view(4, 8, -1)
    assert rows[:, :4].any() and not rows[:, 4:].any()


def test_guidance_is_the_published_one(flag):
    tensors = flag.tensors
    x_NCHW, images = tensors["cfg_x"], len(tensors["cfg_x"]) // 2  # the second half is not looked at
    pack = pack_of([x_NCHW[:images]], tensors["cfg_y"][:images])
    with torch.no_grad():
        got_TC = flag.guided()(tokens_of(x_NCHW[:images]), tensors["cfg_t"][:images], pack)
    assert relative(got_TC, tokens_of(tensors["cfg4"][:images])) < NEAR


@pytest.mark.parametrize(("method", "near"), [("euler", NEAR), ("dopri5", 1e-3)])
def test_samples_are_the_published_ones(flag, method, near):
    tensors = flag.tensors
    images = len(tensors["sample_z"]) // 2
    pack = pack_of([tensors["sample_z"][:images]], tensors["sample_y"][:images])
    sampling = SamplingConfig(method=method, steps=len(tensors["sample_times"]) - 1)
    found = sample(flag.guided(), tokens_of(tensors["sample_z"][:images]), sampling, pack, seed=0)
    expected = tensors["sample_euler"][-1] if method == "euler" else tensors["sample_dopri5"]
    assert relative(found.x_TC, tokens_of(expected[:images])) < near
    assert method == "dopri5" or found.nfe == [5] * images


def test_positions_are_the_published_ones(flag):
    cos, sin = rope_tables(flag.config.rope, flag.config.head_dim, 8, 16)
    assert relative(cos, flag.tensors["rope_cos"]) < NEAR and relative(sin, flag.tensors["rope_sin"]) < NEAR


def test_ntk_stretches_the_positions_of_larger_images_alone(flag):
    rope = flag.config.with_positions("ntk-aware", decouple=False).rope
    plain = flag.config.rope
    assert torch.equal(torch.cat(rope_tables(rope, 16, 16, 16)), torch.cat(rope_tables(plain, 16, 16, 16)))
    (cos, _), patches, base = rope_tables(rope, 16, 32, 32), 32 * 32, 10000 * 4 ** (16 / 14)
    angles = torch.arange(patches)[:, None] * base ** (-torch.arange(0, 16, 2).double() / 16)
    assert relative(cos, angles.cos().float()) < 1e-4


@pytest.mark.parametrize(
    ("name", "parameters", "linear", "conditioning", "attention"),
    [
        ("flag_600m", 609_836_576, 115.98, 0.16, 3.22),
        ("flag_3b", 4_237_824_032, 927.75, 0.61, 12.88),
        ("flag_7b", 7_293_819_936, 1657.91, 0.82, 17.18),
    ],
)
def test_published_sizes(name, parameters, linear, conditioning, attention):
    config = preset(name)
    per_image = flops.linear_macs(config, 0)
    assert flops.parameters(config) == parameters
    assert round(per_image / 1e9, 2) == conditioning
    assert (flops.linear_macs(config, 256) - per_image) / 1e9 == pytest.approx(linear, abs=0.006)
    assert round(flops.mixing_macs(config, 256) / 1e9, 2) == attention
