"""What of a prepared scan was measured, and what a recipe leaves out of it."""

import numpy as np
from jaxtyping import Bool

from medgen.data.recipe import Recipe, Window
from medgen.errors import DataError
from medgen.grid import Grid
from medgen.scan import Scan

# Values this part of a fixed range beyond it, in more than this share of the voxels, are worth a warning.
_CLEARLY, _MANY = 0.05, 0.02


def flat(scan: Scan) -> Scan:
    """A scan one voxel thick along i or j with that axis last, so that it counts as an image; an exact copy."""
    thin = [axis for axis, size in enumerate(scan.grid.shape) if size == 1]
    if scan.is_planar or len(thin) != 1:
        return scan
    return scan.onto(scan.grid.permute([axis for axis in range(3) if axis not in thin] + thin), outside=0)


def prepared(source: Scan, recipe: Recipe) -> tuple[Scan, Bool[np.ndarray, "i j k"]]:
    """The prepared scan, and which of its voxels were measured rather than padded.

    Raises:
        DataError: what can be seen of the scan is constant.
    """
    scan = recipe(source)
    real = real_voxels(scan.grid, source.grid)
    if scan.valid is not None:
        real &= scan.valid
    seen = scan.voxels if real.all() else scan.voxels[:, real]
    if not seen.size or seen.min() == seen.max():
        raise DataError(
            "The scan is constant within the recipe's window and range, where contrast was expected. "
            "Check that the file holds an image in the expected unit, or leave it out."
        )
    return scan, real


def real_voxels(window: Grid, source: Grid) -> Bool[np.ndarray, "i j k"]:
    """Which voxels of a prepared window lie within the source's field of view; the others are padding.

    >>> grid = Grid((2, 3, 1), np.eye(4))
    >>> int(real_voxels(grid.centred((4, 4, 1)), grid).sum())
    6
    """
    axes = np.ogrid[tuple(slice(size) for size in window.shape)]
    inside = np.ones(window.shape, dtype=bool)
    for row, size in zip(source.index_of(window)[:3], source.shape, strict=True):
        at = sum((step * axis for step, axis in zip(row[:3], axes, strict=True)), row[3])
        # A voxel reaches half a voxel beyond its centre.
        inside &= (at > -0.501) & (at < size - 0.499)
    return inside


def what_was_cut(source: Scan, recipe: Recipe) -> str:
    """A sentence on how many voxels lie clearly outside the recipe's fixed range, which cuts them; '' for few.

    A range made of the scan's own percentiles always cuts as much, and is not spoken of.
    """
    window = next((step for step in recipe.steps if isinstance(step, Window)), None)
    if window is None:
        return ""
    low, high = window.low, window.high
    values, margin = source.physical(), _CLEARLY * (high - low)
    beyond = int(np.count_nonzero((values < low - margin) | (values > high + margin)))
    if beyond <= _MANY * values.size:
        return ""
    share = f"{beyond:,} of {values.size:,} voxels ({beyond / values.size:.0%})"
    return f"{share} lie outside {low:g} to {high:g} {source.scale.unit}".rstrip() + " and were cut"


__all__ = ["flat", "prepared", "real_voxels", "what_was_cut"]
