"""What several test modules share."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster import Cluster

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's shards, written by the tool that a user runs."""
    folder = tmp_path_factory.mktemp("digits") / "shards"
    command = [sys.executable, ROOT / "tools" / "make_shards.py", "digits", folder]
    subprocess.run(command, check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """A private cluster for all Slurm tests of the session; skipped only where Slurm cannot be had."""
    can_install = os.geteuid() == 0 and shutil.which("apt-get") is not None
    if not can_install and shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin") is None:
        pytest.skip("slurmctld is not installed, and installing it takes root and apt-get")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folders are too long for unix sockets
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
