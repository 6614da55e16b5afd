"""What fused regions are made of: inputs whose bias is still to be added, and vectors of images that meet their tokens.

Vectors of an image (S rows) meet its tokens (T rows) inside the formulas. Their gradients are sums over the tokens of
an image, a contiguous run of rows, taken outside (`sum_per_image`).

Shapes: T tokens of this rank, S images, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitscale.model.common.compiler import formula, is_compiled
from fitscale.model.common.layout import Segments

Biased = tuple[Tensor, Tensor | None]  # what a linear gives before its bias, and that, if it has one


def at_least_fp32(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ready(out: Biased) -> tuple[Tensor, Tensor | None]:
    """A compiled region adds a bias where it reads; otherwise that is done here."""
    return out if is_compiled() else (biased(*out), None)


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias."""
    return x if bias is None else x + bias


def sum_per_image(x_TD: Tensor, segments: Segments) -> Tensor:
    """Sums over each image's tokens, (T, D) -> (S, D)."""
    if segments.equal:
        return x_TD.unflatten(0, (-1, segments.equal)).sum(1)
    if not x_TD.is_cuda:
        return F.embedding_bag(segments.token_T, x_TD, segments.start_S, mode="sum")
    # On CUDA that is slow for few long images, and index_add_ adds in no fixed order; a product is neither.
    image_S = torch.arange(len(segments.lengths), device=x_TD.device)
    return (image_S[:, None] == segments.image_T).to(x_TD.dtype) @ x_TD


def with_vectors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call the formula with tensors of tokens, and with vectors of images that meet them: by their index, or, outside
    a compiler and where images are equal, as a dimension of their own."""
    run = formula(function)

    def call(segments: Segments, tokens: list[Tensor | None], vectors: list[Tensor], *options: bool) -> Any:
        if is_compiled() or not segments.equal:
            if is_compiled() and len(segments.lengths) == 1:  # a size of 1 would be compiled for itself
                vectors = [_twice(vector_SD) for vector_SD in vectors]
            return run(segments.image_T, *tokens, *vectors, *options)
        shape = (-1, segments.equal)
        grouped = [x if x is None or x.dim() == 1 else x.unflatten(0, shape) for x in tokens]
        results = run(None, *grouped, *(vector_SD[:, None] for vector_SD in vectors), *options)
        return [result.flatten(0, 1) for result in results]

    return call


def _twice(vector_SD: Tensor) -> Tensor:
    """Its one row, twice, laid out in memory as rows of its origin are: what is compiled depends on that, too."""
    stride, start = vector_SD.stride(), vector_SD.storage_offset()
    room = vector_SD.new_empty(start + stride[0] + vector_SD.shape[1])
    return room.as_strided((2, vector_SD.shape[1]), stride, start).copy_(vector_SD)


def at(image_T: Tensor | None, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Each token's image's row."""
    return vectors if image_T is None else tuple(vector_SD.index_select(0, image_T) for vector_SD in vectors)


def bias_gradient(grad: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else grad.sum(0)
