"""An exported file does not depend on the layout that trained, loaded or saved the weights in it."""

import importlib.util
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fitscale.config.schema import Config
from fitscale.run.layout import RunDir
from tests.conftest import ROOT
from tests.distributed.spawn import run_ranks, train_here
from tests.distributed.test_layouts import layout_config, tensors

STEPS = 4
OVERRIDES = (f"run.steps={STEPS}", "evaluation.points=0")
LAYOUTS = [
    (dp, tp, sp, stage, "fp32") for dp, tp, sp in [(1, 1, False), (4, 1, False), (1, 4, True)] for stage in (1, 3)
]


def save_again(config: Config, to: Path) -> None:
    """Load the newest checkpoint of `config.run.dir`, in this layout, and save it to the run directory `to`."""
    from fitscale.parallel.groups import init_parallel, on_rank_zero
    from fitscale.plan.preflight import open_data
    from fitscale.run.attempt import begin_attempt
    from fitscale.train.checkpoint import newest_checkpoint
    from fitscale.train.trainer import Trainer

    run, topology = RunDir(Path(config.run.dir)), init_parallel(config.parallel, config.run.device)
    found, attempt = newest_checkpoint(run), on_rank_zero(lambda: begin_attempt(RunDir(to), 0))
    trainer = Trainer(config, attempt, open_data(config), topology, found, STEPS)
    trainer.saver.save(found.meta)
    assert trainer.saver.wait() is None


@pytest.fixture(scope="module")
def export():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def exported(run: Path, weights: str) -> Path:
        out = run / f"{weights}.safetensors"
        assert tool.main([str(run), str(out), "--weights", weights]) == 0
        return out

    return exported


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_shards, export):
    """A run of dp 2 x tp 2 with sequence parallelism, and its exports."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(train_here, 4, layout_config(folder, digits_shards, 2, True, 2, *OVERRIDES))
    return folder, {weights: export(folder, weights) for weights in ("raw", "ema")}


def test_an_export_holds_what_was_saved(trained):
    folder, exports = trained
    for weights, name in (("raw", "weights/raw"), ("ema", "weights/ema_0.9")):
        ours, saved = load_file(exports[weights]), tensors(folder, STEPS, name)
        assert ours.keys() == saved.keys()
        assert all(ours[key].equal(saved[key]) for key in saved)
    assert exports["raw"].read_bytes() != exports["ema"].read_bytes()


@pytest.mark.parametrize("layout", [*LAYOUTS, (2, 1, False, 2, "bf16")])
def test_exports_of_every_layout_are_the_same_bytes(tmp_path, digits_shards, trained, export, layout):
    dp, tp, sp, stage, precision = layout
    folder, exports = trained
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(folder, run)
    again.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):  # training has them there before it saves
        shutil.copy(folder / name, again / name)
    overrides = (*OVERRIDES, f"parallel.precision={precision}")
    run_ranks(save_again, dp * tp, layout_config(run, digits_shards, tp, sp, stage, *overrides), again)
    (checkpoint,) = RunDir(again).checkpoints()
    assert len(list(checkpoint.weights("raw").iterdir())) == dp * tp
    for weights, expected in exports.items():
        assert export(again, weights).read_bytes() == expected.read_bytes(), weights
