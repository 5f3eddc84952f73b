"""How far a measured number may be from the truth: intervals for shares, and for anything by drawing patients again."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# Draws of patients differ in how many scans they hold.
Indices = Int[np.ndarray, "_"]


class Interval(NamedTuple):
    """Both ends."""

    low: float
    high: float


def binomial_interval(count: int, total: int, confidence: float = 0.95) -> Interval:
    """Exact interval of a share measured on independent scans (Clopper and Pearson 1934).

    >>> [round(end, 3) for end in binomial_interval(0, 10)]
    [0.0, 0.308]
    """
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, total - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, total - count)) if count < total else 1.0
    return Interval(low, high)


def conformal_interval(calibration: int, tested: int, rate: float, confidence: float = 0.95) -> Interval:
    """Where the false-positive rate of split-conformal p-values lies, if healthy and calibration scans are alike.

    A share p <= rate of `tested` scans is BetaBinomial(tested, l, n + 1 - l) / tested with l = floor((n + 1) rate),
    because the n calibration scans are a draw, too (Angelopoulos and Bates 2021, "A gentle introduction to conformal
    prediction", section 3.2, where coverage is one minus this).

    Args:
        calibration: n, how many scans the p-values were calibrated on.
        tested: how many healthy scans were tested.
        rate: the false-alarm rate asked for.
        confidence: chance that the measured rate lies within.

    >>> conformal_interval(10, 50, 0.05)
    Interval(low=0.0, high=0.0)
    """
    from scipy.stats import betabinom

    allowed = int(np.floor((calibration + 1) * rate + 1e-9))
    if not allowed:  # p cannot be as low as that
        return Interval(0.0, 0.0)
    if allowed > calibration:
        return Interval(1.0, 1.0)
    tail = (1 - confidence) / 2
    ends = betabinom.ppf([tail, 1 - tail], tested, allowed, calibration + 1 - allowed) / tested
    return Interval(float(ends[0]), float(ends[1]))


def patients_drawn(
    patients: Sequence[str], rng: np.random.Generator, *, strata: Sequence[str] | None = None, draws: int = 1000
) -> list[Indices]:
    """The scans of as many patients, drawn with replacement; all scans of a patient come together.

    Patients are the independent units, scans of one are not.

    Args:
        patients: whose each scan is.
        rng: what the draws depend on.
        strata: of each scan; as many patients of each kind are drawn as there are, so that no draw lacks ill scans.
        draws: how many.

    Returns:
        Indices of scans, some of them several times, for each draw; none with fewer than two patients.
    """
    scans: dict[str, list[int]] = defaultdict(list)
    for n, patient in enumerate(patients):
        scans[patient].append(n)
    if len(scans) < 2:
        return []
    kinds: dict[tuple[str, ...], list[np.ndarray]] = defaultdict(list)
    for numbers in scans.values():
        kind = tuple(sorted({strata[n] for n in numbers})) if strata else ()
        kinds[kind].append(np.asarray(numbers))
    found = []
    for _ in range(draws):
        drawn = [members[n] for members in kinds.values() for n in rng.integers(len(members), size=len(members))]
        found.append(np.concatenate(drawn))
    return found


def bootstrap_interval(
    statistic: Callable[[Indices], float], draws: Sequence[Indices], confidence: float = 0.95
) -> Interval:
    """Percentile interval of a statistic over draws of patients (Efron and Tibshirani 1993, chapter 13).

    For the difference of two scores on the same scans, let `statistic` be that difference: both see the same draws.

    Args:
        statistic: a number from indices of scans; NaN where there is none.
        draws: made by `patients_drawn`.
        confidence: chance to hold the truth, for many patients.

    Returns:
        Both ends; NaN where no draw gave a number.
    """
    found = np.asarray([statistic(draw) for draw in draws], dtype=np.float64)
    known = found[np.isfinite(found)]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


__all__ = ["Interval", "binomial_interval", "bootstrap_interval", "conformal_interval", "patients_drawn"]
