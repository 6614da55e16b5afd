"""FiT through packs against the published implementation's padded batches, and the properties of the network."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fitscale.config.schema import ParallelConfig
from fitscale.model.build import build_network, initial_items
from fitscale.model.common.attention import packed_attention
from fitscale.model.common.compiler import lacks_for_compiling, use_compiler
from fitscale.model.common.layout import pack_layout
from fitscale.model.fit.config import FitConfig
from fitscale.parallel.groups import init_parallel
from tests.reference import CONFIGS, load_reference

SMALL = FitConfig(depth=2, hidden_size=32, num_heads=2, num_classes=5)


@pytest.fixture(autouse=True, scope="module")
def world():
    init_parallel(ParallelConfig(), "cpu")


def cu_seqlens_of(sizes_S2):
    return F.pad(sizes_S2.prod(1).cumsum(0), (1, 0)).int()


def layout_of(sizes_S2, cu_seqlens=None):
    return pack_layout(sizes_S2, cu_seqlens_of(sizes_S2) if cu_seqlens is None else cu_seqlens, torch.device("cpu"))


def small_inputs(sizes, config=SMALL):
    generator = torch.Generator().manual_seed(1)
    sizes_S2 = torch.tensor(sizes)
    tokens_TC = torch.randn(int(sizes_S2.prod(1).sum()), config.token_channels, generator=generator)
    t_S = torch.rand(len(sizes), generator=generator)
    labels_S = torch.arange(len(sizes)) % (config.num_classes + 1)
    return tokens_TC, t_S, labels_S, layout_of(sizes_S2)


def awake(config, parallel=None, seed=0):
    """A FiT whose zero-initialised layers are not zero, so that everything matters."""
    generator = torch.Generator().manual_seed(seed)
    model = build_network(config, parallel or ParallelConfig())
    for parameter, piece in initial_items(model, seed):
        parameter.data.copy_(piece + 0.1 * torch.randn(piece.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_output_equals_the_published_models(name):
    reference = load_reference(name)
    with torch.no_grad():
        (output_TC,) = reference.model()(*reference.inputs(reference.images))
    expected = reference.tokens("output", reference.images)
    torch.testing.assert_close(output_TC, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpoint_every", [0, 2])
@pytest.mark.parametrize("packs", ["one", "several"])
@pytest.mark.parametrize("name", ["fitv2_tiny", "fitv2_hr_tiny"])
def test_loss_and_every_gradient_equal_the_published_models(name, packs, checkpoint_every):
    require_published_gradients(load_reference(name), packs, checkpoint_every)


@pytest.mark.skipif(lacks_for_compiling(torch.device("cpu")) is not None, reason="needs g++ and Python.h")
def test_compiled_formulas_equal_the_published_models(request):
    request.addfinalizer(lambda: use_compiler(False))
    use_compiler(True)
    require_published_gradients(load_reference("fitv2_tiny"), "several", 2)


def require_published_gradients(reference, packs, checkpoint_every):
    model = reference.model(ParallelConfig(activation_checkpoint_every=checkpoint_every))
    images = reference.images
    for pack in [images] if packs == "one" else [images[2:], images[1:2], images[:1]]:
        loss_S = reference.loss_S(*model(*reference.inputs(pack)), pack)
        torch.testing.assert_close(loss_S, reference.tensors["loss_per_image"][pack], rtol=0, atol=1e-6)
        (loss_S.sum() / len(images)).backward()
    expected = reference.group("grad")
    assert expected.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        error = (parameter.grad - expected[key]).norm() / expected[key].norm()
        assert error < 1e-5, f"{key}: {error}"


def test_images_of_a_pack_do_not_see_each_other():
    model = awake(SMALL)
    sizes = [(3, 4), (1, 7), (5, 2)]
    tokens_TC, t_S, labels_S, layout = small_inputs(sizes)
    with torch.no_grad():
        (together,) = model(tokens_TC, t_S, labels_S, layout)
        for i, (start, end) in enumerate(pairwise(layout.cu_seqlens.tolist())):
            one = layout_of(torch.tensor(sizes[i : i + 1]))
            (alone,) = model(tokens_TC[start:end], t_S[i : i + 1], labels_S[i : i + 1], one)
            torch.testing.assert_close(together[start:end], alone, rtol=0, atol=1e-6)


def test_position_time_and_label_matter():
    model = awake(SMALL)
    tokens_TC, t_S, labels_S, layout = small_inputs([(3, 4)])
    with torch.no_grad():
        (base,) = model(tokens_TC, t_S, labels_S, layout)
        others = {
            "time": model(tokens_TC, t_S / 2, labels_S, layout),
            "label": model(tokens_TC, t_S, labels_S + 5, layout),
            "shape": model(tokens_TC, t_S, labels_S, layout_of(torch.tensor([(4, 3)]))),
        }
    for key, (other,) in others.items():
        assert (base - other).abs().max() > 1e-3, key


def test_ddpm_steps_of_fit_are_told_apart():
    config = replace(SMALL, family="fit")
    model = awake(config)
    tokens_TC, _, labels_S, layout = small_inputs([(3, 4)], config)
    with torch.no_grad():
        late, later = (model(tokens_TC, torch.tensor([t]), labels_S, layout)[0] for t in (564.0, 565.0))
    assert late.shape == (12, 32)
    assert (late - later).abs().max() > 1e-3


def test_replacing_rope_changes_only_larger_images():
    model = awake(SMALL)
    inputs = small_inputs([(4, 4)])
    with torch.no_grad():
        (base,) = model(*inputs)
        model.config = replace(SMALL, rope=replace(SMALL.rope, method="ntk-aware", original_length=4))
        assert torch.equal(*model(*inputs), base)
        model.config = replace(SMALL, rope=replace(SMALL.rope, method="ntk-aware", original_length=2))
        assert not torch.allclose(*model(*inputs), base, atol=1e-4)


def test_initialisation_follows_the_papers():
    model = initialised(replace(SMALL, hidden_size=64, num_classes=1000), seed=3)
    adaln_outputs = ("global_adaLN_modulation.1", "blocks.0.adaLN_modulation.2", "final_layer.adaLN_modulation.1")
    for name in (*adaln_outputs, "final_layer.linear"):
        assert not model.get_submodule(name).weight.any(), name
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        assert model.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.05), name
    for name in ("x_embedder.proj", "blocks.1.attn.qkv", "blocks.1.mlp.fc2", "blocks.0.adaLN_modulation.1"):
        weight = model.get_submodule(name).weight
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound, name
    assert not any(p.any() for key, p in model.named_parameters() if key.endswith("bias"))
    assert not model(*small_inputs([(2, 2)]))[0].any()


def initialised(config, seed):
    model = build_network(config, ParallelConfig())
    for parameter, piece in initial_items(model, seed):
        parameter.data.copy_(piece)
    return model


def test_seed_decides_the_weights():
    first, same, other = (initialised(SMALL, seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not any(key.endswith("_extra_state") for key in first)


def test_bfloat16_is_near_float32():
    model = awake(SMALL)
    inputs = small_inputs([(4, 4), (2, 3)])
    with torch.no_grad():
        (exact,) = model(*inputs)
        (rounded,) = model.to(torch.bfloat16)(*inputs)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.03


def test_wrong_layout_is_refused():
    with pytest.raises(AssertionError, match="do not describe the same images"):
        layout_of(torch.tensor([(3, 4)]), torch.tensor([0, 11]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("head_dim", [64, 72, 96])
def test_variable_length_kernel_equals_attention_per_image(head_dim):
    sizes_S2 = torch.tensor([(16, 16), (1, 9), (10, 20)])
    device = torch.device("cuda")
    layout = pack_layout(sizes_S2, cu_seqlens_of(sizes_S2), device)
    tokens = sum(layout.whole.lengths)
    inputs = [torch.randn(tokens, 4, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3)]
    grad = torch.randn(tokens, 4, head_dim, device=device)

    def forward_and_backward(dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = packed_attention(*leaves, layout)
        out.backward(grad.to(dtype))
        return [out, *(leaf.grad for leaf in leaves)]

    # float32 takes the per-image path.
    results = zip(forward_and_backward(torch.bfloat16), forward_and_backward(torch.float32), strict=True)
    for fast, exact in results:
        assert (fast.float() - exact).norm() / exact.norm() < 0.02
