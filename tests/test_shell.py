"""The shell files: bash can read them, shellcheck finds nothing, and those of the library are installed with it."""

import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fitscale", "slurm", "tools")
FILES = sorted([ROOT / ".ci/run", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.sh"))])


def test_the_library_has_its_shell_files_where_it_is_installed():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = {path for name, glob in setup["options.package_data"].items() for path in package(name).glob(glob)}
    assert installed == {path for path in FILES if path.is_relative_to(ROOT / "fitscale")} != set()


def package(name: str) -> Path:
    return ROOT.joinpath(*name.split("."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_bash_reads_it_and_shellcheck_finds_nothing(path):
    checks = [["bash", "-n"], ["shellcheck"]]
    for check in checks if shutil.which("shellcheck") else checks[:1]:
        result = subprocess.run([*check, path], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def recipe() -> dict[str, str]:
    """The container's recipe by section; the header under the empty name."""
    parts = re.split(r"^%(\w+)\n", (ROOT / "slurm/fitscale.def").read_text(), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_the_container_s_recipe_takes_what_is_there_and_installs_the_package():
    sections = recipe()
    assert set(sections) == {"", "files", "post", "environment", "runscript", "test", "help"}
    header = dict(re.findall(r"^(\w+): (\S+)$", sections[""], re.MULTILINE))
    assert header == {"Bootstrap": "docker", "From": "python:3.11-slim-bookworm"}
    pairs = [line.split() for line in sections["files"].splitlines() if line.strip()]
    assert pairs and all(len(pair) == 2 and (ROOT / pair[0]).exists() for pair in pairs)
    copied = {f"{target}{source}" for source, target in pairs}
    named = set(re.findall(r"/opt/fitscale/[\w./-]+", sections["post"] + sections["test"]))
    assert named and all(any(name.startswith(one) for one in copied) for name in named)
    for name in re.findall(r"/opt/fitscale/([\w./-]+)", sections["test"]):
        assert (ROOT / name).is_file()
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = {"setup.cfg", "pyproject.toml", setup["metadata"]["long_description"].removeprefix("file: ")}
    assert needed | {setup["metadata"]["license_files"]} <= {source for source, _ in pairs}


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_the_container_s_recipe_is_shell(section, tmp_path):
    script = tmp_path / section
    script.write_text(f"#!/bin/sh\n{recipe()[section]}")
    for check in [["sh", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]:
        result = subprocess.run([*check, script], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
