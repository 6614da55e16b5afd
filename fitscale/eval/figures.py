"""From what a feature network said of samples and of a reference, to every figure: pure functions of arrays.

What each figure is, its source and where other tools differ: docs/evaluation.md. Everything is computed in float64, a
block of images at a time; the result does not depend on the number of threads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fitscale.eval.frechet import Statistics, estimate
from fitscale.eval.inception_score import inception_score
from fitscale.eval.kernel import kernel_distance
from fitscale.eval.neighbours import inside


@dataclass(frozen=True)
class Seen:
    """What one network said of N images, float32; memory maps will do."""

    features_NF: np.ndarray
    spatial_NS: np.ndarray | None = None
    scores_NK: np.ndarray | None = None  # class probabilities


@dataclass(frozen=True)
class SeenReference:
    """What is known of the reference through one network; features of some of its images, for figures that need any."""

    statistics: Statistics
    spatial: Statistics | None = None
    features_NF: np.ndarray | None = None


@dataclass(frozen=True)
class Figure:
    """One figure; `standard_error` None where none is known."""

    metric: str
    value: float
    standard_error: float | None = None


def figures(samples: Seen, reference: SeenReference, labels_N: np.ndarray | None = None) -> list[Figure]:
    """All figures that can be had of these images; one for which there are too few, or nothing to compare, is left out.

    Args:
        labels_N: the class each image was drawn for, given only where the network's classes are the model's.

    Raises:
        UserError: samples and reference have features of different length.
    """
    found = list(_distances(samples, reference))
    if reference.features_NF is not None:
        found += _comparisons(samples.features_NF, reference.features_NF)
    if samples.scores_NK is not None:
        found += _classes(samples.scores_NK, labels_N)
    return found


def _distances(samples: Seen, reference: SeenReference) -> Iterator[Figure]:
    if len(samples.features_NF) < 2:
        return
    distance = estimate(samples.features_NF, reference.statistics)
    yield Figure("fd", distance.value, distance.standard_error)
    if distance.limit is not None:
        yield Figure("fd_infinity", distance.limit, distance.standard_error)
    if samples.spatial_NS is not None and reference.spatial is not None:
        spatial = estimate(samples.spatial_NS, reference.spatial)
        yield Figure("sfid", spatial.value, spatial.standard_error)


def _comparisons(samples_NF: np.ndarray, reference_MF: np.ndarray) -> Iterator[Figure]:
    distance = kernel_distance(samples_NF, reference_MF)
    if distance is not None:
        yield Figure("kid", *distance)
    within = inside(samples_NF, reference_MF)
    if within.precision_N is not None:
        yield _mean("precision", within.precision_N)
    if within.recall_M is not None:
        yield Figure("recall", float(within.recall_M.mean()))
    if within.density_N is not None:
        yield _mean("density", within.density_N)
    if within.coverage_M is not None:
        yield Figure("coverage", float(within.coverage_M.mean()))


def _classes(scores_NK: np.ndarray, labels_N: np.ndarray | None) -> Iterator[Figure]:
    yield Figure("inception_score", *inception_score(scores_NK))
    if labels_N is not None:
        yield _mean("recognised", scores_NK.argmax(1) == labels_N)


def _mean(metric: str, values_N: np.ndarray) -> Figure:
    """The mean over samples, whose standard error takes the reference as known."""
    values_N = values_N.astype(np.float64)
    error = float(values_N.std(ddof=1) / len(values_N) ** 0.5) if len(values_N) > 1 else None
    return Figure(metric, float(values_N.mean()), error)
