"""The gated MLP of the FiT family."""

import torch.nn.functional as F
from torch import Tensor, nn

from fitscale.parallel.layers import ColumnLinear, RowLinear


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1_g x) * fc1_x x); its width is split over the tensor-parallel ranks."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int, sequence_parallel: bool) -> None:
        super().__init__()
        self.fc1_g = ColumnLinear(hidden_size, mlp_hidden_size, sequence_parallel)
        self.fc1_x = ColumnLinear(hidden_size, mlp_hidden_size, sequence_parallel)
        self.fc2 = RowLinear(mlp_hidden_size, hidden_size, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))
