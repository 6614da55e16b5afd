"""Packed ternary weights: TerDiT's published layout, and sampling from it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fitscale.config.errors import UserError
from fitscale.config.load import load_config, to_yaml
from fitscale.config.schema import ModelConfig, ParallelConfig
from fitscale.eval.checkpoints import load_model
from fitscale.model.backbone import parameter_table
from fitscale.model.build import build_network, initial_items
from fitscale.model.common.ternary import pack, pack_quarters, unpack, unpack_quarters
from fitscale.model.weights import list_tensors, load_weights, packed_tensors, published_items, stored, write_tensors
from fitscale.parallel.groups import init_parallel
from fitscale.plan.preflight import open_data
from tests.distributed.spawn import run_ranks
from tests.flag_reference import SIZES, call, load_flag_reference, relative
from tests.programs import run_tool
from tests.test_backbone import call as fitscale
from tests.test_convert_checkpoint import make_run
from tests.test_model import small_inputs
from tests.tiny import OVERRIDES

TERDIT = ["model.family=large_dit", "model.quantise=ternary", "flow.kind=ddpm", "sampling.method=ddpm"]
TINY = [*OVERRIDES, *TERDIT, "model.hidden_size=48", "model.num_heads=4", "model.mlp_multiple=16", "model.patch_size=2"]


@pytest.fixture(autouse=True, scope="module")
def world():
    init_parallel(ParallelConfig(), "cpu")


@pytest.fixture(scope="module")
def terdit():
    return load_flag_reference("terdit_tiny")


def published_packed(terdit) -> dict[str, torch.Tensor]:
    """The reference's tensors as they are released: packed where they are ternary."""
    tensors = {k.removeprefix("param."): v for k, v in terdit.tensors.items() if k.startswith("param.")}
    return tensors | {k.removeprefix("packed."): v for k, v in terdit.tensors.items() if k.startswith("packed.")}


def test_packing_and_its_inverse():
    values = torch.randint(-1, 2, (8, 5), generator=torch.Generator().manual_seed(0))
    for there, back in ((pack, unpack), (pack_quarters, unpack_quarters)):
        packed = there(values)
        assert packed.dtype == torch.uint8 and packed.shape == (2, 5) and torch.equal(back(packed), values)
    assert pack_quarters(values)[1, 2] == sum((values[1 + 2 * i, 2] + 1) << (6 - 2 * i) for i in range(4))


def test_weights_are_packed_as_they_are_published(terdit, tmp_path):
    """Through whole weights -> the packed network -> a file in the published names."""
    path, config = tmp_path / "whole.safetensors", terdit.config.to_sample()
    write_tensors(path, {name: stored(tensor) for name, tensor in published_items(terdit.model())}, {})
    packed = build_network(config, ParallelConfig())
    load_weights(packed, path)
    found, expected = dict(published_items(packed)), published_packed(terdit)
    assert found.keys() == expected.keys() and sum(one.dtype == torch.uint8 for one in found.values()) == 24
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def released(terdit, tmp_path) -> Path:
    """The reference as a released file, imported."""
    file, config = tmp_path / "consolidated_ema_ternary.00-of-01.pth", tmp_path / "model.yaml"
    torch.save(published_packed(terdit), file)
    settings = [*TERDIT, *(f"model.{key}={getattr(terdit.config, key)}" for key in TINY_KEYS)]
    config.write_text(to_yaml(load_config([*settings, "model.quantise=packed"])))
    out = tmp_path / "imported.safetensors"
    done = run_tool("convert_checkpoint", file, out, "--config", config)
    assert done.returncode == 0, done.stderr
    return out


TINY_KEYS = ("depth", "hidden_size", "num_heads", "num_classes", "mlp_multiple")


def answers(tp: int, path: Path) -> torch.Tensor:
    """Of the packed network to the reference's images, on this many tensor-parallel ranks."""
    init_parallel(ParallelConfig(tensor_parallel_size=tp), "cpu")
    reference = load_flag_reference("terdit_tiny")
    model = build_network(reference.config.to_sample(), ParallelConfig(tensor_parallel_size=tp))
    load_weights(model, path)
    with torch.no_grad():
        return call(model, *reference.pack(SIZES)).numpy()


def test_a_released_file_answers_as_published_on_one_rank_and_on_two(terdit, released):
    expected = terdit.tokens("output", SIZES)
    assert relative(torch.tensor(answers(1, released)), expected) < 1e-5
    for found in run_ranks(answers, 2, 2, released):
        assert relative(torch.tensor(found), expected) < 1e-5


def awake(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights in which no part is zero, in the published names."""
    generator = torch.Generator().manual_seed(0)
    model = build_network(config, ParallelConfig())
    for parameter, piece in initial_items(model, 0):
        parameter.data.copy_(piece + 0.1 * torch.randn(piece.shape, generator=generator))
    return {name: tensor.clone() for name, tensor in published_items(model)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config = load_config(TINY)
    weights = awake(config.model)
    raw = {name: tensor + 1 for name, tensor in weights.items()}
    return make_run(tmp_path_factory.mktemp("packed") / "run", {"raw": raw, "ema_0.9": weights}, config=config)


@pytest.fixture(scope="module")
def packed(run) -> Path:
    out = run.with_name("packed.safetensors")
    done = run_tool("convert_checkpoint", run, out, "--ternary")
    assert done.returncode == 0, done.stderr
    return out


def test_the_file_holds_a_byte_for_four_weights(packed):
    config, tensors = load_config(TINY).model.to_sample(), load_file(packed)
    for entry in parameter_table(config):
        assert tensors[entry.name].nbytes == (entry.numel // 4 if entry.packed else 4 * entry.numel), entry.name


def test_the_packed_network_answers_as_the_one_that_trains(run, packed):
    """Which is not what samples from a run: that is packed when it is loaded."""
    config = load_config(TINY)
    trained = build_network(config.model, ParallelConfig())
    load_weights(trained, run / "checkpoints" / "step-00000004" / "weights" / "ema_0.9")
    sampled = load_model(config, packed, "cpu")
    assert any(parameter.dtype == torch.uint8 for parameter in sampled.parameters())
    inputs = small_inputs([(3, 4), (2, 2)], config.model)
    with torch.no_grad():
        expected, found = trained(*inputs)[0], sampled(*inputs)[0]
    assert expected.std() > 0.01 and relative(found, expected) < 1e-6


def test_a_ternary_fitv2_is_packed_too(tmp_path):
    """Its q, k and v are rows of one weight, (heads, 3, head_dim) here."""
    config = load_config([*OVERRIDES, "model.quantise=ternary", "model.hidden_size=48", "model.num_heads=4"]).model
    path, out = tmp_path / "whole.safetensors", tmp_path / "packed.safetensors"
    write_tensors(path, {name: stored(tensor) for name, tensor in awake(config).items()}, {})
    write_tensors(out, packed_tensors(config.to_sample(), list_tensors(path)), {})
    assert out.stat().st_size < 0.5 * path.stat().st_size
    answers, inputs = [], small_inputs([(3, 4), (2, 2)], config)
    for model, weights in ((config, path), (config.to_sample(), path), (config.to_sample(), out)):
        network = build_network(model, ParallelConfig())
        load_weights(network, weights)
        with torch.no_grad():
            answers.append(network(*inputs)[0])
    assert answers[0].std() > 0.01
    assert all(relative(one, answers[0]) < 1e-6 for one in answers[1:])


def test_images_from_the_file_are_those_of_the_run(run, packed, tmp_path):
    size = ("--height", 8, "--width", 4, "--count", 3, "--steps", 3, "--guidance", 2, "--device", "cpu")
    for source in (run, packed):
        fitscale("sample", source, *size, "--out", tmp_path / source.name)
    ours, theirs = (
        [np.asarray(Image.open(one)) for one in sorted((tmp_path / source.name).glob("*_class*.png"))]
        for source in (packed, run)
    )
    assert len(ours) == 3 and ours[0].std() > 5
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_mistakes_are_one_message(run, packed, tmp_path, capsys):
    from fitscale.cli import main

    size = ("--height", "8", "--width", "4")
    assert main(["sample", str(packed), *size, "--step", "4"]) == 2
    assert "--step: goes with a run directory" in capsys.readouterr().err
    plain = tmp_path / "plain.safetensors"
    write_tensors(plain, {"a": stored(torch.zeros(1))}, {})
    assert main(["sample", str(plain), *size]) == 2
    assert "does not say which model it is" in capsys.readouterr().err


def test_shards_of_several_ranks_and_other_weights_are_refused(run, tmp_path):
    for name, arguments, message in (
        ("consolidated_ema.00-of-02.pth", (), "00-of-02.pth: of 2 tensor-parallel ranks"),
        ("x.safetensors", ("--ternary",), "--ternary: "),
    ):
        tensors = {entry.name: torch.zeros(entry.shape) for entry in parameter_table(load_config(OVERRIDES).model)}
        torch.save(tensors, tmp_path / name) if name.endswith("pth") else write_tensors(
            tmp_path / name, {key: stored(one) for key, one in tensors.items()}, {}
        )
        (tmp_path / "model.yaml").write_text(to_yaml(load_config(OVERRIDES)))
        done = run_tool(
            "convert_checkpoint",
            tmp_path / name,
            tmp_path / "o.safetensors",
            "--config",
            tmp_path / "model.yaml",
            *arguments,
        )
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "o.safetensors").exists()


def test_bytes_that_are_no_ternary_weights_are_refused(terdit, tmp_path):
    tensors = published_packed(terdit)
    tensors["layers.1.attention.wo.weight"][3, 3] |= 3
    path = tmp_path / "broken.safetensors"
    write_tensors(path, {name: stored(tensor) for name, tensor in tensors.items()}, {})
    with pytest.raises(UserError, match=r"layers\.1\.attention\.wo\.weight: these bytes are no packed ternary weights"):
        load_weights(build_network(terdit.config.to_sample(), ParallelConfig()), path)
    with pytest.raises(UserError, match="of packed ternary weights, the model's is"):
        load_weights(terdit.model(), path)


def test_packed_weights_do_not_train(tmp_path):
    from tests.shard_sets import indexed_set

    indexed_set(tmp_path / "shards", 40)
    wanted = [
        "model.quantise=packed",
        "model.in_channels=3",
        "model.num_classes=7",
        f"data.shards={tmp_path / 'shards'}",
    ]
    with pytest.raises(UserError, match=r"model\.quantise: packed weights are for sampling"):
        open_data(load_config([*TINY, *wanted, "batch.global_batch_size=8"]))


def test_a_width_that_no_bytes_hold_is_refused():
    with pytest.raises(UserError, match=r"model\.quantise: ternary takes four rows .* model\.head_dim is 6, valid: a"):
        replace(load_config(TINY).model, hidden_size=24)


def test_a_checkpoint_goes_in_and_out_as_it_is_published(tmp_path):
    """Flag-DiT's, a state dict; to the bit."""
    flag = load_flag_reference("flag_dit_tiny")
    state = {k.removeprefix("param."): v for k, v in flag.tensors.items() if k.startswith("param.")}
    file, between, out = (tmp_path / name for name in ("consolidated.00-of-01.pth", "flag.safetensors", "out.pth"))
    torch.save(state, file)
    settings = ["model.family=flag_dit", *(f"model.{key}={getattr(flag.config, key)}" for key in TINY_KEYS)]
    (tmp_path / "model.yaml").write_text(to_yaml(load_config(settings)))
    for source, target in ((file, between), (between, out)):
        done = run_tool("convert_checkpoint", source, target, "--config", tmp_path / "model.yaml")
        assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    init_parallel(ParallelConfig(), "cpu")
    network = build_network(flag.config, ParallelConfig())
    load_weights(network, between)
    with torch.no_grad():
        assert relative(call(network, *flag.pack(SIZES)), flag.tokens("output", SIZES)) < 1e-5
