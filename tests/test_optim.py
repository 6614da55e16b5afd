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
