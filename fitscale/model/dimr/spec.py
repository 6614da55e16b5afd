"""DiMR as a backbone: its parameters, and what they cost. No torch.

Stage 0 is the Transformer, on the tokens and a class token for each image; stage 1 the ConvNeXt, on latent pixels. The
link between them takes the input and the output of every block of stage 0.
"""

from math import prod
from typing import Any

from fitscale.config.schema import ParallelConfig
from fitscale.model.backbone import COLUMNS, ROWS, Backbone, Kept, Parameter, linear
from fitscale.model.dimr.config import MLP_RATIO, PIXELS, DimrConfig

KERNEL = 7  # side of the depthwise convolutions
HEAD_KERNEL = 3  # side of the last convolution of a stage
ON_SEQUENCE: dict[str, Any] = {"per_token": 1, "per_image": 1}  # per image: its class token
ON_TOKENS: dict[str, Any] = {"per_token": 1}
ON_PIXELS: dict[str, Any] = {"per_token": PIXELS}


def parameters(cfg: DimrConfig) -> list[Parameter]:
    """The table. Init as in the published code: normal linears and tables, uniform convolutions, norms at one."""
    d, e, c, side = cfg.hidden_size, cfg.convnext_size, cfg.in_channels, cfg.max_side
    states = (cfg.depth + 1) * d
    return [
        *_convolution("stages.0.input_layer.1", (d, c, 2, 2), **ON_TOKENS),
        Parameter("stages.0.input_layer.3.position_embeddings.weight", (side**2, d), init="normal"),
        Parameter("stages.0.class_embeds.weight", (cfg.num_classes + 1, d), init="normal"),
        *_chain(cfg.depth, d, "stages.0", lambda name: _attention(cfg, name), **ON_SEQUENCE),
        *_head("stages.0.output_layer", d, c, **ON_TOKENS),
        *_convolution("stages.1.input_layer.1", (e, c, 1, 1), **ON_PIXELS),
        Parameter("stages.1.input_layer.3.position_embeddings.weight", (PIXELS * side**2, e), init="normal"),
        *_layer_norm("stages.1.upsample.0", states),
        *linear("stages.1.upsample.1.kernel", (PIXELS * e, states), init="normal", **ON_TOKENS),
        *_layer_norm("stages.1.upsample.2", e),
        *_chain(cfg.convnext_depth, e, "stages.1", lambda name: _depthwise(name, e), **ON_PIXELS),
        *_head("stages.1.output_layer", e, c, **ON_PIXELS),
    ]


def _chain(depth: int, width: int, stage: str, mixer: Any, **applied: Any) -> list[Parameter]:
    """Blocks and skips of a stage."""
    found = []
    for number in range(depth):
        name = f"{stage}.blocks.{number}"
        found += mixer(f"{name}.block1") + _gated_mlp(f"{name}.block2", width, **applied)
    for number in range(depth // 2):
        found += linear(f"{stage}.skip_denses.{number}", (width, 2 * width), init="normal", **applied)
    return found


def _attention(cfg: DimrConfig, name: str) -> list[Parameter]:
    d = cfg.hidden_size
    qkv = Parameter(
        f"{name}.query_key_value.weight", (3 * d, d), "normal", ROWS, qkv_heads=cfg.num_heads, **ON_SEQUENCE
    )
    dense = linear(f"{name}.dense", (d, d), init="normal", split=COLUMNS, **ON_SEQUENCE)
    return [*_vector(f"{name}.norm.scale", d), qkv, *dense]


def _depthwise(name: str, width: int) -> list[Parameter]:
    return _convolution(f"{name}.1", (width, 1, KERNEL, KERNEL), **ON_PIXELS)


def _gated_mlp(name: str, width: int, **applied: Any) -> list[Parameter]:
    hidden = MLP_RATIO * width
    return [
        *_vector(f"{name}.norm.scale", width),
        *linear(f"{name}.w0", (hidden, width), init="normal", split=ROWS, **applied),
        *linear(f"{name}.w1", (hidden, width), init="normal", split=ROWS, **applied),
        *linear(f"{name}.w2", (width, hidden), init="normal", split=COLUMNS, **applied),
    ]


def _head(name: str, width: int, channels: int, **applied: Any) -> list[Parameter]:
    shape = (channels, width, HEAD_KERNEL, HEAD_KERNEL)
    return [*_layer_norm(f"{name}.0", width), *_convolution(f"{name}.2", shape, **applied)]


def _layer_norm(name: str, width: int) -> list[Parameter]:
    return _vector(f"{name}.weight", width) + _vector(f"{name}.bias", width, init="zero")


def _vector(name: str, width: int, init: str = "one") -> list[Parameter]:
    """A vector that depends on time: its values at both ends, and what weighs them."""
    ends = [Parameter(f"{name}.{end}", (width,), init=init) for end in ("param0", "param1")]
    return ends + [Parameter(f"{name}.{part}", (width,)) for part in ("nodecay_weight", "nodecay_bias")]


def _convolution(name: str, shape: tuple[int, ...], **applied: Any) -> list[Parameter]:
    """Weight and bias, both drawn from +-1/sqrt(numbers that one output depends on)."""
    bound = prod(shape[1:]) ** -0.5
    weight = Parameter(f"{name}.weight", shape, "uniform", bound=bound, **applied)
    return [weight, Parameter(f"{name}.bias", shape[:1], "uniform", bound=bound, **applied)]


def mixing_macs(cfg: DimrConfig) -> tuple[int, int, int]:
    """q k^T and scores * v of every Transformer block, over n tokens and the class token. The convolutions' MACs are
    their weights'."""
    square = 2 * cfg.hidden_size * cfg.depth
    return square, 2 * square, square


def kept(cfg: DimrConfig, on_cuda: bool) -> Kept:
    """The mean over the blocks of both stages, of a token and its four pixels.

    A block keeps of every row its input, its sum in the middle and what its norms and linears give to the next product;
    the Transformer's also q, k, v and the attention's output (on CPUs twice). In the second half of a chain comes the
    output, which is not the next block's input.
    """
    d, e, blocks = cfg.hidden_size, cfg.convnext_size, cfg.depth + cfg.convnext_depth
    rows = cfg.depth * 4 * d + cfg.depth // 2 * d
    rows_split = cfg.depth * ((4 if on_cuda else 5) * d + 3 * cfg.mlp_hidden_size)
    pixels = PIXELS * (cfg.convnext_depth * 3 * e + cfg.convnext_depth // 2 * e)
    vectors = cfg.depth * 4 * d + cfg.convnext_depth * 2 * e
    return Kept(
        blocks=blocks,
        token=(rows + pixels) / blocks,
        token_split=(rows_split + PIXELS * cfg.convnext_depth * 3 * cfg.convnext_mlp_hidden_size) / blocks,
        token_statistics=(2 * cfg.depth + PIXELS * cfg.convnext_depth) / blocks,
        token_statistics_split=cfg.depth * cfg.num_heads / blocks,
        image=(rows + rows_split + vectors) / blocks,  # the class token's, and vectors of time
        ends=2 * d + 9 * PIXELS * e,  # heads, link; 5 of the pixels' are gradients on their way
        positions=0,
        entering=(cfg.depth * d + cfg.convnext_depth * PIXELS * e) / blocks,
    )


def build(cfg: DimrConfig, parallel: ParallelConfig) -> Any:
    from fitscale.model.dimr.network import Dimr

    return Dimr(cfg, parallel)


DIMR = Backbone("dimr", DimrConfig, parameters, mixing_macs, kept, build)
