"""The network of the tests' own backbone, of the layers that fitscale's have in common."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitscale.config.schema import ParallelConfig
from fitscale.model.common.attention import packed_attention
from fitscale.model.common.embedders import ClassEmbedder, TimeEmbedder, TokenEmbedder
from fitscale.model.common.fused import gate, gate_modulate, modulate
from fitscale.model.common.layout import PackLayout
from fitscale.model.common.regions import biased
from fitscale.parallel.layers import ColumnLinear, RowLinear, enter_sharded, gather_tokens, scatter_tokens
from tests.learned_dit.config import LearnedDitConfig
from tests.learned_dit.spec import TIME_CHANNELS


class LearnedDit(nn.Module):
    def __init__(self, config: LearnedDitConfig, parallel: ParallelConfig) -> None:
        super().__init__()
        self.config, self.parallel, hidden = config, parallel, config.hidden_size
        self.row_table = nn.Parameter(torch.empty(config.max_side, hidden))
        self.column_table = nn.Parameter(torch.empty(config.max_side, hidden))
        self.x_embedder = TokenEmbedder(config.token_channels, hidden)
        self.t_embedder = TimeEmbedder(TIME_CHANNELS, hidden)
        self.y_embedder = ClassEmbedder(config.num_classes, hidden)
        self.blocks = nn.ModuleList(Block(config, parallel.sequence_parallel) for _ in range(config.depth))
        self.coarse, self.fine = nn.Linear(hidden, config.in_channels), nn.Linear(hidden, config.token_channels)

    def forward(self, tokens_TC: Tensor, t_S: Tensor, labels_S: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        x_TD = self.x_embedder(tokens_TC) + self._positions(layout)
        c_SD = F.silu(self.t_embedder(t_S) + self.y_embedder(labels_S))
        split_tokens = self.parallel.sequence_parallel
        x_TD = scatter_tokens(x_TD) if split_tokens else x_TD
        for block in self.blocks:
            x_TD = block(x_TD, c_SD, layout)
        x_TD = gather_tokens(x_TD) if split_tokens else x_TD
        return self.coarse(x_TD).float(), self.fine(x_TD).float()

    def _positions(self, layout: PackLayout) -> Tensor:
        tables = [
            (self.row_table[:rows, None] + self.column_table[None, :cols]).flatten(0, 1) for rows, cols in layout.sizes
        ]
        return torch.cat(tables)


class Block(nn.Module):
    def __init__(self, config: LearnedDitConfig, sequence_parallel: bool) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.mlp_hidden_size
        self.head_dim, self.sequence_parallel = config.head_dim, sequence_parallel
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.qkv = ColumnLinear(hidden, 3 * hidden, sequence_parallel)
        self.proj = RowLinear(hidden, hidden, sequence_parallel)
        self.up = ColumnLinear(hidden, width, sequence_parallel)
        self.down = RowLinear(width, hidden, sequence_parallel)

    def forward(self, x_TD: Tensor, c_SD: Tensor, layout: PackLayout) -> Tensor:
        mods = self.modulation(c_SD)
        mods = enter_sharded(mods) if self.sequence_parallel else mods
        shift1, scale1, gate1, shift2, scale2, gate2 = mods.chunk(6, dim=-1)
        x_TD, given_TD = modulate(x_TD, shift1, scale1, layout.own)
        heads = biased(*self.qkv(given_TD)).unflatten(-1, (-1, 3, self.head_dim)).unbind(2)
        attended = self.proj(packed_attention(*heads, layout).flatten(1))
        x_TD, given_TD = gate_modulate(x_TD, attended, gate1, shift2, scale2, layout.own)
        return gate(x_TD, self.down(F.gelu(biased(*self.up(given_TD)))), gate2, layout.own)
