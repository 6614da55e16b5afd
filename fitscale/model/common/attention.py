"""Attention within the images of a pack: tokens of one image see each other, never those of another.

On CUDA in bf16 or fp16, torch's variable-length kernel takes the whole pack at once; elsewhere
scaled_dot_product_attention runs image by image (on CPUs faster than a padded batch, a block-diagonal mask or nested
tensors).

Shapes: T tokens of the pack, H heads (of this rank), K head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fitscale.model.common.layout import PackLayout


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
