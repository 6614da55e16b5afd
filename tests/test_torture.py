"""tools/torture.py: what it does to files, that it ends on time, and that what does not hold is told and kept."""

import importlib.util
import random
import re
from pathlib import Path

import pytest

from tests.programs import TOOLS, run_tool


@pytest.fixture
def torture():
    spec = importlib.util.spec_from_file_location("torture", TOOLS / "torture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_real_try_of_a_damaged_shard_set(tmp_path):
    """The undisturbed run, and one on a set of which a file has changed: noticed, or harmless."""
    done = run_tool("torture", "--minutes", 0, "--kinds", "shards", "--dir", tmp_path / "t", "--seed", 5)
    assert done.returncode == 0, done.stdout
    assert re.search(
        r"1  shards   1 rank     (noticed|survived, bit-identical): \S+ \(\w+\): (noticed|harmless)", done.stdout
    )
    assert re.search(r"shards, 1 rank +1 +([01]) +\1 +[01] +0\neverything held", done.stdout)
    assert not list((tmp_path / "t").glob("0001-*"))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_damage_changes_the_file_and_nothing_else(torture, tmp_path, suffix):
    content = (8).to_bytes(8, "little") + b"{}      " + bytes(range(1, 201))
    told = set()
    for seed in range(100):
        (tmp_path / "other").write_bytes(content)
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        told.add(torture.hurt(random.Random(seed), path, tmp_path).split("(")[1].rstrip(")"))
        assert not path.exists() or path.read_bytes() != content
        assert (tmp_path / "other").read_bytes() == content
    assert told == {"bits", "cut", "zeros", "garbage", "gone"} | ({"nan"} if suffix == ".safetensors" else set())


def tried(torture, monkeypatch, capsys, tmp_path, kinds, *arguments):
    """Exit code and output of made-up kinds, on an undisturbed run that is made up as well."""
    monkeypatch.setattr(torture, "KINDS", {name: (act, ("2 workers",)) for name, act in kinds.items()})
    monkeypatch.setattr(torture, "prepare", lambda bench: None)
    code = torture.main(["--dir", str(tmp_path / "t"), *arguments])
    return code, capsys.readouterr().out


def test_what_does_not_hold_is_told_kept_and_makes_the_exit_code_1(torture, monkeypatch, capsys, tmp_path):
    def good(bench, layout, run: Path) -> str:
        run.mkdir()
        return "killed 1 times"

    def bad(bench, layout, run: Path) -> str:
        run.mkdir()
        raise torture.OtherEndError("ended with other weights")

    code, text = tried(torture, monkeypatch, capsys, tmp_path, {"good": good, "bad": bad}, "--minutes", "0")
    assert code == 1 and "survived, DID NOT HOLD: ended with other weights" in text and "1 did not hold" in text
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["0002-bad", "0002-bad.txt"]
    assert tried(torture, monkeypatch, capsys, tmp_path / "2", {"good": good}, "--minutes", "0")[0] == 0


def test_it_ends_when_the_time_is_over_whatever_a_try_is_doing(torture, monkeypatch, capsys, tmp_path):
    """The clock is the test's: each look at it takes ten seconds."""
    seconds = iter(range(0, 10**6, 10))
    monkeypatch.setattr(torture.time, "monotonic", lambda: float(next(seconds)))

    def endless(bench, layout, run: Path) -> str:
        while True:
            bench.sleep(0)

    def quick(bench, layout, run: Path) -> str:
        return "harmless"

    code, text = tried(torture, monkeypatch, capsys, tmp_path, {"quick": quick, "endless": endless}, "--minutes", "2")
    assert code == 0 and "everything held" in text and "endless" not in text


def test_a_process_that_is_left_ends_with_its_command(torture):
    """One that its parent has left behind, in a session of its own."""
    inner = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'], "
    started = torture.Started(["-c", f"{inner}start_new_session=True); print('done', flush=True)"])
    started.process.wait()
    (left,) = started.living()
    started.end()
    assert started.text == "done\n" and not started.living() and left != started.process.pid
