"""Does a law hold where it was not fitted, and which of several laws survive?

1. Sizes are left out from the largest down: each group is predicted from all smaller ones. The error at the last
   checkpoints, over the standard deviation that it would have if the law were right, is the first test of fit.
2. Residuals of a law that bends another way than the data keep their sign along a run: the second test (runs of signs,
   Wald and Wolfowitz 1940). Where seeds repeat a size, sizes must not differ by more than seeds do: the third (the
   classical F test of lack of fit). Both are judged against residuals drawn from the fit's own noise.
3. A law is dominated, and does not survive, if another law leaves much less scatter at the very points it is fitted to.
4. Survivors weigh by how probable they made the sizes that were left out: the prequential likelihood (Dawid 1984), as
   in stacking, under Student's t with the degrees of freedom of the noise.
5. The errors of a law that fails a test go on as they went, size by size, beyond what noise explains: its `bias`.

Shapes: N points, P parameters, K draws, J groups of sizes.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from fitscale.scaling.fit.fitting import Fit, FittedPoints, order, refit, told_apart
from fitscale.scaling.fit.laws import COMPUTE, Law
from fitscale.scaling.fit.noise import scattered
from fitscale.scaling.fit.solver import Array
from fitscale.scaling.rows.fitted_points import chosen

GROUPS = 6  # of sizes, at most: the two smallest are never left out
FAILED = 0.05  # a test with a smaller p-value
DOMINATED = 0.01  # p-value of another law's smaller scatter
LEAST_WEIGHT = 0.01  # of a law over the best one's: with less it does not survive
LEAST_FREEDOM = 3  # points beyond runs that tell one scatter from another
SIMULATED = 400


@dataclass(frozen=True)
class LeftOut:
    """What a law said of sizes that it was not fitted to: mean ln(measured / predicted), and its standard deviation."""

    sizes: tuple[str, ...]
    error: float
    spread: float


@dataclass(frozen=True)
class Verdict:
    """How a law fared. P-values are those of its tests, None where the data do not allow one."""

    left_out: dict[int, LeftOut]
    p_left_out: float | None
    p_signs: float | None
    p_replicates: float | None
    freedom: float  # of the noise between runs

    @property
    def failed(self) -> list[str]:
        """What speaks against the law, in words."""
        said = {
            "sizes left out": self.p_left_out,
            "runs of residual signs": self.p_signs,
            "sizes differ by more than their seeds": self.p_replicates,
        }
        return [f"{what} (p = {p:.2g})" for what, p in said.items() if p is not None and p < FAILED]

    @property
    def bias(self) -> tuple[float, float]:
        """How far ln(metric) is off at the next size, and the standard deviation of that; 0 for a law that passed.

        The errors at the sizes left out go on as they went: by half a step more, give or take one, as far as they are
        larger than noise explains (the share of their mean square, as James and Stein shrink, 1961).
        """
        if not self.failed or not self.left_out:
            return 0.0, 0.0
        error_J, spread_J = np.array([(out.error, out.spread) for out in self.left_out.values()]).T
        step = float(error_J[-1] - error_J[0]) / max(len(error_J) - 1, 1)
        beyond = max(1 - float(np.mean(spread_J**2) / np.mean(error_J**2)), 0.0)
        return beyond * (float(error_J[-1]) + step / 2), beyond * max(abs(step), abs(float(error_J[-1])) / 2)

    def log_score(self, groups: set[int]) -> float:
        """ln of how probable the law made these groups of sizes."""
        found = [self.left_out[group] for group in groups]
        return sum(float(stats.t.logpdf(out.error / out.spread, self.freedom) - np.log(out.spread)) for out in found)


@dataclass(frozen=True)
class Group:
    """Sizes that are left out: the smaller ones, `known` where laws of compute are fitted to them, and the last
    points of their own runs, `asked` where laws of compute speak of them."""

    sizes: tuple[str, ...]
    smaller: pd.DataFrame
    last: pd.DataFrame

    def known(self, fit: Fit) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Rows that `fit`'s law is fitted to, and those that it is asked about."""
        if fit.law.inputs != COMPUTE:
            return self.smaller, self.last
        return self.smaller[self.smaller["known"]], self.last[self.last["asked"]]


def groups(rows: pd.DataFrame, sizes: list[str], points: str) -> list[Group]:
    """Groups of `sizes`, which ascend, from the third on; `rows` have none that is held out."""
    parts = [[str(size) for size in part] for part in np.array_split(np.array(sizes), min(len(sizes), GROUPS))]
    found = []
    for index in range(2, len(parts)):
        smaller, unseen = (rows[rows["size"].isin(part)] for part in (chain(*parts[:index]), parts[index]))
        last = unseen[unseen["train_flops"] == unseen.groupby("run")["train_flops"].transform("max")]
        asked = pd.Series(True, last.index)
        if points == "frontier":
            asked = chosen(pd.concat([smaller, unseen]), points)[last.index]
        smaller = smaller.assign(known=chosen(smaller, points))
        found.append(Group(tuple(parts[index]), smaller, last.assign(asked=asked)))
    return found


def verdict(fit: Fit, used: pd.DataFrame, left: list[Group], seed: int = 0) -> Verdict:
    """How `fit`, of the rows `used`, fares on the groups that are left out."""
    left_out = {}
    for index, group in enumerate(left):
        found = _left_out(fit, *group.known(fit))
        if found is not None:
            left_out[index] = LeftOut(group.sizes, *found)
    freedom = fit.noise.freedom[0]
    squares = [(out.error / out.spread) ** 2 for out in left_out.values()]
    p_left_out = float(stats.f.sf(np.mean(squares), len(squares), freedom)) if squares else None
    return Verdict(left_out, p_left_out, *_within(fit, used, np.random.default_rng([seed, 2])), freedom)


def weights(verdicts: list[Verdict], survives: list[bool]) -> list[float]:
    """How much each law counts in the answer: 0 if it does not survive, else by the sizes that all those predicted."""
    survives = survives if any(survives) else [True] * len(verdicts)
    alive = [verdict for verdict, lives in zip(verdicts, survives, strict=True) if lives]
    common = set.intersection(*(set(verdict.left_out) for verdict in alive))
    best = max(verdict.log_score(common) for verdict in alive)
    weight = np.array(
        [
            np.exp(verdict.log_score(common) - best) if lives else 0.0
            for verdict, lives in zip(verdicts, survives, strict=True)
        ]
    )
    weight = np.where(weight < LEAST_WEIGHT, 0.0, weight)
    return (weight / weight.sum()).tolist()


def dominated(fit: Fit, used: pd.DataFrame, others: list[Fit]) -> bool:
    """Whether one of `others` leaves so much less scatter at the points of `fit` that this is no chance.

    Each run's mean is taken out first: what a run is off by says little of a law.
    """
    freedom = len(used) - used["run"].nunique()
    if freedom < LEAST_FREEDOM:
        return False
    names, group_N = np.unique(used["run"].to_numpy(dtype=str), return_inverse=True)
    member_RN = (group_N == np.arange(len(names))[:, None]).astype(float)
    y_N = np.log(used["value"].to_numpy(dtype=float))

    def scatter(each: Fit) -> float:
        residual_N = y_N - each.log_metric(used)
        mean_R = member_RN @ residual_N / member_RN.sum(axis=1)
        return float(np.sum((residual_N - mean_R[group_N]) ** 2))

    most = scatter(fit) / stats.f.isf(DOMINATED, freedom, freedom)
    return any(scatter(other) < most for other in others if speaks(other.law, used).all())


def speaks(law: Law, rows: pd.DataFrame) -> NDArray[np.bool_]:
    """True for the rows that have the law's inputs."""
    if not set(law.inputs) <= set(rows.columns):
        return np.zeros(len(rows), dtype=bool)
    return np.all([rows[name].to_numpy(dtype=float, na_value=np.nan) > 0 for name in law.inputs], axis=0)


def _left_out(fit: Fit, known: pd.DataFrame, last: pd.DataFrame) -> tuple[float, float] | None:
    """Mean ln(measured / predicted) at the `last` points, and its standard deviation; None where nothing is said."""
    if len(known) < len(fit.theta_P) + 1 or known["size"].nunique() < 2 or last.empty:
        return None
    data = FittedPoints.of(fit.law, known, fit.points.centre_F)
    theta_KP, _ = refit(fit.law, data, data.y_N, fit.theta_P[None], fit.loss)
    jacobian_NP = fit.law.evaluate(theta_KP, data.x_NF)[1][0]
    if told_apart(jacobian_NP) < len(fit.theta_P):
        return None
    x_NF, _ = fit.law.centred(last, data.centre_F)
    log_KN, there_KNP = fit.law.evaluate(theta_KP, x_NF)
    error = float(np.mean(np.log(last["value"].to_numpy(dtype=float)) - log_KN[0]))
    noise, mean_P = fit.noise, there_KNP[0].mean(axis=0)
    scale_N = fit.scale(fit.growth, known.iloc[order(fit.law, known)])[0]
    effect_N = mean_P @ np.linalg.pinv(jacobian_NP) * scale_N
    of_runs = pd.Series(effect_N).groupby(data.run_N).sum()
    variance = noise.run * float((of_runs**2).sum()) + noise.point * float((effect_N**2).sum())
    new = fit.scale(fit.growth, last)[0]
    variance += (noise.run + noise.point) * float(np.mean(new**2)) / last["run"].nunique()
    return error, float(np.sqrt(variance))


def _within(fit: Fit, used: pd.DataFrame, rng: np.random.Generator) -> tuple[float | None, float | None]:
    """P-values of the signs and of the replicates, from residuals as the fit's own noise would leave them."""
    points, noise = fit.points, fit.noise
    log_N, jacobian_NP = fit.at_points()
    weighted_NP = jacobian_NP * points.weight_N[:, None]
    scale_N = fit.scale(fit.growth)[0]
    run_K, point_K = (np.full(SIMULATED, variance) for variance in (noise.run, noise.point))
    noise_KN = scattered(rng, np.zeros(len(log_N)), points.run_N, run_K, point_K, scale_N)
    left_KN = noise_KN - (noise_KN * points.weight_N) @ np.linalg.pinv(weighted_NP).T @ jacobian_NP.T
    residual_KN = np.vstack([points.y_N - log_N, left_KN]) / scale_N
    size_N = used.drop_duplicates("run").set_index("run")["size"].reindex(points.run_N).to_numpy(dtype=str)
    signs, sizes = _sign_changes(fit, residual_KN), _between_sizes(residual_KN, points.run_N, size_N)
    p_signs = None if signs is None else float((1 + np.sum(signs[1:] <= signs[0])) / (1 + SIMULATED))
    p_sizes = None if sizes is None else float((1 + np.sum(sizes[1:] >= sizes[0])) / (1 + SIMULATED))
    return p_signs, p_sizes


def _sign_changes(fit: Fit, residual_KN: Array) -> Array | None:
    """How often the sign changes along the runs, each around its own mean; along all points where runs have but one."""
    run_N, x_N = fit.points.run_N, fit.points.x_NF.sum(axis=1)
    names, group_N = np.unique(run_N, return_inverse=True)
    if len(names) == len(run_N):
        group_N = np.zeros(len(run_N), dtype=int)
    if len(run_N) - len(np.unique(group_N)) < LEAST_FREEDOM:
        return None
    member_GN = (group_N == np.unique(group_N)[:, None]).astype(float)
    mean_KG = residual_KN @ member_GN.T / member_GN.sum(axis=1)
    along = np.lexsort((x_N, group_N))
    sign_KN = np.sign((residual_KN - mean_KG @ member_GN)[:, along])
    same = group_N[along][1:] == group_N[along][:-1]
    return np.sum((sign_KN[:, 1:] != sign_KN[:, :-1])[:, same], axis=1)


def _between_sizes(residual_KN: Array, run_N: NDArray[np.str_], size_N: NDArray[np.str_]) -> Array | None:
    """Mean square between sizes over that between seeds of a size, of the runs' mean residuals."""
    names, group_N = np.unique(run_N, return_inverse=True)
    member_RN = (group_N == np.arange(len(names))[:, None]).astype(float)
    mean_KR = residual_KN @ member_RN.T / member_RN.sum(axis=1)
    size_R = np.array([size_N[group_N == index][0] for index in range(len(names))])
    sizes = np.unique(size_R)
    if len(sizes) == len(names) or len(sizes) < 3:
        return None
    of_size_SR = (size_R == sizes[:, None]).astype(float)
    mean_KS = mean_KR @ of_size_SR.T / of_size_SR.sum(axis=1)
    within_K = np.sum((mean_KR - mean_KS @ of_size_SR) ** 2, axis=1) / (len(names) - len(sizes))
    between_K = np.sum(of_size_SR.sum(axis=1) * mean_KS**2, axis=1)
    return between_K / np.maximum(within_K, 1e-300)
