"""From a run directory to a network that can sample."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from fitscale.config.errors import UserError
from fitscale.config.files import parse_json
from fitscale.config.load import load_config
from fitscale.config.schema import Config, ModelConfig, ParallelConfig
from fitscale.eval.draw import Networks
from fitscale.model.build import build_network
from fitscale.model.common.compiler import lacks_for_compiling, use_compiler
from fitscale.model.weights import load_weights, read_metadata
from fitscale.parallel.groups import init_parallel
from fitscale.run.checkpoint import Checkpoint, read_checkpoint
from fitscale.run.comparability import full_weights_name
from fitscale.run.layout import RunDir, run_at

ALIKE = ("patch_size", "in_channels", "num_classes", "objective")  # in a model and the weaker one that guides it


def open_run(path: Path) -> tuple[Config, RunDir]:
    """The config and the layout of the run directory `path`.

    Raises:
        UserError: it is no run directory.
    """
    run = run_at(path)
    return load_config([str(run.config)]), run


def find_checkpoint(run: RunDir, step: int | None) -> Checkpoint:
    """The complete checkpoint of `step`, or the newest.

    Raises:
        UserError: there is none; lists those that are there.
    """
    found = {checkpoint.step: checkpoint for checkpoint in run.checkpoints()}
    if not found:
        for path in reversed(run.checkpoint_folders()):
            read_checkpoint(path)  # says what is wrong with it
        raise UserError(f"{run.path}: no complete checkpoint there yet")
    if step is not None and step not in found:
        there = ", ".join(map(str, found))
        raise UserError(f"--step: {run.path} has no complete checkpoint of step {step}; it has {there}")
    return found[max(found) if step is None else step]


def weights_name(config: Config, checkpoint: Checkpoint, name: str) -> str:
    """The full name of weights called raw, ema or ema_<decay>.

    Raises:
        UserError: the checkpoint has no such weights; lists those it has.
    """
    full = full_weights_name(config, name)
    if full not in checkpoint.weight_names():
        raise UserError(f"--weights: {checkpoint.path} has no {name}; it has {', '.join(checkpoint.weight_names())}")
    return full


def stored_sections(path: Path) -> dict[str, Any]:
    """What the metadata of a .safetensors file that fitscale exported says of its config; nothing of any other.

    Raises:
        UserError: what stands there under a section's name is no JSON object.
    """
    names, metadata = {section.name for section in fields(Config)}, read_metadata(path)
    return {name: parse_json(text.encode(), f"{path}: {name}") for name, text in metadata.items() if name in names}


@dataclass(frozen=True)
class Source:
    """Weights to draw from, of a run's checkpoint or in a file that fitscale wrote."""

    config: Config
    path: Path  # the run directory, or the file
    weights: Path
    about: dict[str, Any]  # step and weights of a run's
    content: Any  # changes when the weights do

    @property
    def title(self) -> str:
        if not self.about:
            return self.path.name
        return f"{self.config.run.name} step {self.about['step']} {self.about['weights']}"


def open_source(path: Path, step: int | None, weights: str | None) -> Source:
    """The weights of a run directory, or of a .safetensors file, whose metadata says which model they are.

    Raises:
        UserError: there are none, or none such; or the file does not say what they are.
    """
    if path.is_file():
        for name, value in (("--step", step), ("--weights", weights)):
            if value is not None:
                raise UserError(f"{name}: goes with a run directory, not with a file, {path}")
        sections, found = stored_sections(path), path.stat()
        if "model" not in sections:
            raise UserError(f"{path}: does not say which model it is; tools/convert_checkpoint.py --config writes that")
        return Source(load_config([sections]), path, path, {}, [found.st_size, found.st_mtime_ns])
    config, run = open_run(path)
    checkpoint = find_checkpoint(run, step)
    name = weights_name(config, checkpoint, weights or config.evaluation.weights)
    about = {"step": checkpoint.step, "weights": name}
    return Source(config, run.path, checkpoint.weights(name), about, checkpoint.meta)


def load_networks(config: Config, weights: Path, device: str) -> Networks:
    """What draws: the network of `weights`, and the guide that `config.sampling.guidance` names, ready to sample.

    Raises:
        UserError: as `load_model`; or there is no such guide, or it has other tokens or classes than the model.
    """
    guide, model = _guide(config), load_model(config, weights, device)
    return Networks(model, None if guide is None else load_model(*guide, device))


def _guide(config: Config) -> tuple[Config, Path] | None:
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


def load_model(config: Config, weights: Path, device: str) -> torch.nn.Module:
    """The network, or this tensor-parallel rank's part of it (`evaluation.tensor_parallel_size`), ready to sample.

    In bf16 if the run was trained so and there is a GPU, else in fp32; compiled if `parallel.compile` is on.

    Raises:
        UserError: the weights are another model's, or the launched ranks do not divide by the tensor-parallel size.
    """
    layout = ParallelConfig(tensor_parallel_size=config.evaluation.tensor_parallel_size)
    topology = init_parallel(layout, device)
    use_compiler(config.parallel.compile == "on" and lacks_for_compiling(topology.device) is None)
    model = build_network(config.model.to_sample(), layout)
    load_weights(model, weights)
    bf16 = config.parallel.precision == "bf16" and topology.device.type == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return model.to(topology.device, dtype).eval().requires_grad_(False)
