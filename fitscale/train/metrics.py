"""What a run shows while it trains: metrics.jsonl, throughput.jsonl, the progress bar and wandb.

metrics.jsonl holds only what the config and the seed decide, so that an interrupted run leaves the same bytes as an
uninterrupted one; every measured time goes to throughput.jsonl.
"""

import json
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fitscale.config.files import append_jsonl, read_jsonl, write_atomic
from fitscale.config.schema import Config
from fitscale.parallel.groups import Topology
from fitscale.plan.devices import device_reported_as
from fitscale.run.attempt import Attempt
from fitscale.run.layout import RunDir

COUNTED = ("step", "images", "tokens", "train_flops")
WAITING_SHARE = 0.1  # of the time: more is worth a word,
WAITING_LONGEST_S = 1.0  # and so is a single wait of more than this


def peak_flops_per_s(device: torch.device) -> float | None:
    """Peak of one device; None where it is not known (a CPU)."""
    if device.type != "cuda":
        return None
    known = device_reported_as(torch.cuda.get_device_name(device))
    return known.peak_flops_per_s if known else None


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the run will write again; make the file if there is none."""
    rows = [row for row in read_jsonl(path) if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


class Monitor:
    """Rank 0's window on a run."""

    def __init__(self, config: Config, attempt: Attempt, totals: dict[str, Any], topology: Topology) -> None:
        self.attempt, self.world_size, self.peak = attempt, topology.world_size, peak_flops_per_s(topology.device)
        name, done = config.run.name, totals["step"]
        self.bar = tqdm(total=config.run.steps, initial=done, desc=name, unit="step", mininterval=1.0)
        self.wandb = _start_wandb(config, attempt.run)
        self.waiting_for_data = False
        self.start_counting(totals)

    def log(self, row: dict[str, Any], phases: dict[str, float]) -> None:
        """Write one row of metrics and one of speed.

        Args:
            row: `step` (finished steps) and the totals `images`, `tokens`, `train_flops` among others.
            phases: what `PhaseTimer.read` gave.

        Raises:
            TakenOverError: a newer attempt has started; nothing is written then.
        """
        first_step = self.logged["step"] + 1
        speed = {**self._speed(row), **phases}
        speed["waiting_for_data"] = is_waiting(speed)
        with self.attempt.writing():
            append_jsonl(self.attempt.run.metrics, row)
            append_jsonl(self.attempt.run.throughput, speed)
        self.bar.set_postfix(_postfix(row, speed), refresh=False)
        self.bar.update(row["step"] - self.bar.n)
        if speed["waiting_for_data"] and not self.waiting_for_data:
            text = f"steps {first_step} to {row['step']}: waiting for data took {_waiting_share(speed)} of the time, "
            text += f"at the longest {speed['data_wait_longest_s']:.1f} s (rank {speed['data_wait_rank']}); "
            self.bar.write(f"{text}throughput.jsonl tells when it goes on", file=sys.stderr)
        self.waiting_for_data = speed["waiting_for_data"]
        if self.wandb is not None:
            self.wandb.log({**row, **speed}, step=row["step"])

    def _speed(self, row: dict[str, Any]) -> dict[str, Any]:
        since, logged = self.since, self.logged
        self.start_counting(row)
        seconds = self.since - since
        steps, images, tokens, train_flops = (row[key] - logged[key] for key in COUNTED)
        return {
            "step": row["step"],
            "attempt": self.attempt.number,
            "time_unix_s": time.time(),
            "step_s": seconds / steps,
            "images_per_s": images / seconds,
            "tokens_per_s": tokens / seconds,
            "flops_per_s": train_flops / seconds,
            "mfu": train_flops / seconds / (self.peak * self.world_size) if self.peak else None,
        }

    def start_counting(self, totals: dict[str, Any]) -> None:
        """Begin to measure speed, from these totals on."""
        self.since = time.perf_counter()
        self.logged = {key: totals[key] for key in COUNTED}

    def close(self) -> None:
        self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()


def is_waiting(speed: dict[str, Any]) -> bool:
    """Whether a row of throughput.jsonl shows that training waited for data, and not only for a moment."""
    long = speed["data_wait_longest_s"] > WAITING_LONGEST_S
    return long or speed["data_wait_s"] > WAITING_SHARE * speed["step_s"]


def _waiting_share(speed: dict[str, Any]) -> str:
    return f"{speed['data_wait_s'] / speed['step_s']:.0%}"


def _postfix(row: dict[str, Any], speed: dict[str, Any]) -> dict[str, str]:
    shown = {
        "waiting for data": _waiting_share(speed) if speed["waiting_for_data"] else "",
        "loss": "skipped" if row["loss"] is None else f"{row['loss']:.4f}",
        "img/s": f"{speed['images_per_s']:.0f}",
        "tok/s": f"{speed['tokens_per_s']:.0f}",
        "MFU": "" if speed["mfu"] is None else f"{speed['mfu']:.1%}",
        "pad": f"{row['padding_share']:.1%}",
        "imbalance": f"{row['imbalance']:.1%}",
    }
    return {name: text for name, text in shown.items() if text}


def _start_wandb(config: Config, run: RunDir) -> Any:
    if config.wandb.mode == "off":
        return None
    import wandb

    identity = run.path / "wandb_id"  # one wandb run per run directory, over all its restarts
    if not identity.exists():
        write_atomic(identity, uuid.uuid4().hex[:8])
    return wandb.init(
        **asdict(config.wandb),
        name=config.run.name,
        id=identity.read_text(),
        resume="allow",
        dir=run.path,
        config=asdict(config),
    )
