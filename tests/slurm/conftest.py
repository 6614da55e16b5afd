"""The cluster of a test module."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.slurm.cluster import Cluster, new_cluster


def has_slurm() -> bool:
    return shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin") is not None


@pytest.fixture(scope="module")
def slurm_cluster() -> Iterator[Cluster]:
    """A private cluster for the module; its tests are skipped only where Slurm cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("a private Slurm cluster takes root")
    if not has_slurm() and shutil.which("apt-get") is None:
        pytest.skip("slurmctld is not installed, and there is no apt-get to install it with")
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(new_cluster())
        except AssertionError as error:
            if has_slurm():
                raise
            pytest.skip(f"slurmctld could not be installed: {str(error).strip().splitlines()[-1]}")
        yield cluster
