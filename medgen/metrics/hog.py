"""Histograms of oriented gradients: what edges a scan has, and where."""

import numpy as np
from jaxtyping import Float

from medgen.metrics.radiomics import Scans, as_array

# Cells along the short side, and the least edge of one in voxels.
_CELLS, _LEAST_CELL = 4, 4
_ORIENTATIONS, _BLOCK = 8, 2
# Where along each axis a volume is cut.
_CUTS = (0.3, 0.5, 0.7)


def hog_rows(x: Scans) -> Float[np.ndarray, "n d"]:
    """Histograms of oriented gradients of each scan, those of a volume's slices one after another.

    Dalal & Triggs 2005, "Histograms of oriented gradients for human detection": 8 orientations in cells of a quarter
    of the short side, normalised in blocks of 2 x 2 cells. Of a volume, three slices across each axis.

    >>> hog_rows(np.zeros((2, 1, 28, 28))).shape
    (2, 288)
    """
    scans = np.moveaxis(as_array(x).astype(np.float32), 1, -1)
    if scans.ndim == 4:
        return np.stack([_hog(scan) for scan in scans]).astype(np.float32)
    return np.stack([np.concatenate([_hog(cut) for cut in _cuts(scan)]) for scan in scans]).astype(np.float32)


def _cuts(scan: np.ndarray) -> list[np.ndarray]:
    """Slices (*plane, c) across each axis."""
    return [scan.take(int(part * scan.shape[axis]), axis) for axis in range(3) for part in _CUTS]


def _hog(image: np.ndarray) -> np.ndarray:
    """Of an image (i, j, c); of several channels, at each place the one of the steepest gradient counts."""
    from skimage.feature import hog

    short = min(image.shape[:2])
    cell = min(short, max(_LEAST_CELL, round(short / _CELLS)))
    block = min(_BLOCK, short // cell)
    sizes = {"pixels_per_cell": (cell, cell), "cells_per_block": (block, block)}
    return hog(image, orientations=_ORIENTATIONS, channel_axis=-1, **sizes)


__all__ = ["hog_rows"]
