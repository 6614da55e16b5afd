"""tools/to_tensorboard.py: event files, read back by google's protobuf from the published description of the format."""

import importlib.util
import struct
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from fitscale.config.files import append_jsonl
from fitscale.config.load import load_config
from fitscale.run.claim import claim
from fitscale.run.layout import RunDir
from tests.measured import record
from tests.programs import TOOLS, run_tool
from tests.tiny import OVERRIDES

SPEC = importlib.util.spec_from_file_location("to_tensorboard", TOOLS / "to_tensorboard.py")
PROGRAM = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PROGRAM)
EVENTS, crc32c = PROGRAM.EVENTS, PROGRAM.crc32c

FIELDS = {  # of tensorflow/core/util/event.proto and framework/summary.proto: name, number, type (or message), repeated
    "Image": [("height", 1, "INT32"), ("width", 2, "INT32"), ("colorspace", 3, "INT32"), ("encoded", 4, "BYTES")],
    "Value": [("tag", 1, "STRING"), ("simple_value", 2, "FLOAT"), ("image", 4, "Image")],
    "Summary": [("value", 1, "Value", True)],
    "Event": [
        ("wall_time", 1, "DOUBLE"),
        ("step", 2, "INT64"),
        ("file_version", 3, "STRING"),
        ("summary", 5, "Summary"),
    ],
}


def event_class():
    file, kinds = (
        descriptor_pb2.FileDescriptorProto(name="event.proto", package="t"),
        descriptor_pb2.FieldDescriptorProto,
    )
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, *repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            own = {"type_name": f".t.{kind}"} if kind in FIELDS else {"type": getattr(kinds, f"TYPE_{kind}")}
            message.field.add(name=field, number=number, label=label, **own)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


EVENT = event_class()


def events(path: Path) -> list:
    """The records of an event file, whose checksums are right."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        parts = data[:8], data[12 : 12 + length]
        for part, masked in zip(parts, (data[8:12], data[12 + length : 16 + length]), strict=True):
            crc = crc32c(part)
            assert struct.unpack("<I", masked)[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
        found.append(EVENT.FromString(parts[1]))
        data = data[16 + length :]
    return found


def shown(path: Path) -> list[tuple[int, str, float]]:
    return [(one.step, value.tag, value.simple_value) for one in events(path) for value in one.summary.value]


@pytest.fixture
def run(tmp_path) -> RunDir:
    config = load_config([*OVERRIDES, f"run.dir={tmp_path}/run", "run.steps=4", "evaluation.points=1"])
    made = claim(config)
    for step in (1, 2):
        append_jsonl(made.metrics, {"step": step, "loss": step / 2, "tokens": 2**40 + step, "note": "text"})
        append_jsonl(made.throughput, {"step": step, "time_unix_s": 1000.5 + step, "step_s": 1.0, "data_wait_s": 0.0})
    append_jsonl(made.metrics, {"step": 3, "loss": None})
    record(config, 2, "validation_loss")
    return made


def test_checksums_are_those_of_rfc_3720():
    assert crc32c(b"123456789") == 0xE3069283
    assert [crc32c(part) for part in (bytes(32), b"\xff" * 32, bytes(range(32)))] == [
        0x8A9136AA,
        0x62A8AB43,
        0x46DD794E,
    ]


def test_metrics_evaluations_and_sheets_are_there_once_however_often_it_is_called(run, tmp_path):
    sheet = run.sheet(2, "0123456789abcdef")
    sheet.parent.mkdir(parents=True)
    Image.new("RGB", (300, 7)).save(sheet)
    for _ in range(2):
        assert run_tool("to_tensorboard", run.path, tmp_path / "out").returncode == 0
    path = tmp_path / "out" / "run" / EVENTS
    first, *others = events(path)
    assert first.file_version == "brain.Event:2"
    assert [(one.step, round(one.wall_time, 1)) for one in others[:2]] == [(1, 1001.5), (2, 1002.5)]
    assert shown(path)[:4] == [(1, "loss", 0.5), (1, "tokens", 2.0**40), (2, "loss", 1.0), (2, "tokens", 2.0**40)]
    (value,) = others[-1].summary.value
    assert (value.tag, value.image.width, value.image.height) == ("evaluated_0123456789abcdef/sheet", 300, 7)
    assert value.image.encoded == sheet.read_bytes() and others[-1].step == 2
    (loss,) = others[-2].summary.value
    assert loss.tag == "evaluation/validation_loss"


def test_only_what_is_new_is_added_and_half_a_line_waits(run, tmp_path):
    out = tmp_path / "out"
    run_tool("to_tensorboard", run.path, out)
    path = out / "run" / EVENTS
    before = path.read_bytes()
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "loss": 8.0}\n{"step": 5, "lo')
    path.write_bytes(before + b"what a killed start left")
    assert "1 events added" in run_tool("to_tensorboard", run.path, out).stdout
    assert path.read_bytes().startswith(before) and shown(path)[-1] == (4, "loss", 8.0)


def test_a_run_that_went_back_adds_nothing_twice_and_another_run_of_the_name_starts_anew(run, tmp_path):
    out, lines = tmp_path / "out", run.metrics.read_bytes()
    run_tool("to_tensorboard", run.path, out)
    path = out / "run" / EVENTS
    before = path.read_bytes()
    for again in (lines.splitlines(keepends=True)[0], lines):  # to its checkpoint, then to where it was
        run.metrics.write_bytes(again)
        assert "0 events added" in run_tool("to_tensorboard", run.path, out).stdout and path.read_bytes() == before
    run.metrics.write_bytes(b'{"step": 1, "loss": 7.0}\n' * 40)
    run_tool("to_tensorboard", run.path, out)
    assert shown(path)[0] == (1, "loss", 7.0) and (1, "loss", 0.5) not in shown(path)


def test_two_runs_of_one_name_are_refused(run, tmp_path):
    (tmp_path / "other").mkdir()
    claim(load_config([*OVERRIDES, f"run.dir={tmp_path}/other/run"]))
    done = run_tool("to_tensorboard", run.path, tmp_path / "other" / "run", tmp_path / "out")
    assert done.returncode == 2 and "several runs are called run" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"step": -1, "loss": 1.0}\n', "-1 is the number of no step"),
        (
            "metrics.jsonl",
            b'{"step": 9223372036854775808, "loss": 1.0}\n',
            "9223372036854775808 is the number of no step",
        ),
        ("throughput.jsonl", b'{"step": 1}\n', "line 1: time_unix_s is missing"),
        ("samples/evaluated_x/step-1.png", b"none", "no contact sheet"),
        ("samples/evaluated_x/step-one.png", b"none", "no contact sheet"),
    ],
)
def test_what_is_no_event_is_one_line_and_nothing_is_written(run, tmp_path, name, content, message):
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    (run.path / name).write_bytes(content)
    done = run_tool("to_tensorboard", run.path, tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*.fitscale"))


def test_numbers_that_no_event_holds_are_the_nearest_that_it_does(run, tmp_path):
    row = f'{{"step": 1, "loss": 1e300, "tokens": -{10**400}, "images": NaN}}\n'
    run.metrics.write_text(row)
    run.throughput.write_text(f'{{"step": 1, "time_unix_s": {10**400}, "step_s": 1.0, "data_wait_s": 0.0}}\n')
    assert run_tool("to_tensorboard", run.path, tmp_path / "out").returncode == 0
    values = [value for _, _, value in shown(tmp_path / "out" / "run" / EVENTS)[:3]]
    assert values[:2] == [2.0**127, -(2.0**127)] and values[2] != values[2]
