"""Kernel distance (KID, Binkowski et al. 2018, arXiv 1801.01401): the squared maximum mean discrepancy of features.

Its kernel is (xy / F + 1)^3, its estimate unbiased: its expectation depends on no number of images. It may be negative.
"""

import numpy as np

from fitscale.eval.blocks import in_threads

SUBSET = 1000  # images of either set at most, as is usual
SUBSETS = 10  # at least, for a standard error
SEED = 0  # of what is in which subset


def kernel_distance(samples_NF: np.ndarray, reference_MF: np.ndarray) -> tuple[float, float] | None:
    """KID and its standard error; None below 20 images on either side.

    The mean over subsets that share no image: at least 10, of at most 1,000 images of either set, which use all samples
    but for a remainder. Being independent, their spread gives the standard error. Usual tools draw 100 subsets, which
    overlap, and report the spread itself.
    """
    count = max(SUBSETS, -(-len(samples_NF) // SUBSET))
    sizes = [min(SUBSET, len(features) // count) for features in (samples_NF, reference_MF)]
    if min(sizes) < 2:
        return None
    rng = np.random.default_rng(SEED)
    chosen = [
        (features, rng.permutation(len(features))[: count * size].reshape(count, size))
        for features, size in zip((samples_NF, reference_MF), sizes, strict=True)
    ]

    def of_subset(number: int) -> float:
        return squared_discrepancy(*(features[np.sort(rows[number])].astype(np.float64) for features, rows in chosen))

    values = np.array(list(in_threads(of_subset, range(count))))
    return float(values.mean()), float(values.std(ddof=1) / count**0.5)


def squared_discrepancy(first_NF: np.ndarray, second_MF: np.ndarray) -> float:
    """Unbiased estimate from 2 or more images of either set: no image is paired with itself."""
    return float(_within(first_NF) + _within(second_MF) - 2 * _kernel(first_NF, second_MF).mean())


def _within(features_NF: np.ndarray) -> float:
    kernel_NN, number = _kernel(features_NF, features_NF), len(features_NF)
    return (kernel_NN.sum() - np.trace(kernel_NN)) / (number * (number - 1))


def _kernel(first_NF: np.ndarray, second_MF: np.ndarray) -> np.ndarray:
    root_NM = first_NF @ second_MF.T / first_NF.shape[1] + 1
    return root_NM * root_NM * root_NM
