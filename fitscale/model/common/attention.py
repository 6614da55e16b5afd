"""Attention within the images of a pack: tokens of one image see each other, never those of another.

On CUDA in bf16 or fp16, torch's variable-length kernel takes the whole pack at once; elsewhere
scaled_dot_product_attention runs over runs of images of one length (on CPUs faster than a padded batch, a
block-diagonal mask or nested tensors).

Shapes: T tokens of the pack, H heads (of this rank), K head dimension.
"""

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fitscale.model.common.layout import PackLayout

KERNEL_MULTIPLE = 8  # of which the variable-length kernel wants a head dimension: others are filled up with zeros


def packed_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout) -> Tensor:
    """softmax(q k^T / sqrt(K)) v within each image; (T, H, K)."""
    lengths = layout.whole.lengths
    if q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16):
        return _kernel_attention(q_THK, k_THK, v_THK, layout)
    # Images of one length that follow each other are a batch. split, unlike slices, has a backward pass that is one
    # concatenation.
    runs = [(length, len(list(images))) for length, images in groupby(lengths)]
    tokens = [length * count for length, count in runs]
    parts = zip(*(x.split(tokens) for x in (q_THK, k_THK, v_THK)), strict=True)
    return torch.cat([_batch_attention(q, k, v, length) for (q, k, v), (length, _) in zip(parts, runs, strict=True)])


def _kernel_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout) -> Tensor:
    longest, bounds, head_dim = max(layout.whole.lengths), layout.cu_seqlens, q_THK.shape[-1]
    lacking = -head_dim % KERNEL_MULTIPLE
    if lacking:
        q_THK, k_THK, v_THK = (F.pad(x, (0, lacking)) for x in (q_THK, k_THK, v_THK))
    out_THK: Any = varlen_attn(q_THK, k_THK, v_THK, bounds, bounds, longest, longest, scale=head_dim**-0.5)
    return out_THK[..., :head_dim] if lacking else out_THK


def _batch_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, length: int) -> Tensor:
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_THK, k_THK, v_THK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
