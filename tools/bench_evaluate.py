"""Speed of an evaluation from noise to features: ways against one another, in one run on one machine.

    python tools/bench_evaluate.py
    python tools/bench_evaluate.py --images 256 --device cuda model.depth=12 model.hidden_size=768

Images of mixed sizes (64 to 256 tokens) are drawn by guided Euler with 50 steps by a small FiTv2 of random weights,
decoded by a small AutoencoderKL, and seen by a small convolutional network. Prints a Markdown table of wall-clock
images/s; what is loaded first does not count. The ways:

    2 ranks                  chunks dealt to two processes, of one thread each (on a GPU, on the same)
    1 rank                   one of them alone, on one core
    padded                   1 rank, every image padded to the largest, attention over a padded batch with its mask
    image by image           one process with all cores: packs, but decoded and looked at one by one
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fitscale.config.load import load_config
from fitscale.config.program import count, exit_code
from fitscale.config.schema import Config

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

MODEL = [
    *("model.depth=4", "model.hidden_size=128", "model.num_heads=4", "model.num_classes=10", "batch.pack_tokens=2048"),
    *("sampling.method=euler", "sampling.steps=50", "sampling.guidance.scale=1.5"),
]
SIDES = (8, 16)  # least and most patches a side
WAYS = ("2 ranks", "1 rank", "padded", "image by image")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", metavar="KEY=VALUE", help="of the model and of the sampling")
    parser.add_argument("--images", type=count, default=32, help="images that each way draws (32)")
    parser.add_argument("--channels", type=count, default=32, help="of the AutoencoderKL's layers (32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_networks(Path(folder), options.channels)
        seconds = {way: timed(way, options, folder) for way in WAYS}
    print(f"{options.images} images, {options.device}\n\n| way | images/s | of the last way's speed |\n|---|---:|---:|")
    for way, taken in seconds.items():
        print(f"| {way} | {options.images / taken:.3g} | {seconds[WAYS[-1]] / taken:.2f} |")


def save_networks(folder: Path, channels: int) -> None:
    """vae/, an AutoencoderKL of the usual shape (factor 8, 4 channels), and eye.pt; of random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (channels,) * 4, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    AutoencoderKL(**blocks, **sizes).save_pretrained(folder / "vae")
    layers = [torch.nn.Conv2d(3, 32, 5, 4), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, 2), torch.nn.ReLU()]
    eye = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    torch.jit.script(eye).save(str(folder / "eye.pt"))


def timed(way: str, options: argparse.Namespace, folder: str) -> float:
    """Seconds from the moment when all ranks have loaded what they need until the last is done."""
    context, ranks = multiprocessing.get_context("spawn"), 2 if way == "2 ranks" else 1
    loaded = context.Barrier(ranks + 1)
    workers = [context.Process(target=work, args=(way, options, folder, rank, ranks, loaded)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    loaded.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"{way}: a rank failed")
    return time.perf_counter() - start


def work(way: str, options: argparse.Namespace, folder: str, rank: int, ranks: int, loaded: Any) -> int:
    """One rank: every `ranks`-th piece of the requests; the number of images that it has drawn."""
    import torch

    from fitscale.eval import generate as generation
    from fitscale.eval.draw import Networks
    from fitscale.eval.requests import Request, chunk_ranges
    from fitscale.model.common import attention

    config = load_config([*MODEL, f"data.latent.vae={folder}/vae", *options.config])
    if way == "image by image":
        generation.BATCH_IMAGES = 1
    elif options.device == "cpu":
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {rank} if ranks == 1 else os.sched_getaffinity(0))
    if way == "padded":
        attention._attention_per_image = padded_attention
    networks = Networks(fresh_model(config, options.device))
    eye = torch.jit.load(f"{folder}/eye.pt", map_location=options.device)

    @torch.no_grad()
    def look(images: generation.Images) -> dict[str, np.ndarray]:
        return {"features": eye(images.pixels_NCHW.float()).cpu().numpy()}

    sides = np.random.default_rng(0).integers(SIDES[0], SIDES[1] + 1, (options.images, 2))
    sides = np.full_like(sides, SIDES[1]) if way == "padded" else sides
    requests = [Request(i, i % 10, int(rows), int(cols)) for i, (rows, cols) in enumerate(sides)]
    few = replace(config, sampling=replace(config.sampling, steps=1))
    generation.generate(networks, few, requests[:2], 0, look)
    loaded.wait()
    pieces = chunk_ranges(len(requests), max(1, options.images // 4))[rank::ranks]
    return sum(len(generation.generate(networks, config, [requests[i] for i in piece], 0, look)) for piece in pieces)


def fresh_model(config: Config, device: str) -> "Module":
    """The network as training starts from it: what it answers costs the same as later."""
    from fitscale.config.schema import ParallelConfig
    from fitscale.model.build import build_network, initial_items
    from fitscale.parallel.groups import init_parallel

    init_parallel(ParallelConfig(), device)
    model = build_network(config.model, ParallelConfig())
    for parameter, value in initial_items(model, seed=0):
        parameter.data.copy_(value)
    return model.to(device).eval().requires_grad_(False)


def padded_attention(q_THK: "Tensor", k_THK: "Tensor", v_THK: "Tensor", lengths: list[int]) -> "Tensor":
    """Attention of a batch in which every image has the tokens of the largest; the mask says which are padding."""
    import torch
    from torch.nn import functional

    batches = [x.reshape(len(lengths), lengths[0], *x.shape[1:]).transpose(1, 2) for x in (q_THK, k_THK, v_THK)]
    mask = torch.ones(len(lengths), 1, 1, lengths[0], dtype=torch.bool)
    return functional.scaled_dot_product_attention(*batches, attn_mask=mask).transpose(1, 2).flatten(0, 1)


if __name__ == "__main__":
    sys.exit(main())
