"""Numbers that mean something, from held-out healthy scans alone."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


def folded(scores: Float[np.ndarray, " n"], new: float) -> tuple[Float[np.ndarray, " n"], float]:
    """Two-sided scores: distance from the middle of the healthy scores and `new` together, in spreads.

    Unusually low is as suspicious as unusually high. Because centre and spread (median and median
    absolute deviation) treat `new` like any other score, the folded scores stay exchangeable.
    """
    together = np.append(scores, new)
    centre = np.median(together)
    spread = np.median(np.abs(together - centre)) * 1.4826
    distance = np.abs(together - centre) / max(float(spread), 1e-12)
    return distance[:-1], float(distance[-1])


def p_value(scores: Float[np.ndarray, " n"], new: float) -> float:
    """Two-sided conformal p-value of a new score among n healthy ones.

    p = (1 + #{folded healthy >= folded new}) / (n + 1): for a scan like the healthy ones,
    P(p <= alpha) <= alpha exactly, whatever the distribution (Vovk et al. 2005, proposition 2.4;
    Bates et al. 2023, equation 1).

    >>> p_value(np.arange(19.0), 100.0)
    0.05
    """
    healthy, mine = folded(scores, new)
    return float((1 + np.count_nonzero(healthy >= mine - 1e-12)) / (len(scores) + 1))


def normals_needed(rate: float) -> int:
    """How many healthy scans a false-alarm rate needs: p cannot be below 1 / (n + 1).

    >>> normals_needed(0.05)
    19
    """
    return int(np.ceil(1 / rate - 1 - 1e-9))


def mask_threshold(maxima: Float[np.ndarray, " n"], rate: float) -> float | None:
    """The level that at most a share `rate` of healthy maps reach anywhere; None with too few maps.

    The ceil((n + 1)(1 - rate))-th smallest of the healthy maps' maxima: marking what lies above it marks
    anything at all in a new healthy scan with probability at most `rate`.
    """
    rank = int(np.ceil((len(maxima) + 1) * (1 - rate) - 1e-9))
    return float(np.sort(maxima)[rank - 1]) if rank <= len(maxima) else None


# The share of a map's voxels, the highest ones, whose mean is its tail: a lesion fills little of a scan.
_TAIL = 0.005


@dataclass(frozen=True, eq=False)
class Normals:
    """Mean and spread of healthy residual maps, and how high healthy z-maps reach.

    Args:
        mean: (*space) healthy residual at each voxel, the largest of its neighbourhood's.
        sd: (*space) its spread, likewise.
        maxima: highest z of each healthy map, with mean and spread taken from the others.
        tails: mean of the highest half per cent of each, likewise.
        two_sided: residuals below the healthy mean are as unusual as those above; z is its own magnitude.
    """

    mean: Float[np.ndarray, "*space"]
    sd: Float[np.ndarray, "*space"]
    maxima: Float[np.ndarray, " n"]
    tails: Float[np.ndarray, " n"]
    two_sided: bool = False

    def z_map(self, residual: Float[np.ndarray, "*space"]) -> Float[np.ndarray, "*space"]:
        """How many healthy spreads a residual lies above the healthy mean (or, two-sided, away from it)."""
        z = (residual - self.mean) / self.sd
        return np.abs(z) if self.two_sided else z


def tail_mean(z: Float[np.ndarray, "*space"]) -> float:
    """Mean of the highest half per cent of a map, NaN left out."""
    known = z[np.isfinite(z)]
    count = max(1, round(_TAIL * known.size))
    return float(np.partition(known, -count)[-count:].mean())


def normals(residuals: Float[np.ndarray, "n *space"], *, two_sided: bool = False) -> Normals:
    """Learn what healthy residual maps look like; each map's own maximum and tail leave that map out.

    Args:
        residuals: maps, NaN where a scan has no voxel.
        two_sided: count residuals below the healthy mean as unusual too.
    """
    known = np.isfinite(residuals)
    count, filled = known.sum(0), residuals if known.all() else np.where(known, residuals, 0)
    total, squares = filled.sum(0, dtype=np.float64), np.square(filled, dtype=np.float64).sum(0)
    maxima, tails = [], []
    for one, seen in zip(filled, known, strict=True):
        others = (total - one, squares - np.square(one, dtype=np.float64), count - seen)
        left_out = Normals(*_mean_and_sd(*others, two_sided), np.empty(0), np.empty(0), two_sided)
        z = left_out.z_map(one)[seen]
        maxima.append(float(z.max()))
        tails.append(tail_mean(z))
    mean, sd = _mean_and_sd(total, squares, count, two_sided)
    return Normals(mean.astype(np.float32), sd.astype(np.float32), np.asarray(maxima), np.asarray(tails), two_sided)


def _mean_and_sd(
    total: np.ndarray, squares: np.ndarray, count: np.ndarray, two_sided: bool
) -> tuple[np.ndarray, np.ndarray]:
    """From sums, the largest mean and spread nearby: anatomy is not aligned to the voxel.

    A healthy edge may lie a voxel or two aside, so what is usual next door is not unusual here; and the
    spread of few scans is noisy, so it is smoothed and never tiny. The largest mean would make anything below
    it unusual, so two-sided maps keep their own. A voxel that fewer than two scans have is like the others.
    """
    from scipy.ndimage import gaussian_filter, maximum_filter

    some = np.maximum(count, 1)
    mean = total / some
    sd = np.sqrt(np.maximum(squares / some - mean**2, 0) * some / np.maximum(1, some - 1))
    known = count >= 2 if (count >= 2).any() else count >= 0
    typical = float(np.sqrt(np.mean(sd[known] ** 2)))
    if not known.all():
        mean, sd = np.where(known, mean, mean[known].mean()), np.where(known, sd, typical)
    near = maximum_filter(gaussian_filter(sd, 1.5, mode="nearest"), 5, mode="nearest")
    return mean if two_sided else maximum_filter(mean, 3, mode="nearest"), np.maximum(near, 0.1 * typical + 1e-6)


__all__ = ["Normals", "folded", "mask_threshold", "normals", "normals_needed", "p_value", "tail_mean"]
