"""A pack's images as grids: what convolutions and tables of positions need, and no other part of the network.

1. Images of equal shape are brought together once, at the network's input, and put back at its outputs. In between, a
   group of n equal images is a run of rows, and its grid (n, height, width, channels) a view.
2. The Transformer stage sees each image as its class token, then its tokens; the ConvNeXt stage as latent pixels, in
   raster order over the whole image.

Shapes: T tokens of the pack, S images, X = T + S tokens with the class tokens, P = 4 T latent pixels, D any width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from fitscale.flow.transfer import send
from fitscale.model.common.layout import PackLayout, Segments
from fitscale.model.dimr.config import PIXELS


@dataclass(frozen=True)
class Grids:
    """Where things lie in a pack whose images are sorted by shape. Index tensors are int64, on the tokens' device."""

    groups: list[tuple[int, int, int]]  # images, rows and columns (in patches) of each group of equal images
    image_S: Tensor  # place in the pack of each image
    token_T: Tensor  # place in the pack of each token
    back_T: Tensor  # its inverse
    raster_P: Tensor  # of each pixel, in raster order over its image: its place in the order of tokens, (T p1 p2)
    token_order_P: Tensor  # its inverse
    sequence_X: Tensor  # of each row of the Transformer: its place among all class tokens, then all tokens
    patch_T: Tensor  # of each token: its row in the Transformer
    sequences: PackLayout  # of the Transformer's rows
    tokens: Segments
    pixels: Segments

    def convolve(self, rows: Tensor, scale: int, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """`layer`, from (n, D, height, width) to as many pixels, over the images of each shape.

        Args:
            rows: (T scale^2, D), in raster order.
            scale: pixels along a patch.
        """
        images = self._by_shape(rows, scale)
        return torch.cat([layer(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(0, 2) for grid in images])

    def add(self, rows: Tensor, scale: int, table: Callable[[int, int], Tensor]) -> Tensor:
        """`rows` plus, at every image, `table(height, width)` of its shape: (height, width, D)."""
        images = self._by_shape(rows, scale)
        return torch.cat([(grid + table(*grid.shape[1:3])).flatten(0, 2) for grid in images])

    def _by_shape(self, rows: Tensor, scale: int) -> list[Tensor]:
        """(n, height, width, D) of each group."""
        shapes = [(n, height * scale, width * scale) for n, height, width in self.groups]
        parts = rows.split([n * height * width for n, height, width in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


@lru_cache(maxsize=4)
def pack_grids(layout: PackLayout) -> Grids:
    """Work out the grids of a pack, on the host; samplers come with the same layout again and again."""
    device = layout.cu_seqlens.device
    order = sorted(range(len(layout.sizes)), key=layout.sizes.__getitem__)
    sizes = [layout.sizes[image] for image in order]
    lengths, places = [rows * cols for rows, cols in sizes], torch.arange(sum(layout.whole.lengths))
    images = places.split(layout.whole.lengths)
    token_T = torch.cat([images[image] for image in order])
    sorted_images = places.split(lengths)
    raster_P = torch.cat([_raster(part_T.view(size)) for part_T, size in zip(sorted_images, sizes, strict=True)])
    class_rows = torch.arange(len(sizes)).split(1)
    rows_of_both = zip(class_rows, (len(sizes) + part_T for part_T in sorted_images), strict=True)
    sequence_X = torch.cat([part for both in rows_of_both for part in both])
    with_class = [length + 1 for length in lengths]
    segments = Segments(with_class, device)
    bounds = torch.tensor([0, *with_class]).cumsum(0).int()
    return Grids(
        groups=[(len(list(equal)), *size) for size, equal in groupby(sizes)],
        image_S=send(torch.tensor(order), device),
        token_T=send(token_T, device),
        back_T=send(_inverse(token_T), device),
        raster_P=send(raster_P, device),
        token_order_P=send(_inverse(raster_P), device),
        sequence_X=send(sequence_X, device),
        patch_T=send((sequence_X >= len(sizes)).nonzero()[:, 0], device),
        sequences=PackLayout(sizes, send(bounds, device), segments, segments),
        tokens=Segments(lengths, device),
        pixels=Segments([PIXELS * length for length in lengths], device),
    )


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))


def _raster(patches: Tensor) -> Tensor:
    """Of an image's pixels in raster order: their places in the order of tokens; `patches` are its tokens'."""
    pixels = PIXELS * patches[:, :, None, None] + torch.arange(PIXELS).view(2, 2)
    return pixels.permute(0, 2, 1, 3).flatten()
