"""How long the analysis takes: a law of size and data on 245 points from 4,500 starts, 4,000 resamples of it, and a
whole study of 240 of the points, every law judged, with 2,000 resamples.

    python tools/bench_fit.py

The points are drawn from Hoffmann et al.'s law (2022) with 1 % noise, as many as their reanalysis has
(Besiroglu et al. 2024). Exit code 1 if any of the three takes over a minute.
"""

import argparse
import sys
import time

import numpy as np
import pandas as pd

from fitscale.config.program import exit_code
from fitscale.scaling.fit.fitting import FittedPoints, ResidualLoss, best_of
from fitscale.scaling.fit.laws import ADDITIVE
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.study import study
from fitscale.scaling.fit.uncertainty import central, resample
from fitscale.scaling.rows.table import validate

ROWS, STUDIED, OF_A_TABLE = 240, 2000, {"metric": "loss"}
POINTS, STARTS, RESAMPLES, LIMIT = 245, 4500, 4000, 60.0
EXPONENTS = np.linspace(0.1, 1.5, 15)
FLOORS = np.linspace(0.05, 0.98, 20)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Time a fit of 245 points from 4,500 starts, 4,000 resamples of it, and a whole study.",
        epilog="example: python tools/bench_fit.py",
    )
    parser.parse_args(argv)
    return exit_code(bench)


def bench() -> int:
    """Fit, resample, study, and print the seconds and the parameters."""
    rows = points()
    data = FittedPoints.of(ADDITIVE, rows)
    began = time.perf_counter()
    start_KP = ADDITIVE.starts(data.x_NF, data.y_N, EXPONENTS, FLOORS)
    fit = best_of(ADDITIVE, data, start_KP, ResidualLoss(huber=1e-3))
    fitted = time.perf_counter()
    draws = resample(fit, RESAMPLES, seed=0)
    resampled = time.perf_counter()
    print(f"{len(rows)} points, {len(start_KP)} starts: {fitted - began:.1f} s, best reached from {fit.reached:.0%}")
    print(f"{len(draws.theta_KP)} resamples: {resampled - fitted:.1f} s")
    for name, draws_K in fit.named(draws.theta_KP).items():
        low, high = central(draws_K)
        print(f"  {name:<6}{fit.named()[name]:10.4f}   90 % {low:.4f} to {high:.4f}")
    began_study = time.perf_counter()
    answer = study(
        validate(rows.iloc[:ROWS].assign(**OF_A_TABLE)), Question("loss", resamples=STUDIED, extrapolate=True)
    )
    studied = time.perf_counter() - began_study
    print(f"study of {ROWS} rows, {STUDIED} resamples: {studied:.1f} s, answered by the {answer.results[0].name} law")
    return int(max(fitted - began, resampled - fitted, studied) > LIMIT)


def points() -> pd.DataFrame:
    """Losses of 245 models of 44 M to 16 B parameters on 0.3 B to 300 B tokens."""
    rng = np.random.default_rng(0)
    parameters = np.exp(rng.uniform(np.log(44e6), np.log(16e9), POINTS))
    tokens = np.exp(rng.uniform(np.log(3e8), np.log(3e11), POINTS))
    loss = 482.0 * parameters**-0.348 + 2085.4 * tokens**-0.366 + 1.817
    value = loss * np.exp(rng.normal(0, 0.01, POINTS))
    runs = [f"run{index}" for index in range(POINTS)]
    sizes = {"run": runs, "size": runs, "parameters": np.round(parameters), "images": np.round(tokens)}
    return pd.DataFrame(sizes | {"train_flops": 6 * parameters * tokens, "value": value})


if __name__ == "__main__":
    sys.exit(main())
