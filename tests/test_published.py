"""Weights in the published layout: import, export, files, and what is said about files of another model."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fitscale.config.errors import UserError
from fitscale.config.schema import ModelConfig, ParallelConfig
from fitscale.model.fit import FiT
from fitscale.model.published import load_weights, published_items, read_items, save_weights, to_published
from fitscale.parallel.groups import init_parallel
from tests.reference import CONFIGS, load_reference

SMALL = ModelConfig(depth=2, hidden_size=32, num_heads=2, num_classes=5)


@pytest.fixture(autouse=True, scope="module")
def world():
    init_parallel(ParallelConfig(), "cpu")


def published_file(path, name="fitv2_tiny"):
    tensors = load_reference(name).tensors
    weights = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    save_file(weights, path)
    return weights


@pytest.mark.parametrize("name", CONFIGS)
def test_import_then_export_is_bit_equal(name, tmp_path):
    weights = published_file(tmp_path / "in.safetensors", name)
    model = FiT(CONFIGS[name], ParallelConfig())
    load_weights(model, tmp_path / "in.safetensors")
    save_weights(tmp_path / "new" / "out.safetensors", dict(published_items(model)), {"model": "{}"})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.safetensors"]
    with safe_open(tmp_path / "new" / "out.safetensors", "pt") as file:
        assert file.metadata() == {"model": "{}"}
        assert set(file.keys()) == set(weights)
        assert all(torch.equal(file.get_tensor(key), value) for key, value in weights.items())


def test_qkv_rows_are_q_then_k_then_v():
    config = replace(SMALL, hidden_size=8)
    rows = torch.tensor([[head, kind, row] for head in range(2) for kind in range(3) for row in range(4)])
    published = to_published("blocks.0.attn.qkv.weight", rows, config)
    assert published.tolist() == [[head, kind, row] for kind in range(3) for head in range(2) for row in range(4)]


def test_a_folder_of_files_is_read_as_one(tmp_path):
    weights = published_file(tmp_path / "in.safetensors")
    keys = sorted(weights)
    for number in range(2):
        part = {key: weights[key] for key in keys[number::2]}
        save_weights(tmp_path / "parts" / f"{number}.safetensors", part, {})
    whole, parts = FiT(CONFIGS["fitv2_tiny"], ParallelConfig()), FiT(CONFIGS["fitv2_tiny"], ParallelConfig())
    load_weights(whole, tmp_path / "in.safetensors")
    load_weights(parts, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert [id(parameter) for parameter, _ in read_items(parts, tmp_path / "parts")] == [
        id(p) for p in parts.parameters()
    ]


def test_a_getter_chooses_what_is_exported():
    model = FiT(SMALL, ParallelConfig())
    doubled = dict(published_items(model, lambda parameter: 2 * parameter.detach().double()))
    plain = dict(published_items(model))
    assert all(torch.equal(doubled[key], 2 * plain[key]) and doubled[key].dtype == torch.float32 for key in plain)


def test_weights_of_another_model_are_refused(tmp_path):
    published_file(tmp_path / "w.safetensors")
    model = FiT(replace(CONFIGS["fitv2_tiny"], num_classes=11), ParallelConfig())
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(
        UserError, match=r"w.safetensors: .* 1 of its keys differ: y_embedder.* is \(11, 96\), .* \(12, 96\)"
    ):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_differing_keys_are_listed_up_to_ten(tmp_path):
    published_file(tmp_path / "w.safetensors")
    deeper, shallower = (FiT(replace(CONFIGS["fitv2_tiny"], depth=depth), ParallelConfig()) for depth in (4, 2))
    with pytest.raises(UserError, match=r"14 of its keys differ: blocks.3.attn.qkv.weight is missing") as caught:
        load_weights(deeper, tmp_path / "w.safetensors")
    assert str(caught.value).count("is missing") == 10 and str(caught.value).endswith("...")
    with pytest.raises(UserError, match=r"blocks.2.adaLN_modulation.1.bias is not part of the model"):
        load_weights(shallower, tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [None, b"", b'\x10\0\0\0\0\0\0\0{"a": '])
def test_missing_and_broken_files_are_named(tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"w.safetensors: cannot be read"):
        load_weights(FiT(SMALL, ParallelConfig()), path)
