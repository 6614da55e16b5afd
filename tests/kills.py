"""SIGKILL at any point of a process's work, chosen by counting function calls: no load on the machine moves it."""

import os
import signal
import sys
from typing import Any

from fitscale.config.schema import Config

STEP_CALLS, SAVE_CALLS = 20_000, 13_000  # of the tiny run: a step in the main thread, a save in its own


def die_after(calls: int) -> None:
    """End this process when this thread has called as many functions more, Python's or C's."""
    left = iter(range(calls))

    def count(*_: object) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def train_and_die(config: Config, in_save: bool, calls: int, victim: int = 0) -> None:
    """Train until rank `victim` ends: `calls` calls into its second save, or into the second step after the first."""
    from fitscale.train import saver, step, trainer

    saver.VISIBLE_S = 1.0  # rank 0 waits no longer for what a dead rank was writing
    steps, saves = iter(range(10**6)), iter(range(10**6))
    take_step, give, write = step.Stepper.take, saver._Save._give, saver._Save._write

    def counted_step(self: Any, batch: Any, votes: Any) -> Any:
        if next(steps) == config.checkpoint.every_steps + 1 and not in_save:
            die_after(calls)
        return take_step(self, batch, votes)

    def counted_give(self: Any) -> None:
        self.second = next(saves) == 1 and in_save
        if self.second:
            die_after(calls)  # in this thread, which writes next
        give(self)

    def counted_write(self: Any) -> None:
        write(self)
        if self.second:
            die_after(0)  # a shorter save than most

    if int(os.environ.get("RANK", "0")) == victim:
        step.Stepper.take = counted_step  # type: ignore[method-assign]
        saver._Save._give, saver._Save._write = counted_give, counted_write  # type: ignore[method-assign]
    trainer.train(config)
