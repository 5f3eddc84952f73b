"""What many scans say together: are they like the calibration scans at all, and who among them is flagged?"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from medgen.data.manifest import Row
from medgen.tasks.worklist import Scored

# Fewer scans say too little about where they come from.
_FEWEST = 8
# A group is one of at most so many words of a column; numbers that differ more are split at their median.
_MOST_GROUPS = 8
# A batch is called unlike the calibration scans when its count of low p-values is as far out as this, either side:
# at the rate of the flags as often as a 95 % interval is left, and at one half, the scores' middle, half as often.
_CHANCE = {"rate": 0.025, "middle": 0.0125}
_MIDDLE = 0.5
FALSE_WARNINGS = 2 * sum(_CHANCE.values())


def count_interval(scans: int, normals: int, rate: float, *, chance: float = 0.025) -> tuple[int, int]:
    """How many of some healthy scans have p <= rate, but for `chance` on either side.

    All their p-values share one calibration set, so they are not independent: with k = floor(rate (n + 1)) the count
    follows the beta-binomial distribution with parameters k and n + 1 - k (Angelopoulos & Bates 2023, "Conformal
    prediction: a gentle introduction", section 3.2), which is wider than the binomial one.

    Args:
        scans: how many are scored.
        normals: calibration scans n.
        rate: of the p-values.
        chance: left out at each end.

    >>> count_interval(100, 19, 0.05)
    (0, 19)
    """
    from scipy.stats import betabinom

    k = int(np.floor(rate * (normals + 1) + 1e-9))
    if not 0 < k <= normals:
        return (0, 0) if k <= 0 else (scans, scans)
    counts = betabinom(scans, k, normals + 1 - k)
    low, high = int(counts.ppf(chance)), int(counts.isf(chance))
    return low, high


def unlike(ps: Float[np.ndarray, " m"], normals: int, rate: float) -> list[str]:
    """Sentences that say these scans are not like the calibration scans; none where they may well be.

    Healthy scans from the calibration scans' source are told so in at most `FALSE_WARNINGS` of all batches: each of
    four counts leaves its exact interval that rarely.

    Args:
        ps: of the scans.
        normals: how many calibration scans there were.
        rate: of the flags.
    """
    told = []
    for name, level in (("rate", rate), ("middle", _MIDDLE)):
        if len(ps) < _FEWEST or not 1 <= level * (normals + 1) + 1e-9 < normals + 1:
            continue
        low, high = count_interval(len(ps), normals, level, chance=_CHANCE[name])
        count = int(np.count_nonzero(ps <= level + 1e-12))
        found = f"{count} of {len(ps)} scans have p <= {level:g}; of scans like the {normals} calibration scans"
        if count > high:
            told.append(
                f"{found} at most {high} would. Either many of these scans are ill, or they come from another scanner, "
                "protocol or population than the calibration scans, or the model was trained on them; then their "
                "p-values, flags and masks do not hold. Score healthy scans from the same source to tell which."
            )
        elif count < low:
            told.append(
                f"{found} at least {low} would. These scans are more usual than the calibration scans: the model may "
                "have been trained on them, or they were processed otherwise (smoothed, resampled); then their "
                "p-values are too large, and anomalies may go unseen."
            )
    return told[:1]


# -- who is flagged --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The scans that a column puts together.

    Args:
        column: of the manifest.
        group: the value, or the range of a number.
        scans: how many were scored.
        flagged: how many of them were; None where nothing is.
        share, low, high: the share flagged and its 95 % interval (Clopper & Pearson 1934).
        healthy_most: flags that 97.5 % of such groups of healthy scans do not exceed.
        median_p: of the group.
    """

    column: str
    group: str
    scans: int
    flagged: int | None
    share: float | None
    low: float | None
    high: float | None
    healthy_most: int | None
    median_p: float


def groups(scans: Sequence[Scored], rows: Sequence[Row], normals: int, rate: float) -> tuple[Group, ...]:
    """Scans by class, domain and covariates, where these tell scans apart.

    Args:
        scans: what is said about each.
        rows: of the manifest, in any order.
        normals: how many calibration scans there were.
        rate: of the flags.
    """
    known = {scan.case: scan for scan in scans if scan.p is not None}
    here = [row for row in rows if row.case in known]
    tables = [{"label": row.label, "domain": row.domain, **row.covariates} for row in here]
    made = []
    for column in dict.fromkeys(name for table in tables for name in table):
        named = _named([table.get(column, "") for table in tables])
        for group in sorted(set(named) - {""}) if len(set(named) - {""}) > 1 else ():
            members = [known[row.case] for row, name in zip(here, named, strict=True) if name == group]
            made.append(_group(column, group, members, normals, rate))
    return tuple(made)


def _named(cells: Sequence[str]) -> list[str]:
    """The group of each cell; '' for none."""
    words = {cell for cell in cells if cell}
    if len(words) <= _MOST_GROUPS:
        return list(cells)
    try:
        numbers = np.asarray([float(cell or "nan") for cell in cells])
    except ValueError:
        return [""] * len(cells)
    middle = float(np.nanmedian(numbers))
    return ["" if np.isnan(n) else f"< {middle:g}" if n < middle else f">= {middle:g}" for n in numbers]


def _group(column: str, group: str, members: Sequence[Scored], normals: int, rate: float) -> Group:
    from scipy.stats import binomtest

    median = float(np.median([scan.p for scan in members if scan.p is not None]))
    if any(scan.flagged is None for scan in members):
        return Group(column, group, len(members), None, None, None, None, None, median)
    flagged = sum(bool(scan.flagged) for scan in members)
    interval = binomtest(flagged, len(members)).proportion_ci(0.95, "exact")
    most = count_interval(len(members), normals, rate)[1]
    share = flagged / len(members)
    return Group(column, group, len(members), flagged, share, interval.low, interval.high, most, median)


def write_groups(found: Sequence[Group], path: Path) -> None:
    """A CSV, a row a group."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Group.__dataclass_fields__))
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(one).items()} for one in found)


def _cell(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else value


__all__ = ["FALSE_WARNINGS", "Group", "count_interval", "groups", "unlike", "write_groups"]
