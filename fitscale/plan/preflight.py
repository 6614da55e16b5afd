"""What a run will read, looked at before anything is written or queued. Imports no torch: submitting is quick.

open_data       the batch plan, of shards that are there and fit the model
require_files   the weights it starts from, and what its evaluations compare with
"""

import math
from collections.abc import Callable
from pathlib import Path

from fitscale.config.errors import UserError, reading
from fitscale.config.schema import Config
from fitscale.data.batch_plan import BatchPlan, OpenIndex, open_plan
from fitscale.data.index import Index, open_index
from fitscale.data.packing import PackRule
from fitscale.model import flops
from fitscale.model.backbone import parameter_table


def open_data(config: Config, open_index: OpenIndex = open_index) -> BatchPlan:
    """The batch plan of the training images.

    Raises:
        UserError: no shards are named or there, or they do not fit the model: channels, classes, kind of latents,
            sizes, an image larger than a pack. Or parameters are named that the model does not have.
    """
    if not config.data.sources:
        raise UserError("data.shards: must be given, in a config file or as data.shards=PATH")
    batch, patch_size = config.batch.global_batch_size, config.model.patch_size
    plan = open_plan(
        config.data, seed=config.run.seed, global_batch_size=batch, patch_size=patch_size, open_index=open_index
    )
    for stream in plan.streams:
        _require_same_latents(config, stream.index)
    plan.require_fit(pack_rule(config))
    _require_names(config)
    return plan


def require_files(config: Config) -> None:
    """Raises UserError, with the key, if another file that the run will need is not there."""
    weights, evaluation = config.run.init_weights, config.evaluation
    if weights is not None:
        _require("run.init_weights", weights)
    if not evaluation.points or evaluation.features is None:
        return
    _require("evaluation.features", evaluation.features, Path.is_file)
    if evaluation.reference is None:
        raise UserError("evaluation.reference: needed with evaluation.features: an image folder, shards or .npz")
    _require("evaluation.reference", evaluation.reference)


def _require(key: str, path: str, is_there: Callable[[Path], bool] = Path.exists) -> None:
    with reading(f"{key}: {path}"):
        if not is_there(Path(path)):
            raise UserError(f"{key}: {path}: no such file or folder")


def pack_rule(config: Config) -> PackRule:
    """Packs are padded to a multiple of the config's and one that sequence parallelism can cut."""
    multiple = math.lcm(config.batch.pad_multiple, config.parallel.tensor_parallel_size)
    return PackRule(config.batch.pack_tokens, multiple, flops.cost(config.model))


def _require_names(config: Config) -> None:
    table = parameter_table(config.model)
    for key, patterns in (("optim.trainable", config.optim.trainable), ("run.reset", config.run.reset)):
        for pattern in patterns:
            if not any(entry.matches([pattern]) for entry in table):
                raise UserError(f"{key}: {pattern!r} is part of no parameter's name")


def _require_same_latents(config: Config, index: Index) -> None:
    meta, model, shards = index.meta, config.model, index.storage.location
    pairs = (
        ("model.in_channels", model.in_channels, meta.channels),
        ("data.latent.kind", config.data.latent.kind, meta.kind),
        ("data.latent.factor", config.data.latent.factor, meta.factor),
        ("data.latent.scaling", config.data.latent.scaling, meta.scaling),
    )
    for key, wanted, stored in pairs:
        if wanted != stored:
            raise UserError(f"{key}: the config says {wanted}, the shards in {shards} have {stored}")
    if meta.num_classes > model.num_classes:
        raise UserError(
            f"model.num_classes: {model.num_classes}, but the shards in {shards} have labels of "
            f"{meta.num_classes} classes"
        )
