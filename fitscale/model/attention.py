"""Attention within the images of a pack: tokens of one image see each other, never those of another.

`PackLayout` is worked out once per forward pass, on the host, so that no layer asks the device for a length. On CUDA in
bf16 or fp16, torch's variable-length kernel takes the whole pack at once; elsewhere scaled_dot_product_attention runs
image by image (on CPUs faster than a padded batch, a block-diagonal mask or nested tensors).

Shapes: T tokens of the pack, S images, H heads (of this rank), K head dimension, D hidden size.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from fitscale.config.schema import ModelConfig, RopeConfig
from fitscale.model.rope import cached_rope_tables, rotate
from fitscale.parallel.layers import ColumnLinear, RowLinear, tp_rank, tp_size

NORM_EPS = 1e-6


@dataclass(frozen=True)
class PackLayout:
    """Where the images of a pack lie, and where their patches lie in them."""

    cu_seqlens: Tensor  # int32 (S + 1,), on the tokens' device
    lengths: list[int]  # tokens of each image
    image_T: Tensor  # int64, image of each token
    own_image_T: Tensor  # of this rank's tokens between the tensor-parallel regions
    cos_TK: Tensor
    sin_TK: Tensor


def pack_layout(
    sizes_S2: Tensor, cu_seqlens: Tensor, rope: RopeConfig, head_dim: int, device: torch.device, sequence_parallel: bool
) -> PackLayout:
    """Work out the layout; sizes (in patches) and cu_seqlens cost a device synchronisation if they are on one."""
    sizes, offsets = sizes_S2.tolist(), cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    assert lengths == [rows * cols for rows, cols in sizes], "cu_seqlens and sizes do not describe the same images"
    tables = [cached_rope_tables(rope, head_dim, rows, cols, device) for rows, cols in sizes]
    image_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    own_image_T = image_T
    if sequence_parallel:
        assert offsets[-1] % tp_size() == 0, f"{offsets[-1]} tokens do not divide by {tp_size()} ranks"
        own_image_T = image_T.chunk(tp_size())[tp_rank()]
    return PackLayout(
        cu_seqlens=cu_seqlens.to(device, torch.int32),
        lengths=lengths,
        image_T=image_T,
        own_image_T=own_image_T,
        cos_TK=torch.cat([cos for cos, _ in tables]),
        sin_TK=torch.cat([sin for _, sin in tables]),
    )


def packed_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout) -> Tensor:
    """softmax(q k^T / sqrt(K)) v within each image; (T, H, K)."""
    if q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16):
        longest, bounds = max(layout.lengths), layout.cu_seqlens
        return varlen_attn(q_THK, k_THK, v_THK, bounds, bounds, longest, longest)  # type: ignore[return-value]
    return _attention_per_image(q_THK, k_THK, v_THK, layout.lengths)


def _attention_per_image(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, lengths: list[int]) -> Tensor:
    # split, unlike slices, has a backward pass that is one concatenation.
    images = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q_THK, k_THK, v_THK)), strict=True)
    out_1HTK = torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in images], dim=2)
    return out_1HTK[0].transpose(0, 1)


class Attention(nn.Module):
    """Self-attention with 2-D RoPE; heads are split over the tensor-parallel ranks.

    The rows of `qkv` lie head by head, (heads, 3, K), so that a rank's piece is one run; the published layout is
    (3, heads, K), see `published.py`.
    """

    def __init__(self, config: ModelConfig, sequence_parallel: bool) -> None:
        super().__init__()
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        self.qkv = ColumnLinear(config.hidden_size, 3 * config.hidden_size, sequence_parallel)
        self.proj = RowLinear(config.hidden_size, config.hidden_size, sequence_parallel)

    def forward(self, x: Tensor, layout: PackLayout) -> Tensor:
        q_THK, k_THK, v_THK = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim)).unbind(2)
        if self.qk_norm:
            q_THK, k_THK = (F.layer_norm(y, (self.head_dim,), eps=NORM_EPS) for y in (q_THK, k_THK))
        q_THK, k_THK = (rotate(y, layout.cos_TK, layout.sin_TK) for y in (q_THK, k_THK))
        return self.proj(packed_attention(q_THK, k_THK, v_THK, layout).flatten(1))
