"""Evaluations on wandb, beside the training's curves."""

from pathlib import Path
from typing import Any

from fitscale.config.schema import Config
from fitscale.run.layout import RunDir


def mirror_evaluation(config: Config, run: RunDir, rows: list[dict[str, Any]], sheet: Path | None) -> None:
    """Nothing yet."""
