"""How far a scan's code lies from the codes of training scans."""

from collections.abc import Iterable
from math import prod, sqrt
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from medgen.data.dataset import Batch
from medgen.errors import DataError
from medgen.models.abilities import Ability, Encodes
from medgen.models.base import Model
from medgen.scores.base import Found, Healthy, Known, Models, Score, best_class, hidden
from medgen.scores.likelihoods import given
from medgen.scores.reconstruction import Reduction, reduced

# Training scans that are asked for their codes, and codes that are kept for neighbours, at most.
_MOST_SCANS, _MOST_CODES = 4096, 4096
# Directions that are told apart; beyond them codes vary alike in all directions.
_MOST_DIRECTIONS = 256
_LEAST_VARIANCE = 1e-8


class LatentDistance(Score):
    """The distance of a scan's code (the mean of q(z | x)) from those of training scans, in their standard deviations.

        mahalanobis    sqrt( (z - m)' C^-1 (z - m) / d )
        knn            mean of the distances to the k nearest training codes, each number in its standard deviations

    with the covariance C of Ledoit & Wolf 2004 ("A well-conditioned estimator for large-dimensional covariance
    matrices"), which few scans suffice for: Lee et al. 2018, "A simple unified framework for detecting
    out-of-distribution samples". A code map is compared position by position, with a mean and covariance each
    (Defard et al. 2021, "PaDiM"), or with codes of all positions (Roth et al. 2022, "PatchCore"); that gives a map.

    Args:
        do: 'latent'.
        how: which distance; for neighbours, codes of training scans are kept in the bundle.
        k: how many neighbours.
        reduce: of a code map's distances, the mean or the highest half per cent.
    """

    do: Literal["latent"] = "latent"
    how: Literal["mahalanobis", "knn"] = "mahalanobis"
    k: int = Field(default=5, ge=1)
    reduce: Reduction = "mean"

    @property
    def needs(self) -> tuple[Ability, ...]:
        """A code."""
        return ("encodes",)

    @torch.no_grad()
    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """What codes of training scans are like.

        Raises:
            DataError: there are fewer than two scans.
        """
        model = models[self.of]
        rows = _gathered(model, healthy.train())
        if len(rows) < 2:
            raise DataError(f"Codes are compared with those of two scans or more; found {len(rows)}. Add scans.")
        learnt = gaussians(rows.movedim(1, 0)) if self.how == "mahalanobis" else _neighbours(rows)
        return {name: tensor.float().cpu().contiguous() for name, tensor in learnt.items()}

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """The distance under the class that suits each scan best."""
        model = models[self.of]
        held = {name: tensor.to(model.device) for name, tensor in known.items()}
        return best_class(model, batch.to(model.device), lambda told: self._found(model, told, held))

    def _found(self, model: Model, batch: Batch, known: Known) -> Found:
        rows, positions = _rows(model, batch)
        far = mahalanobis(rows, known) if self.how == "mahalanobis" else _to_neighbours(rows, known, self.k)
        if len(far[0]) == 1:
            return Found(far)
        coarse = far.reshape(len(far), 1, *positions)
        each = functional.interpolate(coarse, size=tuple(batch.x.shape[2:]), mode="nearest")[:, 0]
        return Found(reduced(each, batch.real, self.reduce)[:, None], hidden(each, batch.real))


def gaussians(rows: Float[Tensor, "p n d"]) -> dict[str, Tensor]:
    """One Gaussian a position from n rows: 'mean' (p, d), 'directions' (p, r, d), their 'precision' (p, r), and the
    precision 'beyond' them (p,), 0 where nothing lies beyond.

    The covariance is Ledoit & Wolf's, (1 - a) S + a m I with m the mean variance; at most 256 of its directions are
    told apart.
    """
    rows = rows.double()
    _, count, size = rows.shape
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    lengths = centred.square().sum(2)
    singular, directions = torch.linalg.svd(centred, full_matrices=False)[1:]
    variances = singular.square() / count
    average = variances.sum(1) / size
    # Ledoit & Wolf 2004, lemmas 3.2 to 3.4.
    squares = variances.square().sum(1)
    away = squares - size * average.square()
    error = lengths.square().sum(1) / count**2 - squares / count
    part = (error.clamp(min=0) / away.clamp(min=_LEAST_VARIANCE**2)).clamp(max=1)[:, None]
    kept = min(_MOST_DIRECTIONS, variances.shape[1])
    left = variances[:, kept:].sum(1, keepdim=True) / max(1, size - kept)
    floor = part * average[:, None]
    told = ((1 - part) * variances[:, :kept] + floor).clamp(min=_LEAST_VARIANCE)
    beyond = ((1 - part) * left + floor).clamp(min=_LEAST_VARIANCE)[:, 0]
    rest = 1 / beyond if kept < size else torch.zeros_like(beyond)
    return {"mean": mean, "directions": directions[:, :kept], "precision": 1 / told, "beyond": rest}


def mahalanobis(rows: Float[Tensor, "b p d"], known: Known) -> Float[Tensor, "b p"]:
    """Distance of every position's row from its Gaussian, over the square root of d."""
    away = rows - known["mean"]
    along = torch.einsum("bpd,prd->bpr", away, known["directions"])
    left = (away.square().sum(2) - along.square().sum(2)).clamp(min=0)
    return ((along.square() * known["precision"]).sum(2) + left * known["beyond"]).sqrt() / sqrt(rows.shape[2])


def _neighbours(rows: Float[Tensor, "n p d"]) -> dict[str, Tensor]:
    """Codes of all positions, no more than are searched quickly, each number over its spread."""
    flat = rows.flatten(0, 1)
    spread = flat.std(0, correction=0).clamp(min=_LEAST_VARIANCE**0.5)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:_MOST_CODES]
    return {"codes": flat[order.to(flat.device)] / spread, "spread": spread}


def _to_neighbours(rows: Float[Tensor, "b p d"], known: Known, k: int) -> Float[Tensor, "b p"]:
    codes, found = known["codes"], []
    for row in rows / known["spread"]:
        # Products of matrices would round alike scans to different distances in different batches.
        far = torch.cdist(row, codes, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(far.topk(min(k, len(codes)), dim=1, largest=False).values.mean(1))
    return torch.stack(found) / sqrt(rows.shape[2])


def _rows(model: Model, batch: Batch) -> tuple[Float[Tensor, "b p d"], tuple[int, ...]]:
    """Codes position by position, and how many positions lie along each axis; one position for a vector."""
    encoder: Any = cast(Encodes, model)
    code = encoder.encode(batch.x, batch.cond, **given(batch)).mean.float()
    positions = tuple(code.shape[2:])
    if code.ndim != batch.x.ndim or prod(positions) == 1:
        return code.flatten(1)[:, None], ()
    return code.flatten(2).movedim(1, 2), positions


def _gathered(model: Model, batches: Iterable[Batch]) -> Float[Tensor, "n p d"]:
    found, count = [], 0
    for batch in batches:
        found.append(_rows(model, batch.to(model.device))[0][: _MOST_SCANS - count])
        count += len(found[-1])
        if count == _MOST_SCANS:
            break
    return torch.cat(found) if found else torch.zeros(0, 1, 1)


__all__ = ["LatentDistance", "gaussians", "mahalanobis"]
