"""When something is wrong: steps that are not finite, loss spikes, ranks that hang.

- A step whose loss or gradient norm is not finite changes nothing: DeepSpeed skips it on all ranks (their norm is one
  number). It is counted and the images at fault are named; too many in a row end the run at its last good checkpoint.
- A loss far above the recent median is written to events.jsonl with the images of its step.
- A watchdog in every process ends it when nothing has moved for `timeout_min`, and says what it was doing; so a rank
  that hangs ends the job, because the others wait for it no longer than that either.
"""

import contextlib
import faulthandler
import math
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl
from fitscale.config.schema import HealthConfig

WINDOW = 100  # steps whose median a loss is held against
LEAST = 20  # steps before the first comparison
HUNG = 75  # exit code of a process that the watchdog ends (EX_TEMPFAIL: try again)


class StepHealth:
    """Counts bad steps in a row and finds spikes; the same on every rank, because loss and norm are."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.bad_in_row = 0
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def is_finite(self, loss: float, grad_norm: float) -> bool:
        """Whether the step was taken; counts those that were not."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self.bad_in_row = 0 if finite else self.bad_in_row + 1
        return finite

    def require_progress(self, step: int, last: bool) -> None:
        """Raises UserError after `max_bad_steps` bad steps in a row, and after any at the run's `last` step."""
        bad = f"{self.bad_in_row} steps in a row, up to step {step}, had a loss or gradient that is not finite; "
        bad += "their images are in metrics.jsonl. The weights are as before these steps"
        if last and self.bad_in_row:
            raise UserError(
                f"run.steps: the run does not end well: {bad}. Step {step} is not saved; end at another step "
                "(run.steps), or begin again with a lower optim.lr or without these images"
            )
        if self.bad_in_row >= self.config.max_bad_steps:
            raise UserError(f"health.max_bad_steps: {bad}")

    def spike(self, loss: float) -> float | None:
        """The recent median if `loss` is a spike, else None; remembers the loss."""
        median = statistics.median(self.recent) if len(self.recent) >= LEAST else None
        self.recent.append(loss)
        return median if median is not None and loss > self.config.spike_factor * median else None


class Watchdog:
    """Ends this process if `doing` is not called for `timeout_min` minutes; used as a context."""

    def __init__(self, timeout_min: float, rank: int, events: Path) -> None:
        self.timeout_s, self.rank, self.events = timeout_min * 60, rank, events
        self.activity, self.since = "starting", time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def doing(self, activity: str) -> None:
        """Note what begins now."""
        self.activity, self.since = activity, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.over.set()
        if error is not None and not isinstance(error, UserError):
            self._say(f"failed while {self.activity}: {type(error).__name__}: {str(error).splitlines()[:1]}")

    def _watch(self) -> None:
        while not self.over.wait(min(1.0, self.timeout_s / 4)):
            still_s = time.monotonic() - self.since
            if still_s > self.timeout_s:
                self._say(f"no progress for {still_s / 60:.1f} min while {self.activity}; ending the job")
                faulthandler.dump_traceback(sys.stderr)
                os._exit(HUNG)

    def _say(self, text: str) -> None:
        print(f"rank {self.rank} on {socket.gethostname()}: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # a full or lost disk must not keep the process from ending
            append_jsonl(self.events, {"time_unix_s": time.time(), "rank": self.rank, "event": text})
