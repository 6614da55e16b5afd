"""The shell files: bash can read them, shellcheck finds nothing, and those of the library are installed with it."""

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
