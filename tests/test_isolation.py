"""Tests leave nothing behind: whatever a test starts keeps its temporary files and caches in pytest's own folder."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fitscale.config.schema_data import DataConfig
from tests.distributed.spawn import run_ranks


def folders() -> list[str]:
    """Where this process puts temporary files, what it caches, and its settings."""
    import matplotlib
    from torch._inductor.runtime.runtime_utils import cache_dir

    cached = (
        matplotlib.get_cachedir(),
        matplotlib.get_configdir(),
        cache_dir(),
        os.path.expanduser(DataConfig().cache_dir),
    )
    return [tempfile.mkdtemp(), os.path.expanduser("~"), *cached]


def test_all_processes_keep_their_leftovers_in_pytests_folder(tmp_path_factory):
    program = "from tests.test_isolation import folders; print(*folders(), sep='\\n')"
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for found in (folders(), run_ranks(folders, 1)[0], started.stdout.split("\n")[:-1]):
        assert len(found) == 6
        assert all(Path(folder).is_relative_to(tmp_path_factory.getbasetemp()) for folder in found), found
