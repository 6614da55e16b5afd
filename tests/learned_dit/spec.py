"""Parameters and costs of the tests' own backbone. No torch."""

from typing import Any

from fitscale.model.backbone import COLUMNS, ROWS, Backbone, Kept, Parameter, linear
from tests.learned_dit.config import LearnedDitConfig

TIME_CHANNELS = 32


def parameters(cfg: LearnedDitConfig) -> list[Parameter]:
    d = cfg.hidden_size
    found = [
        Parameter("row_table", (cfg.max_side, d), init="normal"),
        Parameter("column_table", (cfg.max_side, d), init="normal"),
        *linear("x_embedder.proj", (d, cfg.token_channels), per_token=1),
        *linear("t_embedder.mlp.0", (d, TIME_CHANNELS), per_image=1, init="normal"),
        *linear("t_embedder.mlp.2", (d, d), per_image=1, init="normal"),
        Parameter("y_embedder.embedding_table.weight", (cfg.num_classes + 1, d), init="normal"),
    ]
    for number in range(cfg.depth):
        name, width = f"blocks.{number}", cfg.mlp_hidden_size
        found += linear(f"{name}.modulation", (6 * d, d), per_image=1, init="zero")
        found += linear(f"{name}.qkv", (3 * d, d), split=ROWS, per_token=1, qkv_heads=cfg.num_heads)
        found += linear(f"{name}.proj", (d, d), split=COLUMNS, per_token=1)
        found += linear(f"{name}.up", (width, d), split=ROWS, per_token=1)
        found += linear(f"{name}.down", (d, width), split=COLUMNS, per_token=1)
    found += linear("coarse", (cfg.in_channels, d), per_token=1)
    return found + linear("fine", (cfg.token_channels, d), per_token=1)


def mixing_macs(cfg: LearnedDitConfig) -> tuple[int, int, int]:
    return 0, 0, 2 * cfg.hidden_size * cfg.depth


def kept(cfg: LearnedDitConfig, on_cuda: bool) -> Kept:
    d = cfg.hidden_size
    return Kept(
        blocks=cfg.depth,
        token=8 * d,
        token_split=5 * d + 2 * cfg.mlp_hidden_size,
        token_statistics=4,
        token_statistics_split=cfg.num_heads,
        image=9 * d,
        ends=3 * d,
        positions=0,
    )


def build(cfg: LearnedDitConfig, parallel: Any) -> Any:
    from tests.learned_dit.network import LearnedDit

    return LearnedDit(cfg, parallel)


LEARNED_DIT = Backbone("learned_dit", LearnedDitConfig, parameters, mixing_macs, kept, build)
