"""tools/convert_checkpoint.py as a user runs it: exports of a run, imports of published weights, in bounded memory."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fitscale.config.errors import UserError
from fitscale.config.files import write_atomic
from fitscale.config.load import load_config, to_yaml
from fitscale.config.schema import ParallelConfig
from fitscale.model.build import build_network
from fitscale.model.weights import list_tensors, load_weights, published_items, stored, write_tensors
from fitscale.parallel.groups import init_parallel
from fitscale.run.layout import RunDir
from fitscale.train.checkpoint import complete
from tests.conftest import ROOT
from tests.tiny import OVERRIDES, tiny_config

CONFIG = load_config(OVERRIDES)
MB = 1 << 20


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def weights():
    """Tensors of the tiny model, in the published names."""
    init_parallel(ParallelConfig(), "cpu")
    generator = torch.Generator().manual_seed(0)
    items = published_items(build_network(CONFIG.model, ParallelConfig()))
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in items}


@pytest.fixture
def published(tmp_path, weights):
    """The tiny model's weights as they are published, and its config."""
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "model.yaml").write_text(to_yaml(CONFIG))
    return tmp_path / "weights.safetensors", tmp_path / "model.yaml"


def make_run(path: Path, sets: dict[str, dict[str, torch.Tensor]], files: int = 1, steps=(4,), config=None) -> Path:
    """A run directory whose checkpoints hold `sets`, each dealt over `files` files."""
    run = RunDir(path)
    write_atomic(run.config, to_yaml(config or tiny_config(path, Path("shards"))))
    for step in steps:
        folder, checksums = run.checkpoint_path(step), {}
        for name, tensors in sets.items():
            for rank in range(files):
                part = {name: stored(tensor) for name, tensor in list(tensors.items())[rank::files]}
                file = f"weights/{name}/{rank:05d}.safetensors"
                checksums[file] = write_tensors(folder / file, part, {"rank": str(rank)})
        complete(folder, {"step": step, "model": asdict((config or CONFIG).model)}, checksums)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_an_export_is_the_same_bytes_however_many_files_there_were(tmp_path, main, weights):
    for files in (1, 4):
        sets = {"raw": weights, "ema_0.9": {name: tensor + 1 for name, tensor in weights.items()}}
        run = make_run(tmp_path / f"run{files}", sets, files)
        assert main(run, tmp_path / f"{files}.safetensors", "--weights", "raw") == 0
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()
    exported = load_file(tmp_path / "1.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_an_export_says_what_it_is_and_loads_as_the_model(tmp_path, main, weights):
    averages = {name: tensor + 1 for name, tensor in weights.items()}
    run = make_run(tmp_path / "run", {"raw": weights, "ema_0.9": averages}, files=2, steps=(2, 4))
    out = tmp_path / "new" / "out.safetensors"
    assert main(run, out, "--step", 2) == 0  # the run's own choice of weights: its average
    metadata = metadata_of(out)
    assert json.loads(metadata.pop("model")) == json.loads(json.dumps(asdict(CONFIG.model)))
    assert json.loads(metadata.pop("data"))["latent"]["kind"] == "pixels"
    assert json.loads(metadata.pop("flow"))["kind"] == "rectified" and json.loads(metadata.pop("sampling"))["steps"]
    assert metadata == {"step": "2", "weights": "ema_0.9", "source": "run"}
    model = build_network(CONFIG.model, ParallelConfig())
    load_weights(model, out)
    assert all(torch.equal(value, averages[name]) for name, value in published_items(model))
    assert os.listdir(out.parent) == [out.name]


def test_bf16_rounds_as_torch_does(tmp_path):
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x00000001, 0x7F7FFFFF, 0x7F800000], dtype=torch.int32)
    numbers = torch.cat([ties.view(torch.float32), torch.randn(1000, generator=torch.Generator().manual_seed(0))])
    tensors = {"b": numbers, "a": torch.tensor(1.1), "empty": torch.zeros(0, 3), "c": torch.randn(3, 4).T}
    write_tensors(tmp_path / "out", {name: stored(tensor) for name, tensor in tensors.items()}, {}, "bf16")
    written = load_file(tmp_path / "out")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], tensor.to(torch.bfloat16)), name


def test_what_is_there_stays_unless_forced(tmp_path, main, weights, capsys):
    run = make_run(tmp_path / "run", {"raw": weights, "ema_0.9": weights})
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    assert main(run, out) == 2
    assert out.read_text() == "precious" and "--force" in capsys.readouterr().err
    assert main(run, out, "--force", "--dtype", "bf16") == 0
    assert load_file(out)["x_embedder.proj.bias"].dtype == torch.bfloat16
    assert main(run, tmp_path, "--force") == 2  # a folder is never replaced


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", 3], "has no complete checkpoint of step 3; it has 4"),
        (["--weights", "ema_0.5"], "has no ema_0.5; it has ema_0.9, raw"),
    ],
)
def test_a_choice_that_is_not_there_lists_what_is(tmp_path, main, weights, capsys, arguments, message):
    run = make_run(tmp_path / "run", {"raw": weights, "ema_0.9": weights})
    assert main(run, tmp_path / "out.safetensors", *arguments) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]


def test_a_source_that_is_no_run_is_said_to_be_none(tmp_path, main, published, capsys):
    assert main(tmp_path / "nowhere", tmp_path / "out.safetensors") == 2
    assert "not a run directory" in capsys.readouterr().err
    assert main(published[0], tmp_path / "out.safetensors") == 2
    assert "--config" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(tmp_path, weights):
    (tmp_path / "raw").mkdir()
    save_file(weights, tmp_path / "raw" / "0.safetensors")
    (tmp_path / "out").write_text("before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            write_tensors(tmp_path / "out", list_tensors(tmp_path / "raw"), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path)) == ["out", "raw"] and (tmp_path / "out").read_text() == "before"


def test_published_weights_in_any_wrapping_give_the_same_file(tmp_path, main, published, weights):
    file, config = published
    (tmp_path / "sharded").mkdir()
    names = sorted(weights)
    for part in range(2):
        save_file({name: weights[name] for name in names[part::2]}, tmp_path / "sharded" / f"model-{part}.safetensors")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    torch.save(weights, tmp_path / "plain.pt")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "nested.bin")
    outs = []
    for source in (file, tmp_path / "sharded", tmp_path / "plain.pt", tmp_path / "nested.bin"):
        outs.append(tmp_path / f"{source.stem}.out")
        assert main(source, outs[-1], "--config", config) == 0
        assert metadata_of(outs[-1])["source"] == source.name
    model = build_network(CONFIG.model, ParallelConfig())
    for out in outs:
        load_weights(model, out)
        assert all(torch.equal(value, weights[name]) for name, value in published_items(model))


def test_one_of_several_state_dicts_has_to_be_named(tmp_path, main, published, weights, capsys):
    averages = {name: (tensor + 1).half() for name, tensor in weights.items()}
    torch.save({"model": weights, "ema": averages, "opt": {"lr": 0.1}}, tmp_path / "both.pt")
    arguments = (tmp_path / "both.pt", tmp_path / "out", "--config", published[1])
    assert main(*arguments) == 2
    assert "--weights takes the name of one; it has model, ema" in capsys.readouterr().err
    assert main(*arguments, "--weights", "opt") == 2
    assert "no state dict called opt; it has model, ema" in capsys.readouterr().err
    assert main(*arguments, "--weights", "ema") == 0
    written = load_file(tmp_path / "out")
    assert all(torch.equal(written[name], averages[name].float()) for name in weights)
    assert metadata_of(tmp_path / "out")["weights"] == "ema"


def test_weights_of_another_model_are_refused_with_the_keys_that_differ(tmp_path, main, published, weights, capsys):
    names = ("x_embedder.proj.bias", "blocks.0.attn.qkv.weight")
    changed = {name: tensor for name, tensor in weights.items() if name != names[0]}
    changed |= {names[1]: weights[names[1]][:-1].clone(), "extra": torch.zeros(2)}
    save_file(changed, tmp_path / "other.safetensors")
    assert main(tmp_path / "other.safetensors", tmp_path / "out", "--config", published[1]) == 2
    message = capsys.readouterr().err
    assert f"{names[0]} is missing" in message and "extra is not part of the model" in message
    assert f"{names[1]} is (95, 32), the model's is (96, 32)" in message
    assert not (tmp_path / "out").exists()


def test_broken_files_and_idle_options_are_user_errors(tmp_path, main, published, capsys):
    file, config = published
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "empty").mkdir()
    for source, message in (
        ("cut.safetensors", "cannot be read as safetensors weights"),
        ("none.safetensors", "cannot be read as safetensors weights"),
        ("text.pt", "cannot be read as a state dict"),
        ("none.pt", "cannot be read as a state dict"),
        ("empty", "no .safetensors file"),
    ):
        assert main(tmp_path / source, tmp_path / "out", "--config", config) == 2
        assert message in capsys.readouterr().err
    for option in (["--step", 2], ["--weights", "ema"]):
        assert main(file, tmp_path / "out", *option, "--config", config) == 2
        assert capsys.readouterr().err.startswith(f"error: {option[0]}: ")
    assert not (tmp_path / "out").exists()


PEAK = """
import importlib.util, re, sys, pathlib
import tqdm, fitscale.eval.generate, fitscale.model.weights
def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
spec = importlib.util.spec_from_file_location("tool", sys.argv[1])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
for dtype in ("fp32", "bf16"):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = kilobytes("VmRSS")
    assert tool.main([*sys.argv[2:], "--weights", "raw", "--dtype", dtype, "--force"]) == 0
    print("grew by", (kilobytes("VmHWM") - before) * 1024)
"""


def test_memory_holds_less_than_three_tensors(tmp_path):
    """Not by getrusage: its peak starts from that of the process that started this one.

    The threshold keeps malloc from raising its own: freed tensors of this size would stay in its heap now and then.
    """
    size, count = 12 * MB, 16
    tensors = {f"t{number}": torch.full((size // 4,), float(number)) for number in range(count)}
    run = make_run(tmp_path / "run", {"raw": tensors}, files=2)
    (tmp_path / "peak.py").write_text(PEAK)
    result = subprocess.run(
        [sys.executable, tmp_path / "peak.py", ROOT / "tools" / "convert_checkpoint.py", run, tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(MB)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out").stat().st_size > count * size // 2
    growth = [int(line.split()[-1]) / size for line in result.stdout.splitlines() if line.startswith("grew by")]
    assert len(growth) == 2 and max(growth) < 3, f"tensors held while fp32, bf16 was written: {growth}"
