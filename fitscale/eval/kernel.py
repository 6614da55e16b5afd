"""Kernel distance (KID, Binkowski et al. 2018, arXiv 1801.01401): the squared maximum mean discrepancy of features.

Its kernel is (xy / F + 1)^3, its estimate unbiased: its expectation depends on no number of images. It may be negative.
"""

import numpy as np

from fitscale.eval.blocks import in_threads

SUBSET = 1000  # images at most, as is usual
SUBSETS = 10  # at least, for a standard error
SEED = 0  # of what is in which subset


def kernel_distance(samples_NF: np.ndarray, reference_MF: np.ndarray) -> tuple[float, float] | None:
    """KID and its standard error; None below 2 images a subset.

    The mean over subsets of equal size that share no image: at most 1,000 images each, at least 10 subsets. Being
    independent, their spread gives the standard error. Usual tools draw 100 subsets, which overlap, and report the
    spread itself.
    """
    fewer = min(len(samples_NF), len(reference_MF))
    size = min(SUBSET, fewer // SUBSETS)
    if size < 2:
        return None
    count = fewer // size
    rng = np.random.default_rng(SEED)
    samples_BS, reference_BS = (
        rng.permutation(len(features))[: count * size].reshape(count, size) for features in (samples_NF, reference_MF)
    )

    def of_subset(number: int) -> float:
        chosen = samples_NF[np.sort(samples_BS[number])], reference_MF[np.sort(reference_BS[number])]
        return squared_discrepancy(*(features.astype(np.float64) for features in chosen))

    values = np.array(list(in_threads(of_subset, range(count))))
    return float(values.mean()), float(values.std(ddof=1) / count**0.5)


def squared_discrepancy(first_SF: np.ndarray, second_SF: np.ndarray) -> float:
    """Unbiased estimate from S >= 2 images of either set: no image is paired with itself."""
    size = len(first_SF)
    within = sum(kernel_SS.sum() - np.trace(kernel_SS) for kernel_SS in (_kernel(x, x) for x in (first_SF, second_SF)))
    return float(within / (size * (size - 1)) - 2 * _kernel(first_SF, second_SF).sum() / size**2)


def _kernel(first_SF: np.ndarray, second_SF: np.ndarray) -> np.ndarray:
    product_SS = first_SF @ second_SF.T / first_SF.shape[1] + 1
    return product_SS * product_SS * product_SS
