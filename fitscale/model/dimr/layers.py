"""The layers of DiMR that other backbones do not have: vectors of time, tables of positions, convolutions on packs.

Shapes: R rows (tokens or latent pixels) in the order of `grids`, S images, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitscale.config.errors import UserError
from fitscale.model.common.regions import at_least_fp32
from fitscale.model.dimr.config import DimrConfig
from fitscale.model.dimr.grids import Grids


class TimeVector(nn.Module):
    """A vector of time: s param0 + (1 - s) param1, where s = sigmoid((nodecay_weight + 1) tau + nodecay_bias)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.param0, self.param1, self.nodecay_weight, self.nodecay_bias = (
            nn.Parameter(torch.empty(width)) for _ in range(4)
        )

    def forward(self, tau_S: Tensor) -> Tensor:
        """(S,) -> (S, D), in fp32 at least."""
        names = ("param0", "param1", "nodecay_weight", "nodecay_bias")
        start, end, weight, bias = (at_least_fp32(getattr(self, name)) for name in names)
        share_SD = torch.sigmoid((weight + 1) * tau_S[:, None] + bias)
        return torch.lerp(end, start, share_SD)


class TimeNorm(nn.Module):
    """Scale and shift of a time-dependent LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = TimeVector(width), TimeVector(width)

    def forward(self, tau_S: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) -> two (S, D)."""
        return self.weight(tau_S), self.bias(tau_S)


class PatchLinear(nn.Module):
    """A convolution whose stride is its size, on patches `(c p1 p2)`: a linear layer."""

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, side, side))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, patches_RC: Tensor) -> Tensor:
        return F.linear(patches_RC.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class GridConvolution(nn.Conv2d):
    """A convolution with zero padding on every image of a pack, `scale` rows along a patch; (R, D) -> (R, out)."""

    def __init__(self, width: int, out: int, side: int, groups: int, scale: int) -> None:
        super().__init__(width, out, side, padding=side // 2, groups=groups)
        self.scale = scale

    def forward(self, x_RD: Tensor, grids: Grids) -> Tensor:  # type: ignore[override]
        return grids.convolve(x_RD, self.scale, super().forward)


class PositionTable(nn.Module):
    """One row of a table for each place of the trained shape, a square of `max_side` patches.

    Other shapes get the table resized to theirs (bicubic, corners not aligned), so that both stages cover the same
    extent, or, with `positions` = crop, its top left corner, as in the published code. A single row of patches, as
    padding is, may be longer than the table: then it is resized.
    """

    def __init__(self, config: DimrConfig, width: int, scale: int) -> None:
        super().__init__()
        self.side, self.scale, self.crops = config.max_side * scale, scale, config.positions == "crop"
        self.weight = nn.Parameter(torch.empty(self.side**2, width))

    def forward(self, x_RD: Tensor, grids: Grids) -> Tensor:
        """`x_RD` plus each row's position.

        Raises:
            UserError: an image is larger than a table that is not resized.
        """
        return grids.add(x_RD, self.scale, self._table)

    def _table(self, height: int, width: int) -> Tensor:
        table = self.weight.unflatten(0, (self.side, self.side))
        if (height, width) == (self.side, self.side):
            return table
        if self.crops and (width <= self.side or height > self.scale):
            if max(height, width) > self.side:
                raise UserError(
                    f"model.positions: crop has none for an image of {height // self.scale} x {width // self.scale} "
                    f"patches; valid: at most model.max_side = {self.side // self.scale} on a side, or resize"
                )
            return table[:height, :width]
        grid = at_least_fp32(table).permute(2, 0, 1)[None]
        resized = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        return resized[0].permute(1, 2, 0).to(table.dtype)
