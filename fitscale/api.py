"""Images from Python: load a run, or a .safetensors file, and draw. Torch is imported by `load`, not before.

    from fitscale import api

    model = api.load("runs/b")
    images = model.draw([207, 360], height=256, width=384, guidance=1.5)
    images[0].save("retriever.png")

What goes wrong is a `fitscale.config.errors.UserError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fitscale.config.checks import given
from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import Config

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from fitscale.eval.draw import Networks

SECTIONS = ("model", "flow", "sampling", "data")  # of a config, in the metadata of a file that fitscale exported


@dataclass(frozen=True)
class Model:
    """A network ready to sample, with the config that says how."""

    config: Config
    networks: "Networks"

    def draw(
        self,
        labels: Sequence[int],
        height: int,
        width: int,
        *,
        guidance: float | None = None,
        steps: int | None = None,
        method: str | None = None,
        seed: int = 0,
    ) -> "list[Image]":
        """One image of `height` x `width` pixels for each of `labels`; image i depends on (seed, i) alone.

        Args:
            labels: classes, or `num_classes` for none.
            guidance: scale of classifier-free guidance; 1 = none. This, steps and method: None = the config's.
            steps: integration steps.
            method: sampler.

        Raises:
            UserError: a side is no multiple of the patch, a label or an option is out of range.
        """
        from PIL import Image

        from fitscale.data.encoding import patches
        from fitscale.eval.generate import Images, generate
        from fitscale.eval.requests import Request

        most = self.config.model.num_classes
        if wrong := [label for label in labels if not 0 <= label <= most]:
            raise UserError(f"labels: {wrong[0]} is not one of 0 to {most - 1}, or {most} for no class")
        sampling = given(self.config.sampling, steps=steps, method=method)
        sampling = replace(sampling, guidance=given(sampling.guidance, scale=guidance))
        config = replace(self.config, sampling=sampling)
        rows, cols = patches(config, height, width)
        requests = [Request(i, label, rows, cols) for i, label in enumerate(labels)]

        def look(images: Images) -> "dict[str, np.ndarray]":
            return {"image": images.pixels_NCHW.movedim(1, -1).cpu().numpy()}

        seen = generate(self.networks, config, requests, seed, look)
        images = [one.kept["image"] for one in seen]
        return [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images]


def load(
    source: str | Path, *config: str, weights: str | None = None, step: int | None = None, device: str = "auto"
) -> Model:
    """A model to draw with.

    Args:
        source: run directory; or a .safetensors file in the published names, as tools/convert_checkpoint.py writes it.
        config: YAML files and `key=value` overrides: what a foreign file does not say of its model, or what is to be
            different (data.latent.vae=FOLDER, model.rope.method=ntk-aware).
        weights: of a run: raw, ema or ema_<decay>; None = what it evaluates.
        step: of a run: the checkpoint; None = the newest.
        device: auto, cpu or cuda.

    Raises:
        UserError: no such run, checkpoint, weights or file; the file is of another model than the config says.
    """
    from fitscale.eval.checkpoints import find_checkpoint, load_networks, open_run, stored_sections, weights_name

    path = Path(source)
    if path.is_file():
        if weights is not None or step is not None:
            raise UserError(f"{path}: weights and step go with a run directory, not with a file")
        settings = load_config([stored_sections(path), *config])
        return Model(settings, load_networks(settings, path, device))
    _, run = open_run(path)
    settings = load_config([str(run.config), *config])
    checkpoint = find_checkpoint(run, step)
    name = weights_name(settings, checkpoint, weights or settings.evaluation.weights)
    return Model(settings, load_networks(settings, checkpoint.weights(name), device))
