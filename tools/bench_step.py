"""Speed of a training step against the published way of training, in one run on one machine.

python tools/bench_step.py
python tools/bench_step.py --sizes 256 64-256 --steps 5 --json step.json
python tools/bench_step.py --device cuda --sizes 256 configs/model/xl.yaml parallel.precision=bf16 parallel.zero_stage=1

Three ways take a step in turns, on the same images, drawn anew for every step: (a) the baseline: a batch padded to its
longest image, with an attention mask, plain modules, torch's AdamW and EMA, as FiTv2 is published; (b) fitscale with
`parallel.compile=off`; (c) with `on`. The model is FiTv2 of width 384 and depth 6, trained in fp32 and, as one process
has nothing to shard, without ZeRO, unless further arguments (files, key=value) say otherwise.

Prints, for each distribution of sizes, medians of the ratios of times, tokens/s, and the share of matrix products and
attention in the step. For one block in `--traffic` precision: what flows besides those, forward and backward, in reads
and writes of one hidden vector a token ("passes"), and by how many operators or kernels. Eager operators are counted by
a dispatch mode, views left out; compiled ones by what torch's compiler says its kernels read and write.
"""

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from fitscale.config.checks import choice
from fitscale.config.load import load_config
from fitscale.config.program import count, exit_code
from fitscale.config.schema import Config
from fitscale.data.packing import PackingStats
from fitscale.prepare.statistics import photograph_sizes

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL = [
    *("model.hidden_size=384", "model.depth=6", "model.num_heads=6", "model.num_classes=1000"),
    *("optim.ema_decays=[0.9999]", "optim.grad_clip=1.0", "parallel.precision=fp32", "run.device=cpu"),
    *("parallel.zero_stage=0", "batch.pack_tokens=65536"),
]
SEED = 0


def sides(low: int, high: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Rows and columns uniform in low..high."""
    return lambda rng, count: rng.integers(low, high + 1, (count, 2))


def octaves(low: int, high: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """low^2 to high^2 tokens, as many images in every octave; nearly square."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        tokens = np.exp(rng.uniform(2 * np.log(low), 2 * np.log(high), count))
        rows = np.rint(np.sqrt(tokens))
        return np.stack([rows, np.rint(tokens / rows)], axis=1).astype(np.int64)

    return draw


SIZES = {
    "256": sides(16, 16),
    "fit256": photograph_sizes,
    "64-256": sides(8, 16),
    "16-1024": octaves(4, 32),
}
WAYS = ("baseline", "eager", "fused")
PAIRS = (("baseline", "fused"), ("baseline", "eager"), ("eager", "fused"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config", nargs="*", metavar="FILE|KEY=VALUE", help="of the model, the optimizer and the layout"
    )
    parser.add_argument(
        "--sizes", nargs="*", default=list(SIZES), help="tokens of an image; nothing = only count (all)"
    )
    parser.add_argument("--batch", type=count, default=16, help="images of a step (16)")
    parser.add_argument("--steps", type=count, default=5, help="steps of each way that are timed (5)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to compare (all)")
    parser.add_argument("--traffic", choices=("bf16", "fp32", "none"), default="bf16", help="count passes in (bf16)")
    parser.add_argument("--threads", type=count, default=1, help="threads of the CPU (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    import torch

    from fitscale.parallel.groups import init_parallel

    for name in options.sizes:
        choice("--sizes", name, tuple(SIZES))
    torch.set_num_threads(options.threads)
    config = load_config([*MODEL, *options.config, f"run.device={options.device}"])
    runners = _runners(config, options.ways) if options.sizes else {}
    figures: dict[str, Any] = {"sizes": {}}
    for name in options.sizes:
        figures["sizes"][name] = report_sizes(name, config, runners, options)
    if options.traffic != "none":
        init_parallel(config.parallel, options.device)
        figures[options.traffic] = report_traffic(config, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


@dataclass(frozen=True)
class Images:
    """The images of a step, one after the other."""

    sizes_S2: np.ndarray
    tokens_TC: "Tensor"
    labels_S: "Tensor"

    @property
    def lengths(self) -> list[int]:
        return [int(rows * cols) for rows, cols in self.sizes_S2]


def draw_images(name: str, config: Config, count: int, seed: int = SEED) -> Images:
    import torch

    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    sizes = SIZES[name](rng, count)
    sizes = sizes[np.argsort(sizes.prod(axis=1), kind="stable")]  # as the loader lays them
    tokens = torch.randn(int(sizes.prod(axis=1).sum()), config.model.token_channels, generator=generator)
    return Images(sizes, tokens, torch.from_numpy(rng.integers(0, config.model.num_classes, count)))


# --------------------------------------------------------------------------------------------------- fitscale's step


class Ours:
    """fitscale's own step: its engine, objective and optimizer."""

    def __init__(self, config: Config) -> None:
        from fitscale.model.build import build_network, initial_items
        from fitscale.parallel.groups import init_parallel
        from fitscale.parallel.layers import set_value
        from fitscale.parallel.zero import building, make_engine
        from fitscale.train.health import Watchdog
        from fitscale.train.optim import AdamWEMA
        from fitscale.train.step import Stepper

        topology = init_parallel(config.parallel, config.run.device)
        with building(config, topology):
            self.model = build_network(config.model, config.parallel)
        for parameter, piece in initial_items(self.model, SEED):
            set_value(parameter, piece)
        optimizer = AdamWEMA(list(self.model.parameters()), config.optim)
        engine = make_engine(self.model, optimizer, config, topology)
        self.stepper = Stepper(config, engine, None, topology, Watchdog(60, 0, Path("events.jsonl")))  # type: ignore[arg-type]

    def prepare(self, images: Images) -> Any:
        from fitscale.data.batch_plan import GlobalBatch
        from fitscale.data.loader import StepBatch
        from fitscale.flow.path import draws

        count = len(images.lengths)
        zeros, sizes = np.zeros(count, dtype=np.int64), images.sizes_S2.astype(np.int64)
        batch = GlobalBatch(0, zeros, zeros, zeros, sizes[:, 0], sizes[:, 1], images.labels_S.numpy())
        flow, channels = self.stepper.config.flow, images.tokens_TC.shape[1]
        drawn = draws(SEED, 0, range(count), images.lengths, channels, flow.times, flow.label_drop)  # by the loader
        return StepBatch(batch, PackingStats(0.0, 0.0, 1), images.tokens_TC, [np.arange(count)], [sizes], [], drawn)

    def step(self, batch: Any) -> None:
        self.stepper.take(batch)


# ------------------------------------------------------------------------------------------------------- the baseline


class Published:
    """A padded batch with a mask, plain modules, gradient clipping, AdamW and EMA: as FiTv2 is published."""

    def __init__(self, config: Config) -> None:
        import torch

        self.config, self.device = config, torch.device(config.run.device)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.parallel.precision]
        torch.manual_seed(SEED)
        self.model = padded_network(config).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        settings = config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )

    def prepare(self, images: Images) -> Any:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        tokens = pad_sequence(list(images.tokens_TC.split(images.lengths)), batch_first=True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor(images.lengths)[:, None]
        grids = [
            torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")).flatten(1).T
            for rows, cols in images.sizes_S2.tolist()
        ]
        grid = pad_sequence(grids, batch_first=True)
        return [tensor.to(self.device) for tensor in (tokens, mask, grid, images.labels_S)]

    def step(self, batch: Any) -> None:
        import torch

        tokens, mask, grid, labels = batch
        noise, t = torch.randn_like(tokens), torch.randn(len(tokens), device=self.device).sigmoid()
        noisy = t[:, None, None] * tokens + (1 - t[:, None, None]) * noise
        labels = torch.where(torch.rand(len(labels), device=self.device) < 0.1, self.config.model.num_classes, labels)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            answer = self.model(noisy, t, labels, mask, grid)
        error = (answer.float() - (tokens - noise)).square() * mask[..., None]
        loss = (error.mean(2).sum(1) / mask.sum(1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip or math.inf)
        self.optimizer.step()
        with torch.no_grad():
            for averaged, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
                averaged.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        loss.item()


def rope_of(grid: "Tensor", head_dim: int) -> "tuple[Tensor, Tensor]":
    """Cosines and sines for positions (..., 2): of the rows, then of the columns."""
    import torch

    exponents = torch.arange(0, head_dim // 2, 2, device=grid.device).float() / (head_dim // 2)
    angles = (grid[..., None].float() / 10000.0**exponents).repeat_interleave(2, dim=-1).flatten(2)
    return angles.cos()[:, None], angles.sin()[:, None]


def turn(x: "Tensor", cos: "Tensor", sin: "Tensor") -> "Tensor":
    import torch

    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin


def modulated(x: "Tensor", shift: "Tensor", scale: "Tensor") -> "Tensor":
    return x * (1 + scale[:, None]) + shift[:, None]


def padded_block(model: Any) -> "nn.Module":
    """One block of it."""
    import torch.nn.functional as F
    from torch import nn

    hidden, heads, rank, width = model.hidden_size, model.num_heads, model.adaln_rank, model.mlp_hidden_size

    def norm(width: int) -> "nn.Module":
        return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    class PlainBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = norm(hidden), norm(hidden)
            self.q_norm, self.k_norm = norm(hidden // heads), norm(hidden // heads)
            self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
            self.fc1_g, self.fc1_x, self.fc2 = (
                nn.Linear(*widths) for widths in ((hidden, width), (hidden, width), (width, hidden))
            )
            self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(hidden, rank), nn.Linear(rank, 6 * hidden))

        def forward(self, x: "Tensor", c: "Tensor", shared: "Tensor", *attended: "Tensor") -> "Tensor":
            shift1, scale1, gate1, shift2, scale2, gate2 = (self.adaln(c) + shared).chunk(6, dim=1)
            x = x + gate1[:, None] * self.attention(modulated(self.norm1(x), shift1, scale1), *attended)
            entering = modulated(self.norm2(x), shift2, scale2)
            return x + gate2[:, None] * self.fc2(F.silu(self.fc1_g(entering)) * self.fc1_x(entering))

        def attention(self, x: "Tensor", mask: "Tensor", cos: "Tensor", sin: "Tensor") -> "Tensor":
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = self.q_norm(q), self.k_norm(k)
            q, k = turn(q.float(), cos, sin).to(v.dtype), turn(k.float(), cos, sin).to(v.dtype)
            key = mask[:, None, None, :]
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=key == key.transpose(-2, -1))
            return self.proj(x.transpose(1, 2).flatten(2))

    return PlainBlock()


def padded_network(config: Config) -> "nn.Module":
    """FiTv2 over a padded batch, of plain modules."""
    from torch import nn

    from fitscale.model.common.embedders import ClassEmbedder, TimeEmbedder

    model, hidden = config.model, config.model.hidden_size

    class PlainFiT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(model.token_channels, hidden)
            self.time, self.label = TimeEmbedder(256, hidden), ClassEmbedder(model.num_classes, hidden)
            self.shared = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
            self.blocks = nn.ModuleList(padded_block(model) for _ in range(model.depth))
            self.final_adaln = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
            self.final_norm = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
            self.final = nn.Linear(hidden, model.token_channels)

        def forward(self, x: "Tensor", t: "Tensor", y: "Tensor", mask: "Tensor", grid: "Tensor") -> "Tensor":
            cos, sin = rope_of(grid, hidden // model.num_heads)
            x, c = self.embed(x), self.time(t) + self.label(y)
            shared = self.shared(c)
            for block in self.blocks:
                x = block(x, c, shared, mask, cos, sin)
            shift, scale = self.final_adaln(c).chunk(2, dim=1)
            return self.final(modulated(self.final_norm(x), shift, scale)) * mask[..., None]

    return PlainFiT()


# ------------------------------------------------------------------------------------------------- what is measured


def _runners(config: Config, ways: list[str]) -> dict[str, Any]:
    """One engine serves both of fitscale's ways: they differ in what its blocks' formulas run as."""
    ours = Ours(config) if {"eager", "fused"} & set(ways) else None
    return {way: Published(config) if way == "baseline" else ours for way in ways}


def report_sizes(name: str, config: Config, runners: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    from fitscale.model.common.compiler import use_compiler

    drawn = [draw_images(name, config, options.batch, seed) for seed in range(options.steps + 1)]
    times: dict[str, list[float]] = {way: [] for way in runners}
    for number, images in enumerate(drawn):  # the first is not counted: it compiles, fills caches, makes states
        for way, runner in runners.items():
            use_compiler(way == "fused")
            batch = runner.prepare(images)
            begun = time.perf_counter()
            runner.step(batch)  # ends with the loss on the host
            if number:
                times[way].append(time.perf_counter() - begun)
    ratios = {f"{a}_over_{b}": _ratio(times[a], times[b]) for a, b in PAIRS if a in times and b in times}
    real_N = [sum(images.lengths) for images in drawn[1:]]
    padded = _ratio([max(images.lengths) * len(images.lengths) for images in drawn[1:]], real_N)
    speeds = ", ".join(f"{way} {_ratio(real_N, seconds):,.0f}" for way, seconds in times.items())
    compared = ", ".join(f"{pair} {ratio:.2f}" for pair, ratio in ratios.items())
    print(f"{name}: padded/real {padded:.2f}; tokens/s: {speeds}; {compared}", flush=True)
    return ratios


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return median(a / b for a, b in zip(slow, fast, strict=True))


def report_traffic(config: Config, options: argparse.Namespace) -> dict[str, float]:
    """Passes and kernels of one block, of a model of two blocks less one of one."""
    counts = {way: _of_a_block(config, way, options) for way in options.ways if way != "baseline"}
    for way, (passes, kernels) in counts.items():
        print(f"{way}, {options.traffic}: {passes:.0f} passes, {kernels:.0f} kernels a block, forward and backward")
    passes, kernels = counts["fused" if "fused" in counts else "eager"]
    return {"passes": passes, "kernels": kernels}


def _of_a_block(config: Config, way: str, options: argparse.Namespace) -> tuple[float, float]:
    from fitscale.model.common.compiler import use_compiler

    use_compiler(way == "fused")
    with counting() as count:
        one, two = (_counted(count, config, depth, options) for depth in (1, 2))
    use_compiler(False)
    return two[0] - one[0], two[1] - one[1]


def _counted(count: Any, config: Config, depth: int, options: argparse.Namespace) -> tuple[float, float]:
    """Passes and kernels of the forward and the backward pass of a model of `depth` blocks."""
    import torch

    from fitscale.model.build import build_network
    from fitscale.model.common.layout import pack_layout

    model = replace(config.model, depth=depth)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.traffic]
    network = build_network(model, config.parallel).to(options.device, dtype)
    images = draw_images("64-256", config, options.batch)
    sizes = torch.from_numpy(images.sizes_S2)
    bounds = torch.tensor([0, *np.cumsum(images.lengths)], dtype=torch.int32)
    layout = pack_layout(sizes, bounds, torch.device(options.device))
    inputs = [x.to(options.device) for x in (images.tokens_TC, torch.rand(options.batch), images.labels_S)]
    for _ in range(2):  # the first makes tables and compiles
        network.zero_grad()  # as of a step's first pack
        count.bytes = count.kernels = 0
        sum(out.square().mean() for out in network(*inputs, layout)).backward()
    return count.bytes / (len(images.tokens_TC) * model.hidden_size * dtype.itemsize), count.kernels


PRODUCTS = ("mm", "addmm", "bmm", "scaled_dot_product", "_flash_attention", "varlen_attn")  # of operators' names


@contextmanager
def counting() -> Iterator[Any]:
    """Counts the bytes that operators read and write, and the operators: no views, products, nor attention."""
    import torch
    from torch._inductor import config as inductor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    import fitscale.model.common.compiler as compiler

    class Count(TorchDispatchMode):
        bytes, kernels = 0, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if (
                not func.is_view
                and not any(product in name for product in PRODUCTS)
                and name not in ("empty", "detach")
            ):
                self.kernels += 1
                self.bytes += sum(_bytes(leaf) for leaf in tree_leaves((args, kwargs, out)))
            return out

    count, before = Count(), torch.compile
    compiler.compiled.clear()
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    torch.compile = partial(_counted_compile, count, before)  # type: ignore[assignment]
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")  # by the next line, on purpose
    try:
        with count, inductor.patch(force_disable_caches=True):  # a cached kernel says nothing of what it reads
            yield count
    finally:
        torch.compile = before
        compiler.compiled.clear()


def _counted_compile(count: Any, compiler: Callable[..., Any], function: Callable[..., Any], **settings: Any) -> Any:
    """torch.compile, of a function whose calls add to `count` what the compiler says that its kernels move."""
    from torch._inductor.scheduler import Scheduler
    from torch.utils._python_dispatch import _disable_current_modes

    made, costs, codegen = compiler(function, **settings), [0, 0], Scheduler.codegen

    def noted(scheduler: Any) -> None:
        costs[:] = sum(node.get_read_write_buffers_sizes() for node in scheduler.nodes), len(scheduler.nodes)
        codegen(scheduler)

    def call(*arguments: Any) -> Any:
        with _disable_current_modes(), mock.patch.object(Scheduler, "codegen", noted):
            result = made(*arguments)
        count.bytes, count.kernels = count.bytes + costs[0], count.kernels + costs[1]
        return result

    return call


def _bytes(leaf: Any) -> int:
    import torch

    return leaf.numel() * leaf.element_size() if isinstance(leaf, torch.Tensor) else 0


if __name__ == "__main__":
    sys.exit(main())
