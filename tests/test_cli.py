"""The `fitscale` program as a user meets it: quick help, one message and exit code 2 for a mistake."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fitscale.cli import build_parser, main
from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.program import exit_code

ROOT = Path(__file__).parents[1]
COMMANDS = ["config", "data", "train", "plan", "sample", "evaluate", "doctor"]
PROGRAMS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "slurm").glob("*.py")])


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


HEAVY = {"torch", "deepspeed", "megatron", "diffusers", "matplotlib", "pandas", "scipy", "sklearn", "wandb"}


@pytest.mark.parametrize(
    ("program", "unused"),
    [
        (("-m", "fitscale"), HEAVY | {"numpy", "omegaconf", "yaml"}),  # before it knows the command
        *(((f"slurm/{name}.py",), HEAVY) for name in ("submit", "sweep", "status")),
        (("tools/make_shards.py",), HEAVY),
    ],
    ids=lambda given: given[-1] if isinstance(given, tuple) else "",
)
def test_help_imports_nothing_heavy(program, unused):
    """What a user waits for is what is imported."""
    told = run("-X", "importtime", *program, "--help")
    assert told.returncode == 0 and "usage: " in told.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.stderr.splitlines()}
    assert "argparse" in loaded and not loaded & unused


WATCHED = """
import atexit, json, runpy, sys

class Watched:
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        if text.strip() and not told:
            told.append(sorted(sys.modules))
        return self.stream.write(text)
    def __getattr__(self, name):
        return getattr(self.stream, name)

told, report = [], sys.argv.pop(1)
sys.stdout, sys.stderr = Watched(sys.stdout), Watched(sys.stderr)
atexit.register(lambda: json.dump([*told, sorted(sys.modules)], open(report, "w")))
runpy.run_module("fitscale", run_name="__main__")
"""
THEN = ROOT / "tests" / "data" / "version_0_1"
NOT_FOR_TRAINING = HEAVY - {"torch", "deepspeed", "megatron"}
NOT_FOR_TRAINING |= {"torch._inductor.compile_fx", "networkx", "sklearn", "megatron.core.distributed"}
NOT_FOR_EVALUATION = NOT_FOR_TRAINING - {"scipy"} | {"deepspeed"}  # Frechet distances need it


@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("config runs/fitv2/config.yaml", HEAVY),
        ("data shards --patch-size 1", HEAVY - {"torch", "matplotlib"}),  # which its pictures need
        ("plan runs/fitv2/config.yaml", HEAVY),
        ("train runs/fitv2/config.yaml run.dir=runs/fitv2 run.steps=5", NOT_FOR_TRAINING),
        ("sample runs/fitv2 --height 8 --width 8 --count 1", NOT_FOR_EVALUATION),
        ("evaluate runs/fitv2", NOT_FOR_EVALUATION),
        ("doctor runs/fitv2/config.yaml run.dir=runs/fitv2", HEAVY - {"torch"}),
    ],
    ids=lambda given: given.split()[0] if isinstance(given, str) else "",
)
def test_a_command_speaks_before_it_loads_and_loads_what_it_needs(command, without, tmp_path):
    """How soon a user hears of it, and how long until the first step, is decided by what is imported."""
    folder = shutil.copytree(THEN, tmp_path / "then")
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, "modules.json", *command.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    at_first, at_last = map(set, json.loads((folder / "modules.json").read_text()))
    assert "fitscale.cli" in at_first and not at_first & HEAVY
    assert not at_last & without


@pytest.mark.parametrize(
    ("program", "arguments", "late"),
    [
        ("make_shards", "digits out --scales 0", {"sklearn"}),
        ("train_digits_classifier", "--help", {"torch", "sklearn"}),
        ("export_features", "dinov2 nowhere out.pt", {"torch", "transformers"}),
        ("fit_scaling", "nowhere.csv --metric fd -o out", {"scipy.stats"}),
    ],
)
def test_a_tool_speaks_before_it_loads(program, arguments, late, tmp_path):
    start = f"sys.argv[0] = 'x'\nrunpy.run_path('{ROOT}/tools/{program}.py', run_name='__main__')"
    code = WATCHED.replace('runpy.run_module("fitscale", run_name="__main__")', start)
    subprocess.run(
        [sys.executable, "-c", code, "modules.json", *arguments.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    at_first, at_last = map(set, json.loads((tmp_path / "modules.json").read_text()))
    assert not at_first & late and at_last & late


@pytest.mark.parametrize("command", ["sample --height 8 --width 8", "evaluate", "tune --over steps=1,2"])
def test_a_run_that_is_none_is_told_before_anything_loads(command, tmp_path):
    name, *options = command.split()
    told = run("-X", "importtime", "-m", "fitscale", name, tmp_path, *options)
    *imported, last = told.stderr.splitlines()
    assert told.returncode == 2 and last == f"error: {tmp_path}: not a run directory (no config.yaml there)"
    assert not {line.rpartition("|")[2].strip() for line in imported} & HEAVY


@pytest.mark.parametrize("option", ["--out", "--weights", "--classes"])
def test_a_null_character_is_one_line(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sample", "run", "--height", "8", "--width", "8", option, "a\0b"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "fitscale: error: an argument holds a null character"


def test_the_version_is_the_package_s():
    assert run("-m", "fitscale", "--version").stdout == f"fitscale {version('fitscale')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"example: fitscale {command} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_program_has_help_with_an_example(program):
    result = run(program, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python {program.relative_to(ROOT)}" in " ".join(result.stdout.split())


def test_config_prints_yaml_that_reads_back(capsys, tmp_path):
    assert main(["config", str(ROOT / "configs/demo/digits.yaml"), "model.num_heads=2", "run.name=a: b"]) == 2
    capsys.readouterr()
    assert main(["config", str(ROOT / "configs/demo/digits.yaml"), "optim.lr=5e-4"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    config = load_config([str(tmp_path / "resolved.yaml")])
    assert config == load_config([str(ROOT / "configs/demo/digits.yaml"), "optim.lr=5e-4"])


@pytest.mark.parametrize("command", ["config", "train"])
def test_a_mistake_is_one_line_and_exit_code_2(command, tmp_path):
    result = run("-m", "fitscale", command, "model.dept=3", f"run.dir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: model.dept=3: ") and result.stderr.count("\n") == 1
    assert "Did you mean" in result.stderr and result.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ranks", "grace_s", "printed"),
    [("012", 3600, ["error: a mistake"]), ("1", 0.1, ["rank 1: error: a mistake"])],
    ids=["all ranks meet it", "one rank meets it"],
)
def test_a_mistake_under_torchrun_is_printed_once_whichever_rank_meets_it(tmp_path, ranks, grace_s, printed):
    (tmp_path / "program.py").write_text(
        "import os, sys, time\n"
        "from fitscale.config import program\n"
        "from fitscale.config.errors import UserError\n"
        "def work():\n"
        f"    if os.environ['RANK'] in {ranks!r}:\n"
        "        raise UserError('a mistake')\n"
        "    time.sleep(3600)\n"
        f"program.GRACE_S = {grace_s}\n"
        "sys.exit(program.exit_code(work))\n"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
    lines = run(*launcher, tmp_path / "program.py").stderr.splitlines()
    assert [line for line in lines if line.endswith("error: a mistake")] == printed


def test_a_rank_that_nobody_ends_prints_its_mistake(capsys, monkeypatch):
    monkeypatch.setattr("fitscale.config.program.GRACE_S", 0.01)
    monkeypatch.setenv("RANK", "3")
    assert main(["config", "no.yaml"]) == 2
    assert capsys.readouterr().err == (
        "rank 3: error: no.yaml: no such config file (an override is written key=value)\n"
    )


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"]])
def test_a_command_line_that_is_none_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: fitscale" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error_of_ours():
    """As `fitscale config ... | head -1`: what is printed is longer than a pipe holds, or not."""
    for length in (10, 10**6):
        program = (
            f"from fitscale.config.program import exit_code\nraise SystemExit(exit_code(lambda: print('x' * {length})))"
        )
        out, into = os.pipe()
        os.close(out)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=into, stderr=subprocess.PIPE, check=False
        )
        os.close(into)
        assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_pipe_elsewhere_keeps_its_traceback():
    def fail() -> int:
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        exit_code(fail)


def test_exit_codes(capsys):
    def fail(error: BaseException) -> int:
        raise error

    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 3) == 3
    assert exit_code(lambda: fail(KeyboardInterrupt())) == 130
    assert exit_code(lambda: fail(UserError("wrong"))) == 2
    assert capsys.readouterr().err == "error: wrong\n"
    with pytest.raises(ValueError, match="a fault"):
        exit_code(lambda: fail(ValueError("a fault")))


def test_the_parser_names_its_commands():
    assert all(f"    {command}" in build_parser().format_help() for command in COMMANDS)


LEAVING = """
import atexit, sys, threading, time
import torch.distributed as dist
from fitscale.config.program import leave

class Last:
    def __del__(self):
        print("the interpreter ends")

def main():
    atexit.register(print, "exit handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    if sys.argv[1] == "ranks":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if sys.argv[2] == "stopped":
        raise SystemExit(143)
    return 3

last = Last()
leave(main)
"""


@pytest.mark.parametrize(("how", "code"), [("returned", 3), ("stopped", 143)])
@pytest.mark.parametrize(("world", "after"), [("ranks", ""), ("none", "the interpreter ends\n")])
def test_a_process_of_ranks_leaves_without_the_interpreters_end(world, after, how, code):
    """In which a thread of gloo may abort it; what has registered for the end is done all the same."""
    ended = subprocess.run([sys.executable, "-c", LEAVING, world, how], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (code, f"thread\nexit handler\n{after}")
