"""How likely a model finds a scan, in units that are the same for every family."""

from dataclasses import replace
from math import log
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.models.abilities import Ability, BoundsDensity, EstimatesDensity, MapsDensity, ScoresDensity
from medgen.models.base import Model, can
from medgen.prob.dequantisation import grey
from medgen.seeds import voxel_uniform

# What a density is, by the ability that gives it; the best first.
DENSITIES: dict[Ability, str] = {"scores_density": "exact", "bounds_density": "bound", "estimates_density": "estimate"}
# The grey levels in which densities of continuous values are told.
_BITS = 8


def density_kind(model: Model) -> str:
    """'exact', 'bound' or 'estimate'; '' without a density."""
    return next((kind for ability, kind in DENSITIES.items() if can(model, ability)), "")


def given(batch: Batch) -> dict[str, Any]:
    """What only models that take it are given."""
    return {} if batch.context is None else {"context": batch.context}


def log_density(model: Model, batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """log p(x), its bound or its estimate, nats a real voxel and channel; and the standard error of an estimate.

    Where a scan has voxels that are not real and the model tells what each contributes, those are left out.
    """
    told = given(batch)
    if batch.real is not None and can(model, "maps_density"):
        parts = cast(MapsDensity, model).log_prob_map(batch.x, batch.cond, **told)[:, 0]
        sums = (parts * batch.real).flatten(1).sum(1)
        found = sums / batch.real.flatten(1).sum(1).clamp(min=1) / batch.x.shape[1]
        return found, torch.zeros_like(found)
    size = batch.x[0].numel()
    if can(model, "scores_density"):
        found = cast(ScoresDensity, model).log_prob(batch.x, batch.cond, **told) / size
    elif can(model, "bounds_density"):
        found = cast(BoundsDensity, model).elbo(batch.x, batch.cond, **told) / size
    else:
        # One by one, as the noise of an estimate depends on the scan's place in the batch.
        estimator = cast(EstimatesDensity, model)
        estimates = [estimator.log_prob_estimate(one.x, one.cond, **given(one)) for one in batch.each()]
        found, error = (torch.cat(part) / size for part in zip(*estimates, strict=True))
        return found, error
    return found, torch.zeros_like(found)


def bits_per_dim(model: Model, batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """What a grey level costs under the model, bits a voxel and channel; and the standard error of an estimate.

    Over the whole window, padding with it: not every model tells which of its voxels cost what, and files compress all.

    A density of continuous values is asked about grey levels of 8 bits with uniform noise between them, and told per
    level (Theis et al. 2016, "A note on the evaluation of generative models", equation 4), so that all compare:

        bits = -(log p(x~) - log 255) / log 2,   x~ = (round(255 x) + u - 1/2) / 255
    """
    batch = replace(batch, real=None)
    if model.config.grey_levels:
        density, error = log_density(model, batch)
        return -density / log(2), error / log(2)
    levels = 2**_BITS - 1
    u = voxel_uniform(tuple(batch.x.shape[2:]), seed=0, channels=batch.x.shape[1]).to(batch.x)
    density, error = log_density(model, replace(batch, x=(grey(batch.x, _BITS) + u - 0.5) / levels))
    return (log(levels) - density) / log(2), error / log(2)


__all__ = ["DENSITIES", "bits_per_dim", "density_kind", "given", "log_density"]
