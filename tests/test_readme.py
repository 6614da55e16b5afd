"""The README's commands run as they stand, in a folder whose demo is cut down to a few steps."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fitscale.config.files import read_jsonl
from fitscale.run.layout import RunDir
from tests.distributed.spawn import main_here, run_ranks
from tests.photographs import tiny_vae, write_photographs
from tests.programs import run_tool

ROOT = Path(__file__).parents[1]
IMAGENET = "ImageNet to first training step"
ELSEWHERE = ("torchrun",)  # asks for eight devices; a test of its own runs it on two ranks


def indented(section: str) -> list[str]:
    """The indented lines of a section of the README, a continued one as one line."""
    text = (ROOT / "README.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    joined = re.sub(r"\\\n +", "", text)
    return [line[4:] for line in joined.splitlines() if line.startswith("    ")]


def commands(section: str = "Step by step") -> list[str]:
    """The command lines among them, in their order."""
    return [line for line in indented(section) if re.match(r"(python|fitscale|torchrun|sbatch) ", line)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "tools", "slurm"):
        shutil.copytree(ROOT / name, folder / name)
    digits = folder / "configs" / "demo" / "digits.yaml"
    small = {r"  steps: \d+\n  device": "  steps: 12\n  device", r"first_step: \d+": "first_step: 3"}
    small |= {
        r"points: \d+": "points: 2",
        r"samples: \d+": "samples: 32",
        r"  steps: \d+\n  guidance": "  steps: 2\n  guidance",
    }
    text = digits.read_text()
    for pattern, value in small.items():
        text, count = re.subn(pattern, value, text)
        assert count == 1, pattern
    digits.write_text(text)
    sweep = folder / "configs" / "sweep" / "digits.yaml"
    lines = sweep.read_text().splitlines(keepends=True)
    sweep.write_text("".join(line for line in lines if not line.startswith(("  m: ", "  l: "))))  # they take longest
    return folder


def test_the_commands_of_the_readme_run_in_their_order(workplace):
    todo = [command for command in commands() if not command.startswith(ELSEWHERE)]
    assert len(todo) >= 9
    for command in todo:
        program, *arguments = shlex.split(command.replace("run.steps=200", "run.steps=12"))
        if program == "fitscale":  # in a process that has torch imported
            run_ranks(call_in, 1, workplace, *arguments)
            continue
        result = subprocess.run(
            [sys.executable, *arguments],
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
    assert json.loads((workplace / "demo" / "classifier.json").read_text())["accuracy"] > 0.97


def call_in(folder: Path, *arguments: str) -> None:
    """In a spawned process: the program, as it is called in `folder`."""
    os.chdir(folder)
    main_here(*arguments)


def test_the_lines_of_python_draw_an_image(tmp_path, monkeypatch):
    """As written, on a run that an earlier version made."""
    then = shutil.copytree(ROOT / "tests" / "data" / "version_0_1" / "runs" / "fitv2", tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(block.replace("[3, 5, 8]", "[3, 5, 6]"), {})  # of seven classes
    assert then.is_dir() and (tmp_path / "three.png").stat().st_size > 0


def run_here(arguments: list[str]) -> int:
    """`fitscale ARGUMENTS` in this process."""
    from fitscale.cli import main

    return main(arguments)


def test_imagenet_to_the_first_step_as_written(tmp_path, monkeypatch):
    """The section's commands on a few photographs, with a tiny VAE, a tiny model and one process instead of eight."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_photographs(tmp_path / "data" / "imagenet" / "train", 40, sizes=20, longest=500)
    tiny_vae(tmp_path / "vae")
    mixture = "\n".join(line for line in indented(IMAGENET) if line not in commands(IMAGENET))
    (tmp_path / "mixture.yaml").write_text(mixture.replace("/data/", "data/"))
    small = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "run.steps=2", "run.device=cpu"]
    small += ["batch.global_batch_size=8", "data.num_workers=0"]
    done = []
    for line in commands(IMAGENET):
        line = line.replace("stabilityai/sd-vae-ft-ema", "vae").replace("/data/", "data/")
        words = shlex.split(line)
        words = shlex.split(words[-1]) if words[0] == "sbatch" else words
        words = words[3:] if words[0] == "torchrun" else words[1:]
        words = words[2:] if words[0] == "-m" else words
        if words[0] == "tools/make_shards.py":
            assert run_tool("make_shards", *words[1:]).returncode == 0, line
        elif words[0] == "train":
            assert run_ranks(run_here, 1, [*words, *small]) == [0], line
        elif words[0] == "doctor":
            assert run_here([*words, *small]) == 0, line
        else:
            assert run_here(words) == 0, line
        done.append(words[0])
    assert done == ["tools/make_shards.py"] * 2 + ["data", "doctor", "train", "tools/make_shards.py", "train"]
    assert (tmp_path / "data" / "in1k_256" / "report" / "contact_sheet.png").is_file()
    for name in ("xl", "xl_mixed"):
        assert [row["step"] for row in read_jsonl(RunDir(tmp_path / "runs" / name).metrics)] == [1, 2]


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
