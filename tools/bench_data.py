"""How fast data are read and planned: loader, index, plan, and a simulated rank among 1,024 over 100 million images.

python tools/bench_data.py
python tools/bench_data.py --scratch /local/disk --images 20000

Prints a Markdown table. Shards and indexes are made up under --scratch and removed afterwards; the large indexes are
sparse files.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fitscale.config.program import count, exit_code
from fitscale.config.schema_data import DataConfig
from fitscale.data.batch_plan import BatchPlan, open_plan
from fitscale.data.build_index import build_index
from fitscale.data.index import Index, open_index
from fitscale.data.index_file import IMAGE, VARIANT, IndexMeta, Shard
from fitscale.data.packing import PackRule, split
from fitscale.data.shards import DTYPES, Sample, ShardSetMeta, Variant, write_shards

RANKS, STEPS = 1024, 80  # 80 steps of 4 images a rank go through two windows
LATENT = ShardSetMeta("vae", factor=8, scaling=0.18215, channels=4, num_classes=1000)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--images", type=count, default=8192, help="256-token latents in the loader's shards (8192)")
    parser.add_argument("--passes", type=count, default=25, help="times they are read, for resident memory (25)")
    parser.add_argument("--index-images", type=count, default=1_000_000)
    parser.add_argument("--large-images", type=count, default=100_000_000)
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    print("| what | figure |\n|---|---:|")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        large_index(Path(scratch, "large"), options.large_images)
        small_index(Path(scratch, "small"), options.index_images)
        loader(Path(scratch, "shards"), options.images, options.passes)


def report(what: str, figure: str) -> None:
    print(f"| {what} | {figure} |", flush=True)


def made_up_index(folder: Path, images: int, shard_images: int = 10_000) -> None:
    """An index of one 32 x 32 variant an image, all at one place, of shards that are sparse files."""
    folder.mkdir()
    names = [f"shard-{number:06d}.tar" for number in range(images // shard_images)]
    size = 4 * 32 * 32 * 2
    for name in names:
        (folder / name).touch()
        os.truncate(folder / name, size)
    shards = tuple(
        Shard(name, shard_images, size, "0" * 32, number * shard_images) for number, name in enumerate(names)
    )
    meta = IndexMeta(**asdict(LATENT), shards=shards, sizes=((32, 32, images),))
    rows = np.lib.format.open_memmap(folder / "images.npy", "w+", IMAGE, (images,))
    for start in range(0, images, shard_images):
        part = rows[start : start + shard_images]
        part["first_variant"], part["variants"] = np.arange(start, start + len(part)), 1
        part["shard"] = start // shard_images
    rows.flush()
    rows = np.lib.format.open_memmap(folder / "variants.npy", "w+", VARIANT, (images,))
    row = np.array([(0, size, 0, 32, 32, DTYPES.index("float16"), 0, False)], VARIANT)
    for start in range(0, images, shard_images):
        rows[start : start + shard_images] = row
    rows.flush()
    (folder / "index.json").write_text(json.dumps(asdict(meta)))


def small_index(folder: Path, images: int) -> None:
    made_up_index(folder, images)
    start = time.perf_counter()
    index = open_index(folder)
    opened = time.perf_counter() - start
    report(f"index of {images:,} images: open", f"{1e3 * opened:.1f} ms")
    report("its plan: a step of 256 images, median", f"{plan_ms(index, 256):.2f} ms")


def large_index(folder: Path, images: int) -> None:
    """One rank of 1,024: plan and split of every step, and its resident memory."""
    made_up_index(folder, images)
    before = resident_mb()
    start = time.perf_counter()
    index = open_index(folder)
    report(
        f"index of {images:,} images in {len(index.meta.shards):,} shards: open", f"{time.perf_counter() - start:.2f} s"
    )
    for per_rank in (4, 16):
        what = f"{RANKS:,} ranks x {per_rank} images"
        plan = make_plan(index, RANKS * per_rank)
        first = timed(lambda plan=plan: plan_and_split(plan, 0))
        steps = [timed(lambda plan=plan, n=n: plan_and_split(plan, n)) for n in range(1, STEPS + 1)]
        report(f"{what}: plan and split of the first step (makes an epoch and a window)", f"{first:.1f} ms")
        report(f"{what}: of a step, median of {STEPS}", f"{np.median(steps):.1f} ms")
        report(f"{what}: the slowest of them (makes a window)", f"{max(steps):.1f} ms")
    report("memory of the rank for index and plans, resident", f"{resident_mb() - before:.0f} MB")


def make_plan(index: Index, batch: int) -> BatchPlan:
    data = DataConfig(index.storage.location)
    return open_plan(data, seed=0, global_batch_size=batch, patch_size=2, open_index=lambda *_: index)


def plan_and_split(plan: BatchPlan, n: int) -> None:
    plan.step(n)
    rng = np.random.default_rng(n)
    tokens = rng.integers(64, 257, plan.global_batch_size)  # the made-up index knows one size; splitting wants many
    split(tokens, PackRule(16384, cost=(1.0, 1 / 2e4)), RANKS)


def plan_ms(index: Index, batch: int) -> float:
    plan = make_plan(index, batch)
    return float(np.median([timed(lambda n=n: plan.step(n)) for n in range(100)]))


def timed(function, clock=time.process_time) -> float:  # type: ignore[no-untyped-def]
    """Milliseconds of CPU (or of another clock), so that neighbours on the machine do not count."""
    start = clock()
    function()
    return 1e3 * (clock() - start)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def loader(folder: Path, images: int, passes: int) -> None:
    """Samples/s of one process from warm and cold files, and memory over many samples."""
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    latents = (rng.standard_normal((4, 32, 32)).astype(np.float16) for _ in range(images))
    write_shards(folder, (Sample(f"{n}", 0, [Variant(latent)]) for n, latent in enumerate(latents)), LATENT)
    plan = make_plan(build_index(folder), 256)
    steps = images // 256
    read(plan, steps)  # warms files and allocator
    report("loader, 256-token latents, warm files: samples/s per core", f"{images / seconds_cpu(plan, steps):,.0f}")
    for path in folder.glob("*.tar"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold = timed(lambda: read(plan, steps), time.perf_counter) / 1e3
    report("cold files (page cache dropped): samples/s", f"{images / cold:,.0f}")
    resident = read(plan, passes * steps)
    growth = max(resident[steps:]) / resident[steps - 1] - 1
    report(f"resident memory, most until {passes * images:,} samples, against after {images:,}", f"{growth:+.1%}")


def seconds_cpu(plan: BatchPlan, steps: int) -> float:
    start = time.process_time()
    read(plan, steps)
    return time.process_time() - start


def read(plan: BatchPlan, steps: int) -> list[float]:
    """Resident memory in MB at every step."""
    from fitscale.data.loader import make_loader

    return [resident_mb() for _ in make_loader(plan, PackRule(16384, cost=(1.0, 1e-4)), range(steps))]


if __name__ == "__main__":
    sys.exit(main())
