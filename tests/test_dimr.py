"""DiMR through packs against the published implementation, which takes batches of one shape; and its properties."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import FlowConfig, ParallelConfig
from fitscale.config.schema_sampling import GuidanceConfig, SamplingConfig
from fitscale.flow.dpm_solver import orders
from fitscale.flow.guidance import Guided
from fitscale.flow.loss import make_objective
from fitscale.flow.pack import PackShape, starts
from fitscale.flow.sampler import sample
from fitscale.model import flops
from fitscale.model.backbone import parameter_table
from fitscale.model.build import build_network, initial_items
from fitscale.model.common.compiler import lacks_for_compiling, use_compiler
from fitscale.model.common.layout import Segments, pack_layout
from fitscale.model.dimr.config import DimrConfig
from fitscale.model.dimr.fused import scaled_layer_norm, scaled_rms
from fitscale.model.weights import from_published
from fitscale.parallel.groups import init_parallel

FILE = Path(__file__).parent / "data" / "reference" / "dimr_tiny.safetensors"
TINY = DimrConfig(depth=5, hidden_size=80, num_heads=4, convnext_depth=3, convnext_size=40, max_side=4, num_classes=10)
FLOW = FlowConfig(kind="scaled_linear", label_drop=0.0)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference():
    init_parallel(ParallelConfig(), "cpu")
    return load_file(FILE)


def published_model(reference, config=TINY, parallel=None):
    return filled(config, group(reference, "param", config), parallel)


def filled(config, weights, parallel=None):
    model = build_network(config, parallel or ParallelConfig())
    model.load_state_dict(weights)
    return model


def group(reference, prefix, config=TINY):
    """The tensors named `prefix.*`, in this project's row order."""
    table = {entry.name: entry for entry in parameter_table(config)}
    names = [name for name in table if f"{prefix}.{name}" in reference]
    return {name: from_published(table[name], reference[f"{prefix}.{name}"]) for name in names}


def patches(images):
    """(N, C, H, W) -> tokens (N H W / 4, 4 C), channel order `(c p1 p2)`."""
    return images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def pixels(images):
    """(N, C, H, W) -> (N H W, C)."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def layout_of(*sizes):
    return pack_layout(torch.tensor(sizes), starts([h * w for h, w in sizes]), torch.device("cpu"))


def require_close(got, expected, tolerance=1e-5):
    """Within `tolerance` of the tensor's largest magnitude."""
    assert got.shape == expected.shape
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error < tolerance, error


def trained_on(reference, images):
    """What the objective makes of the reference's images."""
    count = len(images)
    cu_seqlens = starts([16] * count)
    t_S = 1 - (reference["n"][images] - 0.5) / 1000
    data, noise = (patches(reference[name][images]) for name in ("x0", "noise"))
    return make_objective(FLOW, TINY).prepare_at(data, reference["y"][images], cu_seqlens, t_S, noise), cu_seqlens


def require_published_losses_and_gradients(reference, packs, parallel=None):
    model, objective = published_model(reference, parallel=parallel), make_objective(FLOW, TINY)
    for images in packs:
        inputs, cu_seqlens = trained_on(reference, images)
        assert torch.equal(inputs.t_S, reference["n"][images].float())
        require_close(inputs.x_TC, patches(reference["x_t"][images]), 1e-6)
        outputs = model(inputs.x_TC, inputs.t_S, inputs.labels_S, layout_of(*[(4, 4)] * len(images)))
        require_close(outputs[0], pixels(reference["output.0"][images]))
        require_close(outputs[1], patches(reference["output.1"][images]))
        loss_S = objective.loss_S(outputs, inputs, cu_seqlens)
        require_close(loss_S, reference["loss_per_image"][images])
        (loss_S.sum() / 4).backward()
    for name, expected in group(reference, "grad").items():
        require_close(model.get_parameter(name).grad, expected)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_outputs_losses_and_every_gradient_are_the_published_ones(reference, every):
    parallel = ParallelConfig(activation_checkpoint_every=every)
    require_published_losses_and_gradients(reference, [[0, 1, 2, 3]], parallel)


def test_the_loss_of_each_scale_is_the_published_one(reference):
    inputs, cu_seqlens = trained_on(reference, [0, 1, 2, 3])
    outputs = pixels(reference["output.0"]), patches(reference["output.1"])
    targets = pixels(reference["target.0"]), patches(reference["target.1"])
    objective = make_objective(FLOW, TINY)
    for scale, (output_TC, expected) in enumerate(zip(outputs, targets, strict=True)):
        shown = objective._at_scale(inputs, 2 - scale)
        require_close(shown.target, expected, 1e-6)
        error_T = objective.token_loss(output_TC, shown, cu_seqlens)
        require_close(error_T.view(4, -1).mean(1), reference[f"loss.{scale}"])


ACTS = {  # modules whose output is the published one's, and how many rows an image has in it
    "stages.0.input_layer": 16,
    "stages.0.blocks.0": 17,
    "stages.0.skip_denses.0": 17,
    "stages.1.input_layer": 64,
    "stages.1.upsample": 64,
    "stages.1.blocks.0": 64,
}


def test_what_is_between_is_the_published_ones(reference):
    model, seen = published_model(reference), {}
    for name in ACTS:
        model.get_submodule(name).register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        model(patches(reference["x_t"]), reference["n"], reference["y"], layout_of(*[(4, 4)] * 4))
    for name, rows in ACTS.items():
        require_close(seen[name].view(4, rows, -1), reference[f"act.{name}.out"].reshape(4, rows, -1))


def test_vectors_of_time_and_the_norms_epsilons(reference):
    model = published_model(reference)
    norm = model.get_submodule("stages.0.blocks.0.block1.norm.scale")
    require_close(norm(reference["td.n"] / 500 - 1), reference["td.value"])
    tau_S, rows = reference["n"] / 500 - 1, reference["eps.in"].flatten(0, 1)
    segments = Segments([2] * 4, torch.device("cpu"))
    require_close(scaled_rms(rows, norm(tau_S), segments).view(4, 2, -1), reference["eps.td_rms"])
    vectors = model.get_submodule("stages.0.output_layer.0")(tau_S)
    require_close(scaled_layer_norm(rows, *vectors, segments).view(4, 2, -1), reference["eps.td_ln"])


def test_positions_that_are_cropped_are_the_published_ones(reference):
    model = published_model(reference, replace(TINY, positions="crop"))
    with torch.no_grad():
        coarse, fine = model(
            patches(reference["rect.x"]), reference["rect.n"], reference["rect.y"], layout_of(*[(3, 2)] * 2)
        )
    require_close(coarse, pixels(reference["rect.output.0"]))
    require_close(fine, patches(reference["rect.output.1"]))


def test_cropped_positions_end_where_the_table_does(reference):
    model = published_model(reference, replace(TINY, positions="crop"))
    with pytest.raises(
        UserError, match=r"model\.positions: crop has none for an image of 2 x 5 patches; valid: at most"
    ):
        model(torch.zeros(10, 16), torch.ones(1), torch.zeros(1).long(), layout_of((2, 5)))


def test_padding_may_be_longer_than_the_table_of_cropped_positions(reference):
    model = published_model(reference, replace(TINY, positions="crop"))
    tokens, n_S, labels = (
        torch.cat([patches(reference["rect.x"]), torch.zeros(9, 16)]),
        reference["rect.n"],
        reference["rect.y"],
    )
    outputs = model(tokens, F.pad(n_S, (0, 1)), F.pad(labels, (0, 1)), layout_of((3, 2), (3, 2), (1, 9)))
    require_close(outputs[1][:12], patches(reference["rect.output.1"]))


def test_times_in_training_are_whole_and_in_sampling_those_that_are_asked_for():
    objective = make_objective(FLOW, TINY)
    t_S = torch.tensor([0.0, 0.0005, 0.5005, 0.9989, 0.9991, 1.0])
    inputs = objective.prepare_at(torch.zeros(6, 16), torch.zeros(6).long(), starts([1] * 6), t_S, torch.ones(6, 16))
    assert inputs.t_S.tolist() == [1000.0, 1000.0, 500.0, 2.0, 1.0, 1.0]
    assert objective.model_time(torch.tensor([0.25, 0.99975], dtype=torch.float64)).tolist() == pytest.approx(
        [750, 0.25]
    )


def test_resized_positions_cover_the_same_extent():
    """Bicubic interpolation nearly keeps what is linear, away from the border."""
    from fitscale.model.dimr.layers import PositionTable

    table = PositionTable(TINY, width=1, scale=2)
    ramp = torch.arange(8.0)[:, None].expand(8, 8)
    table.weight.data.copy_(ramp.reshape(64, 1))
    centres = (torch.arange(16.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(table._table(16, 4)[4:-4, 2, 0], centres[4:-4], rtol=0, atol=0.05)
    assert torch.equal(table._table(8, 8)[..., 0], ramp)


MIXED = [(4, 2), (3, 3), (4, 4), (2, 4), (3, 3), (4, 4), (1, 2)]


def mixed_inputs():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(sum(rows * cols for rows, cols in MIXED), 16, generator=generator)
    return tokens, 1000 * torch.rand(len(MIXED), generator=generator), torch.arange(len(MIXED))


def test_a_pack_of_mixed_shapes_is_its_images_one_by_one(reference):
    tokens, n_S, labels = mixed_inputs()
    together, apart = published_model(reference), published_model(reference)
    outputs = together(tokens, n_S, labels, layout_of(*MIXED))
    sum(out.square().sum() for out in outputs).backward()
    starts_S = starts([rows * cols for rows, cols in MIXED]).tolist()
    for image, size in enumerate(MIXED):
        own = slice(starts_S[image], starts_S[image + 1])
        alone = apart(tokens[own], n_S[[image]], labels[[image]], layout_of(size))
        for both, one in zip(outputs, alone, strict=True):
            require_close(both[own], one)
        sum(out.square().sum() for out in alone).backward()
    for name, parameter in together.named_parameters():
        require_close(parameter.grad, apart.get_parameter(name).grad)


@pytest.mark.skipif(lacks_for_compiling(torch.device("cpu")) is not None, reason="needs g++ and Python.h")
def test_compiled_formulas_are_those_that_are_written(request):
    """At one width for both stages, because every width is compiled for itself."""
    init_parallel(ParallelConfig(), "cpu")
    config = replace(TINY, depth=3, hidden_size=16, convnext_size=16)
    generator = torch.Generator().manual_seed(0)
    table = parameter_table(config)
    weights = {one.name: (one.init == "one") + 0.2 * torch.randn(one.shape, generator=generator) for one in table}
    written, compiled = filled(config, weights), filled(config, weights)
    request.addfinalizer(lambda: use_compiler(False))
    outputs = []
    for model, on in ((written, False), (compiled, True)):
        use_compiler(on)
        outputs.append(model(*mixed_inputs(), layout_of(*MIXED)))
        sum(out.square().sum() for out in outputs[-1]).backward()
    for expected, got in zip(*outputs, strict=True):
        require_close(got, expected)
    for name, parameter in compiled.named_parameters():
        require_close(parameter.grad, written.get_parameter(name).grad)


def test_a_head_dimension_of_60_is_filled_up_for_the_kernel(monkeypatch):
    """As XL has it, on CUDA; the kernel's place is taken by what it has to compute."""
    from fitscale.model.common import attention

    def kernel(q, k, v, bounds, others, longest, most, *, scale):
        assert q.shape[-1] == 64 and bounds is others and longest == most == max(rows * cols for rows, cols in MIXED)
        images = zip(*(x.split(bounds.diff().tolist()) for x in (q, k, v)), strict=True)
        heads = ([x.transpose(0, 1) for x in image] for image in images)
        return torch.cat([((q @ k.mT * scale).softmax(-1) @ v).transpose(0, 1) for q, k, v in heads])

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    init_parallel(ParallelConfig(), "cpu")
    layout, generator = layout_of(*MIXED), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, sum(layout.whole.lengths), 2, 60, generator=generator)
    require_close(attention._kernel_attention(q, k, v, layout), attention.packed_attention(q, k, v, layout))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_head_dimension_of_60_on_cuda():
    from fitscale.model.common.attention import packed_attention

    init_parallel(ParallelConfig(), "cpu")
    sizes = torch.tensor(MIXED)
    layouts = [pack_layout(sizes, starts(sizes.prod(1).tolist()), torch.device(name)) for name in ("cpu", "cuda")]
    outcomes = []
    for layout, settings in zip(layouts, ({}, {"device": "cuda", "dtype": torch.bfloat16}), strict=True):
        heads = torch.randn(3, sum(layout.whole.lengths), 2, 60, generator=torch.Generator().manual_seed(0))
        q, k, v = leaves = [x.bfloat16().float().to(**settings).requires_grad_() for x in heads]
        out = packed_attention(q, k, v, layout)
        outcomes.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for expected, got in zip(*outcomes, strict=True):
        require_close(got.float().cpu(), expected, 2e-2)


def guided(model, **settings):
    def network(x_TC, t_S, pack):
        layout = pack_layout(pack.sizes_S2, pack.cu_seqlens, torch.device("cpu"))
        return model(x_TC, t_S, pack.labels_S, layout)[-1]

    guidance = GuidanceConfig(channels=4, **settings)
    model_time = make_objective(FLOW, TINY).model_time
    return Guided(network, guidance, no_class=10, patch_size=2, model_time=model_time)


def pack_of(labels):
    count = len(labels)
    return PackShape(labels, torch.full((count, 2), 4), starts([16] * count), tuple(range(count)))


@pytest.mark.parametrize(
    ("name", "settings"), [("linear", {"scale": 1.4}), ("cosine", {"scale": 2.5, "power": 2.0, "towards": "data"})]
)
@torch.no_grad()
def test_guidance_is_the_published_one(reference, name, settings):
    t_S = torch.full((4,), 1 - reference["guided.n"].item() / 1000, dtype=torch.float64)
    moved = guided(published_model(reference), **settings)(patches(reference["guided.x"]), t_S, pack_of(reference["y"]))
    require_close(moved, patches(reference[f"guided.{name}"]))


@pytest.mark.parametrize("evaluations", [6, 10])
def test_dpm_solver_draws_the_published_samples(reference, evaluations):
    model_fn, seen = guided(published_model(reference), scale=1.4), []

    def recorded(x_TC, t_S, pack):
        seen.append((1000 * (1 - t_S), x_TC, model_fn(x_TC, t_S, pack)))
        return seen[-1][-1]

    sampling = SamplingConfig(method="dpm_solver_pp", steps=evaluations)
    drawn = sample(recorded, patches(reference["sample.z"]), sampling, pack_of(reference["sample.y"]), seed=0)
    assert drawn.nfe == [evaluations] * 2
    prefix = f"sample.dpm{evaluations}"
    for number, (n_S, x_TC, epsilon_TC) in enumerate(seen):
        require_close(n_S.float(), reference[f"{prefix}.n"][[number, number]])
        require_close(x_TC, patches(reference[f"{prefix}.x"][number]))
        require_close(epsilon_TC, patches(reference[f"{prefix}.eps"][number]))
    require_close(drawn.x_TC, patches(reference[prefix]))


def test_the_schedule_is_the_published_one(reference):
    from fitscale.flow.loss import SCALED_LINEAR_ALPHAS_CUMPROD, SCALED_LINEAR_BETA

    assert torch.equal(SCALED_LINEAR_BETA, reference["schedule.betas"][1:])
    torch.testing.assert_close(SCALED_LINEAR_ALPHAS_CUMPROD, reference["schedule.cum_alphas"][1:], rtol=1e-12, atol=0)


def test_steps_of_the_solver_take_all_evaluations():
    assert [orders(n) for n in (1, 2, 3, 4, 5, 6)] == [[1], [2], [2, 1], [3, 1], [3, 2], [3, 2, 1]]
    assert all(sum(orders(n)) == n for n in range(1, 300))


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "macs"),
    [("xl", 505_046_408, 1018, (604_828_800, 74_880, 394_444_800)),
     ("g", 1_056_352_904, 1446, (1_256_212_224, 131_328, 830_767_104))],
)  # fmt: skip
def test_parameters_and_macs_are_the_published_ones(name, parameters, tensors, macs):
    model = load_config([str(ROOT / f"configs/model/dimr_{name}_2r.yaml")]).model
    assert flops.parameters(model) == parameters and len(parameter_table(model)) == tensors
    by_token, by_square, fixed = macs
    for tokens in (256, 1024, 6):
        expected = by_token * tokens + by_square * (tokens + 1) ** 2 + fixed
        assert flops.linear_macs(model, tokens) + flops.mixing_macs(model, tokens) == expected


def test_it_starts_as_published(reference):
    model = build_network(TINY, ParallelConfig())
    names = {parameter: name for name, parameter in model.named_parameters()}
    start = {names[parameter]: piece for parameter, piece in initial_items(model, 0)}
    bounds = {"stages.0.input_layer.1": 0.25, "stages.1.input_layer.1": 0.5, "stages.1.blocks.2.block1.1": 1 / 7}
    bounds |= {"stages.0.output_layer.2": (9 * 80) ** -0.5, "stages.1.output_layer.2": (9 * 40) ** -0.5}
    for name, bound in bounds.items():
        both = torch.cat([start[f"{name}.{part}"].flatten() for part in ("weight", "bias")])
        assert 0.8 * bound < both.abs().max() <= bound and start[f"{name}.bias"].abs().max() > 0
    for name, tensor in start.items():
        if "param" in name:
            shift = "bias.param" in name
            assert torch.equal(tensor, torch.full_like(tensor, 0.0 if shift else 1.0)), name
        elif "nodecay" in name:
            assert not tensor.any()
        elif name.rsplit(".", 1)[0] not in bounds and "block1.1." not in name:
            spread = 0.0 if name.endswith("bias") else 0.02
            assert abs(tensor.std().item() - spread) < 0.002, name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.patch_size=4", ["model.patch_size", "is not 2"]),
        ("model.depth=38", ["model.depth", "odd"]),
        ("model.convnext_depth=20", ["model.convnext_depth", "odd"]),
        ("model.positions=stretch", ["model.positions", "resize, crop"]),
        ("flow.kind=rectified", ["flow.kind", "scaled_linear"]),
        ("sampling.method=ddim", ["sampling.method", "dpm_solver_pp"]),
        ("parallel.tensor_parallel_size=3", ["parallel.tensor_parallel_size", "num_heads"]),
    ],
)
def test_what_it_cannot_be_is_refused(override, words):
    with pytest.raises(UserError) as caught:
        load_config([str(ROOT / "configs/model/dimr_xl_2r.yaml"), override])
    assert all(word in str(caught.value) for word in words), caught.value


def test_its_tokens_are_not_cut():
    layout = ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]
    with pytest.raises(UserError, match=r"parallel\.sequence_parallel: .* model\.family = dimr"):
        load_config([str(ROOT / "configs/model/dimr_xl_2r.yaml"), *layout])
