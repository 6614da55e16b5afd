"""The mirror at wandb, offline and for real: what training and evaluations have sent is read from wandb's files."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fitscale.config.load import load_config
from fitscale.config.schema import Config
from fitscale.eval import mirror as of_evaluation
from fitscale.eval.mirror import mirror_evaluation
from fitscale.run.claim import claim
from fitscale.run.comparability import DATA, FILES, sample_key, validation_key
from fitscale.run.layout import RunDir
from fitscale.train import mirror as train_mirror
from fitscale.train.mirror import Mirror
from tests.tiny import OVERRIDES
from tests.waiting import wait_until

BLOCK = 32768  # wandb writes records as LevelDB does: in blocks, each part with its checksum, length and kind
HOLD = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> tuple[Config, RunDir]:
    folder = tmp_path_factory.mktemp("mirror") / "run"
    config = load_config([*OVERRIDES, f"run.dir={folder}", "run.name=mirrored", "wandb.mode=offline"])
    return config, claim(config)


def evaluated(config: Config, step: int, guidance: float = 1.0) -> list[dict]:
    of_samples = sample_key(config, "ema_0.9") | dict.fromkeys(FILES, "beef") | {"guidance": guidance}
    of_loss = validation_key(config, "ema_0.9") | dict.fromkeys(DATA, "beef")
    row = {"step": step, "standard_error": None}
    loss = row | {"metric": "validation_loss", "value": 0.25, "standard_error": 0.5, "key": of_loss}
    return [loss, row | {"metric": "fd", "value": 12.5, "key": of_samples}]


def sent(run: RunDir) -> list[dict]:
    """The rows of wandb's history, over all processes that had the wandb run, in the order of their time."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return sorted(found, key=lambda row: row["_timestamp"])


def records(data: bytes):
    place, parts = 7, b""  # after the header
    while place + 7 <= len(data):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if place + 7 + length > len(data):  # still being written
            return
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_training_and_evaluations_are_in_one_wandb_run_one_process_at_a_time(offline, monkeypatch):
    config, run = offline
    sheet = run.sheet(10, "beef")
    sheet.parent.mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(sheet)
    monkeypatch.setattr(of_evaluation, "WAIT_S", 1)
    with subprocess.Popen([sys.executable, "-c", HOLD, run.path / "wandb.lock"], stdin=-1, stdout=-1) as training:
        training.stdout.readline()
        mirror_evaluation(config, run, evaluated(config, 10), sheet)
        assert not run.wandb_id.exists() and len(list(run.wandb_outbox.iterdir())) == 1
        training.communicate(b"\n")
    mirror = Mirror(config, run)
    mirror.log({"step": 12, "loss": 0.5})  # the next who has the run sends what waits
    assert not list(run.wandb_outbox.iterdir())
    mirror.close()
    mirror_evaluation(config, run, evaluated(config, 10, guidance=2.0), None)
    wait_until(lambda: len(sent(run)) == 3, "wandb's service to have written the three rows")
    first, second, third = sent(run)
    assert (first["step"], first["loss"]) == (12, 0.5)
    assert (second["step"], second["evaluation/fd"], second["evaluation/validation_loss"]) == (10, 12.5, 0.25)
    assert second["evaluation/validation_loss_error"] == 0.5 and "evaluation/fd_error" not in second
    assert (second["evaluation/sheet/width"], second["evaluation/sheet/height"]) == (20, 10)
    (other,) = [name for name in third if name.endswith("/fd")]
    assert other.startswith("evaluation-") and third["evaluation/validation_loss"] == 0.25
    folders = {path.name.rsplit("-", 1)[1] for path in run.path.glob("wandb/offline-run-*")}
    assert folders == {run.wandb_id.read_text()}


def test_a_wandb_that_cannot_be_reached_is_said_once_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(train_mirror, "START_S", 1)
    config = load_config([*OVERRIDES, f"run.dir={tmp_path}/run", "wandb.mode=online"])
    run = claim(config)
    for step in (10, 20):
        mirror_evaluation(config, run, evaluated(config, step), None)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "wandb cannot be reached" in warnings[0]
    assert [json.loads(path.read_text())["step"] for path in sorted(run.wandb_outbox.iterdir())] == [10, 20]


def test_without_wandb_nothing_is_left_behind(tmp_path):
    config = load_config([*OVERRIDES, f"run.dir={tmp_path}/run"])
    run = claim(config)
    mirror_evaluation(config, run, evaluated(config, 10), None)
    assert {path.name for path in Path(run.path).iterdir()} == {"config.yaml"}
