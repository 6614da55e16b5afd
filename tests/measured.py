"""Lines of evaluations.jsonl as an evaluation of the run's own config writes them, without measuring anything."""

from pathlib import Path
from typing import Any

from fitscale.config.files import append_jsonl
from fitscale.config.schema import Config
from fitscale.run import comparability
from fitscale.run.layout import RunDir


def record(config: Config, step: int, *metrics: str, nfe: float | None = None, **changed: Any) -> None:
    """Add a line for each of `metrics` at `step`; `changed`: entries of the key that the config does not ask for."""
    weights = comparability.full_weights_name(config, config.evaluation.weights)
    for metric in metrics:
        if metric == "validation_loss":
            key = comparability.validation_key(config, weights)
            key |= dict.fromkeys(comparability.DATA, "feed")
        else:
            key = comparability.sample_key(config, weights)
            key |= dict.fromkeys(comparability.FILES, "beef")
        row = {"step": step, "metric": metric, "value": 1.0, "nfe": nfe, "key": key | changed}
        append_jsonl(RunDir(Path(config.run.dir)).evaluations, row)
