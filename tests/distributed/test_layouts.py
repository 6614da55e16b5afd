"""Every parallel layout trains the same model: loss, gradient norm and every gradient against one process.

The gradients are read from the first moment after one step, which is (1 - beta1) times the clipped gradient, in the
checkpoint of step 1: whole tensors in the published names, so that layouts compare one to one. Training starts from
weights none of which is zero: from the usual start most gradients of the first step are zero.
"""

import hashlib
import shutil
import tempfile
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fitscale.config.files import read_json, read_jsonl
from fitscale.config.schema import Config, ParallelConfig
from fitscale.model.build import build_network, initial_items
from fitscale.model.common.compiler import lacks_for_compiling
from fitscale.model.weights import published_items, stored, write_tensors
from fitscale.parallel.groups import init_parallel
from fitscale.run.layout import RunDir
from tests.distributed.spawn import run_ranks, train_here
from tests.tiny import tiny_config

STEPS = 4
FEW = 3  # where eight show no more
LAYOUTS = [
    (1, 1, False),
    (2, 1, False),
    (4, 1, False),
    (1, 2, False),
    (1, 2, True),
    (2, 2, False),
    (2, 2, True),
    (1, 4, True),
]
COMPILED = [((1, 2, True), 3)]  # formulas know no ranks
HPZ = "parallel.zero_hpz_partition_size=2"


@cache
def awake_weights() -> Path:
    """Weights whose zero-initialised parts are filled, so that every parameter has a gradient at the first step."""
    init_parallel(ParallelConfig(), "cpu")
    config = layout_config(Path("unused"), Path("unused"), 1, False, 0)
    model, generator = build_network(config.model, ParallelConfig()), torch.Generator().manual_seed(0)
    for parameter, piece in initial_items(model, seed=0):
        parameter.data.copy_(piece + 0.05 * torch.randn(piece.shape, generator=generator))
    path = Path(tempfile.mkdtemp()) / "awake.safetensors"
    write_tensors(path, {name: stored(value) for name, value in published_items(model)}, {})
    return path


def layout_config(folder: Path, shards: Path, tp: int, sp: bool, stage: int, *overrides: str) -> Config:
    return tiny_config(
        folder,
        shards,
        *("model.hidden_size=48", "model.num_heads=4", f"run.steps={STEPS}", "optim.lr=2e-4", "optim.grad_clip=0.5"),
        *(f"parallel.tensor_parallel_size={tp}", f"parallel.sequence_parallel={sp}", f"parallel.zero_stage={stage}"),
        *("batch.pack_tokens=450", "evaluation.points=2", "evaluation.first_step=1", "checkpoint.keep_last=1"),
        *overrides,
    )


def tensors(run_dir: Path, step: int, folder: str) -> dict[str, torch.Tensor]:
    files = sorted((RunDir(run_dir).checkpoint_path(step) / folder).iterdir())
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def awake_config(folder: Path, shards: Path, tp: int, sp: bool, stage: int, *overrides: str) -> Config:
    return layout_config(folder, shards, tp, sp, stage, f"run.init_weights={awake_weights()}", *overrides)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, digits_shards):
    """Run directory of the reference: one rank, ZeRO 0, one pack a step."""

    @cache
    def reference() -> Path:
        folder = tmp_path_factory.mktemp("reference") / "run"
        run_ranks(train_here, 1, awake_config(folder, digits_shards, 1, False, 0, "batch.pack_tokens=4096"))
        return folder

    return reference()


def metric(run_dir: Path, key: str) -> torch.Tensor:
    return torch.tensor([row[key] for row in read_jsonl(RunDir(run_dir).metrics)], dtype=torch.float64)


@pytest.mark.parametrize(("layout", "stage"), list(product(LAYOUTS, (0, 1, 2, 3))))
def test_fp32_layout_equals_one_process(tmp_path, digits_shards, one_process, layout, stage):
    require_equal_to_one_process(tmp_path / "run", digits_shards, one_process, layout, stage)


@pytest.mark.parametrize("layout", [(4, 1, False), (2, 2, True)])
def test_weights_gathered_from_a_nodes_copy_are_the_same(tmp_path, digits_shards, one_process, layout):
    require_equal_to_one_process(tmp_path / "run", digits_shards, one_process, layout, 3, HPZ)


@pytest.mark.skipif(lacks_for_compiling(torch.device("cpu")) is not None, reason="needs g++ and Python.h")
@pytest.mark.parametrize(("layout", "stage"), COMPILED)
def test_compiled_layout_equals_one_process_as_written(tmp_path, digits_shards, one_process, layout, stage):
    run = tmp_path / "run"
    require_equal_to_one_process(run, digits_shards, one_process, layout, stage, "parallel.compile=on")
    assert read_json(RunDir(run).environment)["compiled"]


def train_in_buckets(config: Config) -> None:
    """Gradients are summed over ranks in several buckets, as those of a large model."""
    ParallelConfig.reduce_bucket = lambda self, dp_size: 15_000
    train_here(config)


def require_equal_to_one_process(run, shards, one_process, layout, stage, *overrides):
    dp, tp, sp = layout
    packs = f"batch.pack_tokens={820 // dp}"  # enough for most steps
    run_ranks(train_in_buckets, dp * tp, awake_config(run, shards, tp, sp, stage, packs, *overrides))
    loss, norm = ((metric(run, key) - metric(one_process, key)).abs().max().item() for key in ("loss", "grad_norm"))
    assert len(metric(run, "loss")) == STEPS
    assert set(metric(run, "packs").tolist()) == {1, 2}
    assert loss < 1e-6, f"loss differs by {loss}"
    assert norm < 1e-5, f"gradient norm differs by {norm}"
    ours, theirs = (tensors(folder, 1, "optimizer/exp_avg") for folder in (run, one_process))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.any(), name
        worst = (ours[name] - gradient).abs().max().item() / gradient.abs().max().item()
        assert worst < 1e-4, f"gradient of {name} is off by {worst:.1e} of its largest entry"


def train_and_hash_replicated(config: Config) -> dict[str, str]:
    """Trains; digests of the parameters that tensor parallelism keeps whole on every rank."""
    from fitscale.parallel.zero import own_part
    from fitscale.train import trainer

    built = []
    original = trainer.Trainer.run_to_end
    trainer.Trainer.run_to_end = lambda self: (original(self), built.append(self.engine))[0]
    train_here(config)
    named = built[0].module.named_parameters()
    parts = {name: own_part(built[0], p) for name, p in named if not getattr(p, "tensor_model_parallel", False)}
    return {
        f"{name} from {part[0]}": hashlib.sha256(part[1].numpy().tobytes()).hexdigest()
        for name, part in parts.items()
        if part is not None
    }


@pytest.mark.parametrize(("layout", "stage"), [((1, 2, False), 0), ((1, 4, True), 1), ((2, 2, True), 3)])
def test_replicated_parameters_stay_identical_to_the_bit(tmp_path, digits_shards, layout, stage):
    dp, tp, sp = layout
    config = awake_config(tmp_path / "run", digits_shards, tp, sp, stage, f"run.steps={FEW}")
    ranks = run_ranks(train_and_hash_replicated, dp * tp, config)
    kept = {part: [digests[part] for digests in ranks if part in digests] for part in ranks[0]}
    assert len(kept) > 10
    assert all(len(digests) == tp and len(set(digests)) == 1 for digests in kept.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_the_optimizer_changes_nothing(tmp_path, digits_shards, one_process, stage):
    overrides = ("parallel.offload_optimizer=true", f"run.steps={FEW}")
    run_ranks(train_here, 2, awake_config(tmp_path / "run", digits_shards, 1, False, stage, *overrides))
    assert (metric(tmp_path / "run", "loss") - metric(one_process, "loss")[:FEW]).abs().max() < 1e-6


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_nothing(tmp_path, digits_shards, one_process, every):
    overrides = (f"parallel.activation_checkpoint_every={every}", f"run.steps={FEW}")
    run_ranks(train_here, 2, awake_config(tmp_path / "run", digits_shards, 2, True, 1, *overrides))
    assert (metric(tmp_path / "run", "loss") - metric(one_process, "loss")[:FEW]).abs().max() < 1e-6


@pytest.mark.parametrize(("layout", "stage"), [((2, 1, False), 1), ((2, 1, False), 2), ((2, 2, True), 3)])
def test_bf16_stays_near_fp32(tmp_path, digits_shards, one_process, layout, stage):
    dp, tp, sp = layout
    overrides = ("parallel.precision=bf16",)
    run_ranks(train_here, dp * tp, awake_config(tmp_path / "run", digits_shards, tp, sp, stage, *overrides))
    assert (metric(tmp_path / "run", "loss") - metric(one_process, "loss")).abs().max() < 2e-2


def train_without_the_sum_of_the_modulations_gradient(config: Config) -> None:
    """Trains with a planted fault: AdaLN's vectors enter the sharded region unwrapped."""
    from fitscale.model.fit import network

    network.enter_sharded = lambda x: x
    train_here(config)


def test_a_missing_gradient_sum_is_caught(tmp_path, digits_shards, one_process):
    """What the table above rests on: it fails where one replicated parameter's gradient is a rank's share only."""
    config = awake_config(tmp_path / "run", digits_shards, 2, True, 1, "run.steps=1", "evaluation.points=0")
    run_ranks(train_without_the_sum_of_the_modulations_gradient, 2, config)
    ours, theirs = (tensors(folder, 1, "optimizer/exp_avg") for folder in (tmp_path / "run", one_process))
    name = "blocks.1.adaLN_modulation.2.bias"
    assert (ours[name] - theirs[name]).abs().max() > 0.1 * theirs[name].abs().max()


MOVES = [  # stages 1 and 2 set their states in one way, 3 in another
    ((1, 1, False), 1, ()),
    ((2, 1, False), 2, ()),
    ((2, 1, False), 3, (HPZ,)),
    ((4, 1, False), 2, ()),
    ((4, 1, False), 3, ()),
    ((1, 2, False), 1, ()),
    ((1, 4, True), 2, ()),
    ((1, 4, True), 3, ()),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, digits_shards):
    """A run of dp 2 x tp 2 with sequence parallelism, stopped after a few steps, and the same after twice as many."""
    folder = tmp_path_factory.mktemp("saved")
    for name, steps in (("stopped", FEW), ("whole", 2 * FEW)):
        overrides = (f"run.steps={steps}", f"checkpoint.every_steps={FEW}", "evaluation.points=0")
        run_ranks(train_here, 4, layout_config(folder / name, digits_shards, 2, True, 2, *overrides))
    return folder


@pytest.mark.parametrize(("layout", "stage", "more"), MOVES)
def test_a_run_goes_on_in_any_layout(tmp_path, digits_shards, saved, layout, stage, more):
    dp, tp, sp = layout
    shutil.copytree(saved / "stopped", tmp_path / "run")
    overrides = (f"run.steps={2 * FEW}", f"checkpoint.every_steps={FEW}", "evaluation.points=0", *more)
    run_ranks(train_here, dp * tp, layout_config(tmp_path / "run", digits_shards, tp, sp, stage, *overrides))
    assert (metric(tmp_path / "run", "loss") - metric(saved / "whole", "loss")).abs().max() < 1e-6
    for folder in ("weights/raw", "weights/ema_0.9"):
        ours, theirs = (tensors(run, 2 * FEW, folder) for run in (tmp_path / "run", saved / "whole"))
        assert ours.keys() == theirs.keys()
        assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-6
