"""Frechet distance between two sets of features, each seen as a Gaussian (Heusel et al. 2017, arXiv 1706.08500).

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

With features of Inception it is the FID. Its expectation falls as 1/N towards its limit, so the number of samples is
part of every result. Everything is float64; N images, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import linalg

from fitscale.config.errors import UserError
from fitscale.eval.blocks import block, in_threads, starts

GROUPS = 10  # of consecutive images, left out in turn


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
        """Needs memory for its argument in float64: many images are to come in several calls."""
        features_NF = np.asarray(features_NF, dtype=np.float64)
        mean_F = features_NF.mean(0)
        centred_NF = features_NF - mean_F
        self._update(len(features_NF), mean_F, centred_NF.T @ centred_NF)

    def merge(self, others: "Moments") -> None:
        self._update(others.count, others.mean_F, others.scatter_FF)

    def without(self, part: "Moments") -> "Moments":
        """The moments of the images that are not in `part`, which must not be all of them."""
        rest = Moments()
        rest.merge(self)
        rest._update(-part.count, part.mean_F, -part.scatter_FF)
        return rest

    def _update(self, count: int, mean_F: np.ndarray, scatter_FF: np.ndarray) -> None:
        """Add images, or take them away again where `count` and `scatter_FF` are negative."""
        if not count:
            return
        total, gap_F = self.count + count, mean_F - self.mean_F
        self.scatter_FF = self.scatter_FF + scatter_FF + np.outer(gap_F, gap_F) * (self.count * count / total)
        self.mean_F = self.mean_F + gap_F * (count / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Needs at least two feature vectors.

        Raises:
            UserError: there are fewer.
        """
        if self.count < 2:
            raise UserError(f"a Frechet distance needs 2 or more images on either side, not {self.count}")
        return Statistics(self.mean_F, self.scatter_FF / (self.count - 1))


def group_moments(features_NF: np.ndarray, groups: int) -> list[Moments]:
    """Moments of `groups` runs of consecutive images, as equal in number as can be."""
    return list(in_threads(moments_of, np.array_split(features_NF, groups)))


def moments_of(features_NF: np.ndarray) -> Moments:
    """Those of any number of features, which may be a memory map."""
    moments = Moments()
    for start in starts(features_NF):
        moments.add(block(features_NF, start))
    return moments


def frechet_distance(first: Statistics, second: Statistics, root_FF: np.ndarray | None = None) -> float:
    """Squared Frechet distance, as FID is reported; exact for singular covariances too.

    The trace of (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): no complex roots, and no offset
    added to the diagonal where there are fewer images than features. `root_FF`: of the second covariance, if known.

    Raises:
        UserError: the two have different numbers of features.
    """
    if first.mean_F.shape != second.mean_F.shape:
        raise UserError(
            f"features of {len(first.mean_F)} and of {len(second.mean_F)} numbers cannot be compared: samples and "
            "reference need the same feature network"
        )
    root_FF = _root(second.cov_FF) if root_FF is None else root_FF
    return _distance(first, second, linalg.svdvals(_root(first.cov_FF) @ root_FF).sum())


@dataclass(frozen=True)
class Estimate:
    """A distance; its standard error and `limit`, what it tends to for ever more images, None where unknown."""

    value: float
    standard_error: float | None = None
    limit: float | None = None


def estimate(features_NF: np.ndarray, reference: Statistics) -> Estimate:
    """The distance of at least two images to the reference, with a delete-a-group jackknife over the images.

    Standard error: from the spread of the distances that leave out one of 10 groups of consecutive images each; the
    reference counts as known. None below 2 images a group.

    Limit (FID-infinity, Chong & Forsyth 2020, arXiv 1911.07023): a line in 1/N, read at 0. They draw sets of 15 sizes;
    here it goes through the distance of all N images and the mean of the 10 distances of 9N/10, which are there anyway.
    Points so near leave less of the 1/N^2 term. Its standard error is that of the distance, as for every jackknife
    (Efron & Tibshirani 1993, chapter 11). None where 9N/10 is below twice the number of features: no line there yet.

    Raises:
        UserError: features of another number than the reference's.
    """
    leave_out = len(features_NF) >= 2 * GROUPS
    groups = group_moments(features_NF, GROUPS if leave_out else 1)
    whole = Moments()
    for group in groups:
        whole.merge(group)
    samples = whole.statistics()
    (root_FF,) = in_threads(_root, [reference.cov_FF])

    def without(part: Moments) -> float:
        rest = whole.without(part).statistics()
        return _distance(rest, reference, _overlap(root_FF, rest.cov_FF))

    exact = partial(frechet_distance, samples, reference, root_FF)
    jobs: list[Callable[[], float]] = [exact, *(partial(without, part) for part in [Moments(), *groups] if leave_out)]
    value, *left_out = in_threads(lambda job: job(), jobs)
    if not leave_out:
        return Estimate(value)
    all_of_them, parts = left_out[0], np.array(left_out[1:])
    error = ((GROUPS - 1) / GROUPS * ((parts - parts.mean()) ** 2).sum()) ** 0.5
    many = min(whole.count - group.count for group in groups) >= 2 * len(reference.mean_F)
    limit = value - (GROUPS - 1) * (parts.mean() - all_of_them)
    return Estimate(value, float(error), float(limit) if many else None)


def _distance(first: Statistics, second: Statistics, overlap: float) -> float:
    gap_F = first.mean_F - second.mean_F
    return float(gap_F @ gap_F + np.trace(first.cov_FF) + np.trace(second.cov_FF) - 2 * overlap)


def _root(cov_FF: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semi-definite matrix; eigenvalues that are rounding alone count as 0."""
    values_F, vectors_FF = linalg.eigh(cov_FF)
    return (vectors_FF * np.sqrt(_without_noise(values_F))) @ vectors_FF.T


def _overlap(root_FF: np.ndarray, cov_FF: np.ndarray) -> float:
    """tr((root^2 cov)^(1/2)): a third of the work of singular values, and half their digits, which differences need."""
    return float(np.sqrt(_without_noise(linalg.eigvalsh(root_FF @ cov_FF @ root_FF))).sum())


def _without_noise(values_F: np.ndarray) -> np.ndarray:
    noise = values_F.max() * len(values_F) * np.finfo(np.float64).eps
    return np.where(values_F > noise, values_F, 0)
