"""No name or value of a config, a profile or a sweep runs as shell: every script is executed, under a fake srun.

Whatever stands there is refused, or reaches srun, sbatch and the job's environment as it is written.
"""

import contextlib
import importlib.util
import io
import json
import os
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fitscale.config.errors import UserError
from fitscale.config.load import load_config, load_schema
from fitscale.config.program import exit_code
from fitscale.jobs.profile import ClusterConfig
from fitscale.jobs.sweep import SweepConfig
from tests.tiny import OVERRIDES

ROOT = Path(__file__).parents[1]
# Writes its arguments and the job's environment, each ended by NUL, and ends as a job does that is done.
SRUN = '#!/bin/sh\nprintf "%s\\0" "$@" >"$RECORD/arguments"\nenv -0 >"$RECORD/environment"\n'
PIECES = [
    *("\n", "\r", "\0", "\t", "\x1b", "\x85", "\u2028", "\u2029", " ", "'", '"', "\\", "`", "$", "#", "%", "%j", "~"),
    *("touch CANARY", "$(touch CANARY)", "`touch CANARY`", "; touch CANARY;", "\ntouch CANARY\n", "'; touch CANARY; '"),
    *("--wrap=x", "-", "--", "| touch CANARY", "&& touch CANARY", "${HOME}", "*", "!!", ">CANARY", "é", "a", "=", ":"),
]
HOSTILE = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
SBATCH = ("partition", "account", "qos", "constraint", "exclude")
KEYS = [*SBATCH, "sbatch key", "sbatch value", "environment key", "environment value", "srun", "run.name", "run.dir"]


def load_program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"slurm_{name}", ROOT / "slurm" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def submit() -> ModuleType:
    return load_program("submit")


def script_of(submit: ModuleType, folder: Path, shards: Path, key: str, value: str) -> str | None:
    """The batch script of a run in whose profile or config `value` stands at `key`; None if it is refused."""
    profile: dict[str, object] = {"device": "cpu", "gpus_per_node": 0, "tasks_per_node": 1}
    section, _, part = key.partition(" ")
    run = {"name": "name", "dir": str(folder / "run")}
    if section.startswith("run."):
        run[section.removeprefix("run.")] = value if section == "run.name" else f"{folder}/{value}"
    elif part:
        profile[section] = {value: "x"} if part == "key" else {"NAME" if section == "environment" else "name": value}
    else:
        profile[section] = [value] if section == "srun" else value
    for name, content in (("profile", profile), ("run", {"run": run})):
        (folder / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    arguments = [*OVERRIDES, f"{folder}/run.yaml", f"data.shards={shards}", "--cluster", f"{folder}/profile.yaml"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(lambda: submit.main([*arguments, "--dry-run"]))
    if code:
        assert code == 2 and err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1, err.getvalue()
        return None
    text = out.getvalue()
    return text[text.index("#!/bin/bash") : text.rindex("end_job $?") + len("end_job $?\n")]


def execute(script: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """What srun was given: its arguments, and its environment."""
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    (folder / "script").write_text(script)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "RECORD": str(folder), "SLURM_JOB_ID": "7", "HOME": "/nowhere"}
    result = subprocess.run(
        ["bash", folder / "script"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    arguments, variables = ((folder / name).read_bytes().decode() for name in ("arguments", "environment"))
    return arguments.split("\0")[:-1], dict(one.split("=", 1) for one in variables.split("\0")[:-1])


def options(script: str) -> dict[str, str]:
    """What sbatch reads of a script: one argument a line."""
    lines = [shlex.split(line.removeprefix("#SBATCH ")) for line in script.splitlines() if line.startswith("#SBATCH")]
    assert all(len(line) == 1 and line[0].startswith("--") for line in lines), lines
    return dict(line[0].removeprefix("--").partition("=")[::2] for line in lines)


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(value=HOSTILE)
@example(value="x\ntouch CANARY\n#")
@example(value="x=1; touch CANARY; y")
@example(value="plain")
def test_nothing_runs_that_should_not(tmp_path_factory, submit, digits_shards, key, value):
    folder = tmp_path_factory.mktemp("job")
    value = value.replace("CANARY", str(folder / "canary")) if key != "run.dir" else value
    script = script_of(submit, folder, digits_shards, key, value)
    if script is None:
        return
    arguments, variables = execute(script, folder)
    assert not (folder / "canary").exists() and not (folder / "CANARY").exists()
    asked = options(script)
    if key in SBATCH:
        assert asked[key] == value
    elif key == "sbatch key":
        assert asked[value] == "x"
    elif key == "sbatch value":
        assert asked["name"] == value
    elif key == "environment key":
        assert variables[value] == "x"
    elif key == "environment value":
        assert variables["NAME"] == value
    elif key == "srun":
        assert value in arguments
    elif key == "run.name":
        assert asked["job-name"] == f"{value}-train-400000"
    else:
        run = os.path.realpath(f"{folder}/{value}")
        assert variables["FITSCALE_RUN_DIR"] == run and f"{run}/submitit/%j" in arguments[-1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=HOSTILE, folder=HOSTILE, cell=HOSTILE)
@example(name="x # y", folder="a b: c # d", cell="c")
@example(name="n", folder="[x", cell="c")
def test_names_of_a_sweep_are_refused_or_its_cells_have_them(tmp_path_factory, name, folder, cell):
    path = tmp_path_factory.getbasetemp() / "sweep.yaml"
    path.write_text(json.dumps({"name": name, "dir": folder, "cells": {cell: []}}))
    try:
        (arguments,) = load_schema(SweepConfig, [str(path)]).arguments.values()
        config = load_config([*OVERRIDES, *arguments])
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert (config.run.name, Path(config.run.dir)) == (f"{name}-{cell}", Path(folder) / cell)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("environment: [x]", "environment: must hold key: value pairs"),
        ("setup: {a: b}", "setup: must hold a list, "),
        ("environment: {A: [x]}", "must be a text"),
        ('environment: {"A B": x}', "'A B' is no name of a variable"),
        ("sbatch: {mail_type: x}", "'mail_type' is no option of sbatch"),
    ],
)
def test_a_mistake_in_a_profile_is_one_line(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_schema(ClusterConfig, [str(tmp_path / "p.yaml")])
    assert message in str(caught.value) and "\n" not in str(caught.value)
