"""`fitscale describe`: the numbers of the backbone's table, by part, before anything is built."""

import subprocess
import sys

import pytest

from fitscale.cli import main
from fitscale.config.load import load_config
from fitscale.model import flops
from fitscale.model.backbone import parameter_table
from fitscale.plan.describe import part_name, parts_of
from tests.conftest import ROOT

MODELS = sorted(path.name for path in (ROOT / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_model(name):
    model = load_config([str(ROOT / "configs" / "model" / name)]).model
    parts = parts_of(parameter_table(model), 192)
    assert sum(part.parameters for part in parts.values()) == flops.parameters(model)
    assert sum(part.linear_macs for part in parts.values()) == flops.linear_macs(model, 192)
    assert len(parts) < 20  # equal blocks are one part


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("blocks.7.attn.qkv.weight", "blocks.N.attn"),
        ("blocks.7.adaLN_modulation.1.bias", "blocks.N.adaLN_modulation"),
        ("x_embedder.proj.weight", "x_embedder"),
        ("y_embedder.embedding_table.weight", "y_embedder"),
        ("stages.1.blocks.12.block2.norm.scale.param0", "stages.1.blocks.N.block2"),
        ("stages.0.skip_denses.3.weight", "stages.0.skip_denses"),
        ("table", "table"),
    ],
)
def test_a_part_is_what_a_module_holds(tensor, part):
    assert part_name(tensor) == part


def test_describe_prints_exact_numbers(capsys):
    assert main(["describe", str(ROOT / "configs/model/xl.yaml"), "--height", "128", "--width", "512"]) == 0
    out = capsys.readouterr().out
    model = load_config([str(ROOT / "configs/model/xl.yaml")]).model
    assert "671,045,776 parameters" in out and "8 x 32 = 256 tokens" in out
    assert f"{flops.linear_macs(model, 256):,} linear MACs + {flops.mixing_macs(model, 256):,} MACs" in out


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(capsys):
    assert main(["describe", str(ROOT / "configs/model/xl.yaml"), "--height", "100"]) == 2
    assert "--height: 100 is not a multiple of 16" in capsys.readouterr().err


def test_describe_does_without_torch():
    program = "import sys; sys.modules['torch'] = None; from fitscale.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "describe", str(ROOT / "configs/model/xxl.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "2,971,928,080" in done.stdout
