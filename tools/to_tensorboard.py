"""Run directories as TensorBoard's event files: metrics, evaluations and contact sheets.

    python tools/to_tensorboard.py runs/b runs/xl tensorboard      # or a sweep's directory
    tensorboard --logdir tensorboard

Call it again, as often as you like, while runs go on: only what is new is added. Every run has a folder in OUT, with
one event file and read.json, which says how much of the run is in it.

The format is short, and written here, so that nothing has to be installed where the runs are: a record is a length, a
protocol buffer (tensorflow's core/util/event.proto), and their masked CRC-32C (its lib/io/record_writer.h).
"""

import argparse
import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError, writing
from fitscale.config.files import parse_json, read_json, read_jsonl, require_kinds, write_atomic
from fitscale.config.load import load_config
from fitscale.config.program import exit_code
from fitscale.run.comparability import shown_name
from fitscale.run.layout import EVALUATIONS, METRICS, THROUGHPUT, RunDir, find_runs

EVENTS, READ = "events.out.tfevents.0000000000.fitscale", "read.json"
VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # how a field of a protocol buffer is written
LARGEST, LATEST_S = float(2**127), float(2**63)  # of the numbers and times in an event
RGB = 3  # TensorBoard's colorspace
Place = tuple[int, str]  # how far a file has been read: bytes, and the line that ends there


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="+", type=Path, metavar="RUN|SWEEP", help="run and sweep directories")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for TensorBoard's --logdir")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: convert(arguments.path, arguments.out))


def convert(paths: list[Path], out: Path) -> None:
    """Bring the event files in `out` up to what the run directories hold.

    Raises:
        UserError: a path holds no run; two runs have one name; no room.
    """
    runs = find_runs(paths)
    names = [run.path.resolve().name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{out}: several runs are called {', '.join(sorted(twice))}; give each a folder OUT of its own")
    for name, run in zip(names, runs, strict=True):
        with writing(out / name):
            print(f"{name}: {add(run, out / name):,} events added", flush=True)


def add(run: RunDir, folder: Path) -> int:
    """Append to the event file in `folder` what is new in `run`; returns the number of events.

    read.json is replaced last: what a killed start has written beyond it is cut off by the next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    read = read_json(folder / READ) if (folder / READ).exists() else {}
    metrics, evaluations = (new_lines(path, *read.get(path.name, (0, ""))) for path in (run.metrics, run.evaluations))
    if metrics is None or evaluations is None:  # of another run that had this name
        read, metrics, evaluations = {}, new_lines(run.metrics, 0, ""), new_lines(run.evaluations, 0, "")
    assert metrics is not None and evaluations is not None
    seen = read.get("sheets", [])
    sheets = [path for path in sorted(run.samples.glob("evaluated_*/step-*.png")) if _name(path, run) not in seen]
    events = list(_events(run, metrics[0], evaluations[0], sheets))
    with open(folder / EVENTS, "ab") as file:
        file.truncate(read.get("bytes", 0))
        if not read:
            file.write(record(_field(1, DOUBLE, time.time()) + _field(3, BYTES, b"brain.Event:2")))
        file.writelines(map(record, events))
        file.flush()
        os.fsync(file.fileno())
        size = file.seek(0, os.SEEK_END)
    done = {run.metrics.name: metrics[1], run.evaluations.name: evaluations[1]}
    sheet_names = [*seen, *(_name(path, run) for path in sheets)]
    write_atomic(folder / READ, json.dumps({**done, "sheets": sheet_names, "bytes": size}))
    return len(events)


def new_lines(path: Path, start: int, last: str) -> tuple[list[dict[str, Any]], Place] | None:
    """The rows of a .jsonl file after byte `start`, where the line `last` ends, and the place reached.

    A file that is shorter is being written again, to the same bytes (a run that went back to its checkpoint): nothing
    is new. None: it is another file.
    """
    if not path.exists() or path.stat().st_size < start:
        return [], (start, last)
    with open(path, "rb") as file:
        file.seek(start - len(last.encode()))
        if file.read(len(last.encode())) != last.encode():
            return None
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    rows = [parse_json(line, path) for line in whole]
    return rows, (start + sum(map(len, whole)), whole[-1].decode() if whole else last)


def _events(
    run: RunDir, metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]], sheets: list[Path]
) -> Iterator[bytes]:
    """Events as protocol buffers; their time is that of the training step, where it is known."""
    config = load_config([str(run.config)])
    times = {row["step"]: row["time_unix_s"] for row in read_jsonl(run.throughput, **THROUGHPUT)}

    def event(step: int, values: list[bytes]) -> bytes:
        if not 0 <= step < 2**63:
            raise UserError(f"{run.path}: {step} is the number of no step; valid: 0 to {2**63 - 1}")
        summary = b"".join(_field(1, BYTES, value) for value in values)
        seconds = times.get(step, time.time())
        return _field(1, DOUBLE, _within(seconds, LATEST_S)) + _field(2, VARINT, step) + _field(5, BYTES, summary)

    for row in metrics:
        require_kinds(row, run.metrics, **METRICS)
        numbers = {name: value for name, value in row.items() if name != "step" and type(value) in (int, float)}
        yield event(row["step"], [_scalar(name, value) for name, value in numbers.items()])
    for row in evaluations:
        require_kinds(row, run.evaluations, **EVALUATIONS)
        yield event(row["step"], [_scalar(shown_name(config, row["metric"], row["key"]), row["value"])])
    for path in sheets:
        try:
            yield event(int(path.stem.removeprefix("step-")), [_image(f"{path.parent.name}/sheet", path.read_bytes())])
        except (ValueError, struct.error) as error:
            raise UserError(f"{path}: no contact sheet of an evaluation ({error})") from error


def _name(sheet: Path, run: RunDir) -> str:
    return str(sheet.relative_to(run.samples))


def _scalar(tag: str, value: float) -> bytes:
    return _field(1, BYTES, tag.encode()) + _field(2, FLOAT, _within(value, LARGEST))


def _within(value: float, most: float) -> float:
    """`value`, or the nearer of +-`most`; not a number stays that."""
    return -most if value < -most else most if value > most else value


def _image(tag: str, png: bytes) -> bytes:
    """A PNG; its header holds width and height."""
    width, height = struct.unpack(">II", png[16:24])
    size = _field(1, VARINT, height) + _field(2, VARINT, width) + _field(3, VARINT, RGB)
    return _field(1, BYTES, tag.encode()) + _field(4, BYTES, size + _field(4, BYTES, png))


def _field(number: int, kind: int, value: Any) -> bytes:
    """A field of a protocol buffer."""
    key = _varint(number << 3 | kind)
    if kind == BYTES:
        return key + _varint(len(value)) + value
    return key + (_varint(value) if kind == VARINT else struct.pack("<d" if kind == DOUBLE else "<f", value))


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def record(data: bytes) -> bytes:
    """`data` as a record of an event file."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of `data`, RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


if __name__ == "__main__":
    sys.exit(main())
