"""Any TorchScript network as the eye of a Frechet distance.

The convention is that of the TorchScript Inception made for FID ("inception-2015-12-05.pt"): called as
`net(images_NCHW, return_features=True)` with uint8 RGB of any size, it scales them itself and answers (N, F) features;
without `return_features` it answers class scores. Networks always get three channels (grey is repeated), so one file
serves every kind of image. Images of different sizes are fed in groups of one size.

A TorchScript file is a program: loading and calling it runs what it says. So its SHA-256 is told before that, and
`evaluation.trusted`, where it is set, decides which may be loaded.
"""

import hashlib
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitscale.config.errors import UserError
from fitscale.data.pictures import in_batches, rgb

BATCH = 64  # images per call
AT_ONCE = 4 * BATCH  # images that are collected before they are looked at: some have one size
MOST_BYTES = 4 << 30  # of a network's file; Inception has 95 MB


class FeatureNet:
    """A TorchScript feature network; `identity` is the SHA-256 of its file.

    Args:
        trusted: SHA-256 of the networks that may be loaded; none = any.

    Raises:
        UserError: the file is missing, not trusted, no TorchScript, or does not follow the convention.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", trusted: Sequence[str] = ()) -> None:
        self.path, self.device = Path(path), torch.device(device)
        if not self.path.is_file() or self.path.stat().st_size > MOST_BYTES:
            raise UserError(
                f"evaluation.features: {path}: no such file of up to {MOST_BYTES >> 30} GiB; it must be a TorchScript "
                "feature network"
            )
        program = self.path.read_bytes()  # once: what is loaded is what was hashed
        self.identity = hashlib.sha256(program).hexdigest()
        if trusted and self.identity not in trusted:
            raise UserError(
                f"evaluation.features: {path} is a program that evaluation.trusted does not name: its sha256 is "
                f"{self.identity}"
            )
        print(f"feature network {path}, sha256 {self.identity}: a program, which runs from here on", flush=True)
        try:
            self.net = torch.jit.load(io.BytesIO(program), map_location=self.device).eval()
        except Exception as error:  # damaged archives raise nearly anything
            raise UserError(f"evaluation.features: {path} is not a TorchScript file: {_first_line(error)}") from error
        probe = np.zeros((16, 16, 3), dtype=np.uint8)
        self.num_features = self.features([probe]).shape[1]
        self.num_scores = self.scores([probe]).shape[1]

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features (N, F), float64, of uint8 (H, W, 1 or 3) images of any sizes."""
        return np.stack(in_batches(partial(self._call, return_features=True), images, BATCH))

    def scores(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Class scores (N, K), float64."""
        return np.stack(in_batches(self._call, images, BATCH))

    @torch.no_grad()
    def _call(self, images_NHWC: np.ndarray, **keywords: Any) -> np.ndarray:
        batch = torch.from_numpy(rgb(images_NHWC)).permute(0, 3, 1, 2).contiguous().to(self.device)
        try:
            answer = self.net(batch, **keywords).double().cpu().numpy()
        except (RuntimeError, AttributeError) as error:
            raise UserError(
                f"evaluation.features: {self.path} cannot be called as net(uint8 images NCHW, return_features=True): "
                f"{_first_line(error)}"
            ) from error
        if answer.ndim != 2 or len(answer) != len(batch) or not np.isfinite(answer).all():
            raise UserError(
                f"evaluation.features: {self.path} answered {len(batch)} images with {answer.shape}, or with numbers "
                "that are not finite; it must give one row of finite numbers an image"
            )
        return answer


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
