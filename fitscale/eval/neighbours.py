"""Precision, recall, density and coverage: what lies within the k-th neighbour's distance of what.

Around every image of a set lies a ball whose radius is the distance to its k-th nearest neighbour in that set, itself
not counted. The balls together are the set's estimated manifold.

    precision   share of the samples in a ball of the reference (Kynkaanniemi et al. 2019, arXiv 1904.06991), k = 3
    recall      share of the reference in a ball of the samples, k = 3
    density     number of the reference's balls around a sample, over k (Naeem et al. 2020, arXiv 2002.09797), k = 5
    coverage    share of the reference whose ball holds a sample, k = 5

The balls are closed, as in ADM's evaluator: a sample that copies an image is within its ball even where that image is
in the reference more than k times, whose radius is then 0. N samples, M reference images, F features.
"""

from dataclasses import dataclass

import numpy as np

from fitscale.eval.blocks import block, in_threads, starts

MANIFOLD = 3  # neighbours for precision and recall, as in ADM's evaluator
COVERAGE = 5  # for density and coverage: their paper's choice, at which two equal distributions have a coverage of 0.97
_COLUMNS = 2048  # of a tile of distances


@dataclass(frozen=True)
class Inside:
    """For each sample or reference image; None where a set has too few images for its balls."""

    precision_N: np.ndarray | None = None  # bool
    recall_M: np.ndarray | None = None  # bool
    density_N: np.ndarray | None = None  # balls over k, float64
    coverage_M: np.ndarray | None = None  # bool


def inside(samples_NF: np.ndarray, reference_MF: np.ndarray) -> Inside:
    """Which images lie within which. Work grows as N (N + M) F; memory does not grow with N M."""
    (real_M, covering_M), (fake_N,) = _radii(reference_MF, MANIFOLD, COVERAGE), _radii(samples_NF, MANIFOLD)

    def compare(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        rows_BF = block(samples_NF, start)
        precision_B, balls_B = np.zeros(len(rows_BF), dtype=bool), np.zeros(len(rows_BF))
        recall_M, coverage_M = (np.zeros(len(reference_MF), dtype=bool) for _ in range(2))
        for first in starts(reference_MF, _COLUMNS):
            columns = slice(first, first + _COLUMNS)
            distance_BC = _squared_distances(rows_BF, block(reference_MF, first, _COLUMNS))
            precision_B |= (distance_BC <= real_M[columns]).any(1)
            recall_M[columns] = (distance_BC <= fake_N[start : start + len(rows_BF), None]).any(0)
            covering_BC = distance_BC <= covering_M[columns]
            balls_B += covering_BC.sum(1)
            coverage_M[columns] = covering_BC.any(0)
        return precision_B, balls_B, recall_M, coverage_M

    precision, balls = [], []
    recall_M, coverage_M = (np.zeros(len(reference_MF), dtype=bool) for _ in range(2))
    for precision_B, balls_B, recalled_M, covered_M in in_threads(compare, starts(samples_NF)):
        precision.append(precision_B)
        balls.append(balls_B)
        recall_M |= recalled_M
        coverage_M |= covered_M
    covers = len(reference_MF) > COVERAGE
    return Inside(
        precision_N=np.concatenate(precision) if len(reference_MF) > MANIFOLD else None,
        recall_M=recall_M if len(samples_NF) > MANIFOLD else None,
        density_N=np.concatenate(balls) / COVERAGE if covers else None,
        coverage_M=coverage_M if covers else None,
    )


def _radii(features_NF: np.ndarray, *neighbours: int) -> list[np.ndarray]:
    """Squared distance of each image to its k-th nearest other, for each k; infinite where there are too few."""
    kept = max(neighbours) + 1  # and itself

    def nearest(start: int) -> np.ndarray:
        rows_BF = block(features_NF, start)
        nearest_BK = np.full((len(rows_BF), kept), np.inf)
        for first in starts(features_NF, _COLUMNS):
            distance_BC = _squared_distances(rows_BF, block(features_NF, first, _COLUMNS))
            distance_BC.partition(min(kept, distance_BC.shape[1]) - 1, axis=1)
            nearest_BK = np.sort(np.hstack([nearest_BK, distance_BC[:, :kept]]), axis=1)[:, :kept]
        return nearest_BK

    nearest_NK = np.concatenate(list(in_threads(nearest, starts(features_NF))))
    return [nearest_NK[:, k] for k in neighbours]


def _squared_distances(rows_BF: np.ndarray, columns_CF: np.ndarray) -> np.ndarray:
    """(B, C) by |x|^2 + |y|^2 - 2 xy. What is within the rounding of that is 0, so that equal images are equal."""
    norm_BC = np.einsum("bf,bf->b", rows_BF, rows_BF)[:, None] + np.einsum("cf,cf->c", columns_CF, columns_CF)
    distance_BC = norm_BC - 2 * (rows_BF @ columns_CF.T)
    distance_BC[distance_BC <= norm_BC * (rows_BF.shape[1] * np.finfo(np.float64).eps)] = 0
    return distance_BC
