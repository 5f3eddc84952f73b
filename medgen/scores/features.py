"""Scores that compare descriptors of a scan with those of the healthy ones."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.scores.base import Found, Healthy, Known, Models
from medgen.scores.reference import enough, fingerprints, gaussian_distance, learned_gaussian, nearest_mean, own_rows
from medgen.scores.statistics import ModelFree

# Cells along the short side, and the least edge of one in voxels.
_CELLS, _LEAST_CELL = 4, 4
_ORIENTATIONS, _BLOCK = 8, 2
# Where along each axis a volume is cut.
_CUTS = (0.3, 0.5, 0.7)


class Hog(ModelFree):
    """Distance of a scan's histograms of oriented gradients from those of healthy scans.

    Dalal & Triggs 2005, "Histograms of oriented gradients for human detection": 8 orientations in cells of a quarter
    of the short side, normalised in blocks of 2 x 2 cells. Of a volume, three slices across each axis.

    Args:
        how: 'knn', the mean distance to the nearest healthy scans, or 'mahalanobis' with a shrunk covariance.
        neighbours: how many are nearest.
    """

    do: Literal["hog"] = "hog"
    how: Literal["knn", "mahalanobis"] = "knn"
    neighbours: int = Field(default=5, ge=1)

    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """The descriptors of the training scans, or the Gaussian of them."""
        rows, prints = [], []
        for batch in healthy.train():
            rows.append(hog_rows(batch.x))
            prints.append(fingerprints(batch.x))
        enough(sum(map(len, rows)), 3, self.do)
        bank, own = torch.cat(rows), torch.cat(prints)
        return {"own": own} | ({"bank": bank} if self.how == "knn" else learned_gaussian(bank))

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """How far each scan is."""
        rows, own = hog_rows(batch.x), own_rows(batch.x, known["own"])
        if self.how == "knn":
            values = nearest_mean(rows, known["bank"].to(rows), own, self.neighbours)
        else:
            values = gaussian_distance(rows, {name: t for name, t in known.items() if name != "own"}, own)
        return Found(values[:, None].to(batch.x.device))


def hog_rows(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b d"]:
    """Histograms of oriented gradients of each scan, those of a volume's slices one after another."""
    scans = x.detach().cpu().float().movedim(1, -1).numpy()
    if x.ndim == 4:
        return torch.from_numpy(np.stack([_hog(scan) for scan in scans])).float()
    rows = [np.concatenate([_hog(cut) for cut in _cuts(scan)]) for scan in scans]
    return torch.from_numpy(np.stack(rows)).float()


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


__all__ = ["Hog", "hog_rows"]
