"""What enters a network: tokens, times and labels, under the names of the published checkpoints.

Shapes: T tokens of the pack, S images, D hidden size, C numbers in a token.
"""

import math

import torch
from torch import Tensor, nn

_TIME_MAX_PERIOD = 10000.0


class TokenEmbedder(nn.Module):
    """Tokens (T, C) -> (T, D)."""

    def __init__(self, token_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(token_channels, hidden_size)

    def forward(self, tokens_TC: Tensor) -> Tensor:
        return self.proj(tokens_TC.to(self.proj.weight.dtype))


class TimeEmbedder(nn.Module):
    """Times (S,) -> (S, D): cosines then sines of `channels` / 2 frequencies, then an MLP. Times enter as they are."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t_S: Tensor) -> Tensor:
        half = self.channels // 2
        index = torch.arange(half, dtype=torch.float32, device=t_S.device)
        angles = t_S.float()[:, None] * torch.exp(-math.log(_TIME_MAX_PERIOD) * index / half)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        first: nn.Module = self.mlp[0]
        return self.mlp(waves.to(first.get_parameter("weight").dtype))


class ClassEmbedder(nn.Module):
    """Labels (S,) -> (S, D); label `num_classes` is "no class"."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels_S: Tensor) -> Tensor:
        return self.embedding_table(labels_S)
