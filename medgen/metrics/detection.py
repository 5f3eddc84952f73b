"""How well a score tells ill from healthy."""

import numpy as np
from jaxtyping import Float


def auroc(healthy: Float[np.ndarray, " n"], ill: Float[np.ndarray, " m"]) -> float:
    """Area under the ROC curve: the chance that an ill scan scores above a healthy one, ties counting half.

    >>> auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    0.875
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([healthy, ill]))
    n, m = len(healthy), len(ill)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


__all__ = ["auroc"]
