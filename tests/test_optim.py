"""AdamW with EMA: the EMA are the recursion they claim to be, and AdamW is torch's."""

import pytest
import torch

from fitscale.config.schema import OptimConfig
from fitscale.run.comparability import ema_name
from fitscale.train.optim import AdamWEMA, decay_groups, freeze_untrained, learning_rate


def test_weights_follow_torch_and_ema_the_recursion():
    config = OptimConfig(lr=0.1, ema_decays=[0.5, 0.9], weight_decay=0.01)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(5))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizer = AdamWEMA([ours], config)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    expected = {decay: ours.detach().clone() for decay in config.ema_decays}
    for _ in range(4):
        gradient = torch.randn(5)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        expected = {decay: decay * ema + (1 - decay) * theirs.detach() for decay, ema in expected.items()}
        assert torch.equal(ours, theirs)
        for decay, ema in expected.items():
            torch.testing.assert_close(optimizer.state[ours][ema_name(decay)], ema)


@pytest.mark.parametrize("grad_clip", [None, 0.5, 1e9])
def test_gradients_are_clipped_as_torch_clips_them(grad_clip):
    config = OptimConfig(lr=0.1, ema_decays=[0.5], grad_clip=grad_clip)
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
    theirs = [torch.nn.Parameter(one.detach().clone()) for one in ours]
    optimizer, reference = AdamWEMA(ours, config), torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0)
    optimizer.gradient_norm = lambda: torch.nn.utils.get_total_norm([one.grad for one in ours])
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs, grad_clip)
        optimizer.step()
        reference.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_a_norm_that_is_not_finite_changes_nothing(norm, grad_clip):
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamWEMA([weights], OptimConfig(lr=0.1, ema_decays=[0.5], weight_decay=0.1, grad_clip=grad_clip))
    norms = iter([torch.tensor(1.0), torch.tensor(norm)])
    optimizer.gradient_norm = lambda: next(norms)
    weights.grad = torch.ones(3)
    optimizer.step()
    before = {key: value.clone() for key, value in (optimizer.state[weights] | {"weights": weights.detach()}).items()}
    assert before["step"] == 1 and not torch.equal(before["ema_0.5"], before["weights"])
    weights.grad = torch.tensor([1.0, norm, 1.0])
    optimizer.step()
    after = optimizer.state[weights] | {"weights": weights.detach()}
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_learning_rate_warms_up_then_holds_or_falls_to_zero():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine")
    assert learning_rate(cosine, 52, 100) == pytest.approx(0.5)
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.0)


def test_trainable_names_select_parameters():
    model = torch.nn.ModuleDict({"x_embedder": torch.nn.Linear(2, 2), "mlp": torch.nn.Linear(2, 2)})
    freeze_untrained(model.named_parameters(), ["x_embedder", "bias"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["x_embedder.weight", "x_embedder.bias", "mlp.bias"]


def test_what_is_spared_does_not_decay_and_all_groups_have_state_after_one():
    """DeepSpeed steps group by group, and looks for the state of all after the first."""
    config = OptimConfig(lr=0.1, ema_decays=[0.5], weight_decay=0.5, no_decay=["bias", "scale"])
    model = torch.nn.Linear(2, 3)
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    groups = decay_groups([*model.named_parameters(), ("frozen", frozen)], config)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.5, 1), (0.0, 1)]
    optimizer = AdamWEMA(groups, config)
    weight, bias = (parameter.detach().clone() for parameter in (model.weight, model.bias))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    every = optimizer.param_groups
    for group in every:
        optimizer.param_groups = [group]
        optimizer.step()
        assert torch.equal(optimizer.state[model.bias]["ema_0.5"], bias)
    torch.testing.assert_close(model.weight.detach(), 0.95 * weight)
    assert torch.equal(model.bias.detach(), bias)
    assert len(decay_groups(model.named_parameters(), OptimConfig(weight_decay=0.5))) == 1
