"""A run directory belongs to one config: the first run writes it there, every later one has to agree with it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError
from fitscale.config.load import load_config, to_yaml
from fitscale.config.rundir import RunDir, write_atomic
from fitscale.config.schema import Config

# What may change between two starts of one run: where and how fast it is computed, and what is measured on the way.
# All other keys decide the weights that come out; run.steps only under a schedule that ends with it.
MAY_CHANGE = (
    "run.dir",
    "run.device",
    "run.log_every",
    "data.shards",
    "data.num_workers",
    "data.prefetch_steps",
    "batch.pack_tokens",
    "batch.pad_multiple",
    "parallel.",
    "checkpoint.",
    "sampling.",
    "evaluation.",
    "wandb.",
)


def claim(config: Config) -> RunDir:
    """Make `config.run.dir` the directory of this run and write the resolved config into it.

    Raises:
        UserError: no run.dir, or the directory holds another run; the text lists the keys that differ. Nothing is
            written then.
    """
    if not config.run.dir:
        raise UserError("run.dir: must be given, e.g. run.dir=runs/b (the directory that records the run)")
    run = RunDir(Path(config.run.dir))
    if run.config.exists():
        _check_same(run, config)
    write_atomic(run.config, to_yaml(config))
    return run


def differing_keys(mine: Config, theirs: Config) -> list[str]:
    """Dotted keys, with both values, in which two configs of one run may not differ."""
    mine_flat, theirs_flat = _flat(asdict(mine)), _flat(asdict(theirs))
    fixed = [key for key in mine_flat if not _may_change(key, mine)]
    return [
        f"{key} = {theirs_flat[key]} there, {mine_flat[key]} here" for key in fixed if mine_flat[key] != theirs_flat[key]
    ]


def _check_same(run: RunDir, config: Config) -> None:
    different = differing_keys(config, load_config([str(run.config)]))
    if different:
        raise UserError(
            f"run.dir: {run.path} belongs to a run with another config ({'; '.join(different)}); "
            "choose another run.dir or the config that is there"
        )


def _may_change(key: str, config: Config) -> bool:
    return key.startswith(MAY_CHANGE) or (key == "run.steps" and config.optim.schedule != "cosine")


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
