"""Texture of scans in grey bins: how bins lie beside each other, and how long they run.

Definitions and names are those of the Image Biomarker Standardisation Initiative (Zwanenburg et al. 2020, "The image
biomarker standardization initiative", reference manual, sections 3.6 and 3.7), of whole scans without a mask, each
number averaged over the directions: 4 in an image, 13 in a volume. Where three of its numbers of co-occurrence say what
others do (difference average, sum average, cluster tendency), they are left out.
"""

from itertools import product

import numpy as np
from jaxtyping import Float, Int

CO_OCCURRENCE = (
    "joint_maximum", "joint_average", "joint_variance", "joint_entropy", "difference_variance", "difference_entropy",
    "sum_variance", "sum_entropy", "angular_second_moment", "contrast", "dissimilarity", "inverse_difference",
    "normalised_inverse_difference", "inverse_difference_moment", "normalised_inverse_difference_moment",
    "inverse_variance", "correlation", "autocorrelation", "cluster_shade", "cluster_prominence",
    "information_correlation_1", "information_correlation_2",
)  # fmt: skip
RUN_LENGTH = (
    "short_runs", "long_runs", "low_grey", "high_grey", "short_runs_low_grey", "short_runs_high_grey",
    "long_runs_low_grey", "long_runs_high_grey", "grey_non_uniformity", "normalised_grey_non_uniformity",
    "length_non_uniformity", "normalised_length_non_uniformity", "run_percentage", "grey_variance", "length_variance",
    "run_entropy",
)  # fmt: skip

Levels = Int[np.ndarray, "n *space"]


def directions(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One of each two opposite neighbours of a voxel, along axes that have more than one voxel.

    >>> directions((5, 5))
    [(0, 1), (1, -1), (1, 0), (1, 1)]
    >>> len(directions((5, 5, 5))), directions((5, 1))
    (13, [(1, 0)])
    """
    steps = product(*[(-1, 0, 1) if size > 1 else (0,) for size in shape])
    return [step for step in steps if next((part for part in step if part), 0) > 0]


def co_occurrences(levels: Levels, bins: int) -> Float[np.ndarray, "n directions bins bins"]:
    """How often bins i and j lie beside each other, counted both ways, as shares that sum to one.

    Args:
        levels: from 0 to bins - 1.
        bins: how many.

    >>> co_occurrences(np.array([[[0, 0, 1]]]), 2)[0, 0].tolist()
    [[0.5, 0.25], [0.25, 0.0]]
    """
    count, shape = len(levels), levels.shape[1:]
    first = levels + bins * np.arange(count).reshape(-1, *[1] * len(shape))
    found = []
    for step in directions(shape):
        here, there = _pairs(step)
        places = first[:, *here] * bins + levels[:, *there]
        found.append(np.bincount(places.ravel(), minlength=count * bins**2).reshape(count, bins, bins))
    counts = np.stack(found, 1).astype(np.float64)
    counts += counts.swapaxes(2, 3)
    return counts / counts.sum((2, 3), keepdims=True)


def run_lengths(levels: Levels, bins: int) -> Float[np.ndarray, "n directions bins lengths"]:
    """How many runs of each bin have 1, 2, ... voxels, in each direction.

    >>> run_lengths(np.array([[[0, 0, 1]]]), 2)[0, 0].tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    count, shape = len(levels), levels.shape[1:]
    longest, found = max(shape), []
    for step in directions(shape):
        axis = next(n for n, part in enumerate(step) if part)
        slabs = np.ascontiguousarray(np.moveaxis(levels, 1 + axis, 0))
        runs, ends = _runs(slabs, step[:axis] + step[axis + 1 :])
        scans = np.arange(count).reshape(1, -1, *[1] * (slabs.ndim - 2))
        places = (scans * bins + slabs) * longest + (runs - 1)
        counts = np.bincount(places[ends], minlength=count * bins * longest)
        found.append(counts.reshape(count, bins, longest))
    return np.stack(found, 1).astype(np.float64)


def _runs(slabs: np.ndarray, step: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """How long the run is that has come to each voxel from slab to slab, and whether it ends there.

    Args:
        slabs: levels (slab, n, *rest).
        step: along the rest, from a slab to the next.
    """
    before, here = (((slice(None), *part)) for part in _pairs(step))
    runs, ends = np.ones(slabs.shape, dtype=np.int64), np.ones(slabs.shape, dtype=bool)
    for k in range(1, len(slabs)):
        same = slabs[k][here] == slabs[k - 1][before]
        runs[k][here] += same * runs[k - 1][before]
        ends[k - 1][before] = ~same
    return runs, ends


def _pairs(step: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The voxels that have a neighbour a step further, and these neighbours."""
    cut = {1: slice(1, None), -1: slice(None, -1), 0: slice(None)}
    return tuple(cut[-part] for part in step), tuple(cut[part] for part in step)


# -- numbers of the matrices -------------------------------------------------------------------------------


def co_occurrence_numbers(shares: Float[np.ndarray, "n directions bins bins"]) -> Float[np.ndarray, "n numbers"]:
    """The numbers of `CO_OCCURRENCE`, averaged over directions; bins count from 1.

    Of a constant scan every number is finite: correlation 1, both information correlations 0.
    """
    bins = shares.shape[-1]
    level = np.arange(1, bins + 1)
    i, j = np.meshgrid(level, level, indexing="ij")
    flat = shares.reshape(*shares.shape[:2], -1)
    differences = flat @ (abs(i - j).reshape(-1, 1) == np.arange(bins))
    sums = flat @ ((i + j).reshape(-1, 1) == np.arange(2, 2 * bins + 1))
    one = shares.sum(3)
    mean = one @ level
    variance = one @ level**2 - mean**2
    gap = np.arange(bins)
    gaps = {
        "contrast": gap**2, "dissimilarity": gap, "inverse_difference": 1 / (1 + gap),
        "normalised_inverse_difference": 1 / (1 + gap / bins), "inverse_difference_moment": 1 / (1 + gap**2),
        "normalised_inverse_difference_moment": 1 / (1 + (gap / bins) ** 2),
        "inverse_variance": np.where(gap, 1 / np.maximum(gap, 1) ** 2, 0),
    }  # fmt: skip
    found = {name: differences @ weight for name, weight in gaps.items()}
    from_middle = np.arange(2, 2 * bins + 1) - 2 * mean[..., None]
    for name, power in (("sum_variance", 2), ("cluster_shade", 3), ("cluster_prominence", 4)):
        found[name] = (sums * from_middle**power).sum(-1)
    apart, both = _entropy(one), _entropy(flat)
    auto = flat @ (i * j).reshape(-1)
    found |= {
        "joint_maximum": flat.max(-1), "joint_average": mean, "joint_variance": variance, "joint_entropy": both,
        "difference_variance": found["contrast"] - found["dissimilarity"] ** 2,
        "difference_entropy": _entropy(differences), "sum_entropy": _entropy(sums),
        "angular_second_moment": (flat**2).sum(-1), "autocorrelation": auto,
        "correlation": np.where(variance > 1e-12, (auto - mean**2) / np.maximum(variance, 1e-12), 1.0),
        # A symmetric matrix has both of the manual's HXY1 and HXY2 equal to twice the entropy of one bin.
        "information_correlation_1": np.where(apart > 1e-12, both / np.maximum(apart, 1e-12) - 2, 0.0),
        "information_correlation_2": np.sqrt(np.clip(1 - np.exp(-2 * (2 * apart - both)), 0, None)),
    }  # fmt: skip
    return np.stack([found[name].mean(1) for name in CO_OCCURRENCE], 1)


def run_length_numbers(
    runs: Float[np.ndarray, "n directions bins lengths"], voxels: int
) -> Float[np.ndarray, "n numbers"]:
    """The numbers of `RUN_LENGTH`, averaged over directions; bins count from 1.

    Args:
        runs: made by `run_lengths`.
        voxels: of a scan.
    """
    level = np.arange(1.0, runs.shape[2] + 1)
    length = np.arange(1.0, runs.shape[3] + 1)
    count = runs.sum((2, 3))
    shares = runs / count[..., None, None]
    by_level, by_length = shares.sum(3), shares.sum(2)

    def emphasis(grey: int, long: int) -> np.ndarray:
        return np.einsum("ndgl,g,l->nd", shares, level**grey, length**long, optimize=True)

    found = {
        "short_runs": emphasis(0, -2), "long_runs": emphasis(0, 2), "low_grey": emphasis(-2, 0),
        "high_grey": emphasis(2, 0), "short_runs_low_grey": emphasis(-2, -2), "short_runs_high_grey": emphasis(2, -2),
        "long_runs_low_grey": emphasis(-2, 2), "long_runs_high_grey": emphasis(2, 2),
        "grey_non_uniformity": (by_level**2).sum(-1) * count,
        "normalised_grey_non_uniformity": (by_level**2).sum(-1),
        "length_non_uniformity": (by_length**2).sum(-1) * count,
        "normalised_length_non_uniformity": (by_length**2).sum(-1),
        "run_percentage": count / voxels,
        "grey_variance": by_level @ level**2 - (by_level @ level) ** 2,
        "length_variance": by_length @ length**2 - (by_length @ length) ** 2,
        "run_entropy": _entropy(shares.reshape(*shares.shape[:2], -1)),
    }  # fmt: skip
    return np.stack([found[name].mean(1) for name in RUN_LENGTH], 1)


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Bits, along the last axis."""
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(-1)


__all__ = [
    "CO_OCCURRENCE", "RUN_LENGTH", "co_occurrence_numbers", "co_occurrences", "directions", "run_length_numbers",
    "run_lengths",
]  # fmt: skip
