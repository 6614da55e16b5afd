"""Checkpoints that are complete or not there, and that fit every layout.

    save:    (saver.py) whole fp32 tensors into .saving-A-step-N -> fsync -> COMPLETE (names and sizes of all files)
             -> rename to step-N
    resume:  newest folder whose COMPLETE holds; what is not complete is skipped with a warning, never deleted

    step-00001000/COMPLETE                     step, images, tokens, FLOPs, model config, files
                  weights/raw/00000.safetensors          one file per writing rank, published names, fp32
                  weights/ema_0.9999/...
                  optimizer/exp_avg/...  exp_avg_sq/...

No tensor is stored as a shard, so any number of ranks, tensor-parallel size or ZeRO stage can go on from it, and
sampling reads `weights/` without DeepSpeed. The batch plan is a pure function: its state is the step.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError
from fitscale.config.files import write_atomic
from fitscale.config.schema import ModelConfig
from fitscale.model.weights import read_items
from fitscale.parallel.zero import fill_optimizer_state, set_tensor
from fitscale.run.comparability import ema_name
from fitscale.run.layout import Checkpoint, RunDir, read_checkpoint

log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")


def tensor_sets(ema_decays: list[float]) -> dict[str, str | None]:
    """Folder in the checkpoint -> key in the optimizer's state (None: the weights themselves)."""
    ema = {f"weights/{ema_name(decay)}": ema_name(decay) for decay in ema_decays}
    return {"weights/raw": None, **ema, **{f"optimizer/{name}": name for name in MOMENTS}}


def complete(folder: Path, meta: dict[str, Any]) -> None:
    """Bring every file to the disk, then write the marker that names them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        fsync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_atomic(folder / "COMPLETE", json.dumps({**meta, "files": sizes}, indent=1))
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        fsync(path)


def fsync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_checkpoint(run: RunDir) -> Checkpoint | None:
    """The newest complete checkpoint; newer folders that are not complete are named in a warning."""
    for path in reversed(run.checkpoint_folders()):
        checkpoint = read_checkpoint(path)
        if checkpoint is not None:
            return checkpoint
        log.warning("%s is not complete (no marker, or a file is missing or cut short): skipped", path)
    return None


def require_same_model(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raises UserError, with the differing keys, if `checkpoint` is of another model than `model`."""
    saved, wanted = checkpoint.meta["model"], asdict(model)
    # What an earlier version did not know yet has its default there.
    saved = asdict(type(model)()) | saved
    keys = [key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)]
    if keys:
        differing = ", ".join(f"model.{key}: {saved.get(key)} there, {wanted.get(key)} here" for key in keys)
        raise UserError(f"{checkpoint.path}: a checkpoint of another model ({differing})")


def load_optimizer(checkpoint: Checkpoint, engine: Any, ema_decays: list[float]) -> None:
    """Set the optimizer's fp32 weights, EMA and moments; the module was built with `weights/raw` already."""
    fill_optimizer_state(engine, checkpoint.meta["optimizer_steps"])
    for folder, key in tensor_sets(ema_decays).items():
        for parameter, value in read_items(engine.module, checkpoint.path / folder):
            if parameter.requires_grad:
                set_tensor(engine, parameter, value, key)


def prune_checkpoints(run: RunDir, keep_last: int, keep_steps: set[int]) -> None:
    """Delete complete checkpoints beyond the newest `keep_last`, except those of `keep_steps`; 0 keeps all."""
    complete = run.checkpoints()
    for checkpoint in complete[:-keep_last] if keep_last else []:
        if checkpoint.step not in keep_steps:
            (checkpoint.path / "COMPLETE").unlink()  # first, so that half a deletion is never taken for whole
            shutil.rmtree(checkpoint.path)
