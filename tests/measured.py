"""Lines of evaluations.jsonl as an evaluation of the run's own config writes them, without measuring anything."""

from pathlib import Path
from typing import Any

from fitscale.config import circumstances
from fitscale.config.rundir import RunDir, append_jsonl
from fitscale.config.schema import Config


def record(config: Config, step: int, *metrics: str, **changed: Any) -> None:
    """Add a line for each of `metrics` at `step`; `changed`: entries of the key that the config does not ask for."""
    weights = circumstances.full_weights_name(config, config.evaluation.weights)
    for metric in metrics:
        if metric == "validation_loss":
            key = circumstances.validation_key(config, weights)
            key |= dict.fromkeys(circumstances.DATA, "feed")
        else:
            number = config.evaluation.samples
            key = circumstances.sample_key(config, weights, config.sampling, config.model.rope, number)
            key |= dict.fromkeys(circumstances.FILES, "beef")
        row = {"step": step, "metric": metric, "value": 1.0, "key": key | changed}
        append_jsonl(RunDir(Path(config.run.dir)).evaluations, row)
