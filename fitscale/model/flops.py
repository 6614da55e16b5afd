"""What a FiT costs, from its config alone (no torch): parameters, and multiply-accumulates (MACs) of one image.

Conventions, always told apart:
- a MAC is one multiplication and one addition: 2 FLOPs; training is 3 forward passes (one forward, two backward);
- linear MACs are those of the linear layers, the conditioning's (once per image) included; attention MACs are those of
  q k^T and of scores * v. Norms, activations, RoPE and the sums of biases are not counted;
- the papers' "GFLOPs" are linear MACs at 256 tokens: `paper_macs`.
"""

from fitscale.config.schema import ModelConfig

PAPER_TOKENS = 256
FLOPS_PER_MAC = 2
TRAIN_PASSES = 3

_TIME_CHANNELS = 256  # width of the time embedding's sinusoids

Linear = tuple[int, int]  # input and output features; every linear has a bias


def token_linears(cfg: ModelConfig) -> dict[str, list[Linear]]:
    """The linears that run on every token, by part."""
    d, width = cfg.hidden_size, cfg.mlp_hidden_size
    return {
        "x_embedder": [(cfg.token_channels, d)],
        "attention": [(d, 3 * d), (d, d)] * cfg.depth,
        "mlp": [(d, width), (d, width), (width, d)] * cfg.depth,
        "final_layer": [(d, cfg.patch_size**2 * cfg.out_channels)],
    }


def image_linears(cfg: ModelConfig) -> dict[str, list[Linear]]:
    """The linears that run once per image (conditioning), by part."""
    d, rank = cfg.hidden_size, cfg.adaln_rank
    block = [(d, 6 * d)] if rank is None else [(d, rank), (rank, 6 * d)]
    shared = [] if rank is None else [(d, 6 * d)]
    return {
        "t_embedder": [(_TIME_CHANNELS, d), (d, d)],
        "adaln": shared + block * cfg.depth,
        "final_adaln": [(d, 2 * d)],
    }


def parameters(cfg: ModelConfig) -> int:
    """Trainable numbers of the whole model, the table of classes included."""
    table = (cfg.num_classes + 1) * cfg.hidden_size
    parts = (token_linears(cfg) | image_linears(cfg)).values()
    return table + sum(fan_in * out + out for linears in parts for fan_in, out in linears)


def linear_macs_by_part(cfg: ModelConfig, tokens: int) -> dict[str, int]:
    """MACs of the linear layers for the forward pass of one image of `tokens` tokens, by part."""
    per_token = {part: tokens * _macs(linears) for part, linears in token_linears(cfg).items()}
    return per_token | {part: _macs(linears) for part, linears in image_linears(cfg).items()}


def linear_macs(cfg: ModelConfig, tokens: int) -> int:
    """MACs of the linear layers for the forward pass of one image of `tokens` tokens."""
    return sum(linear_macs_by_part(cfg, tokens).values())


def attention_macs(cfg: ModelConfig, tokens: int) -> int:
    """MACs of q k^T and scores * v for the forward pass of one image of `tokens` tokens."""
    return 2 * tokens**2 * cfg.hidden_size * cfg.depth


def train_flops(cfg: ModelConfig, tokens: int) -> int:
    """FLOPs of training on one image of `tokens` tokens once, forward and backward, attention included."""
    return TRAIN_PASSES * FLOPS_PER_MAC * (linear_macs(cfg, tokens) + attention_macs(cfg, tokens))


def paper_macs(cfg: ModelConfig) -> int:
    """What the papers print as "GFLOPs": linear MACs of the forward pass at 256 tokens."""
    return linear_macs(cfg, PAPER_TOKENS)


def cost(cfg: ModelConfig) -> tuple[int, int]:
    """(a, b): an image of n tokens costs a*n + b*n^2 MACs forward, its per-image conditioning left out."""
    return sum(_macs(linears) for linears in token_linears(cfg).values()), attention_macs(cfg, 1)


def _macs(linears: list[Linear]) -> int:
    return sum(fan_in * out for fan_in, out in linears)
