"""Whether one way of training beats another on the same patients: gains with intervals, and a word for them.

Both ways see the same draws of test patients and of training sets, so what is hard in a draw is hard for both (Efron
and Tibshirani 1993, chapter 8; Konietschke and Pauly 2014, "Bootstrapping and permuting paired t-test type
statistics"). Numbers of all draws are found together: an AUROC takes one sorting of the scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from medgen.metrics.intervals import Interval, patients_drawn
from medgen.seeds import derived_seed

Verdict = Literal["helps", "no benefit", "harms", "cannot tell"]


@dataclass(frozen=True, eq=False)
class Again:
    """Test patients and training sets, drawn again with replacement; the first row is all of them, each once.

    Args:
        scans: how often each test scan is in each resample.
        sets: how often each training set is.
    """

    scans: Int[np.ndarray, "resamples m"]
    sets: Int[np.ndarray, "resamples d"]


def drawn_again(
    patients: Sequence[str], strata: Sequence[str] | None, sets: int, *, resamples: int = 1000, seed: int = 0
) -> Again:
    """Draws of test patients and of training sets.

    Args:
        patients: whose each test scan is.
        strata: of each test scan, such as its class; as many patients of each are drawn as there are.
        sets: how many training sets there were.
        resamples: how many draws.
        seed: of the draws.
    """
    rng = np.random.default_rng(derived_seed(seed, 21))
    drawn = patients_drawn(patients, rng, strata=strata, draws=resamples)
    scans = [np.ones(len(patients), dtype=np.int64)]
    scans += [np.bincount(rows, minlength=len(patients)) for rows in drawn]
    chosen = rng.integers(sets, size=(len(drawn), sets))
    of_sets = [np.ones(sets, dtype=np.int64)] + [np.bincount(row, minlength=sets) for row in chosen]
    return Again(np.stack(scans), np.stack(of_sets))


def class_aurocs(
    scores: Float[np.ndarray, "m k"],
    y: Int[np.ndarray, " m"],
    classes: Int[np.ndarray, " k"],
    counts: Int[np.ndarray, "resamples m"],
) -> Float[np.ndarray, " resamples"]:
    """`medgen.metrics.utility.class_auroc` of every resample; NaN where one lacks a class.

    >>> every = np.ones((1, 3), dtype=np.int64)
    >>> class_aurocs(np.array([[1.0, 0], [0, 1], [0, 2]]), np.array([0, 1, 1]), np.array([0, 1]), every).tolist()
    [1.0]
    """
    if len(classes) == 2:
        return _aurocs(scores[:, 1] - scores[:, 0], y == classes[1], counts)
    return np.mean([_aurocs(scores[:, k], y == c, counts) for k, c in enumerate(classes)], axis=0)


def _aurocs(values: np.ndarray, ill: np.ndarray, counts: np.ndarray) -> Float[np.ndarray, " resamples"]:
    order = np.argsort(values, kind="stable")
    ranked, counted = values[order], counts[:, order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(ranked) > 0]))
    of_ill = np.add.reduceat(counted * ill[order], starts, axis=1)
    of_healthy = np.add.reduceat(counted * ~ill[order], starts, axis=1)
    below = np.cumsum(of_healthy, axis=1) - of_healthy
    pairs = of_ill.sum(1) * of_healthy.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (of_ill * (below + of_healthy / 2)).sum(1) / pairs, np.nan)


def means(values: Float[np.ndarray, " m"], counts: Int[np.ndarray, "resamples m"]) -> Float[np.ndarray, " resamples"]:
    """Mean over scans of every resample, such as of Dice; scans without a number have no say."""
    known = np.isfinite(values)
    total = counts[:, known].sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, counts[:, known] @ values[known] / total, np.nan)


def over_sets(found: Float[np.ndarray, "d resamples"], again: Again) -> Float[np.ndarray, " resamples"]:
    """Mean over training sets, drawn again as `again` says."""
    return (found.T * again.sets).sum(1) / again.sets.sum(1)


def interval(found: Float[np.ndarray, " resamples"], confidence: float = 0.95) -> Interval:
    """Percentile interval of what was found in all resamples but the first, which is no draw; NaN without any."""
    known = found[1:][np.isfinite(found[1:])]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def verdict(gain: Interval) -> Verdict:
    """What an interval of a gain says; 'no benefit' where it holds 0, 'cannot tell' where there is none.

    >>> verdict(Interval(0.01, 0.05)), verdict(Interval(-0.01, 0.05)), verdict(Interval(-0.05, -0.01))
    ('helps', 'no benefit', 'harms')
    """
    if gain.low != gain.low:
        return "cannot tell"
    return "helps" if gain.low > 0 else "harms" if gain.high < 0 else "no benefit"


__all__ = ["Again", "Verdict", "class_aurocs", "drawn_again", "interval", "means", "over_sets", "verdict"]
