"""What checksums cost: seconds a GB to write a checkpoint's file with one, and to verify it when it is read.

python tools/bench_checkpoint.py
python tools/bench_checkpoint.py --gb 8 --scratch /scratch

Prints a Markdown table. One file of fp32 tensors, as one rank writes it; `scratch` is where checkpoints would be. What
is read has just been written, so it comes from memory where there is room for it: from a slow disk add its own time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

from fitscale.config.program import exit_code
from fitscale.model.weights import list_tensors, stored, write_tensors
from fitscale.run.checkpoint import read_checkpoint, write_marker

FILE = "weights/raw/00000.safetensors"
TENSOR_BYTES = 64 * 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the file (2)")
    parser.add_argument("--scratch", type=Path, help="where to write it (the system's temporary folder)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    count = max(1, round(options.gb * 1e9 / TENSOR_BYTES))
    tensors = {f"{number:05d}": stored(torch.randn(TENSOR_BYTES // 4)) for number in range(count)}
    content = [one.read().view(torch.uint8).numpy().data for one in tensors.values()]
    gb = count * TENSOR_BYTES / 1e9
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        step = Path(folder) / "step-00000001"
        rows = {"write, checksum and fsync included": measured(lambda: write_tensors(step / FILE, tensors, {}))}
        rows["the checksum alone, in memory"] = measured(lambda: [xxhash.xxh3_64(one).digest() for one in content])
        checksum = write_tensors(step / FILE, tensors, {})
        write_marker(step, {"step": 1}, {FILE: checksum})
        rows["verify"] = measured(lambda: read_checkpoint(step).damage([FILE]))
        rows["read all tensors, unverified"] = measured(
            lambda: [one.read().sum() for one in list_tensors(step / "weights" / "raw", verify=False).values()]
        )
    print(f"| {gb:.2f} GB | s/GB |\n|---|---:|")
    print("\n".join(f"| {name} | {seconds / gb:.2f} |" for name, seconds in rows.items()))


def measured(function: Callable[[], object]) -> float:
    """Seconds that `function` takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
