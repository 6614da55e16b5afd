"""Where the images of a pack lie: what every backbone's network is given beside the tokens.

It is worked out once per pack, on the host, so that no layer asks the device for a length. Position tables are not in
it: they belong to the backbones.

Shapes: T tokens of the pack, S images.
"""

from dataclasses import InitVar, dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from fitscale.flow.transfer import send
from fitscale.parallel.layers import tp_rank, tp_size


@dataclass(frozen=True)
class Segments:
    """Which of some tokens belong to which image; an image's are contiguous."""

    lengths: list[int]  # tokens of each image; 0 if it has none here
    device: InitVar[torch.device]  # the tokens'
    image_T: Tensor = field(init=False)  # int64, image of each token
    token_T: Tensor = field(init=False)  # int64, 0 to T - 1
    start_S: Tensor = field(init=False)  # int64, first token of each image

    def __post_init__(self, device: torch.device) -> None:
        lengths_S = torch.tensor(self.lengths)
        image_T = torch.repeat_interleave(lengths_S)
        tensors = {
            "image_T": image_T,
            "token_T": torch.arange(len(image_T)),
            "start_S": lengths_S.cumsum(0) - lengths_S,
        }
        for name, tensor in tensors.items():
            object.__setattr__(self, name, send(tensor, device))

    @property
    def equal(self) -> int:
        """Tokens of an image, if all have as many, else 0."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else 0


@dataclass(frozen=True, eq=False)  # hashed by identity: a backbone may keep what it worked out for a pack
class PackLayout:
    """The images of a pack, one after the other, each in raster order."""

    sizes: list[tuple[int, int]]  # rows and columns of each image, in patches
    cu_seqlens: Tensor  # int32 (S + 1,), on the tokens' device: where each image starts, and T
    whole: Segments  # all tokens
    own: Segments  # this rank's tokens between the tensor-parallel regions


def pack_layout(
    sizes_S2: Tensor, cu_seqlens: Tensor, device: torch.device, sequence_parallel: bool = False
) -> PackLayout:
    """Work out the layout; sizes (in patches) and cu_seqlens cost a device synchronisation if they are on one.

    Under sequence parallelism T divides by the tensor-parallel size.
    """
    sizes, offsets = [(rows, cols) for rows, cols in sizes_S2.tolist()], cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    assert lengths == [rows * cols for rows, cols in sizes], "cu_seqlens and sizes do not describe the same images"
    whole = own = Segments(lengths, device)
    if sequence_parallel:
        assert offsets[-1] % tp_size() == 0, f"{offsets[-1]} tokens do not divide by {tp_size()} ranks"
        own_tokens = offsets[-1] // tp_size()
        first = own_tokens * tp_rank()
        cuts = [min(max(offset - first, 0), own_tokens) for offset in offsets]
        own = Segments([end - start for start, end in pairwise(cuts)], device)
    return PackLayout(sizes, send(cu_seqlens.to(torch.int32), device), whole, own)
