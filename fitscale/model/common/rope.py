"""Rotary position embedding: tables of cosines and sines for one image, and their stretching beyond trained sizes.

1. The K/2 pairs of a head are cut in half: the first half turns with a patch's row, the second with its column.
2. Each half is a 1-D embedding of D = K/2 dimensions: pair i turns by position * frequency_i,
   frequency_i = theta^(-2i/D).
3. On a test length L beyond the trained length, frequencies are lowered according to s = max(L / trained length, 1):
   `linear` (position interpolation, arXiv 2306.15595) divides all of them by s; `ntk-aware` raises the base to
   theta * s^(D/(D-2)); `ntk-by-parts` and `yarn` (arXiv 2309.00071) keep the fast ones and interpolate the slow ones.
4. L is the longer side, or each axis has its own (`decouple`, the Vision variants of FiT, arXiv 2402.12376).
5. `ntk-aware-pro1/2` and `yarn` also lengthen the turned vectors, which sharpens the attention.

Flag-DiT (arXiv 2405.05945) has one axis instead: D = K, a position is a patch's number in raster order, L is the number
of patches; it knows `linear` and `ntk-aware` (`RasterRopeConfig`).

Dimensions 2i and 2i + 1 of a published head are pair i; here the K/2 first ones of all pairs come before all second
ones (`weights.halves`), so that both are read in runs.

Shapes: n = rows * cols patches in raster order, K head dimension, D = K/2 dimensions of one axis.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from fitscale.flow.transfer import send
from fitscale.model.common.rope_config import AnyRopeConfig, RasterRopeConfig, RopeConfig

Rope = tuple[Tensor, Tensor]  # cosines and sines, (tokens, K/2) each

# Rotations within the trained length between which a blend goes from one rule to the next (from many to few), as in
# the papers' code; the middle pair is blended over less than one rotation.
_YARN_ROTATIONS = (32.0, 1.0)
_NTK_TO_LINEAR_ROTATIONS = (1.25, 0.75)
_BASE_TO_NTK_ROTATIONS = (16.0, 2.0)


def rope_tables(config: AnyRopeConfig, head_dim: int, rows: int, cols: int) -> Rope:
    """Cosines and sines for an image of rows x cols patches, each float32 (rows * cols, head_dim / 2) on the CPU."""
    if isinstance(config, RasterRopeConfig):
        return _axis_table(config, head_dim, rows * cols, rows * cols)
    longest = max(rows, cols)
    row_length, col_length = (rows, cols) if config.decouple else (longest, longest)
    row_cos, row_sin = _axis_table(config, head_dim // 2, rows, row_length)
    col_cos, col_sin = _axis_table(config, head_dim // 2, cols, col_length)
    stretch = _attention_stretch(config, rows, cols)
    return _grid(row_cos, col_cos) * stretch, _grid(row_sin, col_sin) * stretch


@lru_cache(maxsize=512)
def cached_rope_tables(config: AnyRopeConfig, head_dim: int, rows: int, cols: int, device: torch.device) -> Rope:
    """`rope_tables` on `device`, remembered: a data set has few sizes, and training meets them at every step."""
    with torch.inference_mode(False):  # or tables first met while sampling could not serve training
        cos, sin = rope_tables(config, head_dim, rows, cols)
        return send(cos, device), send(sin, device)


def pack_rope(config: AnyRopeConfig, head_dim: int, sizes: list[tuple[int, int]], device: torch.device) -> Rope:
    """The tables of a pack of images of `sizes` (rows, columns), one after the other: (T, K/2) each."""
    tables = [cached_rope_tables(config, head_dim, rows, cols, device) for rows, cols in sizes]
    return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])


def frequencies(config: AnyRopeConfig, dim: int, length: int) -> Tensor:
    """Radians per patch of the dim/2 pairs of one axis, float32, for a test length of `length` patches."""
    exponents = torch.arange(0, dim, 2).float() / dim
    base = 1.0 / config.theta**exponents
    scale = max(length / config.original_length, 1.0)
    if config.method == "normal":
        return base
    linear = 1.0 / (scale * config.theta**exponents)
    if config.method == "linear":
        return linear
    if config.method == "yarn":
        return _blend(config, dim, _YARN_ROTATIONS, base, linear)
    # A single pair (D = 2) has frequency 1 whatever the base, so the exponent's pole there does not matter.
    ntk = 1.0 / (config.theta * scale ** (dim / max(dim - 2, 1))) ** exponents
    if config.method == "ntk-by-parts":
        slow_to_fast = _blend(config, dim, _NTK_TO_LINEAR_ROTATIONS, ntk, linear)
        return _blend(config, dim, _BASE_TO_NTK_ROTATIONS, base, slow_to_fast)
    return ntk


def _axis_table(config: AnyRopeConfig, dim: int, positions: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of one axis, each (positions, dim / 2)."""
    angles = torch.outer(torch.arange(positions).float(), frequencies(config, dim, length))
    return angles.cos(), angles.sin()


def _grid(row_table: Tensor, col_table: Tensor) -> Tensor:
    """Row half, then column half, for every patch in raster order."""
    rows, cols = len(row_table), len(col_table)
    row_half = row_table[:, None].expand(rows, cols, -1)
    col_half = col_table[None].expand(rows, cols, -1)
    return torch.cat((row_half, col_half), dim=-1).flatten(0, 1)


def _blend(config: AnyRopeConfig, dim: int, rotations: tuple[float, float], many: Tensor, few: Tensor) -> Tensor:
    """`many` for pairs that turn often within the trained length, `few` for those that turn less, a ramp between."""
    first, last = (_pair_with_rotations(config, dim, count) for count in rotations)
    low, high = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2).float() - low) / width).clamp(0, 1)
    return many * (1 - ramp) + few * ramp


def _pair_with_rotations(config: AnyRopeConfig, dim: int, rotations: float) -> float:
    """Index (a real number) of the pair that turns `rotations` times over the trained length."""
    return dim * math.log(config.original_length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))


def _attention_stretch(config: RopeConfig, rows: int, cols: int) -> float:
    """Factor of cos and sin: 1, or what grows with the test length (one factor for both axes, decoupled or not).

    `yarn`: 0.1 ln(s) + 1 of the longer side; `ntk-aware-pro1`, `-pro2`: sqrt(log(2 L_test) / log(L_train)), where L is
    the longer side or the number of tokens.
    """
    longest, trained = max(rows, cols), config.original_length
    if config.method == "yarn":
        return 0.1 * math.log(longest / trained) + 1.0 if longest > trained else 1.0
    if config.method == "ntk-aware-pro1":
        return _entropy_ratio(longest, trained)
    if config.method == "ntk-aware-pro2":
        return _entropy_ratio(rows * cols, trained**2)
    return 1.0


def _entropy_ratio(test: int, train: int) -> float:
    return math.sqrt(math.log(2 * test) / math.log(train)) if 2 * test > train else 1.0
