"""Reference tensors of Flag-DiT and TerDiT (images of one size a batch), given as packs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fitscale.config.schema import FlowConfig
from fitscale.config.schema_sampling import GuidanceConfig
from fitscale.flow.guidance import Guided
from fitscale.flow.loss import Inputs, make_objective
from fitscale.flow.pack import PackShape, starts
from fitscale.model.common.layout import pack_layout
from fitscale.model.flag.config import FlagConfig
from tests.reference import FOLDER, ReferenceFile

TINY = {"depth": 3, "hidden_size": 64, "num_heads": 4, "num_classes": 10, "mlp_multiple": 32}
CONFIGS = {
    "flag_dit_tiny": FlagConfig(family="flag_dit", **TINY),
    "terdit_tiny": FlagConfig(family="large_dit", quantise="ternary", **TINY),
}
SIZES = ("8x8", "12x12", "6x10")  # latent pixels
PATCH = 2


def tokens_of(images_NCHW: Tensor) -> Tensor:
    """The tokens of images of one size, one image after the other: (T, C p1 p2), channel order `(c p1 p2)`."""
    patches = images_NCHW.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # N C h p1 w p2
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


def pack_of(images_NCHW: Sequence[Tensor], labels_S: Tensor) -> PackShape:
    """The pack of batches of images, one batch after the other."""
    sizes = [(image.shape[1] // PATCH, image.shape[2] // PATCH) for batch in images_NCHW for image in batch]
    return PackShape(labels_S, torch.tensor(sizes), starts([a * b for a, b in sizes]), tuple(range(len(sizes))))


def call(model: nn.Module, x_TC: Tensor, t_S: Tensor, pack: PackShape) -> Tensor:
    """The network's answer to a pack."""
    parallel = model.parallel.sequence_parallel
    return model(x_TC, t_S, pack.labels_S, pack_layout(pack.sizes_S2, pack.cu_seqlens, x_TC.device, parallel))[-1]


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest error over the largest magnitude."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    return float((got.detach() - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class FlagReference(ReferenceFile):
    """One of Flag-DiT's or TerDiT's."""

    def pack(self, sizes: Sequence[str]) -> tuple[Tensor, Tensor, PackShape]:
        """x_t, times and the pack of all images of `sizes`."""
        pack = pack_of([self.tensors[f"x_t.{s}"] for s in sizes], self.joined("y", sizes))
        return self.tokens("x_t", sizes), self.joined("t", sizes).float(), pack

    def inputs(self, sizes: Sequence[str], data: str, noise: str) -> tuple[Inputs, Tensor]:
        """What the objective makes of data and noise of these names, and where its images start."""
        _, t_S, pack = self.pack(sizes)
        times = t_S if self.flow.kind == "rectified" else 1 - t_S / 1000
        drawn = pack.labels_S, pack.cu_seqlens, times, self.tokens(noise, sizes)
        return make_objective(self.flow, self.config).prepare_at(self.tokens(data, sizes), *drawn), pack.cu_seqlens

    @property
    def flow(self) -> FlowConfig:
        return FlowConfig(kind=self.config.objective)

    def guided(self, scale: float = 4.0) -> Guided:
        """What samplers evaluate."""
        model = self.model()
        return Guided(
            lambda x_TC, t_S, pack: call(model, x_TC, t_S, pack),
            GuidanceConfig(scale=scale),
            no_class=self.config.num_classes,
            patch_size=PATCH,
            model_time=make_objective(self.flow, self.config).model_time,
        )

    def tokens(self, name: str, sizes: Sequence[str]) -> Tensor:
        return torch.cat([tokens_of(self.tensors[f"{name}.{s}"]) for s in sizes])

    def joined(self, name: str, sizes: Sequence[str]) -> Tensor:
        return torch.cat([self.tensors[f"{name}.{s}"] for s in sizes])


def load_flag_reference(name: str) -> FlagReference:
    return FlagReference(CONFIGS[name], load_file(FOLDER / f"{name}.safetensors"))
