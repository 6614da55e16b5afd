"""Where the images of a pack lie: what every backbone's network is given beside the tokens.

It is worked out once per pack, on the host, so that no layer asks the device for a length. Position tables are not in
it: they belong to the backbones.

Shapes: T tokens of the pack, S images.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fitscale.parallel.layers import tp_rank, tp_size


@dataclass(frozen=True)
class PackLayout:
    """The images of a pack, one after the other, each in raster order."""

    sizes: list[tuple[int, int]]  # rows and columns of each image, in patches
    cu_seqlens: Tensor  # int32 (S + 1,), on the tokens' device: where each image starts, and T
    lengths: list[int]  # tokens of each image
    image_T: Tensor  # int64, image of each token
    own_image_T: Tensor  # of this rank's tokens between the tensor-parallel regions


def pack_layout(
    sizes_S2: Tensor, cu_seqlens: Tensor, device: torch.device, sequence_parallel: bool = False
) -> PackLayout:
    """Work out the layout; sizes (in patches) and cu_seqlens cost a device synchronisation if they are on one.

    Under sequence parallelism T divides by the tensor-parallel size.
    """
    sizes, offsets = [(rows, cols) for rows, cols in sizes_S2.tolist()], cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    assert lengths == [rows * cols for rows, cols in sizes], "cu_seqlens and sizes do not describe the same images"
    image_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    own_image_T = image_T
    if sequence_parallel:
        assert offsets[-1] % tp_size() == 0, f"{offsets[-1]} tokens do not divide by {tp_size()} ranks"
        own_image_T = image_T.chunk(tp_size())[tp_rank()]
    return PackLayout(sizes, cu_seqlens.to(device, torch.int32), lengths, image_T, own_image_T)
