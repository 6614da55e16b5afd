"""Does noise grow with the size of a run? How plausible each growth is, given the residuals of a fit.

The standard deviation of ln(metric), between runs as between checkpoints, is taken as  s x exp(g z), z the run's size:
the sum of the law's inputs at its last point (for N and D that is ln C but for a constant), centred over the runs.
Every g on a grid is judged by its restricted likelihood (REML, Patterson and Thompson 1971), integrated over how the
variance is shared between runs and checkpoints; noise that does not grow has half of the prior, so that the
data have to show it.
Shapes: N points, R runs, P parameters (in products also the residuals), G growths, Q shares.
"""

import numpy as np
from numpy.typing import NDArray

from fitscale.scaling.fit.solver import Array

FACTORS = np.arange(-3.0, 4.25, 0.5)  # ln of how much larger the noise of the largest fitted run is than the smallest's
LEAST = 0.01  # what is less plausible is left out
LEAST_RUNS = 4  # fewer do not tell a growth from how much runs differ
LIKELY = 1.5  # standard deviation of that before any data
SHARES = np.array([0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])  # of the variance that is between runs


def size_of_runs(x_NF: Array, run_N: NDArray[np.str_]) -> Array:
    """ln(size)_N of every point's run: the sum of its inputs at its last point."""
    names, group_N = np.unique(run_N, return_inverse=True)
    size_R = np.full(len(names), -np.inf)
    np.maximum.at(size_R, group_N, x_NF.sum(axis=1))
    return size_R[group_N]


def plausible_growths(
    residual_N: Array, jacobian_NP: Array, run_N: NDArray[np.str_], size_N: Array
) -> tuple[Array, Array]:
    """Growths g_G of the noise per unit of `size_N`, probability_G of each; 0 alone for few runs, or of one size."""
    spread = float(np.ptp(size_N))
    if spread == 0.0 or len(np.unique(run_N)) < LEAST_RUNS or len(residual_N) - jacobian_NP.shape[1] < 3:
        return np.zeros(1), np.ones(1)
    likelihood_G = _log_likelihoods(residual_N, jacobian_NP, run_N, np.exp(FACTORS[:, None] / spread * size_N))
    none = FACTORS == 0.0
    prior_G = np.where(none, 0.0, np.exp(-((FACTORS / LIKELY) ** 2) / 2))
    prior_G = np.where(none, 0.5, 0.5 * prior_G / prior_G.sum())
    weight_G = prior_G * np.exp(likelihood_G - likelihood_G.max())
    seen = weight_G > LEAST * weight_G.sum()
    return FACTORS[seen] / spread, weight_G[seen] / weight_G[seen].sum()


def _log_likelihoods(residual_N: Array, jacobian_NP: Array, run_N: NDArray[np.str_], scale_GN: Array) -> Array:
    """ln of the restricted likelihoods of noise proportional to `scale_GN`, averaged over `SHARES`."""
    columns_GNP = np.column_stack([jacobian_NP, residual_N]) / scale_GN[:, :, None]
    names, group_N = np.unique(run_N, return_inverse=True)
    member_RN = (group_N == np.arange(len(names))[:, None]).astype(float)
    sum_GRP, count_R = member_RN @ columns_GNP, member_RN.sum(axis=1)
    share_Q = SHARES if len(names) < len(run_N) else SHARES[:1]
    runs_QR = 1 - share_Q[:, None] + count_R * share_Q[:, None]
    within_GPP = np.swapaxes(columns_GNP, 1, 2) @ columns_GNP
    between_GQPP = np.einsum("grp,qr,gro->gqpo", sum_GRP, share_Q[:, None] / runs_QR, sum_GRP, optimize=True)
    product_GQPP = (within_GPP[:, None] - between_GQPP) / (1 - share_Q[:, None, None])
    values, vectors = np.linalg.eigh(product_GQPP[..., :-1, :-1])
    told_apart = values > 1e-12 * values[..., -1:]
    values = np.where(told_apart, values, 1.0)
    along = np.einsum("gqpv,gqp->gqv", vectors, product_GQPP[..., :-1, -1]) * told_apart
    squares_GQ = np.maximum(product_GQPP[..., -1, -1] - np.sum(along**2 / values, axis=-1), 1e-300)
    freedom_GQ = len(run_N) - told_apart.sum(axis=-1)
    size_GQ = 2 * np.log(scale_GN).sum(axis=1)[:, None]
    size_GQ = size_GQ + np.sum((count_R - 1) * np.log(1 - share_Q[:, None]) + np.log(runs_QR), axis=1)
    found_GQ = -(size_GQ + np.log(values).sum(axis=-1) + freedom_GQ * np.log(squares_GQ)) / 2
    return np.logaddexp.reduce(found_GQ, axis=1)
