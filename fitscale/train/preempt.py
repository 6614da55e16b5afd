"""What a run does when the cluster wants its node back.

1. Every rank hears USR2 (time limit near, preemption) and SIGTERM (requeue, cancel) and only sets a flag.
2. At every step boundary the ranks agree, by the maximum of their flags: a signal may reach one rank a step earlier
   than another, and a save takes all of them.
3. All save together; then every rank leaves with `Preempted`. Whoever started the run decides what follows.
"""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

# By urgency: after a USR2 the job is to be queued again, even if SIGTERM follows before the save is over.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Preempted(SystemExit):
    """Training has saved and stopped after `signal`."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(128 + signum)
        self.signal = signum


class Preemption:
    """Listens for the signals while used as a context (in the main thread); the handlers before it come back after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.heard = 0  # 0: nothing; n: SIGNALS[n - 1]
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        self.before = {signum: signal.signal(signum, self._hear) for signum in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self.heard = max(self.heard, 1 + SIGNALS.index(signal.Signals(signum)))

    def agreed(self) -> signal.Signals | None:
        """The most urgent signal that any rank has heard; a collective over all ranks."""
        flag = torch.tensor(self.heard, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        number = int(flag.item())
        return SIGNALS[number - 1] if number else None
