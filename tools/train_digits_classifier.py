"""Train the small classifier through which the demo sees its digits, as FID sees photographs through Inception.

1. The digits of the demo's shards, at all their scales, with the same ones held out.
2. A small convolutional network on 16 x 16 letterboxed images, trained with slight shifts, turns, blur and noise.
3. TorchScript with the calling convention of fitscale/eval/features.py, spatial features included.

    python tools/train_digits_classifier.py demo/classifier.pt
"""

import argparse
import json
import sys
from io import BytesIO
from pathlib import Path

from fitscale.config.files import write_atomic
from fitscale.config.program import exit_code, loading
from fitscale.data.index import is_held_out
from fitscale.prepare.digits import digit_variants

with loading("torch and scikit-learn"):
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

SIDE = 16  # images are letterboxed to this many pixels
FEATURES = 48
EPOCHS = 12
BATCH = 128
HOLDOUT_FRACTION = 0.15


class DigitsNet(nn.Module):
    """Digits of any size -> 10 class scores, or the features they are read from."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.neck = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * (SIDE // 4) ** 2, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, 10)

    def forward(
        self, images: Tensor, return_features: bool = False, return_spatial: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """uint8 (N, 1 or 3, H, W), H and W any -> scores (N, 10), features (N, 48), or both with spatial ones between.

        Spatial features (N, 48) are the first 3 channels of the last 4 x 4 map, as ADM takes 7 of Inception's 17 x 17.
        """
        places = self.body(letterbox(images))
        features = self.neck(places)
        if return_spatial:
            return features, places[:, :3].flatten(1), self.head(features)
        return features if return_features else self.head(features)

    def scores(self, letterboxed: Tensor) -> Tensor:
        """Float (N, 1, 16, 16) -> (N, 10)."""
        return self.head(self.neck(self.body(letterboxed)))


def letterbox(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float (N, 1, 16, 16) in [0, 1]: grey, padded to a square, resized."""
    grey = images.float().mean(dim=1, keepdim=True) / 255.0
    height, width = grey.shape[2], grey.shape[3]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = functional.pad(grey, [left, side - width - left, top, side - height - top])
    return functional.interpolate(square, size=[16, 16], mode="bilinear", align_corners=False, antialias=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train the demo's digit classifier and write it as TorchScript.",
        epilog="example: python tools/train_digits_classifier.py demo/classifier.pt",
    )
    parser.add_argument("out", type=Path, help="TorchScript file to write; its accuracy goes to OUT with .json")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    return exit_code(lambda: train_classifier(arguments.out, arguments.seed))


def train_classifier(out: Path, seed: int) -> None:
    torch.manual_seed(seed)
    images, labels, held_out = digits()
    model = fit(images[~held_out], labels[~held_out])
    model.eval()
    with torch.no_grad():
        right = model.scores(images[held_out]).argmax(1) == labels[held_out]
    accuracy = right.double().mean().item()
    save(model, out)
    record = {"accuracy": accuracy, "held_out_images": int(held_out.sum()), "holdout_fraction": HOLDOUT_FRACTION}
    write_atomic(out.with_suffix(".json"), json.dumps(record, indent=1))
    print(f"{out}: {accuracy:.2%} of {int(held_out.sum())} held-out images recognised")


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Letterboxed images (N, 1, 16, 16), labels (N,), and which are held out; a digit at each scale is an image."""
    images, labels, held_out = [], [], []
    for sample in digit_variants():
        for variant in sample.variants:
            images.append(letterbox(torch.tensor(variant.array_CHW)[None]))
            labels.append(sample.label)
            held_out.append(is_held_out(sample.key, HOLDOUT_FRACTION))
    return torch.cat(images), torch.tensor(labels), torch.tensor(held_out)


def fit(images: Tensor, labels: Tensor) -> DigitsNet:
    model = DigitsNet()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        scores = model.scores(distort(images[chosen]))
        loss = functional.cross_entropy(scores, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 4) == 0:
            print(f"  step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    return model


def distort(images: Tensor) -> Tensor:
    """Slight random turns, scalings and shifts, blur for some and noise for all."""
    number = len(images)
    turn = (torch.rand(number) - 0.5) * 0.4
    scale = 1 + (torch.rand(number) - 0.5) * 0.3
    shift = (torch.rand(number, 2) - 0.5) * 0.25
    rows = [
        torch.stack([turn.cos() * scale, -turn.sin() * scale, shift[:, 0]], dim=1),
        torch.stack([turn.sin() * scale, turn.cos() * scale, shift[:, 1]], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    blurred = functional.avg_pool2d(moved, 3, stride=1, padding=1)
    kept = torch.where(torch.rand(number, 1, 1, 1) < 0.3, blurred, moved)
    return (kept + 0.04 * torch.randn_like(kept)).clamp(0, 1)


def save(model: DigitsNet, out: Path) -> None:
    """Write TorchScript whose bytes depend on the model alone, as its hash is part of every result's key.

    Saved to a path it would hold the path's name; not frozen, its constants in the order of Python's string hashes.
    """
    buffer = BytesIO()
    torch.jit.save(torch.jit.freeze(torch.jit.script(model)), buffer)
    write_atomic(out, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
