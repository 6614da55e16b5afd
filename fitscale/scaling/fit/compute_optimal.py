"""The compute-optimal size, or amount of data, at each compute budget, and how it grows: N*(C) = k C^a.

1. Rows of equal compute (slices.py) give metric against size per budget. Sizes nearer than a tenth of the mean gap are
   taken as one: between two that are almost equal an interpolation follows their noise out of all bounds.
2. Every method of curves.py finds the minimum. The one that predicts sizes left out best comes first. (An
   interpolation beats a parabola on many sizes with little noise: Porian et al. 2024; where there are few sizes or much
   noise it follows the noise.)
3. Each optimum's uncertainty comes from redrawing the noise of its points; the law is a weighted regression, and its
   interval grows by how much more the optima scatter around it than their own draws (Birge 1932).
   It has no interval where budgets share runs, whose deviations move several optima at once, nor with four sizes,
   which do not tell noise from shape.

A budget whose minimum lies at the smallest or largest size tried, that has none, or whose curve leaves what was
measured by more than the measurements span, is refused by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from fitscale.scaling.fit.curves import METHODS, NEAR, left_out
from fitscale.scaling.fit.slices import LEAST_SIZES
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.fit.uncertainty import central
from fitscale.scaling.rows.refusals import Caution, Refusal, listed

SAME_SIZE = 0.1  # of the mean gap between ln(sizes)
PREFER = 1.1  # an interpolation has to be better than a parabola by a tenth: near ties are chance
BEYOND = 0.01  # a curve's minimum lies a little below the best size tried; by more than this, or its error, it is said
DRAWS = 400

Interval = tuple[float, float]


@dataclass(frozen=True)
class Optimum:
    """The best size, or data, of one budget; `spread` is the standard deviation of ln(best)."""

    budget: float
    best: float
    metric: float
    spread: float
    sizes: int
    measured: float = float("nan")  # the best metric that was measured at this budget

    @property
    def beyond(self) -> float:
        """By how much the metric at the optimum is below everything measured there, as ln; 0 if it is not."""
        return max(0.0, float(np.log(self.measured / self.metric)))


@dataclass(frozen=True)
class IsoFlop:
    """best(C) = coefficient x C^exponent, from the optima of all budgets that have one; intervals hold `level`."""

    method: str
    of: str  # parameters, tokens or images
    exponent: float
    coefficient: float  # at C = 1
    level: float
    interval: Interval | None  # of the exponent; None: not estimated, `no_interval` says why
    coefficient_interval: Interval | None
    no_interval: str | None
    error: float  # root of the mean squared ln(measured / predicted) of sizes left out near the optima
    merged: int  # sizes that were taken together with another
    optima: list[Optimum]
    refusals: list[Refusal]
    slices: pd.DataFrame = field(compare=False, repr=False)


@dataclass(frozen=True)
class _Curve:
    """One budget's sizes, ascending: ln(size or data), mean ln(metric)."""

    budget: float
    x_N: Array
    y_N: Array
    merged: int


def by_every_method(
    slices: pd.DataFrame, of: str, seed: int, level: float = 0.9
) -> tuple[list[IsoFlop], list[Refusal]]:
    """`isoflop` by every method that differs from the others here, best first, and those that were refused."""
    most = slices.groupby("budget")["parameters"].nunique().max()
    found, refusals = [], []
    for method in METHODS:
        if method == "parabola-7" and most <= NEAR:
            continue
        try:
            found.append(isoflop(slices, method, seed, of, level))
        except Refusal as refusal:
            refusals.append(refusal)
    return sorted(found, key=lambda iso: iso.error * (PREFER if iso.method == "akima" else 1.0)), refusals


def isoflop(
    slices: pd.DataFrame, method: str = "akima", seed: int = 0, of: str = "parameters", level: float = 0.9
) -> IsoFlop:
    """Fit the compute-optimal size to `slices`: columns budget, parameters, value, and run where it is known.

    `of`: the column whose best amount is looked for, parameters, tokens or images.

    Raises:
        Refusal: fewer than two budgets have an optimum, or the table does not say `of`.
    """
    if slices[of].isna().any():
        raise Refusal("missing_values", f"isoflop: column {of} is missing in some rows, so no optimum of it is known")
    curves = [_curve(budget, slices[slices["budget"] == budget], of) for budget in np.unique(slices["budget"])]
    whole = [curve for curve in curves if len(curve.x_N) >= LEAST_SIZES]
    misses = [left_out(method, curve.x_N, curve.y_N) for curve in whole]
    noise = _noise(method, [curve for curve in whole if len(curve.x_N) > LEAST_SIZES])
    found, refusals = [], []
    for index, curve in enumerate(curves):
        try:
            found.append(_optimum(curve, method, noise or 0.0, np.random.default_rng([seed, index])))
        except Refusal as refusal:
            refusals.append(refusal)
    optima = [optimum for optimum, _ in found]
    if len(optima) < 2:
        what = f"isoflop by {method}: {len(optima)} budgets have an optimum, two are needed"
        raise Refusal("too_few_points", f"{what}; {'; '.join(map(str, refusals))}")
    exponent, constant = fit_exponent(optima)
    no_interval = _no_interval(slices, noise)
    draws_BK = np.array([draws_K for _, draws_K in found])
    of_exponent, of_coefficient = (None, None) if no_interval else _intervals(optima, draws_BK, level)
    error = float(np.sqrt(np.mean(np.concatenate(misses) ** 2)))
    merged = sum(curve.merged for curve in curves)
    return IsoFlop(
        method,
        of,
        float(exponent),
        float(np.exp(constant)),
        level,
        of_exponent,
        of_coefficient,
        no_interval,
        error,
        merged,
        optima,
        refusals,
        slices,
    )


def fit_exponent(optima: list[Optimum], logs: Array | None = None) -> Array:
    """Exponent and ln(coefficient) of best(C), every optimum weighted by its own spread.

    `logs`: other ln(best) for the optima, (B,) or (B, K); with K of them the result is (2, K).
    """
    logs = np.log([optimum.best for optimum in optima]) if logs is None else logs
    weights = [1 / optimum.spread for optimum in optima]
    return np.polyfit(np.log([optimum.budget for optimum in optima]), logs, 1, w=weights)


def isoflop_cautions(isoflops: list[IsoFlop]) -> Iterator[Caution]:
    """What a reader must know: of the first of `isoflops`, the one that is quoted, all; of others what is beyond."""
    for iso in isoflops[:1]:
        yield from (Caution(refusal.code, f"{refusal.message} (by {iso.method})") for refusal in iso.refusals)
        if iso.merged:
            text = f"isoflop: {iso.merged} sizes are nearer to another than a tenth of the mean gap, and taken with it"
            yield Caution("merged_sizes", text)
    for iso in isoflops:
        far = [optimum for optimum in iso.optima if optimum.beyond > min(iso.error, BEYOND)]
        if far:
            worst = max(far, key=lambda optimum: optimum.beyond)
            at = listed([f"{optimum.budget:.3g}" for optimum in far])
            what = f"isoflop by {iso.method}: at budget {at} the metric at the optimum lies below all that was measured"
            text = (
                f"{what}, by up to {-np.expm1(-worst.beyond):.1%} ({worst.metric:.4g}, measured {worst.measured:.4g})"
            )
            yield Caution("outside_range", text)


def _intervals(optima: list[Optimum], draws_BK: Array, level: float) -> tuple[Interval, Interval]:
    """The level's of exponent and coefficient."""
    fitted_2, draws_2K = fit_exponent(optima), fit_exponent(optima, draws_BK)
    residual_B = np.log([optimum.best for optimum in optima]) - np.polyval(
        fitted_2, np.log([optimum.budget for optimum in optima])
    )
    expected_BK = draws_BK - np.log([optimum.best for optimum in optima])[:, None]
    weight_B = np.array([optimum.spread**-2 for optimum in optima])
    freedom = len(optima) - 2
    by_noise = float(weight_B @ np.mean(expected_BK**2, axis=1)) * freedom / len(optima)
    birge = np.sqrt(float(weight_B @ residual_B**2) / by_noise) if freedom and by_noise > 0 else 1.0
    low_2, high_2 = central((fitted_2[:, None] + (draws_2K - fitted_2[:, None]) * max(1.0, birge)).T, level)
    return (float(low_2[0]), float(high_2[0])), (float(np.exp(low_2[1])), float(np.exp(high_2[1])))


def _no_interval(slices: pd.DataFrame, noise: float | None) -> str | None:
    """Why the exponent's interval cannot be estimated, if it cannot."""
    if noise is None:
        return f"no budget has more than {LEAST_SIZES} sizes, too few to tell noise from the shape of the curve"
    if "run" in slices and (slices.groupby("run")["budget"].nunique() > 1).any():
        return "the budgets share runs, whose deviations move several optima at once"
    return None


def _curve(budget: float, rows: pd.DataFrame, of: str) -> _Curve:
    """Means over the rows of a size; of a size are all that are `SAME_SIZE` of the mean gap above its smallest."""
    logs = np.log(rows[["parameters", of, "value"]].astype(float).to_numpy())
    logs = logs[np.argsort(logs[:, 0], kind="stable")]
    exact = np.unique(logs[:, 0])
    near = SAME_SIZE * (exact[-1] - exact[0]) / max(len(exact) - 1, 1)
    starts = exact[:1].tolist()
    for x in exact[1:]:
        if x > starts[-1] + near:
            starts.append(float(x))
    group = np.searchsorted(starts, logs[:, 0], side="right") - 1
    means = pd.DataFrame(logs[:, 1:], columns=["x", "y"]).groupby(group).mean().sort_values("x")
    return _Curve(float(budget), means["x"].to_numpy(), means["y"].to_numpy(), len(exact) - len(starts))


def _optimum(curve: _Curve, method: str, noise: float, rng: np.random.Generator) -> tuple[Optimum, Array]:
    where, x_N, y_N = f"isoflop: budget {curve.budget:.3g}", curve.x_N, curve.y_N
    if len(x_N) < LEAST_SIZES:
        raise Refusal("too_few_points", f"{where} has {len(x_N)} sizes, {LEAST_SIZES} are needed")
    best, value = (float(found_K[0]) for found_K in METHODS[method](x_N, y_N[:, None]).lowest())
    if np.isinf(best):
        raise Refusal("concave_optimum", f"{where}: the curve over size opens downward, no optimum")
    if not x_N[0] < best < x_N[-1]:
        which = "smallest" if best <= x_N[0] else "largest"
        raise Refusal("edge_optimum", f"{where}: the {which} size is the best, so the optimum lies outside")
    if value < y_N.min() - np.ptp(y_N):
        what = f"the curve through the sizes falls to {np.exp(value):.3g}, measured were {np.exp(y_N.min()):.4g} to"
        raise Refusal("outside_range", f"{where}: {what} {np.exp(y_N.max()):.4g}")
    draws_NK = y_N[:, None] + rng.normal(0, noise, (len(y_N), DRAWS))
    draws_K = np.clip(METHODS[method](x_N, draws_NK).lowest()[0], x_N[0], x_N[-1])
    gap = np.diff(x_N)[np.searchsorted(x_N, best) - 1]
    spread = max(float(np.std(draws_K)), gap / np.sqrt(12))  # no finer than the gap between two sizes
    return Optimum(
        curve.budget, np.exp(best), float(np.exp(value)), spread, len(x_N), float(np.exp(y_N.min()))
    ), draws_K


def _noise(method: str, curves: list[_Curve]) -> float | None:
    """Standard deviation of ln(metric) around the method's curves; None without curves.

    An interpolation leaves no residuals: its noise is that of the sizes left out, each predicted by its neighbours.
    """
    if not curves:
        return None
    misses = np.abs(np.concatenate([left_out(method, curve.x_N, curve.y_N) for curve in curves]))
    return float(np.median(misses)) / 0.6745 / np.sqrt(1.5) if len(misses) else None
