"""Run directories -> runs table.

1. Find the run directories: each path given is one, or a sweep's folder that holds them.
2. Of each: config.yaml says what the model is, evaluations.jsonl what was measured, environment.json on which device.
3. One row per line of evaluations.jsonl; what a run directory does not hold stays missing.
"""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from fitscale.config.errors import UserError
from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.config.schema import Config, ModelConfig
from fitscale.model import flops
from fitscale.run.layout import RunDir
from fitscale.scaling.rows.table import COLUMNS, KEY, read_table, validate

COPIED = (
    "step",
    "images",
    "train_flops",
    "paper_flops",
    "device_hours",
    "weights",
    "metric",
    "value",
    "standard_error",
    "samples",
    "nfe",
)


def find_runs(paths: list[Path]) -> list[RunDir]:
    """The run directories at `paths` or directly inside them, without repeats, in order of their path."""
    found = {run.path.resolve(): run for path in paths for run in _runs_at(path)}
    return [found[path] for path in sorted(found)]


def collect(paths: list[Path]) -> pd.DataFrame:
    """The runs table of the run directories at `paths`; runs without any evaluation have no row.

    Raises:
        UserError: a path holds no run directory, or one of its files cannot be read.
    """
    runs = find_runs(paths)
    base = _common_parent(runs)
    rows = [row for run in runs for row in run_rows(run, str(run.path.resolve().relative_to(base)))]
    table = pd.DataFrame(rows, columns=None if rows else list(COLUMNS))
    return validate(table, ", ".join(map(str, paths)))


def load_table(paths: list[Path]) -> pd.DataFrame:
    """`read_table` of one .csv or .parquet path, else `collect` of run directories."""
    tables = [path for path in paths if path.suffix in (".csv", ".parquet")]
    if tables and len(paths) > 1:
        raise UserError(f"{tables[0]}: give one table, or run directories")
    return read_table(tables[0]) if tables else collect(paths)


def run_rows(run: RunDir, name: str) -> list[dict[str, Any]]:
    """One row per line of the run's evaluations.jsonl; `name` goes into the column `run`."""
    evaluations = _evaluations(run)
    config = load_config([str(run.config)])
    shared = _run_columns(run, config, evaluations) | {"run": name}
    return [shared | _evaluation_columns(config.model, evaluation) for evaluation in evaluations]


def _runs_at(path: Path) -> list[RunDir]:
    if RunDir(path).config.is_file():
        return [RunDir(path)]
    inside = [RunDir(folder) for folder in sorted(path.iterdir()) if folder.is_dir()] if path.is_dir() else []
    found = [run for run in inside if run.config.is_file()]
    if not found:
        raise UserError(f"{path}: neither a run directory (with config.yaml) nor a folder of run directories")
    return found


def _common_parent(runs: list[RunDir]) -> str:
    return os.path.commonpath([run.path.resolve().parent for run in runs])


def _evaluations(run: RunDir) -> list[dict[str, Any]]:
    try:
        return read_jsonl(run.evaluations)
    except ValueError as error:
        raise UserError(f"{run.evaluations}: not JSON lines: {error}") from error


def _run_columns(run: RunDir, config: Config, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    model = config.model
    return {
        "family": model.family,
        "size": model.name,
        "width": model.hidden_size,
        "depth": model.depth,
        "heads": model.num_heads,
        "patch": model.patch_size,
        "parameters": flops.parameters(model),
        "batch": config.batch.global_batch_size,
        "seed": config.run.seed,
        "lr": config.optim.lr,
        "device": _environment(run).get("device"),
        "status": "finished" if _last_step(run, evaluations) >= config.run.steps else "unfinished",
    }


def _environment(run: RunDir) -> dict[str, Any]:
    try:
        return json.loads(run.environment.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{run.environment}: not JSON: {error}") from error


def _last_step(run: RunDir, evaluations: list[dict[str, Any]]) -> int:
    saved = [checkpoint.step for checkpoint in run.checkpoints()]
    return max(saved + [evaluation["step"] for evaluation in evaluations], default=0)


def _evaluation_columns(model: ModelConfig, evaluation: dict[str, Any]) -> dict[str, Any]:
    columns = {name: evaluation.get(name) for name in COPIED}
    key = {KEY + name: _text(value) for name, value in (evaluation.get("key") or {}).items()}
    return columns | _work_per_image(model, evaluation) | key


def _work_per_image(model: ModelConfig, evaluation: dict[str, Any]) -> dict[str, float | None]:
    """Mean tokens and MACs per image trained on.

    Linear MACs are affine in the tokens, so their mean is that of the mean image; attention grows with the square, so
    its mean is what the true training FLOPs leave over.
    """
    images, tokens, train = (evaluation.get(name) for name in ("images", "tokens", "train_flops"))
    if not images or not tokens:
        return {"tokens_per_image": None, "linear_macs": None, "attention_macs": None}
    per_token, _ = flops.cost(model)
    linear = flops.linear_macs(model, 0) + per_token * tokens / images
    attention = train / (6 * images) - linear if train else None
    return {"tokens_per_image": tokens / images, "linear_macs": linear, "attention_macs": attention}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)
