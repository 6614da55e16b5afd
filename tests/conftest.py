"""What several test modules share."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.hookimpl(trylast=True)  # pytest has chosen its folder by then
def pytest_configure(config: pytest.Config) -> None:
    """Keep what this process and all that it starts leave behind in pytest's own folder, which pytest clears.

    Temporary files, caches (torch's, matplotlib's, wandb's, data.cache_dir's default) and settings. As early as this,
    because imports leave some. Of what is at home only git's settings are of use here.
    """
    folder = config._tmp_path_factory.mktemp("left")  # type: ignore[attr-defined]
    settings = os.environ.get("GIT_CONFIG_GLOBAL", str(Path("~/.gitconfig").expanduser()))
    os.environ |= {name: str(folder) for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    os.environ |= {"GIT_CONFIG_GLOBAL": settings}
    tempfile.tempdir = str(folder)


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's shards, written by the tool that a user runs."""
    folder = tmp_path_factory.mktemp("digits") / "shards"
    command = [sys.executable, ROOT / "tools" / "make_shards.py", "digits", folder]
    subprocess.run(command, check=True, cwd=ROOT)
    return folder


@pytest.fixture(params=["eager", "compiled"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the fused regions run."""
    import torch

    from fitscale.model.common.compiler import lacks_for_compiling, use_compiler

    if request.param == "compiled" and lacks_for_compiling(torch.device("cpu")):
        pytest.skip("needs a C++ compiler and Python's headers")
    use_compiler(request.param == "compiled")
    yield request.param
    use_compiler(False)
