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
from fitscale.config.files import read_json, read_jsonl
from fitscale.config.load import load_config
from fitscale.config.schema import Config, ModelConfig
from fitscale.model import flops
from fitscale.run.layout import RunDir, find_runs
from fitscale.scaling.rows.files import FORMATS, read_table
from fitscale.scaling.rows.table import COLUMNS, KEY, number, numbers, refuse, validate


def collect(paths: list[Path]) -> pd.DataFrame:
    """The runs table of the run directories at `paths`; runs without any evaluation have no row.

    Raises:
        UserError: a path holds no run directory, or one of its files cannot be read or holds what is no evaluation.
    """
    runs = find_runs(paths)
    base = os.path.commonpath([run.path.resolve().parent for run in runs])
    tables = [run_rows(run, str(run.path.resolve().relative_to(base))) for run in runs]
    return validate(pd.concat(tables, ignore_index=True), ", ".join(map(str, paths)))


def load_table(paths: list[Path]) -> pd.DataFrame:
    """`read_table` of one .csv or .parquet path, else `collect` of run directories."""
    tables = [path for path in paths if path.suffix in FORMATS]
    if tables and len(paths) > 1:
        raise UserError(f"{tables[0]}: give one table, or run directories")
    return read_table(tables[0]) if tables else collect(paths)


def run_rows(run: RunDir, name: str) -> pd.DataFrame:
    """One row per line of the run's evaluations.jsonl; `name` goes into the column `run`.

    What a line says of its columns is overruled by what the run's config says of them.

    Raises:
        UserError: a file cannot be read, or a line holds what is no evaluation.
    """
    evaluations = read_jsonl(run.evaluations)
    for line, evaluation in enumerate(evaluations, 1):
        if not isinstance(evaluation.get("key") or {}, dict):
            raise UserError(f"{run.evaluations}, line {line}: key must hold a JSON object")
    index = pd.RangeIndex(1, len(evaluations) + 1, name="line")
    tokens = pd.Series([evaluation.get("tokens") for evaluation in evaluations], index, dtype=object, name="tokens")
    refuse(tokens, (tokens.notna() & ~(numbers(tokens) >= 0)).to_numpy(), "a number of tokens", str(run.evaluations))
    config = load_config([str(run.config)])
    shared = _run_columns(run, config, evaluations) | {"run": name}
    rows = [
        {column: evaluation.get(column) for column in COLUMNS}
        | {KEY + entry: _text(value) for entry, value in (evaluation.get("key") or {}).items()}
        | _work_per_image(config.model, evaluation)
        | shared
        for evaluation in evaluations
    ]
    return validate(pd.DataFrame(rows, index, None if rows else list(COLUMNS)), str(run.evaluations))


def _run_columns(run: RunDir, config: Config, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    environment = read_json(run.environment) if run.environment.exists() else {}
    model = config.model
    steps = [checkpoint.step for checkpoint in run.checkpoints()] + [number(row.get("step")) for row in evaluations]
    return {
        "family": model.kind,
        "size": model.name,
        "width": model.hidden_size,
        "depth": model.depth,
        "heads": model.num_heads,
        "patch": model.patch_size,
        "parameters": flops.parameters(model),
        "batch": config.batch.global_batch_size,
        "seed": config.run.seed,
        "lr": config.optim.lr,
        "device": environment.get("device"),
        "status": "finished" if any(step >= config.run.steps for step in steps) else "unfinished",
    }


def _work_per_image(model: ModelConfig, evaluation: dict[str, Any]) -> dict[str, float | None]:
    """Mean tokens and MACs per image trained on.

    Linear MACs are affine in the tokens, so their mean is that of the mean image; attention grows with the square, so
    its mean is what the true training FLOPs leave over.
    """
    images, tokens, train = (number(evaluation.get(name)) for name in ("images", "tokens", "train_flops"))
    if not (images > 0 and tokens > 0):
        return {}
    fixed = flops.linear_macs(model, 0)
    linear = fixed + (flops.linear_macs(model, 1) - fixed) * tokens / images
    attention = train / (6 * images) - linear if train > 0 else None
    return {"tokens_per_image": tokens / images, "linear_macs": linear, "attention_macs": attention}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)
