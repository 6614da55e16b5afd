"""Any TorchScript network as the eye that sees samples and reference.

The convention is that of the TorchScript Inception made for FID ("inception-2015-12-05.pt"):

    net(images, return_features=True)   (N, F) features
    net(images)                         (N, K) class probabilities or logits; K = 0 for a network that knows no classes

with `images` uint8 (N, 3, H, W) of any size, which the network scales itself. Two arguments are known besides:

    net(images, return_spatial=True)    a tuple (features, spatial, scores), all in one call; sFID compares the spatial
                                        features (N, S), which say where things are. Where `forward` has the argument,
                                        it is always called so
    no_output_bias=True                 given wherever `forward` has the argument: class probabilities without the last
                                        layer's bias, as the Inception Score has been computed from the first

Networks always get three channels (grey is repeated), so one file serves every kind of image.

A TorchScript file is a program: loading and calling it runs what it says. So its SHA-256 is told before that, and
`evaluation.trusted`, where it is set, decides which may be loaded.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fitscale.config.errors import UserError

BATCH = 64  # images per call
MOST_BYTES = 4 << 30  # of a network's file; Inception has 95 MB
PROBE = (2, 3, 16, 16)  # black, and noise
_OFF = 1e-3  # by which probabilities may miss 1 in sum


class FeatureNet:
    """A TorchScript feature network.

    Attributes:
        name: what the config calls it; "" where it names one network by a plain path.
        identity: the SHA-256 of its file.
        num_features, num_spatial, num_scores: numbers it gives an image; 0 spatial features or scores = none.

    Args:
        trusted: SHA-256 of the networks that may be loaded; none = any.

    Raises:
        UserError: the file is missing, not trusted, no TorchScript, or does not follow the convention.
    """

    def __init__(
        self, path: str | Path, device: str | torch.device = "cpu", trusted: Sequence[str] = (), name: str = ""
    ) -> None:
        self.path, self.device, self.name = Path(path), torch.device(device), name
        self.key = f"evaluation.features.{name}" if name else "evaluation.features"
        if not self.path.is_file():
            raise UserError(f"{self.key}: {path}: no such file; it must be a TorchScript feature network")
        if self.path.stat().st_size > MOST_BYTES:
            raise UserError(f"{self.key}: {path}: larger than {MOST_BYTES >> 30} GiB, so it is no feature network")
        program = self.path.read_bytes()  # once: what is loaded is what was hashed
        self.identity = hashlib.sha256(program).hexdigest()
        if trusted and self.identity not in trusted:
            raise UserError(
                f"{self.key}: {path} is a program that evaluation.trusted does not name: its sha256 is {self.identity}"
            )
        print(f"feature network {path}, sha256 {self.identity}: a program, which runs from here on", flush=True)
        try:
            self.net = torch.jit.load(io.BytesIO(program), map_location=self.device).eval()
        except Exception as error:  # damaged archives raise nearly anything
            raise UserError(f"{self.key}: {path} is not a TorchScript file: {_first_line(error)}") from error
        self._probe()

    def _probe(self) -> None:
        """Find out what the network gives, and whether its scores are probabilities or logits."""
        known = {argument.name for argument in self.net.forward.schema.arguments}
        self._all_at_once = "return_spatial" in known
        self._without_bias = {"no_output_bias": True} if "no_output_bias" in known else {}
        self._probabilities, self.num_scores = False, 1
        noise = np.random.default_rng(0).integers(0, 256, PROBE, dtype=np.uint8)
        noise[0] = 0
        answers = self._answers(torch.from_numpy(noise).to(self.device))
        widths = {what: answer.shape[1] for what, answer in answers.items()}
        self.num_features, self.num_scores = widths["features"], widths["scores"]
        self.num_spatial = widths.get("spatial", 0)
        self._probabilities = self.num_scores > 0 and bool(_are_probabilities(answers["scores"]))

    @torch.no_grad()
    def look(self, images_N3HW: Tensor) -> dict[str, Tensor]:
        """What the network says of uint8 images of one shape that are on its device.

        Returns:
            float32 on the device: "features" (N, F); where it has them, "spatial" (N, S) and "scores" (N, K), which are
            class probabilities.

        Raises:
            UserError: the network failed, or answered with anything but one row of finite numbers an image.
        """
        answers = self._answers(images_N3HW)
        if self.num_scores:
            if not self._probabilities:
                answers["scores"] = answers["scores"].softmax(1)
            elif not _are_probabilities(answers["scores"]):
                raise UserError(
                    f"{self.key}: {self.path} answered with class probabilities at first, and now with scores that are "
                    "negative or do not add up to 1; it must give one or the other"
                )
        return {what: answer for what, answer in answers.items() if answer.shape[1]}

    @torch.no_grad()
    def _answers(self, images_N3HW: Tensor) -> dict[str, Tensor]:
        try:
            if self._all_at_once:
                features, spatial, scores = self.net(images_N3HW, return_spatial=True, **self._without_bias)
                found = {"features": features, "spatial": spatial, "scores": scores}
            else:
                found = {"features": self.net(images_N3HW, return_features=True)}
                if self.num_scores:
                    found["scores"] = self.net(images_N3HW, **self._without_bias)
        except (RuntimeError, AttributeError, ValueError) as error:
            call = "return_spatial=True) -> (features, spatial, scores" if self._all_at_once else "return_features=True"
            raise UserError(
                f"{self.key}: {self.path} cannot be called as net(uint8 images NCHW, {call}): {_first_line(error)}"
            ) from error
        for answer in found.values():
            if answer.ndim != 2 or len(answer) != len(images_N3HW):
                self._refuse(images_N3HW, answer)
        found = {what: answer.float() for what, answer in found.items()}
        if not torch.stack([answer.isfinite().all() for answer in found.values()]).all():
            self._refuse(images_N3HW, found["features"])
        return found

    def _refuse(self, images_N3HW: Tensor, answer: Tensor) -> None:
        raise UserError(
            f"{self.key}: {self.path} answered {len(images_N3HW)} images with {tuple(answer.shape)}, or with numbers "
            "that are not finite; it must give one row of finite numbers an image"
        )


def _are_probabilities(scores_NK: Tensor) -> Tensor:
    return ((scores_NK >= 0).all(1) & ((scores_NK.sum(1) - 1).abs() <= _OFF)).all()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
