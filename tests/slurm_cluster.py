"""The private cluster that the Slurm tests share, and runs on it: submitted as a user does, disturbed, waited for."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fitscale.config.rundir import RunDir, read_jsonl

ROOT = Path(__file__).parents[1]
PORT = 21817  # away from a cluster that somebody started with the scripts' own default
TIMEOUT_S = 150


class Cluster:
    """Two nodes of 8 CPUs on this machine (slurm/local/)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BASE_PORT": str(PORT)}
        self.environment["PATH"] += ":/usr/sbin:/sbin"

    def start(self) -> None:
        """Bring up all that is down: daemons, crashed nodes, drained nodes."""
        out = self.script("start.sh")
        exports = [line.removeprefix("export ") for line in out.splitlines() if line.startswith("export ")]
        self.environment |= dict(line.split("=", 1) for line in exports)

    def stop(self, *nodes: str) -> None:
        """Crash these nodes; without any, stop the cluster."""
        self.script("stop.sh", *nodes)

    def script(self, name: str, *arguments: str) -> str:
        return self.run(str(ROOT / "slurm/local" / name), str(self.folder), *arguments).stdout

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command with this cluster's environment."""
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result

    def python(self, program: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python slurm/PROGRAM ARGUMENTS`."""
        return self.run(sys.executable, str(ROOT / "slurm" / program), *map(str, arguments), check=check)

    def state(self, job: str) -> str:
        return self.run("squeue", "--noheader", "--states", "all", "--jobs", job, "--format", "%T").stdout.strip()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"gave up waiting for {what}"
        time.sleep(0.2)


def last_step(run: RunDir) -> int:
    rows = read_jsonl(run.metrics)
    return rows[-1]["step"] if rows else 0


def starts(run: RunDir) -> list[dict]:
    return [row for row in read_jsonl(run.attempts) if row["event"] == "start"]
