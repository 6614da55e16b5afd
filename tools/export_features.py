"""TorchScript feature networks in fitscale's convention (fitscale/eval/features.py) from the weight files people have.

    python tools/export_features.py inception pt_inception-2015-12-05-6726825d.pth inception.pt
    python tools/export_features.py dinov2 FOLDER dinov2.pt

inception: the FID Inception of pytorch-fid, images scaled to 299 x 299 as its `InceptionV3` does. Features are the
2,048 of the last pooling; scores the 1,008 class probabilities without the last layer's bias; spatial features the
first 7 channels of `mixed_6/conv` (17 x 17 x 7 = 2,023), as in ADM's evaluator.

dinov2: a DINOv2 of `transformers` as Stein et al. (2023, arXiv 2306.04675) see through it: bicubic to 224 x 224,
ImageNet's mean and standard deviation, the normalised class token.

Details, and what differs from others: docs/evaluation.md.

Needs the extra `features`: pip install -c constraints.txt -e .[features]
"""

import argparse
import sys
import warnings
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

from fitscale.config.errors import UserError
from fitscale.config.files import write_atomic
from fitscale.config.program import exit_code, loading

with loading("torch"):
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

SPATIAL_CHANNELS = 7
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Inception(nn.Module):
    """The FID Inception from images to features, spatial features and class probabilities."""

    def __init__(self, trunk: torch.jit.ScriptModule, classes_KF: Tensor) -> None:
        super().__init__()
        self.trunk = trunk
        self.register_buffer("classes_KF", classes_KF)

    def forward(
        self, images: Tensor, return_features: bool = False, return_spatial: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """uint8 (N, 3, H, W) -> probabilities (N, 1008), features (N, 2048), or both with (N, 2023) between."""
        scaled = functional.interpolate(images.float() / 255, size=[299, 299], mode="bilinear", align_corners=False)
        features, spatial = self.trunk(2 * scaled - 1)
        if return_features and not return_spatial:
            return features
        scores = functional.linear(features, self.classes_KF).softmax(1)
        if return_spatial:
            return features, spatial, scores
        return scores


class InceptionTrunk(nn.Module):
    """pytorch-fid's Inception without its scaling: (N, 3, 299, 299) in [-1, 1] -> features and spatial features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        first = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2 Mixed_5b"
        first += " Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d"
        last = "Mixed_6e Mixed_7a Mixed_7b Mixed_7c avgpool"
        self.first, self.last = (nn.Sequential(*(getattr(net, n) for n in names.split())) for names in (first, last))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """TensorFlow's `mixed_6` is Mixed_6d, and `mixed_6/conv` its first branch; ADM flattens (row, col, channel)."""
        middle = self.first(images)
        spatial = middle[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        return self.last(middle).flatten(1), spatial.flatten(1)


class Dinov2(nn.Module):
    """DINOv2 from images to the class token; it knows no classes."""

    def __init__(self, body: torch.jit.ScriptModule, side: int) -> None:
        super().__init__()
        self.body, self.side = body, side
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        """uint8 (N, 3, H, W) -> features (N, F), or scores (N, 0)."""
        if not return_features:
            return torch.zeros([images.shape[0], 0], device=images.device)
        size = [self.side, self.side]
        scaled = functional.interpolate(images.float(), size, mode="bicubic", align_corners=False, antialias=True)
        levels = scaled.round().clamp(0, 255) / 255  # as Pillow's bicubic filter gives
        return self.body((levels - self.mean) / self.std)


class ClassToken(nn.Module):
    """A DINOv2 of transformers, of which only the normalised class token is kept."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixel_values=pixels).pooler_output


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write a feature network as TorchScript for evaluation.features.",
        epilog="example: python tools/export_features.py inception pt_inception-2015-12-05-6726825d.pth inception.pt",
    )
    parser.add_argument("network", choices=["inception", "dinov2"])
    parser.add_argument("weights", type=Path, help="pytorch-fid's checkpoint; for dinov2 a folder of transformers")
    parser.add_argument("out", type=Path, help="TorchScript file to write")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: export(arguments.network, arguments.weights, arguments.out))


def export(network: str, weights: Path, out: Path) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # that what depends on one size alone is fixed
        net = {"inception": inception, "dinov2": dinov2}[network](weights)
        frozen = torch.jit.freeze(torch.jit.script(net.eval()), optimize_numerics=False)
        buffer = BytesIO()  # neither a path's name nor an order of Python's hashes: the same bytes for the same weights
        torch.jit.save(frozen, buffer)
    write_atomic(out, buffer.getvalue())
    print(f"{out}: {network} from {weights}, {len(buffer.getvalue()):,} bytes")


def _without_extra(network: str, error: ImportError) -> UserError:
    return UserError(f"{network} needs the extra `features` ({error}): pip install -c constraints.txt -e .[features]")


def inception(weights: Path) -> nn.Module:
    """pytorch-fid's own builder, which would fetch the weights, with those of the file."""
    try:
        from pytorch_fid import inception as library
    except ImportError as error:
        raise _without_extra("inception", error) from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        with patch.object(library, "load_state_dict_from_url", lambda *_, **__: state):
            net = library.fid_inception_v3().eval()
    except Exception as error:  # files that are damaged, or hold something else, raise nearly anything
        raise UserError(f"{weights} holds no weights of pytorch-fid's Inception: {error}") from error
    trunk = torch.jit.trace(InceptionTrunk(net).eval(), torch.zeros(2, 3, 299, 299))
    return Inception(trunk, net.fc.weight.detach())


def dinov2(weights: Path) -> nn.Module:
    if not weights.is_dir():
        raise UserError(f"{weights}: no such folder; `hf download facebook/dinov2-large --local-dir DIR` makes one")
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise _without_extra("dinov2", error) from error
    try:
        net = Dinov2Model.from_pretrained(weights, local_files_only=True, dtype=torch.float32).eval()
    except Exception as error:  # as above
        raise UserError(f"{weights} is no folder of a DINOv2 of transformers: {error}") from error
    side = 16 * net.config.patch_size
    return Dinov2(torch.jit.trace(ClassToken(net).eval(), torch.zeros(2, 3, side, side)), side)


if __name__ == "__main__":
    sys.exit(main())
