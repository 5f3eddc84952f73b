"""How well a map shows where a finding is: one small table of counts, from which every number comes.

Counting at some thousand levels keeps fifty volumes of a million voxels in a few megabytes, and lets patients be
drawn again without touching a voxel.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from jaxtyping import Bool, Float, Int

from medgen.metrics.detection import at_least, stepwise

# Levels at most, from ill and from healthy voxels: a step of recall, and of the false-positive rate up to its limit.
_LEVELS = (1024, 512)
_LIMIT = 0.3


@dataclass(frozen=True, eq=False)
class VoxelCounts:
    """How many voxels of each scan reach each level.

    Exact where there are no more than some thousand different values, else every level is one of the values.

    Args:
        levels: falling.
        ill: voxels of findings that reach them.
        healthy: other voxels that do.
        overlap: sum over the scan's findings of the share of each that does.
        totals: per scan: voxels of findings, other voxels that were scored, findings.
    """

    levels: Float[np.ndarray, " k"]
    ill: Float[np.ndarray, "n k"]
    healthy: Float[np.ndarray, "n k"]
    overlap: Float[np.ndarray, "n k"]
    totals: Float[np.ndarray, "n 3"]

    def together(self, scans: Int[np.ndarray, " m"]) -> "VoxelCounts":
        """These scans, some of them several times, as one row."""
        times = np.bincount(scans, minlength=len(self.totals)).astype(np.float64)
        summed = {name: (times @ getattr(self, name))[None] for name in ("ill", "healthy", "overlap", "totals")}
        return replace(self, **summed)

    def average_precision(self) -> float:
        """Area under the precision-recall curve of all voxels together, in steps; NaN without findings."""
        found, wrong = self.ill.sum(0), self.healthy.sum(0)
        return stepwise(found, found + wrong) if found[-1] else float("nan")

    def dices(self) -> Float[np.ndarray, " k"]:
        """Dice coefficient of all voxels together at each level."""
        found, marked = self.ill.sum(0), self.ill.sum(0) + self.healthy.sum(0)
        total = self.totals[:, 0].sum()
        return 2 * found / np.maximum(marked + total, 1) if total else np.full(len(self.levels), np.nan)

    def best_dice(self) -> float:
        """The highest Dice coefficient of any level: what a threshold chosen on the answers could reach."""
        return float(self.dices().max())

    def dice_at(self, level: float) -> float:
        """The Dice coefficient at one of the levels: those given as `also` are."""
        return float(self.dices()[np.flatnonzero(self.levels == level)[0]])

    def aupro(self, limit: float = _LIMIT) -> float:
        """Area under the per-region overlap over false-positive rates of 0 to `limit`, divided by `limit`.

        The overlap at a level is the mean over findings (connected voxels) of the share of each that is marked, so
        that a small one counts as much as a large one (Bergmann et al. 2021, "The MVTec anomaly detection dataset",
        section 4.2).
        """
        from scipy.integrate import trapezoid

        regions, healthy = self.totals[:, 2].sum(), self.totals[:, 1].sum()
        if not regions or not healthy:
            return float("nan")
        rate = np.concatenate([[0], self.healthy.sum(0) / healthy])
        share = np.concatenate([[0], self.overlap.sum(0) / regions])
        below = rate < limit
        end = np.interp(limit, rate, share)
        return float(trapezoid(np.append(share[below], end), np.append(rate[below], limit)) / limit)


def voxel_counts(
    maps: Sequence[Float[np.ndarray, "..."]],
    masks: Sequence[Bool[np.ndarray, "..."]],
    *,
    also: Iterable[float] = (),
) -> VoxelCounts:
    """Count voxels of maps against masks of findings.

    A voxel without a score (NaN) is a finding missed, and where nothing is ill, it does not count at all.

    Args:
        maps: of each scan (*space), high where it is unusual.
        masks: findings of each scan (*space).
        also: further levels.
    """
    levels = _levels(maps, masks, np.asarray([float(level) for level in also], dtype=np.float64))
    rows = [_row(found, mask, levels) for found, mask in zip(maps, masks, strict=True)]
    ill, healthy, overlap, totals = (np.stack(column) for column in zip(*rows, strict=True))
    return VoxelCounts(levels, ill, healthy, overlap, totals)


def _levels(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], also: np.ndarray) -> np.ndarray:
    """Values of ill voxels by rank; of healthy ones those highest, by rank, up to the limit of rates."""
    ill = [found[mask] for found, mask in zip(maps, masks, strict=True)]
    at_ill = _ranked(np.concatenate([found[~np.isnan(found)] for found in ill]), _LEVELS[0])
    total = sum(int((~np.isnan(found) & ~mask).sum()) for found, mask in zip(maps, masks, strict=True))
    # Only the highest healthy voxels have a say; each map gives a sample of its own, by rank.
    step = max(1, total // (16 * _LEVELS[1]))
    sampled = [np.sort(found[~np.isnan(found) & ~mask])[::-1][::step] for found, mask in zip(maps, masks, strict=True)]
    pool = np.sort(np.concatenate(sampled))[::-1]
    highest = pool[: int(np.ceil(1.1 * _LIMIT * len(pool))) + 1]
    at_healthy = _ranked(highest, _LEVELS[1])
    return np.unique(np.concatenate([at_ill, at_healthy, also, [-np.inf]]))[::-1]


def _ranked(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the different values, evenly by rank, both ends among them."""
    ordered = np.unique(values) if len(values) <= most else np.sort(values)
    if len(ordered) > most:
        ordered = ordered[np.linspace(0, len(ordered) - 1, most).round().astype(int)]
    return ordered.astype(np.float64)


def _row(found: np.ndarray, mask: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, ...]:
    """One scan's counts at each level."""
    from scipy.ndimage import label

    seen = ~np.isnan(found)
    values = np.where(seen, found, -np.inf)
    healthy = at_least(values[seen & ~mask], levels)
    overlap, regions = np.zeros(len(levels)), 0
    if mask.any():
        named, regions = cast("tuple[np.ndarray, int]", label(mask, np.ones((3,) * mask.ndim)))
        inside, names = values[mask], named[mask]
        for one in range(1, regions + 1):
            mine = inside[names == one]
            overlap += at_least(mine, levels) / len(mine)
    totals = np.asarray([mask.sum(), (seen & ~mask).sum(), regions], dtype=np.float64)
    return at_least(values[mask], levels), healthy, overlap, totals


__all__ = ["VoxelCounts", "voxel_counts"]
