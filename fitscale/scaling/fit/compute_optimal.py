"""The compute-optimal size: at each compute budget the best size, and how it grows with compute: N*(C) = k C^a.

From isoFLOP curves:
1. Rows of equal compute (or slices through the runs' curves at common budgets) give metric against size per budget.
2. Akima's interpolation of ln(metric) over ln(N) finds the minimum (Porian et al. 2024); a parabola, the usual
   choice, moves exponents by up to .03, and is fitted to compare.
3. Each optimum's uncertainty comes from redrawing the noise of its points; the exponent is a weighted regression.
   It has no interval where budgets share runs, whose deviations move several optima at once, nor with four sizes,
   which do not tell noise from shape.

From a fitted law of size and data, where such curves do not overlap: a budget C buys C / c(N) images of a model of N
parameters; c(N), the training FLOPs per image, is a power of N fitted to the table. The best N minimises the law along
that line.

A budget whose minimum lies at the smallest or largest size tried, or that has none, is refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import Akima1DInterpolator

from fitscale.scaling.fit.fitting import Fit
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.uncertainty import central
from fitscale.scaling.rows.refusals import Refusal

SAME_BUDGET = 1.1  # rows whose compute differs by less belong to one budget
LEAST_SIZES = 4
CUTS = 6  # budgets at which curves are cut
FINE = 2001
DRAWS = 200

Method = Callable[[Array, Array], tuple[float, float]]  # ln(parameters), ln(metric) -> both at the best size


@dataclass(frozen=True)
class Optimum:
    """The best size of one budget; `spread` is the standard deviation of ln(parameters)."""

    budget: float
    parameters: float
    metric: float
    spread: float
    sizes: int


@dataclass(frozen=True)
class IsoFlop:
    """N*(C) = coefficient x C^exponent, from the optima of all budgets that have one."""

    method: str
    exponent: float
    interval_90: tuple[float, float] | None  # None: not estimated, `no_interval` says why
    no_interval: str | None
    coefficient: float
    optima: list[Optimum]
    refusals: list[Refusal]


def isoflop(slices: pd.DataFrame, method: str = "akima", seed: int = 0) -> IsoFlop:
    """Fit the compute-optimal size to `slices`: columns budget, parameters, value, and run where it is known.

    Raises:
        Refusal: fewer than two budgets have an optimum.
    """
    curves = {budget: _curve(slices[slices["budget"] == budget]) for budget in np.unique(slices["budget"])}
    noise = _noise([curve for curve in curves.values() if len(curve[0]) > LEAST_SIZES])
    found, refusals = [], []
    for index, (budget, (x_N, y_N)) in enumerate(curves.items()):
        try:
            rng = np.random.default_rng([seed, index])
            found.append(_optimum(budget, x_N, y_N, METHODS[method], noise or 0.0, rng))
        except Refusal as refusal:
            refusals.append(refusal)
    optima = [optimum for optimum, _ in found]
    if len(optima) < 2:
        what = f"isoflop: {len(optima)} budgets have an optimum, two are needed"
        raise Refusal("too_few_points", f"{what}; {'; '.join(map(str, refusals))}")
    exponent, constant = fit_exponent(optima)
    no_interval = _no_interval(slices, noise)
    interval = None if no_interval else central(fit_exponent(optima, np.array([draws_K for _, draws_K in found]))[0])
    return IsoFlop(method, float(exponent), interval, no_interval, float(np.exp(constant)), optima, refusals)


def fit_exponent(optima: list[Optimum], logs: Array | None = None) -> Array:
    """Exponent and ln(coefficient) of N*(C), every optimum weighted by its own spread.

    `logs`: other ln(parameters) for the optima, (B,) or (B, K); with K of them the result is (2, K).
    """
    logs = np.log([optimum.parameters for optimum in optima]) if logs is None else logs
    weights = [1 / optimum.spread for optimum in optima]
    return np.polyfit(np.log([optimum.budget for optimum in optima]), logs, 1, w=weights)


def optimal_sizes(fit: Fit, rows: pd.DataFrame, theta_KP: Array, budgets: Array) -> tuple[list[Optimum], list[Refusal]]:
    """The best size of each budget, its `spread` over the parameter sets `theta_KP`; edge optima are refused."""
    sizes = rows.drop_duplicates("parameters").sort_values("parameters")
    logs_N = np.linspace(np.log(float(sizes["parameters"].min())), np.log(float(sizes["parameters"].max())), FINE)
    cost = np.log(sizes["train_flops"] / sizes["images"].astype(float))
    slope, constant = np.polyfit(np.log(sizes["parameters"].astype(float)), cost, 1)
    optima, refusals = [], []
    for budget in budgets:
        images_N = np.exp(np.log(budget) - constant - slope * logs_N)
        line = pd.DataFrame({"parameters": np.exp(logs_N), "images": images_N})
        metric_N = fit.metric(line)
        best = int(np.argmin(metric_N))
        if best in (0, FINE - 1):
            refusals.append(_edge(f"budget {budget:.3g}", "smallest trained" if best == 0 else "largest trained"))
            continue
        spread = float(np.std(logs_N[np.argmin(fit.metric(line, theta_KP), axis=1)]))
        optima.append(Optimum(float(budget), float(np.exp(logs_N[best])), float(metric_N[best]), spread, len(sizes)))
    return optima, refusals


def _edge(where: str, which: str) -> Refusal:
    return Refusal("edge_optimum", f"{where}: the {which} size is the best, so the optimum lies outside")


def _no_interval(slices: pd.DataFrame, noise: float | None) -> str | None:
    """Why the exponent's interval cannot be estimated, if it cannot."""
    if noise is None:
        return f"no budget has more than {LEAST_SIZES} sizes, too few to tell noise from the shape of the curve"
    if "run" in slices and (slices.groupby("run")["budget"].nunique() > 1).any():
        return "the budgets share runs, whose deviations move several optima at once"
    return None


def slices_of_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns budget, run, parameters, value for `isoflop`.

    Runs that were made for common budgets are taken as they are. Otherwise every run's curve, a line between its
    evaluations in logarithms, is cut at `CUTS` log-spaced budgets that at least `LEAST_SIZES` sizes reach.
    """
    rows = rows.sort_values("train_flops")
    group = (np.log(rows["train_flops"]).diff() > np.log(SAME_BUDGET)).cumsum()
    whole = rows.groupby(group).filter(lambda part: part["parameters"].nunique() >= LEAST_SIZES)
    flops, runs = whole.groupby(group)["train_flops"], whole.groupby(group)["run"]
    # One point of each run at one compute, not dense curves whose points are near each other in a chain.
    if len(whole) and (flops.max() <= flops.min() * SAME_BUDGET).all() and (runs.nunique() == runs.size()).all():
        budget = flops.transform(lambda flops: np.exp(np.log(flops).mean()))
        return whole.assign(budget=budget)[["budget", "run", "parameters", "value"]]
    return _cut(rows)


def _cut(rows: pd.DataFrame) -> pd.DataFrame:
    grid = np.geomspace(rows["train_flops"].min(), rows["train_flops"].max(), 400)
    curves = [_along(run, grid) for _, run in rows.groupby("run", sort=True) if len(run) > 1]
    cuts = pd.concat(curves) if curves else rows.iloc[:0].assign(budget=0.0)
    sizes = cuts.groupby("budget", sort=True)["size"].nunique()
    reached = sizes.index[sizes >= LEAST_SIZES]
    if reached.empty:
        raise Refusal("too_few_points", f"isoflop: no compute is reached by {LEAST_SIZES} sizes at least")
    chosen = reached[[round(i * (len(reached) - 1) / (CUTS - 1)) for i in range(CUTS)]]
    return cuts.loc[cuts["budget"].isin(chosen), ["budget", "run", "parameters", "value"]]


def _along(run: pd.DataFrame, grid: Array) -> pd.DataFrame:
    """The metric at every compute of `grid` that the run has passed."""
    logs = run[["train_flops", "value"]].sort_values("train_flops").astype(float).apply(np.log)
    value = np.exp(np.interp(np.log(grid), logs["train_flops"], logs["value"], left=np.nan, right=np.nan))
    of_run = run.iloc[0][["run", "size", "parameters"]].to_dict()
    return pd.DataFrame({"budget": grid, "value": value, **of_run}).dropna()


def _curve(rows: pd.DataFrame) -> tuple[Array, Array]:
    """ln(parameters), ascending, and the mean ln(metric) of each."""
    logs = rows[["parameters", "value"]].astype(float).apply(np.log).groupby("parameters")["value"].mean()
    return logs.index.to_numpy(dtype=float), logs.to_numpy(dtype=float)


def _optimum(
    budget: float, x_N: Array, y_N: Array, find: Method, noise: float, rng: np.random.Generator
) -> tuple[Optimum, Array]:
    where = f"isoflop: budget {budget:.3g}"
    if len(x_N) < LEAST_SIZES:
        raise Refusal("too_few_points", f"{where} has {len(x_N)} sizes, {LEAST_SIZES} are needed")
    best, value = find(x_N, y_N)
    if np.isinf(best):
        raise Refusal("concave_optimum", f"{where}: the curve over size opens downward, no optimum")
    if not x_N[0] < best < x_N[-1]:
        raise _edge(where, "smallest" if best <= x_N[0] else "largest")
    draws_K = np.array([find(x_N, y_N + rng.normal(0, noise, len(y_N)))[0] for _ in range(DRAWS)])
    draws_K = np.clip(draws_K, x_N[0], x_N[-1])
    gap = np.diff(x_N)[np.searchsorted(x_N, best) - 1]
    spread = max(float(np.std(draws_K)), gap / np.sqrt(12))  # no finer than the gap between two sizes
    return Optimum(budget, float(np.exp(best)), float(np.exp(value)), spread, len(x_N)), draws_K


def _akima(x_N: Array, y_N: Array) -> tuple[float, float]:
    curve = Akima1DInterpolator(x_N, y_N)
    grid = np.linspace(x_N[0], x_N[-1], FINE)
    values = curve(grid)
    lowest = int(np.argmin(values))
    return float(grid[lowest]), float(values[lowest])


def _parabola(x_N: Array, y_N: Array) -> tuple[float, float]:
    """Vertex of the parabola through the seven points nearest the lowest; infinity where it opens downward."""
    near = np.sort(np.argsort(np.abs(x_N - x_N[np.argmin(y_N)]), kind="stable")[:7])
    a, b, c = np.polyfit(x_N[near], y_N[near], 2)
    return (float(-b / (2 * a)), float(c - b**2 / (4 * a))) if a > 0 else (float("inf"), float("nan"))


def _noise(curves: list[tuple[Array, Array]]) -> float | None:
    """Standard deviation of ln(metric) around smooth curves, from leaving each inner point out; None without curves."""
    misses = [
        abs(y_N[i] - float(Akima1DInterpolator(np.delete(x_N, i), np.delete(y_N, i))(x_N[i])))
        for x_N, y_N in curves
        for i in range(1, len(x_N) - 1)
        if abs(i - int(np.argmin(y_N))) <= 2
    ]
    return float(np.median(misses)) / 0.6745 / np.sqrt(1.5) if misses else None


METHODS: dict[str, Method] = {"akima": _akima, "parabola": _parabola}
