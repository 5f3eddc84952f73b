"""Scores that compare descriptors of a scan with those of the healthy ones."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.metrics.hog import hog_rows
from medgen.scores.base import Found, Healthy, Known, Models
from medgen.scores.reference import enough, fingerprints, gaussian_distance, learned_gaussian, nearest_mean, own_rows
from medgen.scores.statistics import ModelFree


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
            rows.append(torch.from_numpy(hog_rows(batch.x)))
            prints.append(fingerprints(batch.x))
        enough(sum(map(len, rows)), 3, self.do)
        bank, own = torch.cat(rows), torch.cat(prints)
        return {"own": own} | ({"bank": bank} if self.how == "knn" else learned_gaussian(bank))

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """How far each scan is."""
        rows, own = torch.from_numpy(hog_rows(batch.x)), own_rows(batch.x, known["own"])
        if self.how == "knn":
            values = nearest_mean(rows, known["bank"].to(rows), own, self.neighbours)
        else:
            values = gaussian_distance(rows, {name: t for name, t in known.items() if name != "own"}, own)
        return Found(values[:, None].to(batch.x.device))


__all__ = ["Hog"]
