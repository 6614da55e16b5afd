"""RoPE tables against those of the published implementation, and what a rotation must keep."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fitscale.model.common.rope import cached_rope_tables, rope_tables
from fitscale.model.common.rope_config import ROPE_METHODS, RopeConfig

REFERENCE = Path(__file__).parent / "data" / "reference"
FILES = {"10x20": "rope_10x20_16x16", "16x16": "rope_10x20_16x16", "20x20": "rope_20x20"}


def reference_table(name: str, size: str) -> torch.Tensor:
    with safe_open(REFERENCE / f"{FILES[size]}.safetensors", "pt") as file:
        same_as = json.loads(file.metadata()["same_as"])  # equal tables are stored once
        return file.get_tensor(same_as.get(name, name))


@pytest.mark.parametrize("size", FILES)
@pytest.mark.parametrize("decouple", [False, True])
@pytest.mark.parametrize("method", ROPE_METHODS)
def test_tables_equal_the_published_ones(method, decouple, size):
    rows, cols = map(int, size.split("x"))
    cos, sin = rope_tables(RopeConfig(method=method, decouple=decouple), 64, rows, cols)
    for kind, table in (("cos", cos), ("sin", sin)):
        expected = reference_table(f"{method}.decouple{int(decouple)}.{size}.{kind}", size)
        torch.testing.assert_close(table.repeat_interleave(2, dim=-1), expected, rtol=0, atol=1e-6)  # once a dimension


@pytest.mark.parametrize("method", ROPE_METHODS)
def test_smallest_head_dimension_has_finite_tables(method):
    cos, sin = rope_tables(RopeConfig(method=method, original_length=4), 4, 9, 3)
    assert cos.shape == sin.shape == (27, 2)
    assert torch.isfinite(cos).all() and torch.isfinite(sin).all()


def test_tables_of_a_size_are_made_once():
    arguments = (RopeConfig(), 8, 3, 4, torch.device("cpu"))
    with torch.inference_mode():
        cos, _ = cached_rope_tables(*arguments)
    assert cached_rope_tables(*arguments)[0] is cos
    assert not cos.is_inference()
