"""What a model costs, from its config alone (no torch): parameters, and multiply-accumulates (MACs) of one image.

Conventions, always told apart:
- a MAC is one multiplication and one addition: 2 FLOPs; training is 3 forward passes (one forward, two backward);
- linear MACs are those of the weights of the backbone's table, the conditioning's (once per image) included; mixing
  MACs are those of what mixes tokens: q k^T and scores * v. Norms, activations, RoPE and the sums of biases are not
  counted;
- the papers' "GFLOPs" are linear MACs at 256 tokens: `paper_macs`.
"""

from functools import lru_cache

from fitscale.config.schema import ModelConfig
from fitscale.model.backbone import backbone_of, parameter_table

PAPER_TOKENS = 256
FLOPS_PER_MAC = 2
TRAIN_PASSES = 3


def parameters(cfg: ModelConfig) -> int:
    """Trainable numbers of the whole model, the table of classes included."""
    return sum(parameter.numel for parameter in parameter_table(cfg))


def linear_macs(cfg: ModelConfig, tokens: int) -> int:
    """MACs of the weights for the forward pass of one image of `tokens` tokens."""
    per_image, per_token = _linear_coefficients(cfg)
    return per_image + per_token * tokens


def mixing_macs(cfg: ModelConfig, tokens: int) -> int:
    """MACs of what mixes tokens (q k^T and scores * v) for the forward pass of one image of `tokens` tokens."""
    fixed, linear, square = backbone_of(cfg).mixing_macs(cfg)
    return fixed + linear * tokens + square * tokens**2


def train_flops(cfg: ModelConfig, tokens: int) -> int:
    """FLOPs of training on one image of `tokens` tokens once, forward and backward, mixing included."""
    return TRAIN_PASSES * FLOPS_PER_MAC * (linear_macs(cfg, tokens) + mixing_macs(cfg, tokens))


def paper_macs(cfg: ModelConfig) -> int:
    """What the papers print as "GFLOPs": linear MACs of the forward pass at 256 tokens."""
    return linear_macs(cfg, PAPER_TOKENS)


def cost(cfg: ModelConfig) -> tuple[int, int]:
    """(a, b): an image of n tokens costs a*n + b*n^2 MACs forward, what it costs whatever its size left out."""
    _, linear, square = backbone_of(cfg).mixing_macs(cfg)
    return _linear_coefficients(cfg)[1] + linear, square


@lru_cache(maxsize=64)
def _linear_coefficients(cfg: ModelConfig) -> tuple[int, int]:
    """Linear MACs of an image whatever its size, and of each of its tokens."""
    weights = [parameter for parameter in parameter_table(cfg) if parameter.is_weight]
    return sum(one.numel * one.per_image for one in weights), sum(one.numel * one.per_token for one in weights)
