"""Is a fitted law bent against its points? Residuals that go down, up and down again (or the reverse) along an input.

The sign of a bend is a parabola in x = ln(input) that a fit would gain from. Runs deviate as a whole, so two sources
tell of it, each tested against its own noise (both exact for normal noise of runs and checkpoints, noise.py), and
taken together by Fisher's method: checkpoints within their runs, every run with a level of its own; and the means of
the runs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fitscale.scaling.fit.fitting import Fit
from fitscale.scaling.fit.solver import Array

NAMES = {"train_flops": "compute", "images": "data"}
SIGNIFICANT = 0.02  # chance to call a straight law bent


@dataclass(frozen=True)
class Bend:
    """Mean measured / law - 1 of the fifths of the points with the least, a middling and the most `input`."""

    input: str
    fifths: tuple[float, float, float]
    chance: float  # of as much of a bend by noise alone

    def __str__(self) -> str:
        shares = ", ".join(f"{share:+.0%}" if abs(share) >= 0.02 else f"{share:+.1%}" for share in self.fifths)
        return f"residuals go {shares} from the least {NAMES.get(self.input, self.input)} to the most"


def bend(fit: Fit) -> Bend | None:
    """The clearest bend of the law against its points; None if there is none that noise would not make."""
    log_N, jacobian_NP = fit.at_points()
    residual_N, run_N = fit.points.y_N - log_N, np.unique(fit.points.run_N, return_inverse=True)[1].astype(np.int64)
    found = []
    for name, x_N in zip(fit.law.inputs, fit.points.x_NF.T, strict=True):
        square_N = (x_N - x_N.mean()) ** 2
        tests = (test(residual_N, jacobian_NP, square_N, run_N) for test in (_within, _between))
        chances = [chance for chance in tests if chance is not None]
        low, middle, high = _fifths(residual_N, x_N)
        if chances and (middle - low) * (middle - high) > 0:
            found.append(Bend(name, (low, middle, high), float(stats.combine_pvalues(chances).pvalue)))
    clearest = min(found, key=lambda each: each.chance, default=None)
    return clearest if clearest is not None and clearest.chance < SIGNIFICANT else None


def _fifths(residual_N: Array, x_N: Array) -> tuple[float, float, float]:
    in_order, count = residual_N[np.argsort(x_N, kind="stable")], max(len(x_N) // 5, 1)
    start = (len(x_N) - count) // 2
    parts = (in_order[:count], in_order[start : start + count], in_order[-count:])
    low, middle, high = (float(np.expm1(part.mean())) for part in parts)
    return low, middle, high


def _within(residual_N: Array, jacobian_NP: Array, square_N: Array, run_N: NDArray[np.int64]) -> float | None:
    member_NG = np.eye(run_N.max() + 1)[run_N]
    return _chance(np.column_stack([jacobian_NP, member_NG]), square_N, residual_N)


def _between(residual_N: Array, jacobian_NP: Array, square_N: Array, run_N: NDArray[np.int64]) -> float | None:
    member_NG = np.eye(run_N.max() + 1)[run_N]
    mean_GN = (member_NG / member_NG.sum(axis=0)).T
    return _chance(mean_GN @ jacobian_NP, mean_GN @ square_N, mean_GN @ residual_N)


def _chance(design_NP: Array, extra_N: Array, residual_N: Array) -> float | None:
    """p of the t-test of one more column beside a design; None where it cannot be tested."""
    basis_NP, singular_P, _ = np.linalg.svd(design_NP, full_matrices=False)
    basis_NP = basis_NP[:, singular_P > 1e-9 * max(singular_P[0], 1e-300)]
    extra_N, left_N = (column - basis_NP @ (basis_NP.T @ column) for column in (extra_N, residual_N))
    freedom = len(residual_N) - basis_NP.shape[1] - 1
    length = float(np.linalg.norm(extra_N))
    if freedom < 2 or length < 1e-9:
        return None
    slope = float(extra_N @ left_N) / length
    rest = float(left_N @ left_N) - slope**2
    t = abs(slope) / np.sqrt(max(rest, 1e-24) / freedom)
    return float(2 * stats.t.sf(t, freedom))
