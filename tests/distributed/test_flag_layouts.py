"""Flag-DiT and TerDiT train alike in every layout: loss, gradient norm and every gradient against one process.

Norms of q and k, gamma and alphas reach over all tensor-parallel ranks, which the published implementations' do not.
As in test_layouts.py, training starts from weights none of which is zero.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from fitscale.config.load import load_config
from fitscale.config.schema import Config, ParallelConfig
from fitscale.model.build import build_network, initial_items
from fitscale.model.weights import published_items, stored, write_tensors
from fitscale.parallel.groups import init_parallel
from tests.distributed.spawn import run_ranks
from tests.distributed.test_layouts import metric, tensors, train_here
from tests.shard_sets import indexed_set
from tests.test_terdit import CANCELLED
from tests.tiny import OVERRIDES

FAMILIES = {
    "flag_dit": ("model.family=flag_dit",),
    "terdit": ("model.family=large_dit", "model.quantise=ternary", "flow.kind=ddpm", "sampling.method=ddpm"),
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
STEPS = 4


def config_of(folder: Path, shards: Path, family: str, *overrides: str) -> Config:
    model = ("model.hidden_size=48", "model.num_heads=4", "model.mlp_multiple=16", "model.num_classes=7")
    data = ("model.patch_size=2", "model.in_channels=3", "batch.global_batch_size=8", "batch.pack_tokens=160")
    steps = (f"run.steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep_last=0", "optim.lr=2e-4")
    places = (f"run.dir={folder}", f"data.shards={shards}")
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


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """By family: shards, weights, and the run directory of one rank, ZeRO 0."""
    folder = tmp_path_factory.mktemp("flag")
    shards = folder / "shards"
    indexed_set(shards, 40)

    @cache
    def reference(family):
        start, run = folder / f"{family}.safetensors", folder / family
        config = config_of(run, shards, family, f"run.init_weights={start}", "parallel.zero_stage=0")
        awake_weights(start, config)
        run_ranks(train_here, 1, config)
        return shards, start, run

    return reference


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(tmp_path, one_process, family, layout):
    shards, start, expected = one_process(family)
    ranks, overrides = LAYOUTS[layout]
    run = tmp_path / "run"
    run_ranks(train_here, ranks, config_of(run, shards, family, f"run.init_weights={start}", *overrides))
    for key, near in (("loss", 1e-6), ("grad_norm", 1e-5)):
        assert len(metric(run, key)) == STEPS
        assert (metric(run, key) - metric(expected, key)).abs().max() < near * metric(expected, key).max(), key
    ours, theirs = (tensors(folder, 1, "optimizer/exp_avg") for folder in (run, expected))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if not name.endswith(CANCELLED):
            worst = (ours[name] - gradient).abs().max() / gradient.abs().max()
            assert gradient.any() and worst < 1e-4, f"gradient of {name} is off by {worst:.1e} of its largest entry"
