"""Speed of sampling: one way against another, in one run on one machine.

python tools/bench_sample.py
python tools/bench_sample.py --images 64 --pack-tokens 16384 --device cuda model.depth=12 model.hidden_size=768

Prints a Markdown table. Images have mixed sizes, by default 64 to 256 tokens; the model is a small FiTv2 of random
weights, unless further arguments (key=value) say otherwise. Seconds are CPU time on the CPU, the least of the passes;
the ways take turns, so that what else the machine does strikes all.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fitscale.config.load import load_config
from fitscale.config.program import count, exit_code
from fitscale.config.schema import Config

MODEL = [
    *("model.depth=4", "model.hidden_size=128", "model.num_heads=4", "model.num_classes=10"),
    *("sampling.method=dopri5", "sampling.guidance.scale=1.5"),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", metavar="KEY=VALUE", help="of the model and of the sampling")
    parser.add_argument("--images", type=count, default=32, help="images that each way draws (32)")
    parser.add_argument("--sides", type=count, nargs=2, default=[8, 16], help="least and most patches a side (8 16)")
    parser.add_argument("--pack-tokens", type=count, default=2048, help="most tokens in a pack (2048)")
    parser.add_argument("--passes", type=count, default=3, help="times that each way is tried (3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    config = load_config([*MODEL, *options.config])
    ways = {
        "packs": replace(config, batch=replace(config.batch, pack_tokens=options.pack_tokens)),
        "one image at a time": replace(config, batch=replace(config.batch, pack_tokens=1)),
    }
    rows = compared(ways, options)
    print(
        f"{config.sampling.method}, {options.images} images, packs of {options.pack_tokens} tokens, {options.device}\n"
    )
    print("| way | images/s | evaluations an image | of the last way's speed | largest difference from it |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        nfe = f"{row['nfe']:.1f} ({row['least_nfe']} to {row['most_nfe']})"
        print(f"| {row['way']} | {row['images_per_s']:.3g} | {nfe} | {row['ratio']:.2f} | {row['moved']:.1e} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def compared(ways: dict[str, Config], options: argparse.Namespace) -> list[dict[str, float | str]]:
    """What each of the ways takes, in turns."""
    import torch

    from fitscale.eval.draw import Networks, draw_pack, packs
    from fitscale.eval.requests import Request

    networks = Networks(random_model(next(iter(ways.values())), options.device))
    least, most = options.sides
    sides = np.random.default_rng(0).integers(least, most + 1, (options.images, 2))
    requests = [Request(i, i % 10, int(rows), int(cols)) for i, (rows, cols) in enumerate(sides)]

    def draw(config: Config) -> tuple[torch.Tensor, list[int]]:
        drawn = [draw_pack(networks, config, pack, seed=0) for pack in packs(requests, config)]
        return torch.cat([tokens for one in drawn for tokens in one.tokens]), [nfe for one in drawn for nfe in one.nfe]

    times: dict[str, list[float]] = {way: [] for way in ways}
    made = {}
    for _ in range(options.passes):
        for way, config in ways.items():
            seconds, made[way] = timed(lambda config=config: draw(config), options.device)
            times[way].append(seconds)
    last = list(ways)[-1]
    return [
        {
            "way": way,
            "images_per_s": options.images / min(times[way]),
            "nfe": float(np.mean(made[way][1])),
            "least_nfe": min(made[way][1]),
            "most_nfe": max(made[way][1]),
            "ratio": min(times[last]) / min(times[way]),
            "moved": float((made[way][0] - made[last][0]).abs().max()),
        }
        for way in ways
    ]


def random_model(config: Config, device: str) -> "torch.nn.Module":  # noqa: F821
    """A network whose answers depend on all of its inputs, as no network does before it is trained."""
    import torch

    from fitscale.config.schema import ParallelConfig
    from fitscale.model.build import build_network
    from fitscale.parallel.groups import init_parallel

    init_parallel(ParallelConfig(), device)
    model = build_network(config.model, ParallelConfig())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.final_layer.linear.weight.data.mul_(0.3)
    return model.to(device).eval().requires_grad_(False)


def timed(work: Callable[[], object], device: str) -> tuple[float, object]:
    """Seconds, and what came of it: CPU time on the CPU, on a GPU until it is done."""
    import torch

    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


if __name__ == "__main__":
    sys.exit(main())
