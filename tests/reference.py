"""Reference tensors of the published implementation (padded batches), given as packs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fitscale.config.schema import ParallelConfig
from fitscale.model.backbone import parameter_table
from fitscale.model.build import build_network
from fitscale.model.common.layout import PackLayout, pack_layout
from fitscale.model.common.rope_config import RopeConfig
from fitscale.model.fit.config import FitConfig
from fitscale.model.weights import from_published

FOLDER = Path(__file__).parent / "data" / "reference"
CONFIGS = {
    "fitv2_tiny": FitConfig(depth=3, hidden_size=96, num_heads=4, num_classes=10),
    "fitv2_hr_tiny": FitConfig(
        depth=2,
        hidden_size=96,
        num_heads=4,
        num_classes=10,
        rope=RopeConfig(method="ntk-aware", decouple=True, original_length=4),
    ),
    "fit_tiny": FitConfig(family="fit", depth=2, hidden_size=64, num_heads=4, num_classes=10),
}


@dataclass(frozen=True)
class ReferenceFile:
    """One file: its tensors by name, and the model that belongs to it."""

    config: Any
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix.*`, without the prefix, in this project's row order."""
        chosen = {k.removeprefix(prefix + "."): v for k, v in self.tensors.items() if k.startswith(prefix + ".")}
        table = {entry.name: entry for entry in parameter_table(self.config)}
        return {name: from_published(table[name], tensor) for name, tensor in chosen.items()}

    def model(self, parallel: ParallelConfig | None = None) -> nn.Module:
        """The network with the reference's parameters, at a tensor-parallel size of 1."""
        model = build_network(self.config, parallel or ParallelConfig())
        model.load_state_dict(self.group("param"))
        return model


@dataclass(frozen=True)
class Reference(ReferenceFile):
    """One of FiT's."""

    @property
    def images(self) -> list[int]:
        return list(range(len(self.tensors["size"])))

    def tokens(self, name: str, images: list[int]) -> Tensor:
        """The true tokens of `images`, one image after the other: (T, C)."""
        lengths = self.tensors["size"].prod(1)
        return torch.cat([self.tensors[name][i, : lengths[i]] for i in images])

    def inputs(self, images: list[int], split_tokens: bool = False) -> tuple[Tensor, Tensor, Tensor, PackLayout]:
        """What the network takes, for a pack of `images`."""
        sizes_S2 = self.tensors["size"][images].int()
        ends = sizes_S2.prod(1).cumsum(0).int()
        t_S = self.tensors["t"][images]
        if self.config.family == "fit":
            # The published forward pass clamps time at 1, meant for FiTv2 (t in [0, 1]); FiT's DDPM steps all become 1.
            t_S = t_S.clamp(max=1)
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int32), ends))
        layout = pack_layout(sizes_S2, cu_seqlens, torch.device("cpu"), split_tokens)
        return self.tokens("x_t", images), t_S, self.tensors["y"][images], layout

    def loss_S(self, output_TC: Tensor, images: list[int]) -> Tensor:
        """Mean squared error of the velocity, per image."""
        target = self.tokens("x1", images) - self.tokens("x0", images)
        lengths = self.tensors["size"][images].prod(1).tolist()
        return torch.stack([error.mean() for error in (output_TC - target).square().split(lengths)])


def load_reference(name: str) -> Reference:
    return Reference(CONFIGS[name], load_file(FOLDER / f"{name}.safetensors"))
