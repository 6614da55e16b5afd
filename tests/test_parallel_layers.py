"""Tensor and sequence parallelism on two gloo ranks: the same model, outputs and gradients as on one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fitscale.config.errors import UserError
from fitscale.config.schema import ParallelConfig
from fitscale.model.build import build_network, initial_items
from fitscale.model.weights import load_weights, published_items, stored, write_tensors
from fitscale.parallel import groups
from fitscale.parallel.layers import enter_sharded, gather_tokens, gather_tp, scatter_tokens, split_of
from tests.distributed.spawn import run_ranks
from tests.reference import Reference, load_reference

ONE = ParallelConfig()
LAYOUTS = {
    "tp": ParallelConfig(tensor_parallel_size=2),
    "tp+sp": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
    "tp+sp+checkpointing": ParallelConfig(
        tensor_parallel_size=2, sequence_parallel=True, activation_checkpoint_every=1
    ),
}
IMAGES = {"fitv2_tiny": [0, 2, 3], "fit_tiny": [0, 1, 2]}  # an even number of tokens
TRAINED_AT_HIGH_RESOLUTION = ("x_embedder", "bias", "adaLN", "final_layer")


def on_two_ranks(folder):
    """Everything that needs a second process, as {name: measurement}."""
    results = {"topology": [groups.init_parallel(config, "cpu") for config in (ONE, LAYOUTS["tp"])]}
    for name in IMAGES:
        reference = load_reference(name)
        groups.init_parallel(ONE, "cpu")
        whole = reference.model()
        expected = outcome(reference, whole, IMAGES[name])
        path = folder / f"{name}.{os.environ['RANK']}.safetensors"
        write_tensors(path, {name: stored(value) for name, value in published_items(whole)}, {})
        for layout, config in LAYOUTS.items():
            results[name, layout] = compare(reference, config, path, expected, IMAGES[name])
        results[name, "frozen"] = frozen_errors(reference, path, expected[2], IMAGES[name])
        results[name, "seed"] = seed_differences(reference)
    results["enter_sharded"] = gradients_through_enter_sharded()
    results["sequence"] = sequence_round_trip()
    return results


def outcome(reference: Reference, model: nn.Module, images):
    """Output, loss and full gradients of the mean loss."""
    (output,) = model(*reference.inputs(images, model.parallel.sequence_parallel))
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    loss = (output - target).square().mean()
    loss.backward()
    grads = {k: gather_tp(p.grad, split_of(p)) for k, p in model.named_parameters() if p.grad is not None}
    return output.detach(), loss.detach(), grads


def compare(reference, config, path, expected, images):
    groups.init_parallel(config, "cpu")
    model = build_network(reference.config, config)
    load_weights(model, path)
    output, loss, grads = outcome(reference, model, images)
    exported = dict(published_items(model))
    original = {k.removeprefix("param."): v for k, v in reference.tensors.items() if k.startswith("param.")}
    return {
        "output": (output - expected[0]).abs().max().item(),
        "loss": (loss - expected[1]).abs().item(),
        "grads": relative_errors(grads, expected[2]),
        "export": all(torch.equal(exported[key], value) for key, value in original.items()),
        "split": {key for key, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)},
        "shapes": {key: tuple(p.shape) for key, p in model.named_parameters()},
    }


def relative_errors(grads, expected):
    assert grads.keys() == expected.keys()
    return {key: ((grads[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected}


def frozen_errors(reference, path, expected, images):
    """Gradients of the parameters that high-resolution post-training trains, the others frozen."""
    config = LAYOUTS["tp+sp"]
    groups.init_parallel(config, "cpu")
    model = build_network(reference.config, config)
    load_weights(model, path)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in key for part in TRAINED_AT_HIGH_RESOLUTION))
    _, _, grads = outcome(reference, model, images)
    trained = {k: g for k, g in expected.items() if any(part in k for part in TRAINED_AT_HIGH_RESOLUTION)}
    return relative_errors(grads, trained)


def seed_differences(reference):
    """Parameters that differ between layouts made from one seed."""
    models = []
    for config in (ONE, LAYOUTS["tp"]):
        groups.init_parallel(config, "cpu")
        model = build_network(reference.config, config)
        for parameter, piece in initial_items(model, seed=5):
            parameter.data.copy_(piece)
        models.append(dict(published_items(model)))
    return [key for key, value in models[0].items() if not torch.equal(value, models[1][key])]


def gradients_through_enter_sharded():
    """Gradients of x and of its neighbour in a sum; both get one tensor from it: strided, then contiguous."""
    gradients = []
    for reduce in (torch.sum, lambda y: (y * torch.ones(4, 3)).sum()):
        x, neighbour = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
        tripled = 3 * neighbour  # before enter_sharded, so that its backward pass comes after
        reduce(enter_sharded(x) + tripled).backward()
        gradients.append((x.grad.unique().tolist(), neighbour.grad.unique().tolist()))
    return gradients


def sequence_round_trip():
    x_TD = torch.arange(12.0).view(6, 2).requires_grad_()
    own = scatter_tokens(x_TD)
    (gather_tokens(own) * torch.arange(6.0)[:, None]).sum().backward()
    return own.tolist(), x_TD.grad.tolist()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("weights"))


def test_world_is_divided(ranks):
    for rank, (data_parallel, tensor_parallel) in enumerate(result["topology"] for result in ranks):
        place = {"rank": rank, "world_size": 2, "device": torch.device("cpu")}
        assert data_parallel == groups.Topology(dp_rank=rank, dp_size=2, tp_rank=0, tp_size=1, **place)
        assert tensor_parallel == groups.Topology(dp_rank=0, dp_size=1, tp_rank=rank, tp_size=2, **place)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IMAGES)
def test_outputs_and_gradients_are_those_of_one_rank(ranks, name, layout):
    for result in (rank[name, layout] for rank in ranks):
        assert result["output"] < 1e-6 and result["loss"] < 1e-6
        wrong = {key: error for key, error in result["grads"].items() if not error < 1e-6}
        assert not wrong


@pytest.mark.parametrize("name", IMAGES)
def test_frozen_weights_leave_the_other_gradients_as_they_are(ranks, name):
    for rank in ranks:
        assert not {key: error for key, error in rank[name, "frozen"].items() if not error < 1e-6}


@pytest.mark.parametrize("name", IMAGES)
def test_a_seed_makes_the_same_model_in_every_layout(ranks, name):
    assert [rank[name, "seed"] for rank in ranks] == [[], []]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_import_then_export_is_bit_equal(ranks, layout):
    assert all(rank["fitv2_tiny", layout]["export"] for rank in ranks)


def test_attention_and_mlp_are_split_and_nothing_else(ranks):
    result = ranks[0]["fitv2_tiny", "tp"]
    split = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "fc1_g.weight", "fc1_g.bias")
    split += ("fc1_x.weight", "fc1_x.bias", "fc2.weight")
    assert result["split"] == {key for key in result["shapes"] if key.endswith(split)}
    assert result["shapes"]["blocks.0.attn.qkv.weight"] == (144, 96)
    assert result["shapes"]["blocks.0.mlp.fc2.weight"] == (96, 128)


def test_enter_sharded_sums_its_own_gradient_only(ranks):
    assert [rank["enter_sharded"] for rank in ranks] == [[([2.0], [3.0])] * 2] * 2


def test_tokens_are_scattered_and_gathered(ranks):
    for rank, (own, grad) in enumerate(result["sequence"] for result in ranks):
        assert own == torch.arange(12.0).view(2, 3, 2)[rank].tolist()
        assert grad == [[i, i] for i in range(6)]


def test_world_of_one_needs_no_environment():
    first, second = (groups.init_parallel(ONE, "cpu") for _ in range(2))
    assert first == second == groups.Topology(0, 1, 0, 1, 0, 1, torch.device("cpu"))
    groups.shutdown()
    groups.shutdown()
    assert groups.init_parallel(ONE, "cpu") == first


def test_a_world_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = replace(ONE, tensor_parallel_size=3)
    with pytest.raises(UserError, match=r"parallel.tensor_parallel_size: 3 .* 4 processes; valid: 1, 2, 4"):
        groups.init_parallel(config, "cpu")
    config = replace(ONE, tensor_parallel_size=2, zero_stage=3, zero_hpz_partition_size=4)
    with pytest.raises(UserError, match=r"hpz_partition_size: 4 does not divide 2 data-parallel ranks; valid: 1, 2$"):
        groups.init_parallel(config, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_cuda_is_refused():
    with pytest.raises(UserError, match=r"run.device: cuda is asked for"):
        groups.init_parallel(ONE, "cuda")


def test_importing_the_model_is_quiet():
    command = [sys.executable, "-c", "import fitscale.model.build"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stderr == ""


def test_who_asks_megatron_core_for_more_than_is_used_here_gets_it():
    """Its packages are entered without what their `__init__` imports; that runs when a name of it is asked for."""
    program = (
        "import sys, os\n"
        "import fitscale.parallel.layers\n"
        "import megatron.core\n"
        "assert 'megatron.core.distributed' not in sys.modules and 'wandb' not in sys.modules\n"
        "assert 'TORCHDYNAMO_DISABLE' not in os.environ\n"
        "assert megatron.core.mpu is fitscale.parallel.layers.parallel_state\n"
        "from megatron.core.tensor_parallel import ColumnParallelLinear, broadcast_data\n"
        "assert issubclass(fitscale.parallel.layers.ColumnLinear, ColumnParallelLinear)\n"
        "assert not hasattr(megatron.core, 'no_such_name')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)
