"""Radiomic features of whole scans: intensities, texture and wavelet bands, computed here and needing no weights.

A medical, weight-free space in which to compare sets of scans (Konz et al. 2026, "Fréchet radiomic distance"). Names
and definitions are those of the Image Biomarker Standardisation Initiative (Zwanenburg et al. 2020), in 16 bins with
fixed edges on [0, 1], so that scans of different sets fall into the same ones.
"""

from itertools import product

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from medgen.errors import DataError
from medgen.metrics.texture import (
    CO_OCCURRENCE,
    RUN_LENGTH,
    co_occurrence_numbers,
    co_occurrences,
    run_length_numbers,
    run_lengths,
)

BINS = 16
FIRST_ORDER = (
    "mean", "variance", "skewness", "kurtosis", "median", "minimum", "percentile_10", "percentile_90", "maximum",
    "interquartile_range", "range", "mean_absolute_deviation", "robust_mean_absolute_deviation",
    "median_absolute_deviation", "energy", "root_mean_square", "variation", "quartile_dispersion",
)  # fmt: skip
# A band's mean and quartiles are about zero: the last two, which divide by them, say nothing there.
_OF_BANDS = FIRST_ORDER[:-2]
# Voxels in memory at a time.
_AT_ONCE = 2**22

Scans = Float[Tensor, "n c *space"] | Float[np.ndarray, "n c *space"]


def radiomics(x: Scans) -> Float[np.ndarray, "n d"]:
    """Radiomic features of each scan, channel after channel.

    Of every channel 18 first-order numbers, 22 of co-occurrence and 16 of run lengths (distance 1, averaged over 4
    or 13 directions), and 16 first-order ones of each detail band of one level of the Haar wavelet (3 or 7): 104
    numbers in two dimensions, 168 in three. `radiomic_names` names them.

    A constant scan has finite features, too: what divides by a spread or a mean that is zero is 0, correlation is 1.

    Args:
        x: scans on [0, 1]; what lies outside falls into the outermost bins.

    Raises:
        DataError: other than two or three axes of space, a scan of one voxel, or values that are not finite.

    >>> radiomics(np.zeros((2, 1, 8, 8))).shape
    (2, 104)
    """
    values = as_array(x)
    if values.ndim not in (4, 5) or values[0, 0].size < 2:
        raise DataError(f"Radiomics needs scans (n, c, *space) with 2 or 3 axes of space; found {values.shape}.")
    if not np.isfinite(values).all():
        raise DataError("Radiomics needs finite values; found NaN or infinity among the scans.")
    size = max(1, _AT_ONCE // values[0].size)
    parts = [values[n : n + size].astype(np.float64) for n in range(0, len(values), size)]
    return np.concatenate([np.concatenate([_of_channel(p[:, c]) for c in range(p.shape[1])], 1) for p in parts])


def radiomic_names(channels: int = 1, dims: int = 2) -> list[str]:
    """The names of `radiomics`' columns.

    Args:
        channels: of a scan; names of several begin with the channel's number.
        dims: 2 for images, 3 for volumes.

    >>> radiomic_names()[0], radiomic_names()[-1], len(radiomic_names(dims=3))
    ('first_order.mean', 'haar_hh.root_mean_square', 168)
    """
    kinds = {"first_order": FIRST_ORDER, "co_occurrence": CO_OCCURRENCE, "run_length": RUN_LENGTH}
    kinds |= {f"haar_{band}": _OF_BANDS for band in _bands(dims)}
    names = [f"{kind}.{name}" for kind, members in kinds.items() for name in members]
    return names if channels == 1 else [f"channel_{c}.{name}" for c in range(channels) for name in names]


def as_array(x: Scans) -> Float[np.ndarray, "n c *space"]:
    """Scans as NumPy has them, whichever they were."""
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else x


def grey_bins(x: Float[np.ndarray, "n *space"]) -> Int[np.ndarray, "n *space"]:
    """The bin of each voxel, 0 to 15, in equal steps of [0, 1]."""
    return np.clip(np.floor(x * BINS), 0, BINS - 1).astype(np.int64)


def _of_channel(x: Float[np.ndarray, "n *space"]) -> Float[np.ndarray, "n d"]:
    levels = grey_bins(x)
    parts = [
        first_order(x.reshape(len(x), -1)),
        co_occurrence_numbers(co_occurrences(levels, BINS)),
        run_length_numbers(run_lengths(levels, BINS), levels[0].size),
    ]
    of_bands = [first_order(band.reshape(len(x), -1))[:, : len(_OF_BANDS)] for band in _details(x)]
    return np.concatenate(parts + of_bands, 1)


def first_order(x: Float[np.ndarray, "n voxels"]) -> Float[np.ndarray, "n 18"]:
    """The numbers of `FIRST_ORDER`: section 3.3 of the manual, percentiles by linear interpolation.

    >>> first_order(np.array([[1.0, 2.0, 3.0, 4.0]]))[0, :3].tolist()
    [2.5, 1.25, 0.0]
    """
    x = np.sort(x, axis=1)
    mean = x.mean(1)
    away = x - mean[:, None]
    variance = (away**2).mean(1)
    # Rounding leaves a little of a constant scan.
    spread = np.where(variance > 1e-16 * np.maximum(1, mean**2), np.sqrt(variance), 0.0)
    p10, p25, median, p75, p90 = np.quantile(x, [0.1, 0.25, 0.5, 0.75, 0.9], axis=1)
    inside = (x >= p10[:, None]) & (x <= p90[:, None])
    count = np.maximum(inside.sum(1), 1)
    middle = (x * inside).sum(1) / count
    energy = (x**2).sum(1)
    kurtosis = np.where(spread > 0, _over((away**4).mean(1), spread**4) - 3, 0)
    found = [
        mean, variance, _over((away**3).mean(1), spread**3), kurtosis, median, x[:, 0], p10, p90,
        x[:, -1], p75 - p25, x[:, -1] - x[:, 0], abs(away).mean(1),
        (abs(x - middle[:, None]) * inside).sum(1) / count, abs(x - median[:, None]).mean(1), energy,
        np.sqrt(energy / x.shape[1]), _over(spread, mean), _over(p75 - p25, p75 + p25),
    ]  # fmt: skip
    return np.stack(found, 1)


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; 0 where b is."""
    return np.divide(a, b, out=np.zeros_like(a), where=abs(b) > 1e-30)


def _bands(dims: int) -> list[str]:
    return ["".join(band) for band in product("lh", repeat=dims)][1:]


def _details(x: Float[np.ndarray, "n *space"]) -> list[np.ndarray]:
    """The bands of one level of the Haar wavelet in the order of `_bands`; an odd axis repeats its last voxel."""
    x = np.pad(x, [(0, 0), *((0, size % 2) for size in x.shape[1:])], mode="edge")
    found = [x]
    for axis in range(1, x.ndim):
        even, odd = ((slice(None),) * axis + (slice(first, None, 2),) for first in (0, 1))
        found = [part for one in found for part in ((one[even] + one[odd]) / 2, (one[even] - one[odd]) / 2)]
    return found[1:]


__all__ = ["BINS", "FIRST_ORDER", "Scans", "as_array", "first_order", "grey_bins", "radiomic_names", "radiomics"]
