"""Flag-DiT and Large-DiT (arXiv 2405.05945): a diffusion transformer of LLaMA's blocks over packs of images.

1. Tokens of all images of a pack are embedded together; time and class give one conditioning vector per image.
2. Blocks run on the pack; attention stays within each image, positions are 1-D RoPE over its tokens in raster order.
3. The final layer predicts `final_channels` numbers for each latent pixel, of which `out_channels` are used.

Tensor and sequence parallelism as in `model.fit`; the norms of q and k reach over the heads of all ranks. Modules have
the names of the published checkpoints; their weights are set afterwards, by `init` or `weights`.

Shapes: T tokens of the pack, S images, D hidden size, W width of the conditioning, C numbers in a token, H heads of
this rank, K head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitscale.config.schema import ParallelConfig
from fitscale.model.common.attention import packed_attention
from fitscale.model.common.embedders import ClassEmbedder, TimeEmbedder
from fitscale.model.common.fused import RMS_EPS, gate, gate_modulate, modulate, swiglu
from fitscale.model.common.layout import PackLayout
from fitscale.model.common.recompute import run_block
from fitscale.model.common.regions import Biased, at_least_fp32
from fitscale.model.common.rope import Rope, pack_rope
from fitscale.model.common.ternary import linears
from fitscale.model.common.wide_heads import wide_turned_heads
from fitscale.model.flag.config import TIME_CHANNELS, FlagConfig
from fitscale.parallel.layers import (
    SplitVectors,
    enter_sharded,
    gather_tokens,
    scatter_tokens,
)


class FlagDiT(nn.Module):
    """The network. `config` may be replaced by one `with_positions`, to generate beyond the sizes trained on."""

    def __init__(self, config: FlagConfig, parallel: ParallelConfig) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel
        self.x_embedder = nn.Linear(config.token_channels, config.hidden_size)
        self.t_embedder = TimeEmbedder(TIME_CHANNELS, config.condition_size)
        self.y_embedder = ClassEmbedder(config.num_classes, config.condition_size)
        self.layers = nn.ModuleList(Block(config, parallel.sequence_parallel) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, tokens_TC: Tensor, t_S: Tensor, labels_S: Tensor, layout: PackLayout) -> tuple[Tensor]:
        """Predict velocity (flag_dit) or noise and the variance's interpolation (large_dit) for every token.

        Args:
            tokens_TC: noisy tokens of all images of the pack.
            t_S: time of each image, in [0, 1] (flag_dit) or DDPM steps 0..999 (large_dit).
            labels_S: class of each image; `num_classes` is "no class".

        Returns:
            float32 (T, patch_size^2 * out_channels), channel order `(c p1 p2)`; one scale.
        """
        split_tokens = self.parallel.sequence_parallel
        rope = pack_rope(self.config.rope, self.config.head_dim, layout.sizes, tokens_TC.device)
        x_TD = self.x_embedder(tokens_TC.to(self.x_embedder.weight.dtype))
        c_SW = F.silu(self.t_embedder(t_S) + self.y_embedder(labels_S))  # once for all: nn.Identity is where it was
        x_TD = self._blocks(scatter_tokens(x_TD) if split_tokens else x_TD, c_SW, layout, rope)
        return (at_least_fp32(self.final_layer(gather_tokens(x_TD) if split_tokens else x_TD, c_SW, layout)),)

    def _blocks(self, x_TD: Tensor, c_SW: Tensor, layout: PackLayout, rope: Rope) -> Tensor:
        every = self.parallel.activation_checkpoint_every
        for index, block in enumerate(self.layers):
            x_TD = run_block(block, index, every, x_TD, c_SW, layout, rope)
        return x_TD


class Block(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm, shifted, scaled and gated by the image's conditioning (AdaLN).

    Where the linears are ternary, an RMSNorm over all six vectors together follows AdaLN's (TerDiT, arXiv 2405.14854).
    """

    def __init__(self, config: FlagConfig, sequence_parallel: bool) -> None:
        super().__init__()
        self.sequence_parallel, hidden = sequence_parallel, config.hidden_size
        self.attention = Attention(config, sequence_parallel)
        self.feed_forward = SwiGLU(config, sequence_parallel)
        self.attention_norm, self.ffn_norm = NormWeight(hidden), NormWeight(hidden)
        modulation: nn.Module = linears(config.quantise).whole(config.condition_size, 6 * hidden)
        norm = [nn.RMSNorm(6 * hidden, eps=RMS_EPS)] if config.is_ternary else []
        self.adaLN_modulation = nn.Sequential(nn.Identity(), modulation, *norm)

    def forward(self, x_TD: Tensor, c_SW: Tensor, layout: PackLayout, rope: Rope) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(c_SW)
        own = layout.own
        x_TD, attended_TD = modulate(x_TD, shift1, scale1, own, rms=True)
        attended = self.attention(attended_TD, layout, rope)
        x_TD, given_TD = gate_modulate(x_TD, attended, gate1, shift2, scale2, own, rms=True)
        return gate(x_TD, self.feed_forward(given_TD), gate2, own)

    def _modulation(self, c_SW: Tensor) -> tuple[Tensor, ...]:
        """Six vectors of each image (S, D); the norms' weights are in the scales."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_SW).chunk(6, dim=-1)
        vectors = shift1, self.attention_norm(scale1), gate1, shift2, self.ffn_norm(scale2), gate2
        return enter_sharded(torch.cat(vectors, dim=-1)).chunk(6, dim=-1) if self.sequence_parallel else vectors


class NormWeight(nn.Module):
    """The weight of an RMSNorm, as part of the scale that follows the norm."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, scale_SD: Tensor) -> Tensor:
        return (at_least_fp32(self.weight) * (1 + at_least_fp32(scale_SD)) - 1).to(scale_SD.dtype)


class Attention(nn.Module):
    """Self-attention with 1-D RoPE, q and k normalised over all heads; heads are split over tensor-parallel ranks."""

    def __init__(self, config: FlagConfig, sequence_parallel: bool) -> None:
        super().__init__()
        hidden, self.head_dim, make = config.hidden_size, config.head_dim, linears(config.quantise)
        self.wq, self.wk, self.wv = (make.column(hidden, hidden, sequence_parallel, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = SplitVectors(hidden), SplitVectors(hidden)
        self.wo = make.row(hidden, hidden, sequence_parallel, bias=False)

    def forward(self, x: Tensor, layout: PackLayout, rope: Rope) -> Biased:
        q_TD, k_TD, v_TD = (linear(x)[0] for linear in (self.wq, self.wk, self.wv))
        q_THK, k_THK = wide_turned_heads(q_TD, k_TD, self.q_norm(), self.k_norm(), rope)
        return self.wo(packed_attention(q_THK, k_THK, v_TD.unflatten(-1, (-1, self.head_dim)), layout).flatten(1))


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x) * w3 x); its width is split over the tensor-parallel ranks."""

    def __init__(self, config: FlagConfig, sequence_parallel: bool) -> None:
        super().__init__()
        hidden, width, make = config.hidden_size, config.mlp_hidden_size, linears(config.quantise)
        self.w1, self.w3 = (make.column(hidden, width, sequence_parallel, bias=False) for _ in range(2))
        self.w2 = make.row(width, hidden, sequence_parallel, bias=False)

    def forward(self, x: Tensor) -> Biased:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class FinalLayer(nn.Module):
    """Tokens (T, D) -> (T, patch^2 * out_channels), channel order `(c p1 p2)`; the linear's rows are `(p1 p2 c)`."""

    def __init__(self, config: FlagConfig) -> None:
        super().__init__()
        hidden, self.config = config.hidden_size, config
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(config.condition_size, 2 * hidden))
        self.linear = nn.Linear(hidden, config.patch_size**2 * config.final_channels)

    def forward(self, x_TD: Tensor, c_SW: Tensor, layout: PackLayout) -> Tensor:
        shift, scale = self.adaLN_modulation(c_SW).chunk(2, dim=-1)
        pixels = self.linear(modulate(x_TD, shift, scale, layout.whole)[1]).unflatten(
            1, (-1, self.config.final_channels)
        )
        return pixels[:, :, : self.config.out_channels].transpose(1, 2).flatten(1)
