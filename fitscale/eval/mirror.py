"""What an evaluation has found, in wandb: in the wandb run of its training, of which it stands beside the metrics."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitscale.config.load import load_config
from fitscale.config.schema import Config
from fitscale.run.comparability import shown_name
from fitscale.run.layout import RunDir
from fitscale.train.mirror import Mirror, post

WAIT_S = 20  # for a training that has the wandb run and may be about to leave it; one that goes on sends the message
_unreachable: set[Path] = set()  # runs whose wandb this process has tried in vain, which takes it a minute


def mirror_evaluation(config: Config, run: RunDir, rows: Sequence[dict[str, Any]], sheet: Path | None) -> None:
    """Mirror rows of evaluations.jsonl, all of one checkpoint, and its contact sheet, if `config.wandb` says so.

    Where wandb cannot be reached that is said, once, and the message waits for who reaches it; so it does while
    training has the wandb run, which sends it with its next row.
    """
    if config.wandb.mode == "off" or not rows:
        return
    trained = load_config([str(run.config)])  # `config` may have been asked for something else
    message = post(run, rows[0]["step"], _values(trained, rows), sheet)
    if run.path in _unreachable:
        return
    import wandb

    mirror = Mirror(trained if trained.wandb.mode != "off" else config, run)
    try:
        for _ in range(WAIT_S):
            if mirror.open():
                return mirror.close()
            if not message.exists():  # sent by who has the run
                return
            time.sleep(1)
    except wandb.Error as error:
        _unreachable.add(run.path)
        waits = f"what was found waits in {run.wandb_outbox}"
        print(f"warning: {run.path}: not mirrored, wandb cannot be reached ({error}); {waits}", file=sys.stderr)


def _values(trained: Config, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    named = {shown_name(trained, row["metric"], row["key"]): row for row in rows}
    errors = {f"{name}_error": row["standard_error"] for name, row in named.items()}
    return {name: row["value"] for name, row in named.items()} | {
        name: error for name, error in errors.items() if error is not None
    }
