"""Frechet distance between two sets of features, each seen as a Gaussian (Heusel et al. 2017, arXiv 1706.08500).

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

With features of Inception it is the FID. Its expectation falls as 1/N towards its limit, so the number of samples is
part of every result. Everything is float64; N images, F features.
"""

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from fitscale.config.errors import UserError


@dataclass(frozen=True)
class Statistics:
    """Mean `mean_F` and unbiased covariance `cov_FF` of feature vectors."""

    mean_F: np.ndarray
    cov_FF: np.ndarray


class Moments:
    """Mean and covariance of features that arrive in batches (Chan, Golub & LeVeque's update of centred sums)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_F: np.ndarray = np.zeros(1)
        self.scatter_FF: np.ndarray = np.zeros((1, 1))

    def add(self, features_NF: np.ndarray) -> None:
        features_NF = np.asarray(features_NF, dtype=np.float64)
        mean_F, number = features_NF.mean(0), len(features_NF)
        centred_NF = features_NF - mean_F
        scatter_FF = centred_NF.T @ centred_NF
        total, gap_F = self.count + number, mean_F - self.mean_F
        self.scatter_FF = self.scatter_FF + scatter_FF + np.outer(gap_F, gap_F) * (self.count * number / total)
        self.mean_F = self.mean_F + gap_F * (number / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Needs at least two feature vectors.

        Raises:
            UserError: there are fewer.
        """
        if self.count < 2:
            raise UserError(f"a Frechet distance needs 2 or more images on either side, not {self.count}")
        return Statistics(self.mean_F, self.scatter_FF / (self.count - 1))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared Frechet distance, as FID is reported; exact for singular covariances too.

    The trace of (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): no complex roots, and no offset
    added to the diagonal where there are fewer images than features.

    Raises:
        UserError: the two have different numbers of features.
    """
    if first.mean_F.shape != second.mean_F.shape:
        raise UserError(
            f"features of {len(first.mean_F)} and of {len(second.mean_F)} numbers cannot be compared: samples and "
            "reference need the same feature network"
        )
    gap_F = first.mean_F - second.mean_F
    overlap = linalg.svdvals(_root(first.cov_FF) @ _root(second.cov_FF)).sum()
    return float(gap_F @ gap_F + np.trace(first.cov_FF) + np.trace(second.cov_FF) - 2 * overlap)


def _root(cov_FF: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semi-definite matrix; eigenvalues that are rounding alone count as 0."""
    values_F, vectors_FF = linalg.eigh(cov_FF)
    noise = values_F.max() * len(values_F) * np.finfo(np.float64).eps
    return (vectors_FF * np.sqrt(np.where(values_F > noise, values_F, 0))) @ vectors_FF.T
