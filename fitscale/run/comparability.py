"""What makes two results comparable, as far as a config says: most of a result's comparability key.

No torch. The rest of the key are hashes of files: `DATA`, and `FILES` for generated images. Two programs need the same
words: the evaluation writes them into evaluations.jsonl, and who asks what is still to be measured compares with them.
"""

import json
from hashlib import sha256
from typing import Any

from fitscale.config.schema import Config
from fitscale.config.schema_sampling import ADAPTIVE_SAMPLERS, SamplingConfig

# How ddpm and ddim spaced their steps before `sampling.spacing`: their keys name none. So keys stay comparable.
_UNNAMED_SPACING = {"ddpm": "linspace", "ddim": "trailing"}
DATA = ("data",)  # the shards: of the held-out images, or of the labels and sizes that are generated
FILES = ("data", "features", "reference")


def ema_name(decay: float) -> str:
    """Name of an EMA in the optimizer's state, in file names and in evaluations: ema_0.9999."""
    return f"ema_{decay:g}"


def full_weights_name(config: Config, name: str) -> str:
    """The full name of weights called raw, ema (the first EMA) or ema_<decay>."""
    decays = config.optim.ema_decays
    return ema_name(decays[0]) if name == "ema" and decays else name


def metric_name(figure: str, network: str) -> str:
    """Of a figure by the eyes of a feature network, as in evaluations.jsonl: fd/dinov2; the unnamed one's is fd."""
    return f"{figure}/{network}" if network else figure


def validation_key(config: Config, weights: str) -> dict[str, Any]:
    """Of the validation loss of `weights` (full name)."""
    return {
        "weights": weights,
        "patch_size": config.model.patch_size,
        "held_out_images": config.evaluation.validation_images,
        "holdout_fraction": config.data.holdout_fraction,
        "times": config.evaluation.validation_times,
        "objective": config.flow.kind,
    }


def sample_key(config: Config, weights: str, size: tuple[int, int] | None = None, seed: int = 0) -> dict[str, Any]:
    """Of what is measured on generated images; `size` is (height, width) in pixels, None for those of the data set."""
    latent, sampling = config.data.latent, config.sampling
    adaptive, spacing = sampling.method in ADAPTIVE_SAMPLERS, sampling.timestep_spacing
    return {
        "weights": weights,
        "sampler": sampling.method,
        "steps": sampling.steps,
        "tolerances": [sampling.rtol, sampling.atol] if adaptive else None,
        "guidance": sampling.guidance.scale,
        "guidance_channels": sampling.guidance.guided_channels(config.model.in_channels),
        "guidance_power": sampling.guidance.power,
        "decoder": latent.kind if latent.vae is None else latent.vae,
        "rope": config.model.positions,
        "resolution": "dataset" if size is None else "x".join(map(str, size)),
        "samples": config.evaluation.samples,
        "seed": seed,
        **({} if spacing == _UNNAMED_SPACING.get(sampling.method) else {"spacing": spacing}),
        **_beyond_defaults(sampling),
    }


def _beyond_defaults(sampling: SamplingConfig) -> dict[str, Any]:
    """What keys of earlier versions do not name, because there was one way; so it is named where it is another."""
    guidance = sampling.guidance
    guide = [guidance.guide, guidance.guide_step, guidance.guide_weights]
    named = {
        "last_step": (sampling.last_step, (None, "mean")),
        "shift_base_tokens": (sampling.shift_base_tokens, (None,)),
        "guidance_interval": (list(guidance.interval), ([0.0, 1.0],)),
        "guidance_towards": (guidance.towards, ("noise",)),
        "guide": (guide, ([None] * 3,)),
    }
    return {name: value for name, (value, defaults) in named.items() if value not in defaults}


def is_as_configured(config: Config, metric: str, key: dict[str, Any]) -> bool:
    """Whether a result of `metric` with this `key` is what the config itself asks for; its files' contents aside."""
    weights = full_weights_name(config, config.evaluation.weights)
    of_validation = metric == "validation_loss"
    asked = validation_key(config, weights) if of_validation else sample_key(config, weights)
    hashes: tuple[str, ...] = DATA if of_validation else FILES
    return key == asked | {name: key.get(name) for name in hashes} and all(key.get(name) for name in hashes)


def shown_name(config: Config, metric: str, key: dict[str, Any]) -> str:
    """Under what name a result stands beside training's metrics, in wandb and TensorBoard: evaluation/fd.

    One with another key than the config itself asks for is told apart by a hash of it: evaluation-1f0c33a7/fd.
    """
    if is_as_configured(config, metric, key):
        return f"evaluation/{metric}"
    return f"evaluation-{digest(key)[:8]}/{metric}"


def digest(content: object) -> str:
    """16 hexadecimal digits that tell one content, of what JSON can hold, from another."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
