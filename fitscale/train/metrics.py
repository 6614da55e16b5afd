"""What a run shows while it trains: metrics.jsonl, throughput.jsonl, the progress bar and wandb.

metrics.jsonl holds only what the config and the seed decide, so that an interrupted run leaves the same bytes as an
uninterrupted one; every measured time goes to throughput.jsonl.
"""

import json
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from fitscale.config.errors import writing
from fitscale.config.files import append_jsonl, read_jsonl, write_atomic
from fitscale.config.schema import Config
from fitscale.parallel.groups import Topology
from fitscale.plan.devices import device_reported_as
from fitscale.run.attempt import Attempt
from fitscale.run.checkpoint import Checkpoint
from fitscale.run.layout import METRICS
from fitscale.train.mirror import Mirror

COUNTED = ("step", "images", "tokens", "train_flops")
WAITING_SHARE = 0.1  # of the time between two lines: more is worth a word, if it adds up to
WAITING_LEAST_S = 1.0  # this at least;
WAITING_LONGEST_S = 1.0  # and so is a single wait of more than this
LINE_EVERY_S = 30.0  # between lines of progress where there is no terminal


def peak_flops_per_s(device: torch.device) -> float | None:
    """Peak of one device; None where it is not known (a CPU)."""
    known = device_reported_as(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.peak_flops_per_s if known else None


def rewind_metrics(attempt: Attempt, found: Checkpoint | None) -> None:
    """Leave the lines up to the checkpoint `found`: the run writes the others again. Makes the file if there is none.

    Lines that could not be written before that checkpoint was saved are in its marker, and are added here.
    """
    step, path = found.step if found else 0, attempt.run.metrics
    with writing(path), attempt.writing():
        rows = {row["step"]: row for row in read_jsonl(path, **METRICS) if row["step"] <= step}
        rows |= {row["step"]: row for row in (found.meta.get("unwritten", []) if found else [])}
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows.values()))


class Monitor:
    """Rank 0's window on a run."""

    def __init__(self, config: Config, attempt: Attempt, totals: dict[str, Any], topology: Topology) -> None:
        self.attempt, self.world_size, self.peak = attempt, topology.world_size, peak_flops_per_s(topology.device)
        self.progress = _Progress(config, totals["step"])
        self.unwritten: list[dict[str, Any]] = []  # rows of metrics.jsonl for which there was no room
        self.mirror = Mirror(config, attempt.run) if config.wandb.mode != "off" else None
        if self.mirror is not None:
            self.mirror.open()
        self.waiting_for_data = False
        self.start_counting(totals)

    def log(self, row: dict[str, Any], phases: dict[str, float]) -> None:
        """Write one row of metrics and one of speed.

        Args:
            row: `step` (finished steps) and the totals `images`, `tokens`, `train_flops` among others.
            phases: what `PhaseTimer.read` gave.

        Raises:
            TakenOverError: a newer attempt has started; nothing is written then.
            UserError: they cannot be written: no room.
        """
        if self.unwritten:  # what follows a row that is missing waits, too
            self.unwritten.append(row)
            return
        first_step, last_step = self.logged["step"] + 1, row["step"]
        speed = {**self._speed(row), **phases}
        speed["waiting_for_data"] = is_waiting(speed, last_step - first_step + 1)
        self.unwritten.append(row)
        with writing(self.attempt.run.metrics), self.attempt.writing():
            append_jsonl(self.attempt.run.metrics, row)
            self.unwritten.pop()
            append_jsonl(self.attempt.run.throughput, speed)
        self.progress.show(last_step, _shown(row, speed))
        if speed["waiting_for_data"] and not self.waiting_for_data:
            text = f"steps {first_step} to {last_step}: waiting for data took {_waiting_share(speed)} of the time, "
            text += f"at the longest {speed['data_wait_longest_s']:.2g} s (rank {speed['data_wait_rank']}); "
            self.progress.say(f"{text}throughput.jsonl tells when it goes on")
        self.waiting_for_data = speed["waiting_for_data"]
        if self.mirror is not None:
            self.mirror.log({**row, **speed})

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
        self.progress.bar.close()
        if self.mirror is not None:
            self.mirror.close()


class _Progress:
    """How far a run is: a bar where there is a terminal, else a line now and then."""

    def __init__(self, config: Config, step: int) -> None:
        self.name, self.steps, self.first_step = config.run.name, config.run.steps, step
        self.terminal = sys.stderr.isatty()
        bar = {"initial": step, "desc": self.name, "unit": "step", "mininterval": 1.0, "disable": not self.terminal}
        self.bar = tqdm(total=self.steps, **bar)
        self.started_s, self.next_s = time.perf_counter(), 0.0

    def show(self, step: int, values: dict[str, str]) -> None:
        """After `step`, with what else there is to see."""
        if self.terminal:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now_s = time.perf_counter()
        if now_s >= self.next_s or step == self.steps:
            left_s = (now_s - self.started_s) / (step - self.first_step) * (self.steps - step)
            told = ", ".join(f"{name} {value}" for name, value in values.items())
            self.say(f"{self.name}: step {step:,}/{self.steps:,}, {told}, {tqdm.format_interval(left_s)} left")
            self.next_s = now_s + LINE_EVERY_S

    def say(self, text: str) -> None:
        """A line of its own, beside the bar."""
        self.bar.write(text, file=sys.stderr)


def is_waiting(speed: dict[str, Any], steps: int) -> bool:
    """Whether a row of throughput.jsonl, of `steps` steps, shows that training waited for data, and not for moments."""
    waited_s = speed["data_wait_s"]
    often = waited_s > WAITING_SHARE * speed["step_s"] and waited_s * steps > WAITING_LEAST_S
    return often or speed["data_wait_longest_s"] > WAITING_LONGEST_S


def _waiting_share(speed: dict[str, Any]) -> str:
    return f"{speed['data_wait_s'] / speed['step_s']:.0%}"


def _shown(row: dict[str, Any], speed: dict[str, Any]) -> dict[str, str]:
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
