"""What comes from outside as JSON, as a config's value or in a message: bounded, checked, told in one line."""

import json

import pytest

from fitscale.config.errors import UserError
from fitscale.config.files import append_jsonl, read_json, read_jsonl
from fitscale.config.load import load_config

HOSTILE_JSON = {
    "no text": b"\xff\xfe\x00",
    "cut short": b'{"a": 1',
    "nested": b'{"a": ' + b"[" * 200_000,
    "a list": b"[]",
    "a number of 10,000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "empty": b"",
}


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_json_that_is_no_object(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json: "):
        read_json(path)


def test_json_is_read_no_further_than_its_bound(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": "b" * 1000}))
    assert read_json(path, most_bytes=2000) == {"a": "b" * 1000}
    with pytest.raises(UserError, match="more than 500 bytes"):
        read_json(path, most_bytes=500)


def test_json_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize("garbage", [b"garbage", b"[1]", b"\xff", b'{"a": NaN'])
def test_garbage_among_lines_is_named_by_its_line(tmp_path, garbage):
    path = tmp_path / "x.jsonl"
    append_jsonl(path, {"step": 1})
    path.write_bytes(path.read_bytes() + garbage + b"\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: "):
        read_jsonl(path)


@pytest.mark.parametrize(
    "override",
    [
        'run.name="a\\nb"',
        'run.dir="a\\u2028b"',
        'optim.trainable=["a", "b\\tc"]',
        "run.name=" + "x" * 5000,
        "sampling.guidance.scale=nan",
        "sampling.rtol=.inf",
        "run.seed=9223372036854775808",
        "run.seed=0x" + "f" * 5000,
    ],
    ids=lambda override: override[:30],
)
def test_no_section_holds_what_a_script_or_64_bits_cannot(override):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=f"^{key}: "):
        load_config([override])


def test_a_message_is_one_line_of_bounded_length_that_a_terminal_can_show():
    text = str(UserError("a\nb\x1b[31m\udc80 " + "x" * 100_000 + " the end"))
    assert text.isprintable() and len(text) < 1000
    assert text.startswith("a b\\x1b[31m\\udc80 xxx") and text.endswith("the end")
