"""What several test modules share."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's shards, written by the tool that a user runs."""
    folder = tmp_path_factory.mktemp("digits") / "shards"
    command = [sys.executable, ROOT / "tools" / "make_shards.py", "digits", folder]
    subprocess.run(command, check=True, cwd=ROOT)
    return folder
