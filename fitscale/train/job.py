"""What a cluster runs for one cell of a sweep: the commands that a person would type, one after the other."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from submitit.helpers import DelayedSubmission

LOG = "log.txt"


@dataclass(frozen=True)
class RunJob:
    """Train the run in `run_dir`, which holds its config already, then evaluate it.

    Holds nothing but the path, and both commands go on from what the directory holds: so a job that is started again,
    be it from its first pickle after the loss of a node, does what is left and nothing twice. What the commands print
    is in `log.txt` of the run directory.
    """

    run_dir: Path

    def __call__(self) -> None:
        self._run("train", str(self.run_dir / "config.yaml"))
        self._run("evaluate", str(self.run_dir))

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again when the job's time is over; the command that runs now ends with this process."""
        return DelayedSubmission(self)

    def _run(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "fitscale", *arguments]
        with open(self.run_dir / LOG, "ab") as log:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {code}; its output: {self.run_dir / LOG}")
