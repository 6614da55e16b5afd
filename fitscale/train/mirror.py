"""The run's mirror at Weights & Biases: one wandb run per run directory, which one process has at a time.

    wandb_id         the wandb run, over all starts of training and all evaluations
    wandb.lock       who has it: training while it runs, else an evaluation for as long as it mirrors
    wandb_outbox/    what evaluations have found, a file each, until somebody who has the wandb run sends it

wandb lets a second process resume a run that another one writes, and each then overwrites rows of the other. So an
evaluation beside a training leaves its message in the outbox, and the training sends it with its next row.

Every row has its `step`, by which wandb is told to draw: its own count of rows goes on over rewinds and evaluations.
"""

import fcntl
import json
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fitscale.config.files import read_json, write_atomic
from fitscale.config.schema import Config
from fitscale.run.layout import RunDir

START_S = 90  # after which wandb counts as out of reach
FINISH_S = 600  # after which an upload at the end is given up; what is missing stays on disk for `wandb sync`


class Mirror:
    """A process's way to the wandb run of the run in `run`."""

    def __init__(self, config: Config, run: RunDir) -> None:
        self.config, self.run = config, run
        self.lock: IO[bytes] | None = None
        self.wandb: Any = None

    def log(self, row: dict[str, Any]) -> None:
        """Mirror a row with its `step`, and what waits in the outbox; nothing while another process has the run."""
        if self.open():
            self.wandb.log(row)
            self.send_outbox()

    def open(self) -> bool:
        """Whether this process has the wandb run from here on; raises wandb's errors where it cannot be reached."""
        if self.wandb is None and self._take():
            self.wandb = self._start()
        return self.wandb is not None

    def send_outbox(self) -> None:
        """Mirror the messages of the outbox, the oldest first; this process has to have the wandb run."""
        import wandb

        for path in sorted(self.run.wandb_outbox.glob("*.json")):
            message = read_json(path)
            row = {"step": message["step"], **message["values"]}
            sheet = message["sheet"] and self.run.path / message["sheet"]
            if sheet and sheet.is_file():  # not where somebody has cleared samples/
                row["evaluation/sheet"] = wandb.Image(str(sheet), caption=f"step {message['step']:,}")
            self.wandb.log(row)
            path.unlink()

    def close(self) -> None:
        """Let the wandb run go, with all that waits in the outbox."""
        if self.wandb is not None:
            self.send_outbox()
            self.wandb.finish()
            self.wandb = None
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def _take(self) -> bool:
        """Hold the lock, until it is closed or this process ends; False while another process has it."""
        if self.lock is None:
            file = open(self.run.path / "wandb.lock", "ab")  # noqa: SIM115
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX: the kind that network file systems know
            except OSError:
                file.close()
                return False
            self.lock = file
        return True

    def _start(self) -> Any:
        import wandb

        identity = self.run.wandb_id
        if not identity.exists():
            write_atomic(identity, uuid.uuid4().hex[:8])
        started = wandb.init(
            **asdict(self.config.wandb),
            name=self.config.run.name,
            id=identity.read_text(),
            resume="allow",
            dir=self.run.path,
            config=asdict(self.config),
            settings=wandb.Settings(init_timeout=START_S, finish_timeout=FINISH_S),
        )
        started.define_metric("step")
        started.define_metric("*", step_metric="step")
        return started


def post(run: RunDir, step: int, values: dict[str, float], sheet: Path | None) -> Path:
    """Put a message into the outbox: what was found at `step`, and a picture inside the run directory.

    Returns its file, which is gone when somebody has sent it.
    """
    inside = None if sheet is None else str(sheet.resolve().relative_to(run.path.resolve()))
    message = {"step": step, "values": values, "sheet": inside}
    path = run.wandb_outbox / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
    write_atomic(path, json.dumps(message))
    return path
