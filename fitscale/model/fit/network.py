"""FiT and FiTv2 (arXiv 2402.12376, 2410.13925): a diffusion transformer over packs of images of any size.

1. Tokens of all images of a pack are embedded together; time and class give one conditioning vector per image.
2. Blocks run on the pack; attention stays within each image, positions are 2-D RoPE from each image's own size.
3. The final layer predicts `out_channels` numbers for each latent pixel of each token's patch.

With sequence parallelism the tokens are cut over the tensor-parallel ranks from after the embedding to before the final
layer; both ends are replicated. No process group is named here: `fitscale.parallel.layers` knows them. Modules have the
names of the published checkpoints; their weights are set afterwards, by `init` or `weights`.

Shapes: T tokens of the pack, S images, D hidden size, C numbers in a token, K head dimension, H heads of this rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitscale.config.schema import ParallelConfig
from fitscale.model.common.attention import packed_attention
from fitscale.model.common.embedders import ClassEmbedder, TimeEmbedder, TokenEmbedder
from fitscale.model.common.fused import RMS_EPS, gate, gate_modulate, modulate, swiglu, turned_heads
from fitscale.model.common.layout import PackLayout
from fitscale.model.common.recompute import run_block
from fitscale.model.common.regions import Biased, at_least_fp32
from fitscale.model.common.rope import Rope, pack_rope
from fitscale.model.common.ternary import linears
from fitscale.model.fit.config import TIME_CHANNELS, FitConfig
from fitscale.parallel.layers import enter_sharded, gather_tokens, scatter_tokens


class FiT(nn.Module):
    """The network. `config` may be replaced by one `with_positions`, to generate beyond the sizes trained on."""

    def __init__(self, config: FitConfig, parallel: ParallelConfig) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel
        hidden = config.hidden_size
        self.x_embedder = TokenEmbedder(config.token_channels, hidden)
        self.t_embedder = TimeEmbedder(TIME_CHANNELS, hidden)
        self.y_embedder = ClassEmbedder(config.num_classes, hidden)
        self.global_adaLN_modulation = (
            nn.Sequential(nn.Identity(), nn.Linear(hidden, 6 * hidden)) if config.adaln_rank is not None else None
        )
        self.blocks = nn.ModuleList(Block(config, parallel.sequence_parallel) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, tokens_TC: Tensor, t_S: Tensor, labels_S: Tensor, layout: PackLayout) -> tuple[Tensor]:
        """Predict velocity (FiTv2) or noise and the variance's interpolation (FiT) for every token.

        Args:
            tokens_TC: noisy tokens of all images of the pack.
            t_S: time of each image, in [0, 1] (FiTv2) or DDPM steps 0..999 (FiT).
            labels_S: class of each image; `num_classes` is "no class".

        Returns:
            float32 (T, patch_size^2 * out_channels), channel order `(c p1 p2)`; one scale.
        """
        split_tokens = self.parallel.sequence_parallel
        rope = pack_rope(self.config.rope, self.config.head_dim, layout.sizes, tokens_TC.device)
        x_TD = self.x_embedder(tokens_TC)
        c_SD = F.silu(self.t_embedder(t_S) + self.y_embedder(labels_S))  # once for all: nn.Identity is where it was
        x_TD = self._blocks(scatter_tokens(x_TD) if split_tokens else x_TD, c_SD, layout, rope)
        return (at_least_fp32(self.final_layer(gather_tokens(x_TD) if split_tokens else x_TD, c_SD, layout)),)

    def _blocks(self, x_TD: Tensor, c_SD: Tensor, layout: PackLayout, rope: Rope) -> Tensor:
        shared_S6D = None if self.global_adaLN_modulation is None else self.global_adaLN_modulation(c_SD)
        every = self.parallel.activation_checkpoint_every
        for index, block in enumerate(self.blocks):
            x_TD = run_block(block, index, every, x_TD, c_SD, shared_S6D, layout, rope)
        return x_TD


class Block(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the image's conditioning (AdaLN).

    The six vectors come from AdaLN-LoRA (FiTv2: low-rank per block, plus a part shared by all blocks) or from a full
    linear per block (FiT). Where the block's linears are ternary, an RMSNorm over all six follows its own part (TerDiT,
    arXiv 2405.14854).
    """

    def __init__(self, config: FitConfig, sequence_parallel: bool) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.attn = Attention(config, sequence_parallel)
        self.mlp = SwiGLU(config, sequence_parallel)
        hidden, rank, make = config.hidden_size, config.adaln_rank, linears(config.quantise).whole
        products = [make(hidden, 6 * hidden)] if rank is None else [make(hidden, rank), make(rank, 6 * hidden)]
        norm = [nn.RMSNorm(6 * hidden, eps=RMS_EPS)] if config.is_ternary else []
        self.adaLN_modulation = nn.Sequential(nn.Identity(), *products, *norm)

    def forward(self, x_TD: Tensor, c_SD: Tensor, shared_S6D: Tensor | None, layout: PackLayout, rope: Rope) -> Tensor:
        mods_S6D = self.adaLN_modulation(c_SD)
        if shared_S6D is not None:
            mods_S6D = mods_S6D + shared_S6D
        if self.sequence_parallel:
            mods_S6D = enter_sharded(mods_S6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = mods_S6D.chunk(6, dim=-1)
        own = layout.own
        x_TD, attended_TD = modulate(x_TD, shift1, scale1, own)
        x_TD, given_TD = gate_modulate(x_TD, self.attn(attended_TD, layout, rope), gate1, shift2, scale2, own)
        return gate(x_TD, self.mlp(given_TD), gate2, own)


class Attention(nn.Module):
    """Self-attention with 2-D RoPE; heads are split over the tensor-parallel ranks.

    The rows of `qkv` lie head by head, (heads, 3, K), so that a rank's shard is one run; the published layout is
    (3, heads, K), see `weights`.
    """

    def __init__(self, config: FitConfig, sequence_parallel: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        make = linears(config.quantise)
        self.qkv = make.column(config.hidden_size, 3 * config.hidden_size, sequence_parallel)
        self.normed = config.is_v2
        weighted = config.is_v2 and config.qk_norm_weight
        self.q_norm, self.k_norm = (HeadNorm(config.head_dim) if weighted else None for _ in range(2))
        self.proj = make.row(config.hidden_size, config.hidden_size, sequence_parallel)

    def forward(self, x: Tensor, layout: PackLayout, rope: Rope) -> Biased:
        product, bias = self.qkv(x)
        norms = (self.q_norm(), self.k_norm()) if self.q_norm and self.k_norm else None
        heads = product.shape[-1] // (3 * self.head_dim)
        qkv_THK = turned_heads((product, bias), (heads, self.head_dim), rope, norms, self.normed)
        return self.proj(packed_attention(*qkv_THK, layout).flatten(1))


class HeadNorm(nn.Module):
    """The weight of a LayerNorm over the head dimension, without a bias; all heads of all ranks share it."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self) -> Tensor:
        return enter_sharded(self.weight).clone()  # each rank has the shares of its heads; ZeRO-3 takes the weight back


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1_g x) * fc1_x x); its width is split over the tensor-parallel ranks."""

    def __init__(self, config: FitConfig, sequence_parallel: bool) -> None:
        super().__init__()
        hidden, width, make = config.hidden_size, config.mlp_hidden_size, linears(config.quantise)
        self.fc1_g = make.column(hidden, width, sequence_parallel)
        self.fc1_x = make.column(hidden, width, sequence_parallel)
        self.fc2 = make.row(width, hidden, sequence_parallel)

    def forward(self, x: Tensor) -> Biased:
        return self.fc2(swiglu(self.fc1_g(x), self.fc1_x(x)))


class FinalLayer(nn.Module):
    """Tokens (T, D) -> (T, patch^2 * out_channels), channel order `(c p1 p2)`."""

    def __init__(self, config: FitConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(hidden, 2 * hidden))
        self.linear = nn.Linear(hidden, config.patch_size**2 * config.out_channels)

    def forward(self, x_TD: Tensor, c_SD: Tensor, layout: PackLayout) -> Tensor:
        shift, scale = self.adaLN_modulation(c_SD).chunk(2, dim=-1)
        return self.linear(modulate(x_TD, shift, scale, layout.whole)[1])
