"""The weaker model of autoguidance: an earlier checkpoint, a smaller run, or a file of weights."""

from dataclasses import replace
from pathlib import Path

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import Config, ModelConfig
from fitscale.eval.checkpoints import find_checkpoint, open_run, stored_sections, weights_name

ALIKE = ("patch_size", "in_channels", "num_classes", "objective")  # in model and guide


def find_guide(config: Config) -> tuple[Config, Path] | None:
    """Config and weights of the guide that `config.sampling.guidance` names; all but the model is as in `config`.

    A file that fitscale exported says which model it is; any other is the same as in `config`.

    Raises:
        UserError: it is not there, or is no model that can guide this one.
    """
    guidance = config.sampling.guidance
    if guidance.guide is None:
        return None
    path = Path(guidance.guide)
    if path.suffix == ".safetensors":
        model, weights = _model_of_file(path) or config.model, path
    else:
        theirs, run = open_run(path)
        checkpoint = find_checkpoint(run, guidance.guide_step)
        name = weights_name(theirs, checkpoint, guidance.guide_weights or theirs.evaluation.weights)
        model, weights = theirs.model, checkpoint.weights(name)
    for key in ALIKE:
        here, there = getattr(config.model, key), getattr(model, key)
        if here != there:
            raise UserError(f"sampling.guidance.guide: {path} has {key} = {there}, the model that it guides has {here}")
    return replace(config, model=model), weights


def _model_of_file(path: Path) -> ModelConfig | None:
    """The model that the metadata of a .safetensors file says, if any."""
    sections = stored_sections(path)
    return load_config([sections]).model if "model" in sections else None
