"""A pack of images that are being drawn, as samplers and guidance see it.

Shape suffixes: T tokens of a pack, S images of a pack, C numbers in a token, 2 (row, column).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fitscale.flow.path import lengths_of, per_token
from fitscale.flow.transfer import send


@dataclass(frozen=True, eq=False)  # hashed by identity: a network may keep what it worked out for a pack
class PackShape:
    """What a pack asks for, and where its images start; `sizes_S2` in patches, all but the labels on the host.

    `indices` are the images' own: they decide noise, and what an image costs is counted under them. `scale_S` are
    their guidance scales; None is the config's for all.
    """

    labels_S: Tensor
    sizes_S2: Tensor
    cu_seqlens: Tensor
    indices: tuple[int, ...]
    scale_S: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image."""
        return lengths_of(self.cu_seqlens).tolist()

    def select(self, places: Sequence[int]) -> "PackShape":
        """The pack of the images at `places` alone."""
        chosen = torch.tensor(places, dtype=torch.int64)
        return PackShape(
            self.labels_S[send(chosen, self.labels_S.device)],
            self.sizes_S2[chosen],
            starts(self.sizes_S2[chosen].prod(1).tolist()),
            tuple(self.indices[place] for place in places),
            None if self.scale_S is None else self.scale_S[chosen],
        )

    def part(self, values_TC: Tensor, places: Sequence[int]) -> Tensor:
        """The rows of `values_TC` that belong to the images at `places`."""
        parts = values_TC.split(self.lengths)
        return torch.cat([values_TC[:0], *(parts[place] for place in places)])

    def spread(self, values_S: Tensor, x_TC: Tensor) -> Tensor:
        """One number per image over its tokens, (S,) -> (T, 1), in the type and on the device of `x_TC`."""
        return per_token(values_S.to(x_TC), self.cu_seqlens, len(x_TC))


def starts(lengths: Sequence[int]) -> Tensor:
    """Where images of so many tokens start, and the number of all tokens: int32 (S + 1,)."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


# model_fn(x_TC, t_S, pack) -> (T, numbers): what samplers evaluate; t_S is flow time, one per image, on the host
ModelFn = Callable[[Tensor, Tensor, PackShape], Tensor]
