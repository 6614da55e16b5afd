"""Every parameter of a FiT by name and size, from its config alone (no torch), and what a tensor-parallel rank holds.

The names are those of `FiT.named_parameters()`. Attention and MLP are split over the tensor-parallel ranks: the linears
that fan out by their rows (weight and bias), those that fan in by their columns (the bias stays whole). All else is
replicated.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fitscale.config.schema import ModelConfig

_TIME_CHANNELS = 256  # width of the time embedding's sinusoids


@dataclass(frozen=True)
class Parameter:
    """One tensor: its name, its numbers over all ranks, and whether tensor parallelism splits it."""

    name: str
    numel: int
    split: bool

    def local(self, tp_size: int) -> int:
        """Numbers on one tensor-parallel rank."""
        return self.numel // tp_size if self.split else self.numel


def inventory(cfg: ModelConfig) -> list[Parameter]:
    """All parameters, in the order of the modules."""
    d = cfg.hidden_size
    found = [
        *_linear("x_embedder.proj", cfg.token_channels, d),
        *_linear("t_embedder.mlp.0", _TIME_CHANNELS, d),
        *_linear("t_embedder.mlp.2", d, d),
        Parameter("y_embedder.embedding_table.weight", (cfg.num_classes + 1) * d, False),
    ]
    if cfg.adaln_rank is not None:
        found += _linear("global_adaLN_modulation.1", d, 6 * d)
    for number in range(cfg.depth):
        found += _block(cfg, f"blocks.{number}")
    found += _linear("final_layer.adaLN_modulation.1", d, 2 * d)
    found += _linear("final_layer.linear", d, cfg.patch_size**2 * cfg.out_channels)
    return found


def _block(cfg: ModelConfig, name: str) -> Iterator[Parameter]:
    d, width, rank = cfg.hidden_size, cfg.mlp_hidden_size, cfg.adaln_rank
    yield from _linear(f"{name}.attn.qkv", d, 3 * d, "out")
    yield from _linear(f"{name}.attn.proj", d, d, "in")
    yield from _linear(f"{name}.mlp.fc1_g", d, width, "out")
    yield from _linear(f"{name}.mlp.fc1_x", d, width, "out")
    yield from _linear(f"{name}.mlp.fc2", width, d, "in")
    if rank is None:
        yield from _linear(f"{name}.adaLN_modulation.1", d, 6 * d)
    else:
        yield from _linear(f"{name}.adaLN_modulation.1", d, rank)
        yield from _linear(f"{name}.adaLN_modulation.2", rank, 6 * d)


def _linear(name: str, fan_in: int, out: int, split: str = "") -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", fan_in * out, bool(split))
    yield Parameter(f"{name}.bias", out, split == "out")
