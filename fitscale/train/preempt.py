"""What a run does when it is to stop before its end: the cluster wants its node back, or a person does.

1. Every rank hears USR2 (time limit near, preemption), SIGTERM (requeue, cancel) and SIGINT (Ctrl-C), and only sets a
   flag; so does rank 0 when it cannot write what it logs, which ends the run with the next step. The first signal is
   told in one line.
2. In every step the ranks agree, by the sums of their flags, which travel with the loss: a signal may reach one rank a
   step earlier than another, and a save takes all of them.
3. All save together; then every rank leaves with `Preempted`. Whoever started the run decides what follows.

A second signal after Ctrl-C ends the process at once. Under torchrun that is a second Ctrl-C, too: it hands the first
on to its ranks as SIGINT, the second as SIGTERM.
"""

import os
import signal
import sys
from collections.abc import Sequence
from enum import IntEnum
from types import FrameType
from typing import Any

from fitscale.config.program import INTERRUPTED


class Stop(IntEnum):
    """Why a run stops, by urgency: after a USR2 the job is to be queued again, even if SIGTERM follows before the save
    is over."""

    SIGINT = 1
    SIGTERM = 2
    SIGUSR2 = 3
    CANNOT_WRITE = 4


class Preempted(SystemExit):
    """Training has saved and stopped after `signal`."""

    def __init__(self, stop: Stop) -> None:
        self.signal = signal.Signals[stop.name]
        super().__init__(128 + self.signal)


class Preemption:
    """Listens for the signals while used as a context (in the main thread); the handlers before it come back after."""

    def __init__(self) -> None:
        self.heard = 0  # a Stop
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        signals = (signal.Signals[stop.name] for stop in Stop if stop is not Stop.CANNOT_WRITE)
        self.before = {signum: signal.signal(signum, self._hear) for signum in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        if self.heard == Stop.SIGINT and signum != signal.SIGUSR2:
            os._exit(INTERRUPTED)
        if not self.heard and os.environ.get("RANK", "0") == "0":
            again = "; once more leaves at once, without saving" if signum == signal.SIGINT else ""
            text = f"{name}: training saves after this step and leaves, the same command goes on from there{again}"
            print(f"\n{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
        self.heard = max(self.heard, Stop[name])

    def votes(self) -> list[float]:
        """For each `Stop`, whether this rank has heard it; the ranks' are added up with the loss of a step."""
        return [float(self.heard == stop) for stop in Stop]


def agreed(votes: Sequence[float]) -> Stop | None:
    """The most urgent reason to stop that any rank has, from the sums of all ranks' votes."""
    return max((stop for stop, count in zip(Stop, votes, strict=True) if count), default=None)
