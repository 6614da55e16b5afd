"""What a run will read, looked at before anything is written or queued. Imports no torch: submitting is quick.

open_data       the batch plan, of shards that are there and fit the model
require_files   the weights it starts from, and what its evaluations compare with
"""

import math
from collections.abc import Callable
from pathlib import Path

from fitscale.config.errors import UserError, reading
from fitscale.config.schema import Config
from fitscale.data.batch_plan import BatchPlan, open_plan
from fitscale.data.encoding import require_classes, require_latent
from fitscale.data.index import OpenIndex, open_index
from fitscale.data.packing import PackRule
from fitscale.model import flops
from fitscale.model.backbone import parameter_table


def open_data(config: Config, open_index: OpenIndex = open_index) -> BatchPlan:
    """The batch plan of the training images.

    Raises:
        UserError: no shards are named or there, or they do not fit the model: channels, classes, kind of latents,
            sizes, an image larger than a pack. Or parameters are named that the model does not have, or it has
            some that cannot be trained.
    """
    if not config.data.sources:
        raise UserError("data.shards: must be given, in a config file or as data.shards=PATH")
    batch, patch_size = config.batch.global_batch_size, config.model.patch_size
    plan = open_plan(
        config.data, seed=config.run.seed, global_batch_size=batch, patch_size=patch_size, open_index=open_index
    )
    require_encoding(config, plan)
    plan.require_fit(pack_rule(config))
    _require_trainable(config)
    return plan


def require_encoding(config: Config, plan: BatchPlan) -> None:
    """Raises UserError, with the key, if the plan's shards are not what the config says: arrays, channels, classes."""
    indices = [stream.index for stream in plan.streams]
    for index in indices:
        require_latent(config.data.latent, index)
        if (channels := index.meta.channels) != config.model.in_channels:
            said = f"the config says {config.model.in_channels}, the shards in {index.storage.location} have {channels}"
            raise UserError(f"model.in_channels: {said}")
    require_classes(config, indices)


def require_files(config: Config) -> None:
    """Raises UserError, with the key, if another file that the run will need is not there."""
    weights, evaluation = config.run.init_weights, config.evaluation
    if weights is not None:
        _require("run.init_weights", weights)
    for name, path in evaluation.networks.items() if evaluation.points else ():
        _require("evaluation.features", path, Path.is_file)
        _require("evaluation.reference", evaluation.reference_of(name))


def _require(key: str, path: str, is_there: Callable[[Path], bool] = Path.exists) -> None:
    with reading(f"{key}: {path}"):
        if not is_there(Path(path)):
            raise UserError(f"{key}: {path}: no such file or folder")


def pack_rule(config: Config) -> PackRule:
    """Packs are padded to a multiple of the config's and one that sequence parallelism can cut."""
    multiple = math.lcm(config.batch.pad_multiple, config.parallel.tensor_parallel_size)
    return PackRule(config.batch.pack_tokens, multiple, flops.cost(config.model))


def _require_trainable(config: Config) -> None:
    table = parameter_table(config.model)
    if any(entry.packed for entry in table):
        raise UserError("model.quantise: packed weights are for sampling; valid for training: none, ternary")
    for key, patterns in (("optim.trainable", config.optim.trainable), ("run.reset", config.run.reset)):
        for pattern in patterns:
            if not any(entry.matches([pattern]) for entry in table):
                raise UserError(f"{key}: {pattern!r} is part of no parameter's name")
