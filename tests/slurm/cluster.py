"""A private Slurm cluster for one test module, and runs on it: submitted as a user does, disturbed, waited for.

A cluster has a folder and ports of its own, and job ids of its own, because the port of a job's rendezvous follows from
its id and all nodes are this machine. The process that started it holds a lock in the folder for as long as it lives:
a folder whose lock is free was left by tests that were killed, and is stopped and removed before the next one starts.
"""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import yaml

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.run.claim import claim
from fitscale.run.layout import RunDir
from tests.tiny import OVERRIDES

ROOT = Path(__file__).parents[2]
FOLDERS = Path("/tmp")  # pytest's own folders are too long for unix sockets
PREFIX = "fitscale-slurm-"
PORTS = range(30000, 32700, 5)  # above the ports of a rendezvous, below those that Linux hands out by itself


class Cluster:
    """Two nodes of 8 CPUs on this machine (slurm/local/)."""

    def __init__(self, folder: Path, base_port: int) -> None:
        self.folder = folder
        first_job = 1001 + 20 * (base_port - PORTS.start)
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.environment |= {"BASE_PORT": str(base_port), "FIRST_JOB": str(first_job)}
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

    def submit(self, run: RunDir, shards: Path, profile: Path, *arguments: str) -> str:
        """Submit the tiny run with further overrides and options; returns the id of its (first) training job."""
        where = (f"run.dir={run.path}", f"data.shards={shards}", "--cluster", profile)
        self.python("submit.py", *OVERRIDES, *where, *arguments)
        return str(read_jsonl(run.jobs)[0]["job"])

    def state(self, job: str) -> str:
        """The job's state in the queue, which also knows jobs that have ended."""
        return self.run("squeue", "--noheader", "--states", "all", "--jobs", job, "--format", "%T").stdout.strip()

    def control(self, *arguments: str) -> None:
        """`scontrol ARGUMENTS`."""
        self.run("scontrol", *arguments)

    def processes(self, job: str) -> Iterator[tuple[Path, str, dict[str, str]]]:
        """(folder in /proc, command line, environment) of every process of the job."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                items = (process / "environ").read_text().split("\0")
                command = (process / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            environment = dict(item.split("=", 1) for item in items if "=" in item)
            if environment.get("SLURM_JOB_ID") == job:
                yield process, command, environment

    def ranks(self, job: str) -> dict[int, int]:
        """The process ids of the job's ranks."""
        return {
            int(environment["SLURM_PROCID"]): int(process.name)
            for process, command, environment in self.processes(job)
            if "submitit.core._submit" in command and "srun" not in command and "SLURM_PROCID" in environment
        }


@contextmanager
def new_cluster() -> Iterator[Cluster]:
    """A running cluster of its own, stopped and removed afterwards."""
    with _locked(FOLDERS / f"{PREFIX}start.lock"):  # one looks for ports, or installs, at a time
        _remove_leftovers()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=FOLDERS))
        owner = open(folder / "owner", "w")  # noqa: SIM115
        fcntl.flock(owner, fcntl.LOCK_EX)
        cluster = Cluster(folder, _free_ports())
        try:
            cluster.start()
        except BaseException:
            _remove(folder)
            raise
    try:
        yield cluster
    finally:
        _remove(folder)
        owner.close()


def _remove_leftovers() -> None:
    for owner in FOLDERS.glob(f"{PREFIX}*/owner"):
        with open(owner) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # in use
            _remove(owner.parent)


def _remove(folder: Path) -> None:
    subprocess.run([ROOT / "slurm/local/stop.sh", folder], stdout=subprocess.DEVNULL, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def _free_ports() -> int:
    """The first of five ports (controller, accounting, two nodes, one spare) that nobody listens on."""
    return next(port for port in PORTS if all(_is_free(port + offset) for offset in range(5)))


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def write_profile(path: Path, **changes: object) -> Path:
    """The private cluster's profile, changed, as a file in `path`."""
    profile = yaml.safe_load((ROOT / "configs/cluster/demo.yaml").read_text())
    path.write_text(yaml.safe_dump(profile | changes))
    return path


def last_step(run: RunDir) -> int:
    """The step that was logged last."""
    rows = read_jsonl(run.metrics)
    return rows[-1]["step"] if rows else 0


def saved_step(run: RunDir) -> int:
    """The step of the newest complete checkpoint."""
    checkpoints = run.checkpoints()
    return checkpoints[-1].step if checkpoints else 0


def starts(run: RunDir) -> list[dict]:
    """The lines of attempts.jsonl that say that an attempt started."""
    return [row for row in read_jsonl(run.attempts) if row["event"] == "start"]


def end_soon(run: RunDir, steps: int) -> None:
    """Give a run that waits in the queue only `steps` more than it has saved."""
    claim(load_config([str(run.config), f"run.steps={saved_step(run) + steps}"]))
