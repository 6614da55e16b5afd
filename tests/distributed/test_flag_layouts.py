"""Flag-DiT, TerDiT and a ternary FiTv2 train alike in every layout: loss, gradient norm and every gradient.

Norms of q and k, gamma and alphas reach over all tensor-parallel ranks, which the published implementations' do not.
As in test_layouts.py, training starts from weights none of which is zero.
"""

from pathlib import Path

import pytest
import torch

from fitscale.config.load import load_config
from fitscale.config.schema import Config, ParallelConfig
from fitscale.model.build import build_network, initial_items
from fitscale.model.weights import published_items, stored, write_tensors
from fitscale.parallel.groups import init_parallel
from fitscale.plan.memory import activation_bytes
from tests.distributed.spawn import run_ranks, train_here
from tests.distributed.test_layouts import metric, tensors
from tests.distributed.test_plan_memory import activation_config, saved_bytes
from tests.shard_sets import indexed_set
from tests.test_terdit import CANCELLED
from tests.tiny import OVERRIDES

FAMILIES = {
    "flag_dit": ("model.family=flag_dit", "model.mlp_multiple=16"),
    "terdit": (
        "model.family=large_dit",
        "model.quantise=ternary",
        "flow.kind=ddpm",
        "sampling.method=ddpm",
        "model.mlp_multiple=16",
    ),
    "fitv2": ("model.quantise=ternary",),
}
TP, SP = "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"
LAYOUTS = {
    "tp2": (2, (TP, "parallel.zero_stage=0")),
    "tp2 sp": (2, (TP, SP, "parallel.zero_stage=1", "parallel.activation_checkpoint_every=2")),
    "dp2 ZeRO-1": (2, ("parallel.zero_stage=1",)),
    "dp2 ZeRO-2": (2, ("parallel.zero_stage=2",)),
    "dp2 ZeRO-3": (2, ("parallel.zero_stage=3",)),
    "dp2 tp2 sp ZeRO-3": (4, (TP, SP, "parallel.zero_stage=3")),
}
STEPS = 3


def config_of(folder: Path, family: str, run: Path, *overrides: str) -> Config:
    """Of a run in `run` from the shards and the weights in `folder`."""
    model = ("model.hidden_size=48", "model.num_heads=4", "model.num_classes=7")
    data = ("model.patch_size=2", "model.in_channels=3", "batch.global_batch_size=8", "batch.pack_tokens=160")
    steps = (f"run.steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep_last=0", "optim.lr=2e-4")
    places = (f"run.dir={run}", f"data.shards={folder / 'shards'}", f"run.init_weights={folder / family}.safetensors")
    return load_config([*OVERRIDES, *FAMILIES[family], *model, *data, *steps, *places, *overrides])


def awake_weights(path: Path, config: Config) -> None:
    """Weights whose zero-initialised parts are filled, rows of each matrix at scales of their own."""
    init_parallel(ParallelConfig(), "cpu")
    model, generator = build_network(config.model, ParallelConfig()), torch.Generator().manual_seed(0)
    for parameter, piece in initial_items(model, seed=0):
        piece = piece + 0.05 * torch.randn(piece.shape, generator=generator)
        if piece.dim() == 2:
            piece *= torch.linspace(0.2, 2, len(piece))[:, None]
        parameter.data.copy_(piece)
    write_tensors(path, {name: stored(value) for name, value in published_items(model)}, {})


def train_all(configs: list[Config]) -> None:
    for config in configs:
        train_here(config)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A folder with shards, the weights of each family, and its run directory of one rank, ZeRO 0."""
    folder = tmp_path_factory.mktemp("flag")
    indexed_set(folder / "shards", 40)
    for family in FAMILIES:
        awake_weights(folder / f"{family}.safetensors", config_of(folder, family, folder / family))
    run_ranks(
        train_all, 1, [config_of(folder, family, folder / family, "parallel.zero_stage=0") for family in FAMILIES]
    )
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(tmp_path, one_process, layout):
    ranks, overrides = LAYOUTS[layout]
    run_ranks(train_all, ranks, [config_of(one_process, family, tmp_path / family, *overrides) for family in FAMILIES])
    for family in FAMILIES:
        require_equal(tmp_path / family, one_process / family)


def require_equal(run: Path, expected: Path) -> None:
    for key, near in (("loss", 1e-6), ("grad_norm", 1e-5)):
        assert len(metric(run, key)) == STEPS
        assert (metric(run, key) - metric(expected, key)).abs().max() < near * metric(expected, key).max(), (run, key)
    ours, theirs = (tensors(folder, 1, "optimizer/exp_avg") for folder in (run, expected))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if not name.endswith(CANCELLED):
            worst = (ours[name] - gradient).abs().max() / gradient.abs().max()
            assert gradient.any() and worst < 1e-4, f"{run.name}, {name}: off by {worst:.1e} of its largest entry"


def test_bf16_stays_near_fp32(tmp_path, one_process):
    overrides = ("parallel.precision=bf16", "parallel.zero_stage=3")
    run_ranks(train_all, 1, [config_of(one_process, family, tmp_path / family, *overrides) for family in FAMILIES])
    for family, near in (("flag_dit", 5e-3), ("terdit", 4e-2), ("fitv2", 4e-2)):
        assert (metric(tmp_path / family, "loss") - metric(one_process / family, "loss")).abs().max() < near, family


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_activations_are_what_autograd_keeps(family):
    config = activation_config(1, False, 0, "model.hidden_size=192", *FAMILIES[family])
    kept = saved_bytes(config, 16, 4)
    passing = 4 * 16 * 16 * 4 * config.model.hidden_size * 5  # gradients on their way, which a forward pass has not
    planned = activation_bytes(config, 16 * 16 * 4, 4, on_cuda=False) - passing
    assert planned == pytest.approx(kept, rel=0.05), f"{planned / kept - 1:+.1%}"
