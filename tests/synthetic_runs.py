"""Run directories with a known law behind them, written as the trainer and the evaluator write them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from fitscale.config.files import append_jsonl, write_atomic
from fitscale.config.load import to_yaml
from fitscale.config.schema import BatchConfig, Config, EvaluationConfig, RunConfig
from fitscale.config.schema_sampling import GuidanceConfig, SamplingConfig
from fitscale.model import flops
from fitscale.model.fit.config import FitConfig
from fitscale.run.layout import RunDir
from fitscale.scaling.rows.table import validate

SIZES = {"xs": (2, 32, 2), "s": (3, 64, 4), "m": (4, 96, 4), "l": (6, 128, 4)}  # depth, hidden size, heads
Law = Callable[[float, int], float]  # training FLOPs, parameters -> FD
TOKENS = 40
KEY = {"features": "sha256:feed", "reference": "sha256:beef", "sampler": "euler", "steps": 50, "guidance": 1.0}


def write_sweep(
    folder: Path,
    law: Law,
    *,
    sizes: tuple[str, ...] = tuple(SIZES),
    steps: int = 4000,
    points: int = 5,
    run_noise: float = 0.0,
    point_noise: float = 0.0,
    seed: int = 0,
    seeds: int = 1,
) -> list[RunDir]:
    """One run directory per size and seed, its FD equal to the law's but for noise of ln FD."""
    runs = []
    for index, (size, number) in enumerate((size, number) for size in sizes for number in range(seeds)):
        rng = np.random.default_rng([seed, index])
        run = RunDir(folder / f"{size}-seed{number}")
        config = _config(size, number, steps, points)
        write_atomic(run.config, to_yaml(config))
        write_atomic(run.environment, '{"device": "cpu"}')
        of_run = rng.normal(0, run_noise) if run_noise else 0.0
        for step in config.evaluation.steps(steps):
            noise = of_run + (rng.normal(0, point_noise) if point_noise else 0.0)
            _evaluate(run, config, step, law, noise)
        runs.append(run)
    return runs


def _config(size: str, seed: int, steps: int, points: int) -> Config:
    depth, width, heads = SIZES[size]
    model = FitConfig(
        name=size, depth=depth, hidden_size=width, num_heads=heads, patch_size=1, in_channels=1, num_classes=10
    )
    return replace(
        Config(),
        run=RunConfig(name=f"{size}-{seed}", seed=seed, steps=steps),
        model=model,
        batch=BatchConfig(global_batch_size=64),
        sampling=SamplingConfig(guidance=GuidanceConfig(channels=1)),
        evaluation=EvaluationConfig(points=points, first_step=steps // 10),
    )


def _evaluate(run: RunDir, config: Config, step: int, law: Law, noise: float) -> None:
    images = step * config.batch.global_batch_size
    train_flops = flops.train_flops(config.model, TOKENS) * images
    work = {
        "step": step,
        "images": images,
        "tokens": images * TOKENS,
        "train_flops": train_flops,
        "paper_flops": 3 * flops.paper_macs(config.model) * images,
        "device_hours": train_flops / 1e15,
        "weights": "ema_0.9999",
    }
    fd = law(train_flops, flops.parameters(config.model)) * float(np.exp(noise))
    loss = 0.4 + 0.1 * (train_flops / 1e12) ** -0.2
    append_jsonl(
        run.evaluations,
        work | {"metric": "validation_loss", "value": loss, "standard_error": 0.01, "samples": 64, "key": {}},
    )
    append_jsonl(
        run.evaluations, work | {"metric": "fd", "value": fd, "standard_error": None, "samples": 512, "key": KEY}
    )
    share = 1 / (1 + fd / 40)
    append_jsonl(
        run.evaluations,
        work | {"metric": "recognised", "value": share, "standard_error": None, "samples": 512, "key": KEY},
    )


def frontier_law(train_flops, parameters):
    """Early in training a large model is worse than a small one that has used as much compute."""
    return 5 + 1500 * parameters**-0.5 + 3e4 * (train_flops / parameters) ** -0.4


def surface_rows(miss=1.25):
    """Five sizes on a law of size and data; the largest is worse by `miss`, so that it never meets the frontier."""
    rng = np.random.default_rng(3)
    sizes = np.geomspace(3e7, 6e8, 5)
    return validate(
        pd.DataFrame(
            [
                {"run": f"z{index}", "size": f"z{index}", "parameters": int(n), "images": int(d), "step": int(d / 256)}
                | {"train_flops": 6 * n * d, "metric": "loss"}
                | {"value": (400 * n**-0.34 + 410 * d**-0.28 + 1.7) * of_run * np.exp(noise) * (miss if n > 5e8 else 1)}
                for index, (n, of_run) in enumerate(zip(sizes, np.exp(rng.normal(0, 0.005, 5)), strict=True))
                for d, noise in zip(np.geomspace(1e8, 1e10, 7), rng.normal(0, 0.003, 7), strict=True)
            ]
        )
    )
