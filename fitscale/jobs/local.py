"""Jobs as processes of this machine, through submitit's local executor: started, and stopped so that they can save.

submitit's own way to cancel a job sends SIGINT and, a second later, SIGKILL. Its controller passes SIGTERM on, and
waits.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from submitit import LocalExecutor, LocalJob

POLL_S = 0.1


def start_here(executor: LocalExecutor, job: Any) -> LocalJob[Any]:
    """Start a job that does not hear a terminal's Ctrl-C: this process does, and stops it in order."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        started: Any = executor.submit(job)
        return started
    finally:
        signal.signal(signal.SIGINT, before)


def stop_here(jobs: Sequence[LocalJob[Any]]) -> None:
    """Ask those that run to end, and wait until they have saved; stopped once more (Ctrl-C), end them at once."""
    running = [job for job in jobs if not job.done()]
    if not running:
        return
    print(f"stopping {len(running)} jobs; they save first (Ctrl-C: they end at once)", file=sys.stderr, flush=True)
    try:
        _terminate(running)
        while any(not job.done() for job in running):
            time.sleep(POLL_S)
    except (KeyboardInterrupt, SystemExit):
        _terminate(running)  # they pass a second SIGTERM on as SIGKILL
        raise


def _terminate(jobs: Sequence[LocalJob[Any]]) -> None:
    for job in jobs:
        if not job.done():
            os.kill(int(job.job_id), signal.SIGTERM)
