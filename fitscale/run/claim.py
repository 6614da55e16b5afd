"""A run directory belongs to one config: the first start writes it there, every later one has to agree with it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError, reading, writing
from fitscale.config.files import write_atomic
from fitscale.config.load import load_config, to_yaml
from fitscale.config.schema import Config
from fitscale.run.layout import RunDir

# What may differ when a run goes on: where and how fast it runs, never what it computes.
_MAY_CHANGE = {"parallel", "checkpoint", "evaluation", "sampling", "health", "profile", "wandb"}
_MAY_CHANGE_KEYS = {
    *("run.dir", "run.name", "run.steps", "run.device", "run.log_every"),
    *("batch.pack_tokens", "batch.pad_multiple"),
    *("data.shards", "data.num_workers", "data.prefetch_steps", "data.latent.vae"),
    *("data.cache_dir", "data.cache_gb"),
}


def claim(config: Config) -> RunDir:
    """Make `config.run.dir` the directory of this run: write the resolved config there, after `check_claim`.

    Raises:
        UserError: as `check_claim`; or the directory cannot be written.
    """
    run = check_claim(config)
    _record(run, config)
    return run


def _record(run: RunDir, config: Config) -> None:
    """Write the config; what `auto` became when the run was trained stays."""
    if run.config.exists():
        there = load_config([str(run.config)]).parallel
        chosen = {
            key: getattr(there, key) for key in ("precision", "compile") if getattr(config.parallel, key) == "auto"
        }
        config = replace(config, parallel=replace(config.parallel, **chosen))
    with writing(f"run.dir: {run.path}"):
        write_atomic(run.config, to_yaml(config))


@contextmanager
def claimed(configs: list[Config]) -> Iterator[None]:
    """`claim` all; if that or what follows is a UserError, directories that were new and got no job are given back.

    So a submission that the cluster refuses can be mended and tried again under the same names.
    """
    runs = [check_claim(config) for config in configs]
    new = [run for run in runs if not run.config.exists()]
    try:
        for run, config in zip(runs, configs, strict=True):
            _record(run, config)
        yield
    except UserError:
        for run in new:
            if not run.jobs.exists():
                shutil.rmtree(run.submitit, ignore_errors=True)
                run.config.unlink(missing_ok=True)
                with suppress(OSError):
                    run.path.rmdir()
        raise


def check_claim(config: Config) -> RunDir:
    """The directory that `config` names, which is new or of the same run.

    Raises:
        UserError: no run.dir; the folder belongs to another config (the differing keys are listed), or holds something
            else; a new run with settings that only runs of earlier versions may have.
    """
    if not config.run.dir:
        raise UserError("run.dir: must be given, e.g. run.dir=runs/b (the directory that records the run)")
    run = RunDir(Path(config.run.dir))
    with reading(f"run.dir: {run.path}"):  # a name that no file system has is found here
        begun, filled = run.config.exists(), run.path.is_dir() and any(run.path.iterdir())
    if begun:
        there = load_config([str(run.config)])
        if changed := [text for key, text in differences(there, config).items() if not _may_change(key, config)]:
            raise UserError(
                f"run.dir: {run.path} belongs to another config; differing keys: {', '.join(changed)}. "
                "Choose another run.dir, or the config that the folder has in config.yaml"
            )
    elif filled:
        raise UserError(f"run.dir: {run.path} is not empty and holds no config.yaml; choose another folder")
    else:
        config.flow.check_new_run()
    return run


def differences(old: Config, new: Config) -> dict[str, str]:
    """Of every leaf in which two configs differ: its key, and `key: old there, new here`."""
    left, right = dict(_leaves(asdict(old))), dict(_leaves(asdict(new)))
    both = [(key, left.get(key, "absent"), right.get(key, "absent")) for key in left | right]
    return {key: f"{key}: {there} there, {here} here" for key, there, here in both if there != here}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _may_change(key: str, config: Config) -> bool:
    if key == "run.steps" and config.optim.schedule == "cosine":
        return False  # the schedule of the steps already taken depends on it
    moved = key.startswith("data.mixture.") and key.endswith(".shards")
    return moved or key in _MAY_CHANGE_KEYS or key.split(".")[0] in _MAY_CHANGE
