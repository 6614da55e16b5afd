"""Objectives against direct formulas, and the cut into packs, which must not change the loss."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from fitscale.config.schema import FlowConfig, ModelConfig
from fitscale.flow.loss import image_weights, make_objective, segment_mean
from fitscale.flow.path import draws

REFERENCE = Path(__file__).parent / "data" / "reference"
LENGTHS = [4, 1, 7, 3]
SLOTS = torch.tensor([3, 0, 2, 1])
LABELS = torch.tensor([1, 2, 3, 4])
MODEL = ModelConfig(num_classes=10)


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.fixture
def tokens():
    return torch.randn(sum(LENGTHS), 6, generator=torch.Generator().manual_seed(0))


def drawn(flow, slots, cu_seqlens, seed=0, step=0):
    lengths = cu_seqlens.diff().tolist()
    return draws(seed, step, slots.tolist(), lengths, 6, flow.times, flow.label_drop)


@pytest.mark.parametrize("kind", ["rectified", "ddpm"])
@pytest.mark.parametrize("reduction", ["image", "token"])
def test_one_pack_or_many_is_the_same_loss(kind, reduction, tokens):
    flow = FlowConfig(kind=kind, label_drop=0.5)

    def loss(order, cuts):
        objective, total = make_objective(flow, MODEL), torch.zeros(())
        pieces = tokens.split(LENGTHS)
        for first, last in pairwise(cuts):
            chosen = order[first:last]
            pack = torch.cat([*(pieces[i] for i in chosen), torch.zeros(2, 6)])  # padding is an image, slot -1
            cu = starts([*(LENGTHS[i] for i in chosen), 2])
            slots = torch.tensor([*(SLOTS[i].item() for i in chosen), -1])
            labels = torch.tensor([*(LABELS[i].item() for i in chosen), 0])
            inputs = objective.prepare(pack, labels, cu, drawn(flow, slots, cu, seed=1, step=5))
            scale = inputs.t_S.repeat_interleave(cu.diff().long())[:, None] / 1000
            output = torch.cat([inputs.x_TC * scale] * (2 if kind == "ddpm" else 1), 1)
            loss_S = objective.loss_S([output], inputs, cu)
            total = total + (image_weights(reduction, cu, slots, 4, sum(LENGTHS)) * loss_S).sum()
        return total

    whole = loss([0, 1, 2, 3], [0, 4])
    torch.testing.assert_close(loss([2, 0, 3, 1], [0, 1, 4]), whole, rtol=1e-6, atol=1e-7)


def test_prepare_makes_path_target_and_dropped_labels(tokens):
    cu = starts(LENGTHS)
    all_but_none, none = FlowConfig(label_drop=0.999999), FlowConfig(label_drop=0.0)
    inputs = make_objective(all_but_none, MODEL).prepare(tokens, LABELS, cu, drawn(all_but_none, SLOTS, cu))
    assert inputs.labels_S.tolist() == [10] * 4
    t = inputs.t_S.repeat_interleave(cu.diff().long())[:, None]
    noise = tokens - inputs.target
    torch.testing.assert_close(inputs.x_TC, t * tokens + (1 - t) * noise)
    kept = make_objective(none, MODEL).prepare(tokens, LABELS, cu, drawn(none, SLOTS, cu))
    assert kept.labels_S.tolist() == LABELS.tolist()
    assert torch.equal(kept.x_TC, inputs.x_TC)


def test_reductions_weigh_images_or_tokens():
    cu, slots = starts([4, 1, 2]), torch.tensor([0, 1, -1])
    assert image_weights("image", cu, slots, 2, 5).tolist() == [0.5, 0.5, 0.0]
    torch.testing.assert_close(image_weights("token", cu, slots, 2, 5), torch.tensor([0.8, 0.2, 0.0]))


def test_segment_mean_and_its_gradient():
    values = torch.randn(15, requires_grad=True)
    means = segment_mean(values, starts(LENGTHS))
    torch.testing.assert_close(means, torch.stack([part.mean() for part in values.split(LENGTHS)]))
    means[2].backward()
    expected = torch.zeros(15)
    expected[5:12] = 1 / 7
    torch.testing.assert_close(values.grad, expected)


@pytest.mark.parametrize("name", ["fitv2_tiny", "fitv2_hr_tiny"])
def test_published_loss_per_image(name):
    ref = load_file(REFERENCE / f"{name}.safetensors")
    lengths = ref["mask"].sum(1).int().tolist()
    cu = starts(lengths)

    def pack(padded):
        return torch.cat([image[:n] for image, n in zip(padded, lengths, strict=True)])

    objective = make_objective(FlowConfig(), MODEL)
    inputs = objective.prepare_at(pack(ref["x1"]), ref["y"], cu, ref["t"], pack(ref["x0"]))
    torch.testing.assert_close(inputs.x_TC, pack(ref["x_t"]), atol=1e-6, rtol=0)
    loss = objective.loss_S([pack(ref["output"])], inputs, cu)
    torch.testing.assert_close(loss, ref["loss_per_image"], atol=1e-6, rtol=0)


def test_ddpm_steps_run_from_noise_to_data():
    objective = make_objective(FlowConfig(kind="ddpm"), MODEL)
    t = 1 - torch.arange(1000) / 1000
    assert torch.equal(objective.model_time(t), torch.arange(1000.0))
    assert objective.model_time(torch.tensor([0.0, 1.0])).tolist() == [999.0, 0.0]


@pytest.mark.parametrize("step", [1, 10, 500, 999])
def test_ddpm_bound_is_the_kl_of_two_gaussians(step):
    """Posterior q(x_{t-1} | x_t, x_0) by its textbook formula, p by the network's epsilon and variance."""
    objective = make_objective(FlowConfig(kind="ddpm"), MODEL)
    torch.manual_seed(0)
    data, noise, epsilon, place = (torch.randn(3, 4, dtype=torch.float64) for _ in range(4))
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    b, a, before = beta[step], alpha_bar[step], alpha_bar[step - 1]
    x = a.sqrt() * data + (1 - a).sqrt() * noise
    variance = b * (1 - before) / (1 - a)

    def posterior_mean(clean):
        return (before.sqrt() * b * clean + (1 - b).sqrt() * (1 - before) * x) / (1 - a)

    predicted = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
    spread = torch.exp((place + 1) / 2 * b.log() + (1 - place) / 2 * variance.log()).sqrt()
    kl = kl_divergence(Normal(posterior_mean(data), variance.sqrt()), Normal(posterior_mean(predicted), spread))
    expected = (epsilon - noise).square().mean() + kl.mean() / math.log(2)

    cu = starts([3])
    t = torch.tensor([1 - step / 1000])
    inputs = objective.prepare_at(data.float(), torch.tensor([0]), cu, t, noise.float())
    assert inputs.t_S.item() == step
    loss = objective.loss_S([torch.cat([epsilon, place], 1).float()], inputs, cu)
    torch.testing.assert_close(loss[0].double(), expected, rtol=1e-3, atol=0)


def test_ddpm_step_zero_is_the_likelihood_of_a_bin():
    objective = make_objective(FlowConfig(kind="ddpm"), MODEL)
    data, noise = torch.tensor([[0.2, -1.0, 1.0]]), torch.tensor([[0.3, -0.4, 0.5]])
    cu = starts([1])
    inputs = objective.prepare_at(data, torch.tensor([0]), cu, torch.tensor([1.0]), noise)
    output = torch.cat([noise, torch.ones(1, 3)], 1)  # right epsilon, variance beta_0 = 1e-4: mean = data
    inside = Normal(0.0, 0.01).cdf(torch.tensor(1 / 255))
    mass = torch.tensor([2 * inside - 1, inside, inside])
    torch.testing.assert_close(objective.loss_S([output], inputs, cu)[0], -mass.log2().mean(), rtol=1e-3, atol=0)


def test_ddpm_bound_trains_the_variance_alone():
    objective = make_objective(FlowConfig(kind="ddpm"), MODEL)
    cu = starts([5])
    data, noise = torch.randn(5, 2), torch.randn(5, 2)
    inputs = objective.prepare_at(data, torch.tensor([0]), cu, torch.tensor([0.5]), noise)
    output = torch.randn(5, 4, requires_grad=True)
    objective.loss_S([output], inputs, cu).sum().backward()
    torch.testing.assert_close(output.grad[:, :2], 2 * (output[:, :2] - noise).detach() / 10)
    assert output.grad[:, 2:].abs().min() > 0
