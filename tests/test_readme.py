"""The README's commands run as they stand, in a folder whose demo is cut down to a few steps."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("torchrun",)  # asks for eight devices; a test of its own runs it on two ranks


def commands() -> list[str]:
    """The indented command lines of the README's step by step, in their order."""
    text = (ROOT / "README.md").read_text().split("## Step by step")[1].split("\n## ")[0]
    joined = text.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines() if line.startswith("    ")]
    return [line for line in lines if re.match(r"(python|fitscale|torchrun) ", line)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "tools", "slurm"):
        shutil.copytree(ROOT / name, folder / name)
    digits = folder / "configs" / "demo" / "digits.yaml"
    small = {r"  steps: \d+\n  device": "  steps: 12\n  device", r"first_step: \d+": "first_step: 3"}
    small |= {r"samples: \d+": "samples: 32", r"  steps: \d+\n  guidance": "  steps: 2\n  guidance"}
    text = digits.read_text()
    for pattern, value in small.items():
        text, count = re.subn(pattern, value, text)
        assert count == 1, pattern
    digits.write_text(text)
    return folder


def test_the_commands_of_the_readme_run_in_their_order(workplace):
    todo = [command for command in commands() if not command.startswith(ELSEWHERE)]
    assert len(todo) >= 9
    for command in todo:
        program, *arguments = shlex.split(command.replace("run.steps=200", "run.steps=12"))
        start = [sys.executable] if program == "python" else [sys.executable, "-m", "fitscale"]
        result = subprocess.run(
            [*start, *arguments],
            cwd=workplace,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        # Runs of 12 steps need not follow a law; then the fit says so, with exit code 2, and still writes its report.
        refused = "fit_scaling" in command and result.returncode == 2 and "refused" in result.stderr
        assert result.returncode == 0 or refused, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert (workplace / "demo" / "report" / "report.html").is_file()


def test_torchrun_with_two_ranks_trains_as_one_process(workplace):
    """The README's torchrun command at a size that fits here: two ranks, the same loss as one."""
    base = ["configs/demo/digits.yaml", "configs/demo/xs.yaml", "data.shards=demo/shards", "run.steps=3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fitscale"]
    starts = {"one": [sys.executable, "-m", "fitscale"], "two": launch}
    for name, start in starts.items():
        subprocess.run(
            [*start, "train", *base, f"run.dir=runs/{name}", "run.log_every=1"],
            cwd=workplace,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=True,
        )
    one, two = ([float(x) for x in re.findall(r'"loss": ([\d.e-]+)', _metrics(workplace, name))] for name in starts)
    assert len(one) == 3
    assert two == pytest.approx(one, abs=1e-6)


def _metrics(workplace: Path, name: str) -> str:
    return (workplace / "runs" / name / "metrics.jsonl").read_text()
