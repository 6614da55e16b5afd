"""Checkpoints that are complete or not there, and that fit every layout.

    save:    (saver.py) whole fp32 tensors into .saving-A-step-N -> fsync -> COMPLETE (size and checksum of every file)
             -> rename to step-N
    resume:  newest folder whose COMPLETE and files hold; what is not complete is skipped with a warning, what is
             damaged is renamed to step-N.damaged-TIME, and nothing is deleted

    step-00001000/COMPLETE                     run/checkpoint.py
                  weights/raw/00000.safetensors          one file per writing rank, published names, fp32
                  weights/ema_0.9999/...
                  optimizer/exp_avg/...  exp_avg_sq/...

No tensor is stored as a shard, so any number of ranks, tensor-parallel size or ZeRO stage can go on from it, and
sampling reads `weights/` without DeepSpeed. The batch plan is a pure function: its state is the step.
"""

import logging
import os
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fitscale.config.errors import UserError
from fitscale.config.files import require_kinds
from fitscale.config.schema import ModelConfig
from fitscale.model.weights import read_items
from fitscale.parallel.groups import on_rank_zero
from fitscale.parallel.zero import fill_optimizer_state, set_tensor
from fitscale.run.checkpoint import MARKER, TOTALS, Checkpoint, read_checkpoint, write_marker
from fitscale.run.chunks import chunk_progress
from fitscale.run.comparability import ema_name
from fitscale.run.layout import RunDir

log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")


def tensor_sets(ema_decays: list[float]) -> dict[str, str | None]:
    """Folder in the checkpoint -> key in the optimizer's state (None: the weights themselves)."""
    ema = {f"weights/{ema_name(decay)}": ema_name(decay) for decay in ema_decays}
    return {"weights/raw": None, **ema, **{f"optimizer/{name}": name for name in MOMENTS}}


def complete(folder: Path, meta: dict[str, Any], checksums: dict[str, str]) -> None:
    """Write the marker of files that are on the disk, by path inside the folder, and bring the folders there, too."""
    write_marker(folder, meta, checksums)
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
    """The newest intact checkpoint, None before the first; a collective over all ranks, each of which reads some files.

    Newer ones are named in a warning. The damaged ones among them are renamed, so that nobody takes them for whole.

    Raises:
        UserError: there are checkpoints, but no intact one.
    """
    damaged, problems = [], []
    for path in reversed(on_rank_zero(run.checkpoint_folders)):
        checkpoint, problem = on_rank_zero(partial(_read, path))
        if checkpoint is not None and (problem := _damage(checkpoint)):
            damaged.append(path)
        if problem is None:
            on_rank_zero(lambda: _set_aside(damaged))
            return checkpoint
        problems.append(problem)
        if dist.get_rank() == 0:
            log.warning("%s; skipped", problem)
    if problems:
        raise UserError(
            f"{run.checkpoint_folder}: no checkpoint is intact, the newest: {problems[0]}; bring one back, or move the "
            "folder away to begin at step 1"
        )
    return None


def _read(path: Path) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint at `path` if training can go on from it as far as its marker says, else why not."""
    try:
        checkpoint = read_checkpoint(path)
        require_kinds(checkpoint.meta, path / MARKER, **TOTALS, model=dict)
    except UserError as error:
        return None, f"{path} is not complete: {error}"
    return checkpoint, None


def _damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the first damaged file; a collective over all ranks, which share the files."""
    names = sorted(checkpoint.meta.get("checksums", {}))
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, checkpoint.damage(names[dist.get_rank() :: len(found)]))
    return next((problem for problem in found if problem), None)


def _set_aside(paths: list[Path]) -> None:
    """Rename damaged checkpoints, unless an earlier attempt that is still alive has just deleted them."""
    for path in paths:
        if (path / MARKER).exists():
            path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))


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
    """Set the optimizer's fp32 weights, EMA and moments; the module was built with `weights/raw` already.

    The files are those that `newest_checkpoint` has verified.
    """
    fill_optimizer_state(engine, checkpoint.meta["optimizer_steps"])
    for folder, key in tensor_sets(ema_decays).items():
        for parameter, value in read_items(engine.module, checkpoint.path / folder, verify=False):
            if parameter.requires_grad:
                set_tensor(engine, parameter, value, key)


def prune_checkpoints(run: RunDir, keep_last: int, keep_steps: set[int]) -> None:
    """Delete complete checkpoints beyond the newest `keep_last`, except those of `keep_steps`; 0 keeps all.

    A checkpoint whose evaluation is not over is kept too.
    """
    complete = run.checkpoints()
    for checkpoint in complete[:-keep_last] if keep_last else []:
        evaluated = {work.step for work in chunk_progress(run.evaluation_folder)}  # looked at for each: it takes time
        if checkpoint.step not in keep_steps | evaluated:
            try:
                (checkpoint.path / MARKER).unlink()  # first, so that half a deletion is never taken for whole
                shutil.rmtree(checkpoint.path)
            except OSError as error:  # training need not end for that
                log.warning("%s: an old checkpoint cannot be deleted (%s)", checkpoint.path, error.strerror)
