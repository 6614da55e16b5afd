"""The fused regions against the same formulas in plain torch, values and gradients, as written and compiled."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fitscale.model.common import compiler
from fitscale.model.common.fused import gate, gate_modulate, modulate, swiglu, turned_heads
from fitscale.model.common.layout import Segments
from fitscale.model.common.rope import pack_rope
from fitscale.model.common.rope_config import RopeConfig

HIDDEN, WIDTH, HEADS, HEAD_DIM = 24, 40, 2, 8
LENGTHS = {"equal": [6, 6, 6], "mixed": [4, 9, 1, 6], "one": [7], "absent": [0, 5, 3]}  # absent: on another rank


@pytest.fixture(params=LENGTHS)
def segments(request):
    lengths = LENGTHS[request.param]
    return Segments(lengths, torch.device("cpu"))


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def spread(vector_SD, segments):
    return vector_SD[segments.image_T]


def plain_modulate(x, shift, scale, segments):
    return x, norm(x) * (1 + spread(scale, segments)) + spread(shift, segments)


def plain_gate(x, branch, gate, segments):
    return x + spread(gate, segments) * (branch[0] + branch[1])


def plain_gate_modulate(x, branch, gate, shift, scale, segments):
    return plain_modulate(plain_gate(x, branch, gate, segments), shift, scale, segments)


def plain_swiglu(gated, up):
    return F.silu(gated[0] + gated[1]) * (up[0] + up[1])


def plain_turned_heads(qkv, heads, rope, norms, normed):
    cos, sin = (table[:, None] for table in rope)
    q, k, v = (qkv[0] + qkv[1]).unflatten(-1, (heads[0], 3, heads[1])).unbind(2)
    turned = []
    for x, weight in zip((q, k), norms or (None, None), strict=True):
        x = F.layer_norm(x, x.shape[-1:], weight, eps=1e-6) if normed else x
        first, second = x.chunk(2, dim=-1)
        turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    return *turned, v


def gradients(outputs, leaves):
    """Of a sum of the outputs in which every number has a weight of its own."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def require_equal(fused, plain, leaves):
    for got, expected in itertools.zip_longest(gradients(fused, leaves), gradients(plain, leaves)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item() + 1e-6)


def test_norms_and_gates(mode, segments):
    tokens, images = sum(segments.lengths), len(segments.lengths)
    x, product, bias, *vectors = drawn((tokens, HIDDEN), (tokens, HIDDEN), (HIDDEN,), *[(images, HIDDEN)] * 3)
    shift, scale, factor = vectors
    leaves = [x, shift, scale]
    require_equal(modulate(*leaves, segments), plain_modulate(*leaves, segments), leaves)
    branch = (product, bias)
    require_equal(
        gate(x, branch, factor, segments), plain_gate(x, branch, factor, segments), [x, product, bias, factor]
    )
    arguments = (x, branch, factor, shift, scale, segments)
    every = [x, product, bias, *vectors]
    require_equal(gate_modulate(*arguments), plain_gate_modulate(*arguments), every)


def test_swiglu(mode):
    for tokens in (5, 8):
        g, g_bias, u, u_bias = leaves = drawn((tokens, WIDTH), (WIDTH,), (tokens, WIDTH), (WIDTH,))
        pair = (g, g_bias), (u, u_bias)
        require_equal(swiglu(*pair), plain_swiglu(*pair), leaves)


@pytest.mark.parametrize("kind", ["normed", "weighted", "plain"])
def test_heads(mode, kind):
    for sizes in ([(2, 3), (3, 1)], [(4, 4)]):
        tokens = sum(rows * cols for rows, cols in sizes)
        rope = pack_rope(RopeConfig(), HEAD_DIM, sizes, torch.device("cpu"))
        width = 3 * HEADS * HEAD_DIM
        product, bias, *norms = drawn((tokens, width), (width,), (HEAD_DIM,), (HEAD_DIM,))
        weights = (norms[0], norms[1]) if kind == "weighted" else None
        arguments = ((product, bias), (HEADS, HEAD_DIM), rope, weights, kind != "plain")
        leaves = [product, bias, *(weights or ())]
        require_equal(turned_heads(*arguments), plain_turned_heads(*arguments), leaves)


def test_scores_depend_on_relative_position_only():
    rope = pack_rope(RopeConfig(), 16, [(5, 6)], torch.device("cpu"))
    (vectors,) = drawn((3 * 16,))
    q, k, _ = turned_heads((vectors.expand(30, -1), torch.zeros(48)), (1, 16), rope, None, normed=False)
    scores = (q[:, 0] @ k[:, 0].T).view(5, 6, 5, 6)
    torch.testing.assert_close(scores[1, 2, 3, 4], scores[0, 1, 2, 3], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(scores[1, 2, 3, 4], scores[1, 2, 4, 3], atol=1e-3)  # rows are not columns


def test_bf16_is_no_further_from_fp32_when_compiled():
    if compiler.lacks_for_compiling(torch.device("cpu")):
        pytest.skip("needs a C++ compiler, Python's headers")
    lengths = [5, 9, 2]
    segments = Segments(lengths, torch.device("cpu"))
    shapes = [(16, HIDDEN), (16, HIDDEN), (HIDDEN,), *[(3, HIDDEN)] * 3]
    exact_leaves = drawn(*shapes)
    x, product, bias, factor, shift, scale = exact_leaves
    exact = gradients(plain_gate_modulate(x, (product, bias), factor, shift, scale, segments), exact_leaves)
    errors = {}
    for compiled in (False, True):
        compiler.use_compiler(compiled)
        leaves = [leaf.detach().bfloat16().requires_grad_() for leaf in exact_leaves]
        x, product, bias, factor, shift, scale = leaves
        found = gradients(gate_modulate(x, (product, bias), factor, shift, scale, segments), leaves)
        assert all(one.dtype == torch.bfloat16 for one in found)
        errors[compiled] = sum(
            float((a.float() - b).square().sum() / b.square().sum()) for a, b in zip(found, exact, strict=True)
        )
    compiler.use_compiler(False)
    assert errors[True] <= errors[False]


def test_packs_of_other_sizes_compile_nothing_anew():
    if compiler.lacks_for_compiling(torch.device("cpu")):
        pytest.skip("needs a C++ compiler, Python's headers")
    compiler.use_compiler(True)
    try:
        counted = torch._dynamo.utils.counters["stats"]
        for lengths in ([4, 9], [7], [5, 5, 5], [1, 2, 3, 4]):
            segments = Segments(lengths, torch.device("cpu"))
            x, vectors = drawn((sum(lengths), HIDDEN), (len(lengths), 2 * HIDDEN))
            gradients(modulate(x, *vectors.chunk(2, dim=1), segments), [x, vectors])
            if lengths == [4, 9]:
                once = counted["unique_graphs"]
        assert counted["unique_graphs"] == once
    finally:
        compiler.use_compiler(False)
