"""Flag-DiT and Large-DiT as backbones: their parameters, and what they cost. No torch."""

from typing import Any

from fitscale.config.schema import ParallelConfig
from fitscale.model.backbone import COLUMNS, ROWS, Backbone, Kept, Parameter, kept_ternary, linear, quantised
from fitscale.model.flag.config import TIME_CHANNELS, FlagConfig


def parameters(cfg: FlagConfig) -> list[Parameter]:
    """The table. Init as published: Xavier-uniform linears, normal embeddings, zero modulations and output."""
    d, w = cfg.hidden_size, cfg.condition_size
    found = [
        *linear("x_embedder", (d, cfg.token_channels), per_token=1),
        *linear("t_embedder.mlp.0", (w, TIME_CHANNELS), per_image=1, init="normal"),
        *linear("t_embedder.mlp.2", (w, w), per_image=1, init="normal"),
        Parameter("y_embedder.embedding_table.weight", (cfg.num_classes + 1, w), init="normal"),
    ]
    for number in range(cfg.depth):
        found += _block(cfg, f"layers.{number}")
    found += linear("final_layer.adaLN_modulation.1", (2 * d, w), per_image=1, init="zero")
    return found + linear("final_layer.linear", (cfg.patch_size**2 * cfg.final_channels, d), per_token=1, init="zero")


def _block(cfg: FlagConfig, name: str) -> list[Parameter]:
    d, w, width, heads = cfg.hidden_size, cfg.condition_size, cfg.mlp_hidden_size, cfg.num_heads
    rows: dict[str, Any] = {"init": "xavier", "split": ROWS, "per_token": 1}
    columns: dict[str, Any] = {"init": "xavier", "split": COLUMNS, "per_token": 1}
    attention, mlp = f"{name}.attention", f"{name}.feed_forward"
    products = [
        [Parameter(f"{attention}.wq.weight", (d, d), rotary=heads, **rows)],
        [Parameter(f"{attention}.wk.weight", (d, d), rotary=heads, **rows)],
        [Parameter(f"{attention}.wv.weight", (d, d), **rows)],
        [Parameter(f"{attention}.wo.weight", (d, d), **columns)],
        [Parameter(f"{mlp}.w1.weight", (width, d), **rows)],
        [Parameter(f"{mlp}.w3.weight", (width, d), **rows)],
        [Parameter(f"{mlp}.w2.weight", (d, width), **columns)],
        linear(f"{name}.adaLN_modulation.1", (6 * d, w), per_image=1, init="zero"),
    ]
    found = [entry for product in products for entry in quantised(product, cfg.quantise)]
    for norm in ("q_norm", "k_norm"):
        found.append(Parameter(f"{attention}.{norm}.weight", (d,), init="one", split=ROWS, rotary=heads))
        found.append(Parameter(f"{attention}.{norm}.bias", (d,), split=ROWS, rotary=heads))
    found += [Parameter(f"{name}.{norm}.weight", (d,), init="one") for norm in ("attention_norm", "ffn_norm")]
    if cfg.is_ternary:
        found.append(Parameter(f"{name}.adaLN_modulation.2.weight", (6 * d,), init="one"))
    return found


def mixing_macs(cfg: FlagConfig) -> tuple[int, int, int]:
    """q k^T and scores * v of every block."""
    return 0, 0, 2 * cfg.hidden_size * cfg.depth


def kept(cfg: FlagConfig, on_cuda: bool) -> Kept:
    """Of every token a block keeps: 6 vectors of the hidden size (two norms' inputs and modulated outputs, two results
    before their gates); q and k as projected, q, k, v as attention takes them, and its output (on CPUs twice); 3
    vectors of the MLP's width; and statistics of norms and attention. Compiled or not."""
    d = cfg.hidden_size
    return Kept(
        blocks=cfg.depth,
        token=6 * d,
        token_split=(6 if on_cuda else 7) * d + 3 * cfg.mlp_hidden_size,
        token_statistics=8,
        token_statistics_split=cfg.num_heads,
        image=(23 if cfg.is_ternary else 11) * d,
        ends=7 * d + 4 * cfg.token_channels,
        positions=cfg.head_dim,
        **kept_ternary(_block(cfg, ""), cfg.quantise),
    )


def build(cfg: FlagConfig, parallel: ParallelConfig) -> Any:
    from fitscale.model.flag.network import FlagDiT

    return FlagDiT(cfg, parallel)


FLAG_DIT = Backbone("flag_dit", FlagConfig, parameters, mixing_macs, kept, build)
LARGE_DIT = Backbone("large_dit", FlagConfig, parameters, mixing_macs, kept, build)
