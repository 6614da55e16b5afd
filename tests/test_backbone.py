"""The seam for backbones: a third one, which only tests know, trains, resumes and samples like the others."""

import ast
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fitscale.config.errors import UserError
from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.config.schema import Config, FlowConfig, ParallelConfig
from fitscale.flow.loss import make_objective
from fitscale.model import flops
from fitscale.model.backbone import parameter_table
from fitscale.model.build import build_network, initial_items
from fitscale.model.fit.config import FitConfig
from fitscale.parallel.groups import init_parallel
from fitscale.plan.memory import rank_memory
from fitscale.run.layout import RunDir
from tests import learned_dit  # registers it, in the processes that import this file too
from tests.conftest import ROOT
from tests.distributed.spawn import run_ranks, train_here
from tests.programs import run_tool
from tests.shard_sets import indexed_set

FOLDER = Path(learned_dit.__file__).parent
YAML = FOLDER / "tiny.yaml"
LAYOUTS = {
    "dp2 ZeRO-2": (2, ("parallel.zero_stage=2",)),
    "dp2 ZeRO-3": (2, ("parallel.zero_stage=3",)),
    "tp2 sp": (2, ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")),
    "dp2 tp2 sp ZeRO-3": (
        4,
        ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true", "parallel.zero_stage=3"),
    ),
}


def tiny(run_dir: Path, shards: Path, *overrides: str) -> Config:
    settings = ("data.latent.kind=pixels", "data.latent.factor=1", "data.latent.scaling=1.0", "data.num_workers=0")
    settings += ("batch.global_batch_size=8", "batch.pack_tokens=160", "optim.lr=1e-3", "optim.ema_decays=[0.9]")
    settings += ("parallel.precision=fp32", "run.device=cpu", "run.steps=4", "data.holdout_fraction=0.2")
    settings += ("evaluation.points=1", "evaluation.validation_images=4", "checkpoint.every_steps=2")
    settings += ("model.in_channels=3", "model.num_classes=7", "sampling.steps=3")
    return load_config([str(YAML), *settings, f"run.dir={run_dir}", f"data.shards={shards}", *overrides])


def call(*arguments: object) -> None:
    from fitscale.cli import main

    assert main([str(argument) for argument in arguments]) == 0


def losses(run_dir: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in read_jsonl(RunDir(run_dir).metrics)], dtype=torch.float64)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learned") / "shards"
    indexed_set(folder, 40)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards) -> Path:
    """A finished run of one process."""
    config = tiny(tmp_path_factory.mktemp("learned") / "run", shards)
    run_ranks(train_here, 1, config)
    return Path(config.run.dir)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_alike_in_every_layout(tmp_path, shards, trained, layout):
    ranks, overrides = LAYOUTS[layout]
    run_ranks(train_here, ranks, tiny(tmp_path / "run", shards, *overrides))
    assert (losses(tmp_path / "run") - losses(trained)).abs().max() < 1e-6


def test_it_goes_on_from_a_checkpoint_in_another_layout(tmp_path, shards, trained):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(RunDir(tmp_path / "run").checkpoint_path(4))
    run_ranks(train_here, 2, tiny(tmp_path / "run", shards, *LAYOUTS["dp2 ZeRO-3"][1]))
    assert (losses(tmp_path / "run") - losses(trained)).abs().max() < 1e-6


def test_it_is_evaluated_sampled_exported_and_imported(tmp_path, shards, trained):
    run_ranks(call, 1, "evaluate", trained)
    (row,) = read_jsonl(RunDir(trained).evaluations)
    assert row["metric"] == "validation_loss" and 0 < row["value"] < 10
    size = ("--height", 8, "--width", 4, "--count", 2)
    run_ranks(call, 1, "sample", trained, *size, "--guidance", 2, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*_class*.png"))) == 2
    exported = tmp_path / "exported.safetensors"
    assert run_tool("convert_checkpoint", trained, exported, "--weights", "raw").returncode == 0
    table = {entry.name: entry.shape for entry in parameter_table(tiny(trained, shards).model)}
    assert {name: tuple(tensor.shape) for name, tensor in load_file(exported).items()} == table
    start = (f"run.init_weights={exported}", "optim.lr=0", "run.steps=1", "evaluation.points=0")
    run_ranks(train_here, 1, tiny(tmp_path / "again", shards, *start))
    folders = [RunDir(path).checkpoints()[-1].weights("raw") for path in (trained, tmp_path / "again")]
    before, after = ({k: v for f in sorted(folder.iterdir()) for k, v in load_file(f).items()} for folder in folders)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_it_is_planned_and_counted(shards):
    config = tiny(Path("unused"), shards)
    init_parallel(ParallelConfig(), "cpu")
    network = build_network(config.model, ParallelConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == flops.parameters(config.model)
    d, depth = config.model.hidden_size, config.model.depth
    assert flops.mixing_macs(config.model, 9) == 2 * 81 * d * depth
    per_token = 12 * d + depth * (4 * d * d + 2 * d * 2 * d) + 3 * d + 12 * d
    assert flops.cost(config.model)[0] == per_token
    assert rank_memory(config, 1, 160, 8, on_cuda=False).peak > 16 * flops.parameters(config.model)


def test_rope_of_a_backbone_without_any_is_refused(trained, capsys):
    from fitscale.cli import main

    size = ("--height", "8", "--width", "4")
    assert main(["sample", str(trained), *size, "--rope", "yarn"]) == 2
    assert "--rope: models of family learned_dit have no RoPE" in capsys.readouterr().err


def test_the_loss_weighs_every_scale():
    model = learned_dit.LEARNED_DIT.config(patch_size=2, in_channels=1)
    objective = make_objective(FlowConfig(label_drop=0.0), model)
    cu_seqlens, data = torch.tensor([0, 2]), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    inputs = objective.prepare_at(data, torch.tensor([1]), cu_seqlens, torch.tensor([0.3]), torch.ones(2, 4))
    coarse, fine = torch.zeros(2, 1), torch.zeros(2, 4)
    sums = inputs.target.sum(1, keepdim=True) / 2  # of 2 x 2 pixels, so that noise keeps its variance
    expected = 0.25 * sums.square().mean() + inputs.target.square().mean()
    torch.testing.assert_close(objective.loss_S([coarse, fine], inputs, cu_seqlens), expected[None])


@pytest.mark.parametrize("kind", ["name", "split"])
def test_a_network_that_is_not_its_table_is_caught(kind):
    init_parallel(ParallelConfig(), "cpu")
    model = learned_dit.LEARNED_DIT.config(name=f"wrong {kind}", depth=1, hidden_size=32, num_heads=4)
    original = parameter_table(model)
    wrong = {"name": {"name": "other"}, "split": {"split": 1}}[kind]
    table = (replace(original[0], **wrong), *original[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fitscale.model.build.parameter_table", lambda _: table)
        with pytest.raises(AssertionError, match="network and table of learned_dit differ in"):
            build_network(model, ParallelConfig())


def test_an_unknown_family_and_another_familys_key_are_one_message():
    with pytest.raises(UserError, match=r"model\.family: 'dit' is not one of fitv2, fit"):
        load_config(["model.family=dit"])
    with pytest.raises(UserError, match="max_side"):
        load_config(["model.family=fit", "flow.kind=ddpm", "sampling.method=ddpm", "model.max_side=3"])


def test_no_room_but_model_names_a_backbone():
    """`FiT`, comparisons of a family, and the tests' own backbone appear nowhere outside fitscale/model."""
    found = []
    for path in [*(ROOT / "fitscale").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "slurm").glob("*.py")]:
        if path.is_relative_to(ROOT / "fitscale" / "model"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Name | ast.Attribute | ast.alias) and _name(node).split(".")[-1] == "FiT"
            folder = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fitscale.model.fit")
            compared = isinstance(node, ast.Compare) and any(
                isinstance(side, ast.Attribute) and side.attr == "family" for side in [node.left, *node.comparators]
            )
            if named or folder or compared:
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}")
    texts = [path for path in (ROOT / "fitscale").rglob("*.py") if "learned_dit" in path.read_text()]
    assert found == [] and texts == []


def _name(node: ast.Name | ast.Attribute | ast.alias) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else node.name


def test_weighted_norms_of_q_and_k_get_the_gradients_of_all_heads():
    """`qk_norm_weight` under its published names: one rank against two."""
    (whole,), (_, split) = run_ranks(weighted_outcome, 1, 1), run_ranks(weighted_outcome, 2, 2)
    np.testing.assert_allclose(split[0], whole[0], rtol=0, atol=1e-6)
    for name in ("blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.weight"):
        assert np.abs(whole[1][name]).max() > 1e-4
        np.testing.assert_allclose(split[1][name], whole[1][name], rtol=1e-4, atol=1e-7)


def weighted_outcome(tp: int):
    """Output and gradients of a FiTv2 with weights in its norms of q and k, none of them at its start."""
    from fitscale.model.common.layout import pack_layout
    from fitscale.parallel.layers import tp_shard

    parallel = ParallelConfig(tensor_parallel_size=tp)
    init_parallel(parallel, "cpu")
    config = FitConfig(depth=1, hidden_size=48, num_heads=4, num_classes=3, qk_norm_weight=True)
    model = build_network(config, parallel)
    splits = {entry.name: entry.split for entry in parameter_table(config)}
    for (name, parameter), (_, start) in zip(model.named_parameters(), initial_items(model, 0), strict=True):
        generator = torch.Generator().manual_seed(len(name))
        full = next(entry for entry in parameter_table(config) if entry.name == name).shape
        parameter.data.copy_(start + tp_shard(0.1 * torch.randn(full, generator=generator), splits[name]))
    generator = torch.Generator().manual_seed(1)
    layout = pack_layout(torch.tensor([(2, 3), (3, 1)]), torch.tensor([0, 6, 9]), torch.device("cpu"))
    tokens = torch.randn(9, 16, generator=generator)
    (out,) = model(tokens, torch.tensor([0.3, 0.8]), torch.tensor([1, 2]), layout)
    out.square().mean().backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if splits[name] is None}
    return out.detach().numpy(), grads
