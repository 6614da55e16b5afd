"""What makes two results comparable, as far as a config says: most of a result's comparability key.

No torch. The rest of the key are hashes of files: `DATA`, and `FILES` for generated images. Two programs need the same
words: the evaluation writes them into evaluations.jsonl, and who asks what is still to be measured compares with them.
"""

from typing import Any

from fitscale.config.schema import ADAPTIVE_SAMPLERS, Config, RopeConfig, SamplingConfig

DATA = ("data",)  # the shards: of the held-out images, or of the labels and sizes that are generated
FILES = ("data", "features", "reference")


def ema_name(decay: float) -> str:
    """Name of an EMA in the optimizer's state, in file names and in evaluations: ema_0.9999."""
    return f"ema_{decay:g}"


def full_weights_name(config: Config, name: str) -> str:
    """The full name of weights called raw, ema (the first EMA) or ema_<decay>."""
    decays = config.optim.ema_decays
    return ema_name(decays[0]) if name == "ema" and decays else name


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


def sample_key(
    config: Config,
    weights: str,
    sampling: SamplingConfig,
    rope: RopeConfig,
    samples: int,
    size: tuple[int, int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Of what is measured on `samples` generated images; `size` is (height, width), None for those of the data set."""
    latent = config.data.latent
    adaptive = sampling.method in ADAPTIVE_SAMPLERS
    return {
        "weights": weights,
        "sampler": sampling.method,
        "steps": sampling.steps,
        "tolerances": [sampling.rtol, sampling.atol] if adaptive else None,
        "guidance": sampling.guidance.scale,
        "guidance_channels": sampling.guidance.channels,
        "guidance_power": sampling.guidance.power,
        "decoder": latent.kind if latent.vae is None else latent.vae,
        "rope": rope.method + (" decoupled" if rope.decouple else ""),
        "resolution": "dataset" if size is None else "x".join(map(str, size)),
        "samples": samples,
        "seed": seed,
    }


def is_as_configured(config: Config, metric: str, key: dict[str, Any]) -> bool:
    """Whether a result of `metric` with this `key` is what the config itself asks for; its files' contents aside."""
    evaluation = config.evaluation
    weights = full_weights_name(config, evaluation.weights)
    hashes: tuple[str, ...] = DATA if metric == "validation_loss" else FILES
    if metric == "validation_loss":
        asked = validation_key(config, weights)
    else:
        asked = sample_key(config, weights, config.sampling, config.model.rope, evaluation.samples)
    return key == asked | {name: key.get(name) for name in hashes} and all(key.get(name) for name in hashes)
