"""How well a score tells ill scans from healthy ones."""

import numpy as np
from jaxtyping import Float

Scores = Float[np.ndarray, " n"]
IllScores = Float[np.ndarray, " m"]


def auroc(healthy: Scores, ill: IllScores) -> float:
    """Area under the ROC curve: the chance that an ill scan scores above a healthy one, ties counting half.

    >>> auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    0.875
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([healthy, ill]))
    n, m = len(healthy), len(ill)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def auroc_error(healthy: Scores, ill: IllScores) -> float:
    """Standard error of `auroc`, NaN with fewer than two scans of a kind.

    var = var(V10) / m + var(V01) / n, where V10 is the share of healthy scans below each ill one and V01 the share
    of ill scans above each healthy one (DeLong et al. 1988, equations 4 to 6; by ranks: Sun and Xu 2014).
    """
    from scipy.stats import rankdata

    n, m = len(healthy), len(ill)
    if min(n, m) < 2:
        return float("nan")
    ranks = rankdata(np.concatenate([healthy, ill]))
    above_healthy = (ranks[n:] - rankdata(ill)) / n
    below_ill = 1 - (ranks[:n] - rankdata(healthy)) / m
    return float(np.sqrt(above_healthy.var(ddof=1) / m + below_ill.var(ddof=1) / n))


def average_precision(healthy: Scores, ill: IllScores) -> float:
    """Area under the precision-recall curve, in steps: sum of (R_k - R_{k-1}) P_k over thresholds, highest first.

    Chance is the share of ill scans, so it says nothing without that share.

    >>> average_precision(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    0.8333333333333333
    """
    levels = np.unique(ill)[::-1]
    found = at_least(ill, levels)
    return float(stepwise(found, found + at_least(healthy, levels)))


def sensitivity_at(healthy: Scores, ill: IllScores, specificity: float = 0.95) -> float:
    """The largest share of ill scans that a threshold finds, where it passes that share of the healthy scans.

    >>> sensitivity_at(np.arange(20.0), np.array([3.0, 18.5, 30.0]))
    0.6666666666666666
    """
    allowed = int(np.floor(len(healthy) * (1 - specificity) + 1e-9))
    if allowed >= len(healthy):
        return 1.0
    # Scans above the first healthy one that must not be marked.
    limit = np.sort(healthy)[len(healthy) - 1 - allowed]
    return float((ill > limit).mean())


def at_least(values: Float[np.ndarray, " n"], levels: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """How many values reach each level."""
    return (len(values) - np.searchsorted(np.sort(values), levels, side="left")).astype(np.float64)


def stepwise(found: Float[np.ndarray, " k"], marked: Float[np.ndarray, " k"]) -> float:
    """Average precision from counts at falling thresholds: of what was sought, and of all that was marked."""
    precision = found / np.maximum(marked, 1)
    return float((np.diff(found, prepend=0) * precision).sum() / found[-1])


__all__ = ["at_least", "auroc", "auroc_error", "average_precision", "sensitivity_at", "stepwise"]
