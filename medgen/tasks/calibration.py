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


@dataclass(frozen=True, eq=False)
class Normals:
    """Mean and spread of healthy residual maps, and how high healthy z-maps reach.

    Args:
        mean: (*space) healthy residual at each voxel.
        sd: (*space) its spread, at each voxel the larger of its own and its neighbourhood's.
        maxima: highest z of each healthy map, with mean and spread taken from the others.
    """

    mean: Float[np.ndarray, "*space"]
    sd: Float[np.ndarray, "*space"]
    maxima: Float[np.ndarray, " n"]

    def z_map(self, residual: Float[np.ndarray, "*space"]) -> Float[np.ndarray, "*space"]:
        """How many healthy spreads a residual lies above the healthy mean."""
        return (residual - self.mean) / self.sd


def normals(residuals: Float[np.ndarray, "n *space"]) -> Normals:
    """Learn what healthy residual maps look like; each map's own maximum leaves that map out."""
    n = len(residuals)
    total, squares = residuals.sum(0, dtype=np.float64), np.square(residuals, dtype=np.float64).sum(0)

    def spread(s: np.ndarray, q: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        mean = s / count
        variance = np.maximum(q / count - mean**2, 0) * count / max(1, count - 1)
        return mean, _shrunk(np.sqrt(variance))

    maxima = []
    for one in residuals:
        mean, sd = spread(total - one, squares - np.square(one, dtype=np.float64), n - 1) if n > 2 else (total / n, 1.0)
        maxima.append(float(((one - mean) / sd).max()))
    mean, sd = spread(total, squares, n)
    return Normals(mean.astype(np.float32), sd.astype(np.float32), np.asarray(maxima))


def _shrunk(sd: np.ndarray) -> np.ndarray:
    """A voxel's spread from few scans is noisy: at least its neighbourhood's, and a tenth of the typical one."""
    from scipy.ndimage import gaussian_filter

    near = gaussian_filter(sd, 1.5, mode="nearest")
    floor = 0.1 * float(np.sqrt(np.mean(sd**2))) + 1e-6
    return np.maximum(np.maximum(0.5 * (sd + near), near), floor)


__all__ = ["Normals", "folded", "mask_threshold", "normals", "normals_needed", "p_value"]
