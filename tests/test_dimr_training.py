"""DiMR trains alike in every layout, resumes, samples, is evaluated, exported and imported."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.config.schema import Config
from fitscale.model.backbone import backbone_of, parameter_table
from fitscale.plan.memory import activation_bytes, block_count
from fitscale.plan.traffic import step_traffic
from fitscale.run.layout import RunDir
from tests.conftest import ROOT
from tests.distributed.spawn import main_here, run_ranks, train_here
from tests.distributed.test_plan_memory import saved_bytes
from tests.programs import run_tool
from tests.shard_sets import indexed_set

STEPS = 4
LAYOUTS = {
    "dp2 ZeRO-2": (2, 1, 2),
    "dp2 ZeRO-3": (2, 1, 3),
    "tp2 ZeRO-0": (2, 2, 0),
    "dp2 tp2 ZeRO-3": (4, 2, 3),
}


def tiny(run_dir: Path, shards: Path, *overrides: str) -> Config:
    model = ("depth=3", "hidden_size=32", "num_heads=4", "convnext_depth=3", "convnext_size=16", "max_side=6")
    model += ("in_channels=3", "num_classes=7")
    settings = ("data.latent.kind=pixels", "data.latent.factor=1", "data.latent.scaling=1.0", "data.num_workers=0")
    settings += ("batch.global_batch_size=8", "batch.pack_tokens=160", "optim.lr=1e-3", "optim.ema_decays=[0.9]")
    settings += ("optim.warmup_steps=0", "optim.weight_decay=0.3", "parallel.precision=fp32", "run.device=cpu")
    settings += (f"run.steps={STEPS}", "data.holdout_fraction=0.2", "sampling.guidance.channels=3", "sampling.steps=3")
    settings += ("evaluation.points=1", "evaluation.validation_images=4", "checkpoint.every_steps=2")
    files = [str(ROOT / "configs" / name) for name in ("model/dimr_xs_2r.yaml", "recipe/dimr_256.yaml")]
    settings += tuple(f"model.{setting}" for setting in model)
    return load_config([*files, *settings, f"run.dir={run_dir}", f"data.shards={shards}", *overrides])


def train_with_all_partitioned(config: Config) -> None:
    """Under ZeRO-3, DeepSpeed leaves small tensors whole: here none, so that each is fetched when its module runs."""
    from fitscale.parallel import zero
    from fitscale.train.trainer import train

    original = zero._engine_config

    def without_exception(*arguments):
        settings = original(*arguments)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    zero._engine_config = without_exception
    train(config)


def column(run_dir: Path, key: str) -> torch.Tensor:
    return torch.tensor([row[key] for row in read_jsonl(RunDir(run_dir).metrics)], dtype=torch.float64)


def weights(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = RunDir(run_dir).checkpoint_path(step) / "weights" / "raw"
    return {name: tensor for file in sorted(folder.iterdir()) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dimr") / "shards"
    indexed_set(folder, 40)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory, shards) -> Path:
    """Weights none of which is at its start, so that every parameter has a gradient at the first step."""
    table = parameter_table(tiny(Path("unused"), shards).model)
    generator = torch.Generator().manual_seed(0)
    drawn = {
        entry.name: float(entry.init == "one") + 0.1 * torch.randn(entry.shape, generator=generator) for entry in table
    }
    path = tmp_path_factory.mktemp("dimr") / "start.safetensors"
    save_file(drawn, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards, start) -> Path:
    """A finished run of one process, all of a step in one pack."""
    folder = tmp_path_factory.mktemp("dimr") / "run"
    run_ranks(train_here, 1, tiny(folder, shards, f"run.init_weights={start}", "batch.pack_tokens=400"))
    return folder


def require_same(run_dir: Path, trained: Path) -> None:
    """Losses, gradients and weights; a step of Adam is at most about the learning rate, 1e-3."""
    assert (column(run_dir, "loss") - column(trained, "loss")).abs().max() < 2e-6
    torch.testing.assert_close(column(run_dir, "grad_norm"), column(trained, "grad_norm"), rtol=1e-5, atol=0)
    expected = weights(trained)
    for name, tensor in weights(run_dir).items():
        assert (tensor - expected[name]).abs().max() < 2e-4, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_alike_in_every_layout(tmp_path, shards, start, trained, layout):
    ranks, tp, stage = LAYOUTS[layout]
    overrides = (f"parallel.tensor_parallel_size={tp}", f"parallel.zero_stage={stage}", f"run.init_weights={start}")
    run_ranks(train_with_all_partitioned, ranks, tiny(tmp_path / "run", shards, *overrides))
    require_same(tmp_path / "run", trained)


@pytest.mark.parametrize("stage", [2, 3])
def test_it_goes_on_in_another_layout_with_blocks_computed_again(tmp_path, shards, start, trained, stage):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(RunDir(tmp_path / "run").checkpoint_path(STEPS))
    overrides = (f"parallel.zero_stage={stage}", "parallel.activation_checkpoint_every=1", f"run.init_weights={start}")
    run_ranks(train_with_all_partitioned, 2, tiny(tmp_path / "run", shards, *overrides, "batch.pack_tokens=400"))
    require_same(tmp_path / "run", trained)


def test_what_is_spared_does_not_decay(tmp_path, shards, start):
    """With gradients that change nothing (all of AdamW's step is divided by a huge eps), only the decay is left."""
    overrides = ("optim.eps=1e12", "run.steps=1", "evaluation.points=0", f"run.init_weights={start}")
    for stage in (0, 2):
        folder = tmp_path / str(stage)
        run_ranks(train_here, 1, tiny(folder, shards, *overrides, f"parallel.zero_stage={stage}"))
        before = load_file(start)
        for name, tensor in weights(folder, 1).items():
            kept = 1.0 if "nodecay_" in name else 1 - 1e-3 * 0.3
            torch.testing.assert_close(tensor, kept * before[name], rtol=1e-6, atol=1e-9)


def test_it_is_evaluated_sampled_exported_and_imported(tmp_path, shards, trained):
    run_ranks(main_here, 1, "evaluate", trained)
    (row,) = read_jsonl(RunDir(trained).evaluations)
    assert row["metric"] == "validation_loss" and 0 < row["value"] < 10 and row["key"]["objective"] == "scaled_linear"
    size = ("--height", 8, "--width", 4, "--count", 2)
    run_ranks(main_here, 1, "sample", trained, *size, "--guidance", 1.4, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*_class*.png"))) == 2
    exported = tmp_path / "exported.safetensors"
    assert run_tool("convert_checkpoint", trained, exported, "--weights", "raw").returncode == 0
    assert {name: torch.equal(tensor, load_file(exported)[name]) for name, tensor in weights(trained).items()} == {
        entry.name: True for entry in parameter_table(tiny(trained, shards).model)
    }
    published = tmp_path / "DiMR.pth"
    torch.save(load_file(exported), published)
    config = RunDir(trained).path / "config.yaml"
    imported = tmp_path / "imported.safetensors"
    assert run_tool("convert_checkpoint", published, imported, "--config", config).returncode == 0
    assert all(torch.equal(tensor, load_file(imported)[name]) for name, tensor in load_file(exported).items())
    torch.save({name: tensor for name, tensor in load_file(exported).items() if "upsample.2" not in name}, published)
    refused = run_tool("convert_checkpoint", published, tmp_path / "none.safetensors", "--config", config)
    assert refused.returncode == 2 and "stages.1.upsample.2.weight.param0 is missing" in refused.stderr


@pytest.mark.parametrize(("tp", "every"), [(1, 0), (1, 1), (2, 0)])
def test_planned_activations_are_what_autograd_keeps(tp, every):
    layout = (f"parallel.tensor_parallel_size={tp}", f"parallel.activation_checkpoint_every={every}")
    model = ("hidden_size=128", "num_heads=4", "depth=7", "convnext_depth=5", "convnext_size=64", "num_classes=10")
    given = (str(ROOT / "configs/model/dimr_xs_2r.yaml"), *layout, *(f"model.{setting}" for setting in model))
    config = load_config([*given, "parallel.precision=fp32"])
    side, images = 16, 4
    tokens = side * side * images
    measured = max(run_ranks(saved_bytes, tp, config, side, images))
    planned = activation_bytes(config, tokens, images, on_cuda=False)
    planned -= 4 * tokens * 5 * 4 * config.model.convnext_size  # gradients on their way, which a forward pass has not
    if every:  # a block that is computed again is not there yet
        every_block = replace(config, parallel=replace(config.parallel, activation_checkpoint_every=0))
        ends = backbone_of(config.model).kept(config.model, False).ends
        planned -= (activation_bytes(every_block, tokens, images, False) - 4 * tokens * ends) / block_count(config)
    assert planned == pytest.approx(measured, rel=0.05), f"{planned / measured - 1:+.1%}"


@pytest.mark.parametrize("name", ["xs", "s", "b", "l", "xl", "g"])
def test_every_size_is_planned(name, capsys):
    from fitscale.cli import main

    files = (f"{ROOT}/configs/model/dimr_{name}_2r.yaml", f"{ROOT}/configs/recipe/dimr_256.yaml")
    assert main(["plan", *files, "--gpus", "8"]) == 0
    planned = capsys.readouterr().out
    assert f"dimr_{name}_2r" in planned and "tp" in planned


def test_traffic_of_tensor_parallelism_counts_every_pixel():
    """On a ring of two each rank sends as much as is summed: forward what leaves a region, backward what enters one."""
    layout = ("parallel.tensor_parallel_size=2", "parallel.zero_stage=0", "parallel.precision=fp32")
    config = load_config([str(ROOT / "configs/model/dimr_xl_2r.yaml"), *layout])
    d, e = config.model.hidden_size, config.model.convnext_size
    inside = config.model.depth * (2 * d + 3 * d) + 4 * config.model.convnext_depth * (e + 2 * e)
    assert step_traffic(config, 1, 1, 100.0).tensor_parallel == 4 * 100 * inside
