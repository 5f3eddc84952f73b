"""Scores that know what healthy scans look like at each place: z-maps, principal subspaces, normative features.

They suit scans that are registered, such as heads on a template: then the same voxel is the same anatomy.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.metrics.image import local_mean, smoothed
from medgen.scores.base import Found, Healthy, Known, Models, hidden, real_mean
from medgen.scores.filters import squared_gradient, tail_mean
from medgen.scores.reference import enough, fingerprints, learned_places, own_rows, place_z
from medgen.scores.statistics import ModelFree

# Numbers of training scans that principal components are computed from, at most: a gigabyte.
_MOST_NUMBERS = 2**28
_LOCAL_WINDOW = 5
# How far the correlation of features is drawn towards none, and how many voxels of a scan are asked about it.
_SHRINKAGE, _PLACES = 0.1, 4096


class Voxelwise(ModelFree):
    """The smoothed voxel-wise z-map: how many healthy standard deviations a voxel is away from the healthy mean.

        z = (G x - m) / s,    map = |z|, z or -z,    value = mean of the map's highest half per cent

    Args:
        sigma: width of the Gaussian G in voxels.
        side: what is unusual: 'both' sides, 'high' intensities or 'low' ones.
    """

    do: Literal["voxelwise"] = "voxelwise"
    sigma: float = Field(default=1.0, ge=0)
    side: Literal["both", "high", "low"] = "both"

    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """Mean and spread at each voxel."""
        return learned_places(((smoothed(batch.x, self.sigma), batch) for batch in healthy.train()), self.do)

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Its z-map and the map's tail."""
        own = (own_rows(batch.x, known["own"]) >= 0).to(batch.x.device)
        z = place_z(smoothed(batch.x, self.sigma), known, own)
        shown = z.square().mean(1).sqrt() if self.side == "both" else z.mean(1) * (1 if self.side == "high" else -1)
        return Found(tail_mean(shown, batch.real)[:, None], hidden(shown, batch.real))


class Normative(ModelFree):
    """Distance of local features from what is usual at their place, by place and scale.

        map = sqrt(z' R^-1 z / f)

    z: how many healthy standard deviations each of f features is away from its healthy mean at the voxel; R: the
    features' correlation in healthy scans over all voxels. This is the patch distribution of Defard et al. 2021
    ("PaDiM", equation 2) with features made by hand: the intensity smoothed and its log gradient at several scales,
    and the local spread.

    Args:
        sigmas: scales in voxels.
    """

    do: Literal["normative"] = "normative"
    sigmas: tuple[float, ...] = (0.7, 1.4, 2.8)

    @torch.no_grad()
    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """Mean and spread of features at each voxel; their correlation over scans, each left out in turn."""
        known = learned_places(((self.features(batch), batch) for batch in healthy.train()), self.do)
        moments, count = torch.zeros(()), 0
        varied = (known["variance"].sqrt() > known["least"].reshape(-1, *[1] * (known["mean"].ndim - 1))).all(0)
        for batch in healthy.train():
            own = torch.ones(len(batch.x), dtype=torch.bool, device=batch.x.device)
            z = place_z(self.features(batch), known, own)
            told = varied.to(z.device).expand(len(z), *varied.shape)
            rows = z.movedim(1, -1)[told if batch.real is None else told & batch.real]
            rows = rows[:: max(1, len(rows) // (_PLACES * len(z)))].double().clamp(-6, 6).cpu()
            moments, count = moments + rows.T @ rows, count + len(rows)
        size = len(known["mean"])
        correlation = moments / count if count > size else torch.eye(size, dtype=torch.float64)
        correlation = (1 - _SHRINKAGE) * correlation + _SHRINKAGE * torch.eye(size) * correlation.diagonal().mean()
        return known | {"precision": torch.linalg.inv(correlation).float().contiguous()}

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Its map and the map's tail."""
        own = (own_rows(batch.x, known["own"]) >= 0).to(batch.x.device)
        z = place_z(self.features(batch), known, own).movedim(1, -1)
        squared = ((z @ known["precision"].to(z)) * z).mean(-1)
        shown = squared.clamp(min=0).sqrt()
        return Found(tail_mean(shown, batch.real)[:, None], hidden(shown, batch.real))

    def features(self, batch: Batch) -> Float[Tensor, "b f *space"]:
        """What is known of each voxel: for each scale and channel intensity and log gradient; the local spread."""
        found = []
        for sigma in self.sigmas:
            x = smoothed(batch.x, sigma)
            found += [x, (squared_gradient(x).sqrt() + 1e-2).log()]
        middle = self.sigmas[len(self.sigmas) // 2]
        spread = smoothed(batch.x.square(), middle) - smoothed(batch.x, middle).square()
        return torch.cat([*found, (spread.clamp(min=0).sqrt() + 1e-2).log()], 1)


class Pca(ModelFree):
    """What the principal components of healthy scans leave of a scan.

        residual = local mean of |x - m - U' U (x - m)|

    The value is the residual's mean in images, and the mean of its highest half per cent in volumes.

    Args:
        components: how many, at most.
    """

    do: Literal["pca"] = "pca"
    components: int = Field(default=32, ge=1)

    @torch.no_grad()
    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """Mean, twice the components, and the training scans' codes: from them follow the components without one."""
        rows, prints, numbers = [], [], 0
        for batch in healthy.train():
            rows.append(batch.x.cpu().float().flatten(1))
            prints.append(fingerprints(batch.x))
            numbers += batch.x.numel()
            if numbers >= _MOST_NUMBERS:
                break
        enough(sum(map(len, rows)), 3, self.do)
        scans = torch.cat(rows)
        mean = scans.mean(0)
        scans -= mean
        directions = _directions(scans, 2 * self.components)
        return {"mean": mean, "directions": directions, "codes": scans @ directions.T, "own": torch.cat(prints)}

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Its residual, and the residual's mean or tail."""
        told = {name: known[name].to(batch.x.device) for name in ("mean", "directions", "codes")}
        centred = batch.x.flatten(1) - told["mean"]
        codes = centred @ told["directions"].T
        codes[:, self.components :] = 0
        for row, index in enumerate(own_rows(batch.x, known["own"]).tolist()):
            if index >= 0:
                codes[row] = self._without(told["codes"], index)
        left = (centred - codes @ told["directions"]).reshape(batch.x.shape)
        residual = local_mean(left.abs(), _LOCAL_WINDOW).mean(1)
        value = real_mean(residual, batch.real) if batch.x.ndim == 4 else tail_mean(residual, batch.real)
        return Found(value[:, None], hidden(residual, batch.real))

    def _without(self, codes: Float[Tensor, "n r"], index: int) -> Float[Tensor, " r"]:
        """The projection of one row on the mean and the principal components of the others."""
        others = torch.cat([codes[:index], codes[index + 1 :]])
        mean = others.mean(0)
        basis = _directions(others - mean, self.components)
        return mean + (codes[index] - mean) @ basis.T @ basis


def _directions(centred: Float[Tensor, "n d"], most: int) -> Float[Tensor, "r d"]:
    """Orthonormal leading principal directions of centred rows, from the smaller of the two Gram matrices."""
    n, size = centred.shape
    if n >= size:
        values, vectors = torch.linalg.eigh((centred.T @ centred).double())
        kept = _kept(values, min(most, n - 1))
        return vectors.flip(1)[:, :kept].T.float().contiguous()
    values, vectors = torch.linalg.eigh((centred @ centred.T).double())
    kept = _kept(values, min(most, n - 1))
    leading = vectors.flip(1)[:, :kept] / values.flip(0)[:kept].sqrt()
    return leading.T.float() @ centred


def _kept(values: Tensor, most: int) -> int:
    return int((values.flip(0)[:most] > 1e-6 * values[-1].clamp(min=1e-9)).sum())


__all__ = ["Normative", "Pca", "Voxelwise"]
