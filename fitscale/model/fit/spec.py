"""FiTv2 and FiT v1 as backbones: their parameters, and what they cost. No torch."""

from typing import Any

from fitscale.config.schema import ParallelConfig
from fitscale.model.backbone import COLUMNS, ROWS, Backbone, Kept, Parameter, kept_ternary, linear, quantised
from fitscale.model.fit.config import TIME_CHANNELS, FitConfig


def parameters(cfg: FitConfig) -> list[Parameter]:
    """The table. Init follows the papers: Xavier-uniform linears, normal embeddings, zero modulations and output."""
    d = cfg.hidden_size
    found = [
        *linear("x_embedder.proj", (d, cfg.token_channels), per_token=1),
        *linear("t_embedder.mlp.0", (d, TIME_CHANNELS), per_image=1, init="normal"),
        *linear("t_embedder.mlp.2", (d, d), per_image=1, init="normal"),
        Parameter("y_embedder.embedding_table.weight", (cfg.num_classes + 1, d), init="normal"),
    ]
    if cfg.adaln_rank is not None:
        found += linear("global_adaLN_modulation.1", (6 * d, d), per_image=1, init="zero")
    for number in range(cfg.depth):
        found += _block(cfg, f"blocks.{number}")
    out = cfg.patch_size**2 * cfg.out_channels
    found += linear("final_layer.adaLN_modulation.1", (2 * d, d), per_image=1, init="zero")
    found += linear("final_layer.linear", (out, d), per_token=1, init="zero")
    return found


def _block(cfg: FitConfig, name: str) -> list[Parameter]:
    d, width, rank = cfg.hidden_size, cfg.mlp_hidden_size, cfg.adaln_rank
    rows: dict[str, Any] = {"split": ROWS, "per_token": 1}
    columns: dict[str, Any] = {"split": COLUMNS, "per_token": 1}
    products = [
        linear(f"{name}.attn.qkv", (3 * d, d), qkv_heads=cfg.num_heads, rotary=cfg.num_heads, **rows),
        linear(f"{name}.attn.proj", (d, d), **columns),
        linear(f"{name}.mlp.fc1_g", (width, d), **rows),
        linear(f"{name}.mlp.fc1_x", (width, d), **rows),
        linear(f"{name}.mlp.fc2", (d, width), **columns),
    ]
    if rank is None:
        products.append(linear(f"{name}.adaLN_modulation.1", (6 * d, d), per_image=1, init="zero"))
    else:
        products.append(linear(f"{name}.adaLN_modulation.1", (rank, d), per_image=1))
        products.append(linear(f"{name}.adaLN_modulation.2", (6 * d, rank), per_image=1, init="zero"))
    found = [entry for product in products for entry in quantised(product, cfg.quantise)]
    if cfg.qk_norm_weight:
        norms = (f"{name}.attn.{norm}.weight" for norm in ("q_norm", "k_norm"))
        found += [Parameter(norm, (cfg.head_dim,), init="one", rotary=1) for norm in norms]
    if cfg.is_ternary:
        found.append(Parameter(f"{name}.adaLN_modulation.3.weight", (6 * d,), init="one"))
    return found


def mixing_macs(cfg: FitConfig) -> tuple[int, int, int]:
    """q k^T and scores * v of every block."""
    return 0, 0, 2 * cfg.hidden_size * cfg.depth


def kept(cfg: FitConfig, on_cuda: bool) -> Kept:
    """Of every token a block keeps: 6 vectors of the hidden size (two norms' inputs and modulated outputs, two results
    before their gates); q, k, v as projected and as attention takes them, and its output (on CPUs twice); 3 vectors of
    the MLP's width; and statistics of norms and attention. Compiled or not."""
    d = cfg.hidden_size
    return Kept(
        blocks=cfg.depth,
        token=6 * d,
        token_split=(7 if on_cuda else 8) * d + 3 * cfg.mlp_hidden_size,
        token_statistics=4,
        token_statistics_split=cfg.num_heads,
        image=(21 if cfg.is_ternary else 9) * d,
        ends=7 * d + 4 * cfg.token_channels,  # the input, the final layer's norm and product; gradients on their way
        positions=cfg.head_dim,
        **kept_ternary(_block(cfg, ""), cfg.quantise),
    )


def build(cfg: FitConfig, parallel: ParallelConfig) -> Any:
    from fitscale.model.fit.network import FiT

    return FiT(cfg, parallel)


FITV2 = Backbone("fitv2", FitConfig, parameters, mixing_macs, kept, build)
FIT = Backbone("fit", FitConfig, parameters, mixing_macs, kept, build)
