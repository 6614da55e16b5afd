"""Where the time of a step goes, and a profiler's trace of chosen steps.

Phases: `forward`; `backward`, in which ZeRO 1-3 also sum gradients; `optimizer`, in which they also gather weights;
`save`, what the loop waits for a checkpoint. On CUDA they are measured between events on the stream, so nothing waits
for the device but the reading of the sums. Waiting for data is measured on the host, and told of the rank that waited
longest: the others wait for that one.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fitscale.config.schema import ProfileConfig

COMPUTE = ("forward", "backward")
PHASES = (*COMPUTE, "optimizer", "save")


class PhaseTimer:
    """Seconds of this process in each phase since the last reading; `waits` are those of its waits for the loader."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.waits = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside to `name`."""
        start = self._now()
        yield
        self.spans[name].append((start, self._now()))

    def read(self, steps: int) -> dict[str, float]:
        """Seconds a step in each phase; waits for data, and how much longer the slowest rank computes than the mean.

        Begins anew. A collective over all ranks.
        """
        if self.cuda:
            torch.cuda.synchronize(self.device)
        seconds = {name: sum(map(self._span_s, self.spans[name])) for name in PHASES}
        mine = [sum(seconds[name] for name in COMPUTE), sum(self.waits), max(self.waits)]
        self.spans.clear()
        self.waits = [0.0]
        values = torch.tensor(mine, dtype=torch.float64, device=self.device)
        everyones = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, values)
        computing, waited, longest = torch.stack(everyones, dim=1)
        return {
            **{f"{name}_s": value / steps for name, value in seconds.items()},
            "time_imbalance": (computing.max() / computing.mean() - 1).item() if computing.any() else 0.0,
            "data_wait_s": waited.max().item() / steps,
            "data_wait_longest_s": longest.max().item(),
            "data_wait_rank": int(waited.argmax()),
        }

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _span_s(self, span: tuple[Any, Any]) -> float:
        start, end = span
        return start.elapsed_time(end) / 1000 if self.cuda else end - start


class Profiler:
    """Writes `profile/rank-00000.json.gz`, a trace for Perfetto or chrome://tracing, of the steps asked for."""

    def __init__(self, config: ProfileConfig, folder: Path) -> None:
        self.first, self.last = config.first_step, config.first_step + config.steps - 1
        self.folder = folder
        self.running: Any = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around step `step` (counted from 1)."""
        if step == self.first and self.last >= self.first:
            self.running = torch.profiler.profile(record_shapes=True)
            self.running.start()
        yield
        if self.running is not None and step == self.last:
            self.running.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.running.export_chrome_trace(str(self.folder / f"rank-{dist.get_rank():05d}.json.gz"))
            self.running = None
