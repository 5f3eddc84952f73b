"""Numbers that mean something, from held-out healthy scans alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from medgen.errors import BundleError, DataError
from medgen.scores import filters
from medgen.tasks.norms import Norms, norms

# -- one number a scan -----------------------------------------------------------------------------------


def folded(
    scores: Float[np.ndarray, " n"], new: float, *, two_sided: bool = True
) -> tuple[Float[np.ndarray, " n"], float]:
    """How far the healthy scores and `new` lie from the middle of them all, in their spreads.

    Two-sided, the distance counts: unusually low is as suspicious as unusually high. One-sided, it keeps its sign.
    Because centre (median) and spread (1.4826 times the median absolute deviation) treat `new` like any other score,
    what comes out is as exchangeable as what went in.
    """
    together = np.append(scores, new)
    away = together - np.median(together)
    spread, deviation = 1.4826 * float(np.median(np.abs(away))), float(away.std())
    # Of scores that are mostly equal the median deviation says nothing.
    spread = spread if spread > 1e-9 * deviation else deviation or 1.0
    distance = (np.abs(away) if two_sided else away) / spread
    return distance[:-1], float(distance[-1])


def p_value(scores: Float[np.ndarray, " n"], new: float, *, two_sided: bool = True) -> float:
    """Conformal p-value of a new score among n healthy ones.

        p = (1 + #{healthy >= new}) / (n + 1),  both folded where the score is two-sided

    For a scan like the healthy ones P(p <= alpha) <= alpha, whatever the distribution (Vovk et al. 2005, proposition
    2.4; Bates et al. 2023, equation 1). It is never 0, and ties count against suspicion.

    >>> p_value(np.arange(19.0), 100.0)
    0.05
    >>> p_value(np.arange(19.0), -100.0, two_sided=False)
    1.0
    """
    healthy, mine = folded(scores, new, two_sided=two_sided)
    return float((1 + np.count_nonzero(healthy >= mine - 1e-9)) / (len(scores) + 1))


@dataclass(frozen=True)
class Place:
    """Where a score lies among healthy ones.

    Args:
        unusual: its distance from their middle, in their spreads (see `folded`).
        p: its conformal p-value.
        among: how many healthy scores it was compared with.
    """

    unusual: float
    p: float
    among: int


def placed(
    scores: Float[np.ndarray, " n"],
    new: float,
    *,
    two_sided: bool = True,
    norms: Norms | None = None,
    cells: Mapping[str, str] = MappingProxyType({}),
) -> Place | None:
    """A new score among healthy ones, of scans of the person's age and sex where these are known.

    Args:
        scores: of the healthy scans.
        new: of the scan in question.
        two_sided: low scores are as unusual as high ones.
        norms: what age and sex do to healthy scores; None: they are not asked.
        cells: what is known of the person.

    Returns:
        None with fewer than two healthy scores.
    """
    left = None if norms is None else norms.remainder(new, cells)
    if norms is not None and left is not None:
        scores, new = norms.residuals, left
    if len(scores) < 2:
        return None
    p, unusual = p_value(scores, new, two_sided=two_sided), folded(scores, new, two_sided=two_sided)[1]
    return Place(unusual, p, len(scores))


def normals_needed(rate: float) -> int:
    """How many healthy scans a false-alarm rate needs: p cannot be below 1 / (n + 1).

    >>> normals_needed(0.05)
    19
    """
    return int(np.ceil(1 / rate - 1 - 1e-9))


# -- maps ------------------------------------------------------------------------------------------------

# Clusters form above the z that this share of the healthy maps' voxels exceeds (Eklund et al. 2016 for the choice).
_FORMING = 0.001
# What is known of a voxel's variance before looking at it is worth so many scans, and comes from so far around it.
_PRIOR_SCANS, _AROUND = 20, 2.0
_FEWEST = 3


def mask_threshold(maxima: Float[np.ndarray, " n"], rate: float) -> float | None:
    """The level that at most a share `rate` of healthy maps reach anywhere; None with too few maps.

    The ceil((n + 1)(1 - rate))-th smallest of the healthy maps' maxima: marking what lies above it marks
    anything at all in a new healthy scan with probability at most `rate` (the maximum statistic: Nichols & Holmes
    2002).
    """
    rank = int(np.ceil((len(maxima) + 1) * (1 - rate) - 1e-9))
    return float(np.sort(maxima)[rank - 1]) if rank <= len(maxima) else None


@dataclass(frozen=True, eq=False)
class Normals:
    """Mean and spread of healthy residual maps, and how high and how wide healthy z-maps reach.

    Args:
        mean: (*space) healthy residual at each voxel, the largest of its neighbourhood's; NaN where too few
            healthy scans have the voxel.
        sd: (*space) its spread, likewise.
        maxima: highest z of each healthy map, with mean and spread taken from the others.
        tails: mean of the highest half per cent of each, likewise.
        largest: voxels of each one's largest cluster above `forming`, likewise.
        forming: the z above which voxels form clusters.
        two_sided: residuals below the healthy mean are as unusual as those above; z is its own magnitude.
    """

    mean: Float[np.ndarray, "*space"]
    sd: Float[np.ndarray, "*space"]
    maxima: Float[np.ndarray, " n"]
    tails: Float[np.ndarray, " n"]
    largest: Float[np.ndarray, " m"] = field(default_factory=lambda: np.empty(0))
    forming: float = float("inf")
    two_sided: bool = False

    def z_map(self, residual: Float[np.ndarray, "*space"]) -> Float[np.ndarray, "*space"]:
        """How many healthy spreads a residual lies above the healthy mean (or, two-sided, away from it)."""
        return _z(residual, self.mean, self.sd, self.two_sided)


def _z(residual: np.ndarray, mean: np.ndarray, sd: np.ndarray, two_sided: bool) -> np.ndarray:
    z = (residual - mean) / sd
    return np.abs(z) if two_sided else z


def tail_mean(z: Float[np.ndarray, "*space"]) -> float:
    """Mean of the highest half per cent of a map, NaN left out; NaN where nothing is known."""
    return float(filters.tail_mean(torch.tensor(z)[None], torch.tensor(np.isfinite(z))[None])[0])


def clusters(z: Float[np.ndarray, "*space"], level: float) -> tuple[Int[np.ndarray, "*space"], Int[np.ndarray, " k"]]:
    """Voxels above a level that touch by face, edge or corner: labels 1 to k, 0 elsewhere; and how many each has."""
    from scipy.ndimage import label

    found: Any = label(np.nan_to_num(z, nan=-np.inf) > level, structure=np.ones((3,) * z.ndim))
    labels, count = found
    return labels, np.bincount(labels.ravel(), minlength=count + 1)[1:]


def normals(residuals: Float[np.ndarray, "n *space"], *, two_sided: bool = False, by_place: bool = True) -> Normals:
    """Learn what healthy residual maps look like; each map is judged by the others alone.

    A voxel counts where at least three maps have it, so that each of them is judged by two others.

    Args:
        residuals: three maps or more, NaN where a scan has no voxel.
        two_sided: count residuals below the healthy mean as unusual too.
        by_place: whether each voxel has a healthy mean and spread of its own; else all have one together, for maps
            that are relative to their place already and would only gather noise from few scans.

    Raises:
        DataError: no voxel that three maps have.
    """
    known = np.isfinite(residuals)
    count, filled = known.sum(0), residuals if known.all() else np.where(known, residuals, 0)
    if not (count >= _FEWEST).any():
        raise DataError(
            f"A map's healthy spread needs {_FEWEST} maps of the same place; found {len(residuals)} in all."
        )
    total, squares = filled.sum(0, dtype=np.float64), np.square(filled, dtype=np.float64).sum(0)
    judged = np.empty(residuals.shape, np.float32)
    for n, (one, seen) in enumerate(zip(filled, known, strict=True)):
        others = (total - one, squares - np.square(one, dtype=np.float64), count - seen)
        judged[n] = np.where(
            seen & (count >= _FEWEST), _z(one, *_mean_and_sd(*others, two_sided, by_place), two_sided), np.nan
        )
    forming = float(np.quantile(judged[np.isfinite(judged)], 1 - _FORMING, method="higher"))
    somewhere = [z for z in judged if np.isfinite(z).any()]
    mean, sd = (
        np.where(count >= _FEWEST, one, np.nan) for one in _mean_and_sd(total, squares, count, two_sided, by_place)
    )
    return Normals(
        mean.astype(np.float32),
        sd.astype(np.float32),
        maxima=np.asarray([float(np.nanmax(z)) for z in somewhere]),
        tails=np.asarray([tail_mean(z) for z in somewhere]),
        largest=np.asarray([float(clusters(z, forming)[1].max(initial=0)) for z in somewhere]),
        forming=forming,
        two_sided=two_sided,
    )


def _mean_and_sd(
    total: np.ndarray, squares: np.ndarray, count: np.ndarray, two_sided: bool, by_place: bool
) -> tuple[np.ndarray, np.ndarray]:
    """From sums, mean and spread: NaN where fewer than two scans have the voxel.

    The variance of few scans is itself noisy, so it is drawn towards what is usual around the voxel, as if that had
    been seen in n0 scans (Smyth 2004, equation 3, with the neighbourhood as prior), and is never tiny:

        sd^2 = (n0 * mean variance around + (n - 1) * own variance) / (n0 + n - 1)

    Anatomy is not aligned to the voxel: a healthy edge may lie one voxel aside, so mean and spread are the largest of
    the direct neighbours'. A larger mean would make anything below it unusual, so two-sided maps keep their own.
    """
    from scipy.ndimage import gaussian_filter, maximum_filter

    known, some = count >= 2, np.maximum(count, 2)
    if not by_place:
        mean = total.sum() / count.sum()
        sd = np.sqrt(max(squares.sum() / count.sum() - mean**2, 1e-12))
        return np.where(known, mean, np.nan), np.where(known, sd, np.nan)
    mean = total / some
    variance = np.where(known, np.maximum(squares / some - mean**2, 0) * some / (some - 1), 0)
    around = gaussian_filter(variance, _AROUND, mode="nearest")
    if not known.all():
        around /= np.maximum(gaussian_filter(known.astype(np.float64), _AROUND, mode="nearest"), 1e-9)
    shrunk = (_PRIOR_SCANS * around + (some - 1) * variance) / (_PRIOR_SCANS + some - 1)
    typical = float(np.sqrt(variance.sum() / max(1, known.sum())))
    sd = np.maximum(np.sqrt(np.where(known, shrunk, 0)), 0.1 * typical + 1e-6)
    sd = maximum_filter(sd, 3, mode="nearest")
    if not two_sided:
        mean = maximum_filter(np.where(known, mean, -np.inf), 3, mode="nearest")
    return np.where(known, mean, np.nan), np.where(known, sd, np.nan)


# -- what a bundle keeps ---------------------------------------------------------------------------------


def learned_from(
    scores: Float[np.ndarray, " n"],
    maps: Float[np.ndarray, "m *space"] | None = None,
    *,
    two_sided: bool = False,
    by_place: bool = True,
    people: Sequence[Mapping[str, str]] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What held-out healthy scans say, as plain numbers and tensors for a bundle; `from_bundle` reads it.

    Args:
        scores: of the healthy scans; empty where the tail of the z-map is the score.
        maps: their residual maps, or those of the first m; None where there are none.
        two_sided: whether low residuals are as unusual as high ones (of the score that makes the maps).
        by_place: whether healthy maps differ from place to place (see `normals`).
        people: what else is known of each scan, such as age and sex: `Norms.of` reads what they do to the score.

    Raises:
        DataError: a score is not finite.
    """
    if bad := int(np.count_nonzero(~np.isfinite(scores))):
        raise DataError(
            f"{bad} of the {len(scores)} healthy scans held out for calibration have no finite score. Train longer, or "
            "take those scans out."
        )
    numbers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    if maps is not None and np.isfinite(maps).sum(0).max(initial=0) >= _FEWEST:
        learnt = normals(maps, two_sided=two_sided, by_place=by_place)
        scores = scores if len(scores) else learnt.tails
        numbers |= {name: getattr(learnt, name).tolist() for name in ("maxima", "tails", "largest")}
        numbers |= {"forming": learnt.forming, "map_two_sided": two_sided}
        tensors = {"mean": torch.from_numpy(learnt.mean), "sd": torch.from_numpy(learnt.sd)}
    numbers |= {"scores": np.asarray(scores, float).tolist(), "scans": len(scores)}
    known = norms(scores, people[: len(scores)]) if len(people) >= len(scores) else None
    return numbers if known is None else {**numbers, "norms": known.plain()}, tensors


def from_bundle(
    numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Float[np.ndarray, " n"], Normals | None]:
    """The healthy scores and maps that `learned_from` put into a bundle.

    Raises:
        BundleError: something is missing.
    """
    scores = np.asarray(numbers.get("scores", []), float)
    if "mean" not in tensors:
        return scores, None
    if missing := {"scores", "maxima", "tails", "largest", "forming", "map_two_sided"} - set(numbers):
        raise BundleError(f"bundle.json: the calibration lacks {', '.join(sorted(missing))}. Train again.")
    told = {name: np.asarray(numbers[name], float) for name in ("maxima", "tails", "largest")}
    kept = Normals(
        tensors["mean"].numpy(),
        tensors["sd"].numpy(),
        **told,
        forming=float(numbers["forming"]),
        two_sided=bool(numbers["map_two_sided"]),
    )
    return scores, kept


__all__ = [
    "Normals",
    "Place",
    "clusters",
    "folded",
    "from_bundle",
    "learned_from",
    "mask_threshold",
    "normals",
    "normals_needed",
    "p_value",
    "placed",
    "tail_mean",
]
