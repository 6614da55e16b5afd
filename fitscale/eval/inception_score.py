"""Inception Score (Salimans et al. 2016, arXiv 1606.03498) as ADM's evaluator splits it.

    IS = exp(mean_i sum_k p_ik log(p_ik / p_k)),  p_k = mean_i p_ik

N images, K classes, G groups.
"""

import numpy as np
from scipy.special import xlogy

from fitscale.eval.blocks import block, starts

SPLIT = 5000  # consecutive images
GROUPS = 10  # of a split, for the standard error


def inception_score(scores_NK: np.ndarray, split: int = SPLIT) -> tuple[float, float | None]:
    """The mean over splits of `split` consecutive images, the last of which may have fewer; and its standard error.

    A class of probability 0 adds nothing. The standard error is a delete-a-group jackknife inside every split, None
    below 2 images a group.
    """
    parts = [scores_NK[start : start + split] for start in starts(scores_NK, split)]
    values = [_value(*_sums(part), len(part)) for part in parts]
    if min(len(part) for part in parts) < 2 * GROUPS:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(sum(_variance(part) for part in parts) ** 0.5 / len(parts))


def _variance(scores_NK: np.ndarray) -> float:
    groups = np.array_split(scores_NK, GROUPS)
    sums = [_sums(group) for group in groups]
    entropy, mass_K = sum(each[0] for each in sums), sum(each[1] for each in sums)
    left_out_G = np.array(
        [
            _value(entropy - own, mass_K - own_K, len(scores_NK) - len(group))
            for group, (own, own_K) in zip(groups, sums, strict=True)
        ]
    )
    return float((GROUPS - 1) / GROUPS * ((left_out_G - left_out_G.mean()) ** 2).sum())


def _sums(scores_NK: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum of p log p over images and classes, sum of p over images."""
    entropy, mass_K = 0.0, np.zeros(scores_NK.shape[1])
    for start in starts(scores_NK):
        scores_BK = block(scores_NK, start)
        entropy += float(xlogy(scores_BK, scores_BK).sum())
        mass_K += scores_BK.sum(0)
    return entropy, mass_K


def _value(entropy: float, mass_K: np.ndarray, count: int) -> float:
    mean_K = np.maximum(mass_K / count, 0)  # a difference of sums may be a rounding below 0
    return float(np.exp(entropy / count - xlogy(mean_K, mean_K).sum()))
