"""Packing against simpler schemes: padding, imbalance, time lost and plan time, over ranks and batch sizes.

python tools/bench_packing.py
python tools/bench_packing.py --ranks 8 64 --images-per-rank 4 16 --json packing.json

Prints Markdown tables. Two distributions of sizes: photographs shaped like ImageNet's through FiT's preprocessing for
side 256, and a mixed one of 64 to 4,096 tokens. Costs are FiTv2-XL/2's FLOPs; "least
possible" is the imbalance if the costliest image had a rank to itself. Split times are CPU time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from fitscale.config.load import load_config
from fitscale.config.program import count, exit_code
from fitscale.data.packing import PackRule, macs_of, split
from fitscale.model import flops
from fitscale.prepare.statistics import bucketed, first_fit, packed, padded_to_longest, photograph_sizes

CONFIG = Path(__file__).parents[1] / "configs" / "model" / "xl.yaml"
PACK_TOKENS = 16384
BATCHES = 5  # figures are means over so many global batches


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=count, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--images-per-rank", type=count, nargs="+", default=[4, 16, 64])
    parser.add_argument("--max-images", type=count, default=16384, help="larger global batches are left out (16384)")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    rows = [
        row(name, draw, ranks, each * ranks)
        for name, draw in (("FiT 256", photograph_sizes), ("mixed 64-4096", mixed_sizes))
        for ranks in options.ranks
        for each in options.images_per_rank
        if each * ranks <= options.max_images
    ]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def mixed_sizes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) rows and columns of tokens, each 8 to 64, log-uniform."""
    return np.exp(rng.uniform(np.log(8), np.log(64.99), (count, 2))).astype(np.int64)


def row(name: str, draw, ranks: int, images: int) -> dict:  # type: ignore[no-untyped-def, type-arg]
    cost = flops.cost(load_config([str(CONFIG)]).model)
    schemes: dict[str, list] = {"packed": [], "longest": [], "bucketed": [], "first-fit": []}  # type: ignore[type-arg]
    seconds, least = [], []
    for number in range(BATCHES):
        sizes = draw(np.random.default_rng(number), images)
        tokens = sizes.prod(axis=1)
        cost_B = macs_of(tokens, cost)
        start = time.process_time()
        split(tokens, PackRule(PACK_TOKENS, cost=cost), ranks)
        seconds.append(time.process_time() - start)
        least.append(max(0.0, float(cost_B.max() * ranks / cost_B.sum() - 1)))  # the costliest image, alone
        schemes["packed"].append(packed(tokens, cost, ranks, PACK_TOKENS))
        schemes["longest"].append(padded_to_longest(tokens, cost, ranks))
        schemes["bucketed"].append(bucketed(sizes @ [1000, 1], tokens, cost, ranks, PACK_TOKENS))
        schemes["first-fit"].append(first_fit(tokens, cost, ranks, PACK_TOKENS))
    figures = {
        scheme: {key: float(np.mean([getattr(one, key) for one in wastes])) for key in vars(wastes[0])}
        for scheme, wastes in schemes.items()
    }
    return {
        "sizes": name,
        "ranks": ranks,
        "images": images,
        "split_s": float(np.median(seconds)),
        "least_imbalance": float(np.mean(least)),
        **figures,
    }


def table(rows: list[dict]) -> str:  # type: ignore[type-arg]
    """A Markdown table of percentages."""
    lines = [
        "| sizes | ranks | images | packed: padding | imbalance | least possible | lost | (a) longest: padding | lost "
        "| (b) buckets: padding | lost | (c) first-fit: imbalance | lost | split, ms |",
        "|---|" + "---:|" * 13,
    ]
    for one in rows:
        p, a, b, c = (one[scheme] for scheme in ("packed", "longest", "bucketed", "first-fit"))
        shares = [
            p["padding_share"],
            p["imbalance"],
            one["least_imbalance"],
            p["time_lost"],
            a["padding_share"],
            a["time_lost"],
        ]
        shares += [b["padding_share"], b["time_lost"], c["imbalance"], c["time_lost"]]
        cells = " | ".join(f"{share:.1%}" for share in shares)
        lines.append(f"| {one['sizes']} | {one['ranks']} | {one['images']} | {cells} | {1e3 * one['split_s']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
