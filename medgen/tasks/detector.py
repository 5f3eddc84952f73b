"""From a model to one number and one map per scan, calibrated on held-out healthy scans.

A model that restores or reconstructs: the scan is compared with its healthy twin.

    images   residual = 1 - SSIM,                 score = its mean
    volumes  residual = local mean of |x - twin|,  score = mean of the highest half per cent of the z-map

The z-map says how many healthy standard deviations a residual lies above the healthy mean at that place.

A model with a density: how surprising the scan is, in nats. Smooth scans surprise a density less than healthy
ones, though they may be ill, so scores (see `medgen.tasks.calibration`) and z-maps are two-sided: |z|.

    residual = local mean of -log p(x) at each voxel,  score = mean of -log p(x) over the voxels

A density without a map gives the score alone, over the whole window. Everywhere else only real voxels count,
not those that pad a small scan; a map is NaN there.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medgen.bundle import Bundle
from medgen.data.dataset import Batch, ScanDataset
from medgen.errors import BundleError, CapabilityError
from medgen.metrics.image import local_mean, ssim_map
from medgen.models.abilities import Ability, MapsDensity, Reconstructs, Restores
from medgen.models.base import Model, can, each_class
from medgen.scores.likelihoods import DENSITIES, given, log_density
from medgen.tasks.calibration import Normals, normals, tail_mean
from medgen.tasks.capabilities import families_that

# Windows in voxels; beyond so many maps the spread at a voxel is known well enough.
_SSIM_WINDOW, _LOCAL_WINDOW = 7, 5
_MOST_MAPS = {2: 512, 3: 64}
_TWINS: tuple[Ability, ...] = ("restores", "reconstructs")


@dataclass(frozen=True, eq=False)
class Detector:
    """A bundle's model with what it knows of healthy scans.

    Args:
        model: restores, reconstructs or has a density.
        scores: of held-out healthy scans.
        normals: their residual maps; None with fewer than three, or where the model makes none.
    """

    model: Model
    scores: Float[np.ndarray, " n"]
    normals: Normals | None

    @classmethod
    def of(cls, bundle: Bundle) -> "Detector":
        """The detector in a bundle.

        Raises:
            CapabilityError: its model cannot score.
        """
        require_scoring(bundle.model)
        known = None
        if "mean" in bundle.tensors:
            if missing := {"scores", "maxima", "tails"} - set(bundle.calibration):
                raise BundleError(f"bundle.json: the calibration lacks {', '.join(sorted(missing))}. Train again.")
            told = {name: np.asarray(bundle.calibration[name]) for name in ("maxima", "tails")}
            two_sided = not can(bundle.model, *_TWINS)
            known = Normals(bundle.tensors["mean"].numpy(), bundle.tensors["sd"].numpy(), **told, two_sided=two_sided)
        return cls(bundle.model, np.asarray(bundle.calibration.get("scores", [])), known)

    def __call__(
        self,
        x: Float[Tensor, "1 c *space"],
        *,
        cond: Tensor | None = None,
        context: Tensor | None = None,
        real: Bool[Tensor, "1 *space"] | None = None,
    ) -> tuple[float, Float[np.ndarray, "*space"] | None]:
        """Score and z-map of one prepared scan and what is given with it; without healthy maps None for the map."""
        score, residual = examined(self.model, Batch(x, cond, context, real=real))
        if residual is None or self.normals is None:
            return float(score), None
        z = self.normals.z_map(residual[0].cpu().numpy()).astype(np.float32)
        return tail_mean(z) if _scored_by_tail(self.model) else float(score), z


def require_scoring(model: Model) -> None:
    """Refuse a model that cannot score anomalies, naming families that can.

    Raises:
        CapabilityError: the model neither restores, nor reconstructs, nor has a density.
    """
    if not can_score(model):
        raise CapabilityError(
            f"{model.config.kind} cannot score anomalies: it neither restores nor reconstructs, and has no density. "
            f"Models that can: {families_that(*_TWINS, *DENSITIES)}."
        )


def can_score(model: Model) -> bool:
    """Whether a model says at all how unusual a scan is."""
    return can(model, *_TWINS, *DENSITIES)


def makes_maps(model: Model) -> bool:
    """Whether a model says where a scan is unusual, not only whether it is."""
    return can(model, *_TWINS, "maps_density")


@torch.no_grad()
def examined(model: Model, batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *space"] | None]:
    """Mean residual of each scan, and the residual map, NaN where no voxel is real; None without maps.

    A model of several classes is asked about each; the one that suits the scan best counts, whatever the
    scan's label says, so labelled and unlabelled scans are scored alike.

    Raises:
        CapabilityError: the model cannot score.
    """
    require_scoring(model)
    batch = batch.to(model.device)
    hypotheses = each_class(model.config, batch.cond, len(batch.x), model.device)
    found = [_examined(model, replace(batch, cond=cond)) for cond in hypotheses]
    scores = torch.stack([score for score, _ in found])
    nearest, rows = scores.argmin(0), torch.arange(len(batch.x), device=scores.device)
    maps = [residual for _, residual in found if residual is not None]
    return scores[nearest, rows], torch.stack(maps)[nearest, rows] if maps else None


# -- one hypothesis ------------------------------------------------------------------------------------


def _examined(model: Model, batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *space"] | None]:
    """Mean residual and residual map under the batch's own condition."""
    if can(model, *_TWINS):
        residual = _difference(batch.x, _twin(model, batch))
        return _mean(residual, batch.real), _hidden(residual, batch.real)
    if not can(model, "maps_density"):
        return -batch.x.shape[1] * log_density(model, batch)[0], None
    surprise = -cast(MapsDensity, model).log_prob_map(batch.x, batch.cond, **given(batch))
    return _mean(surprise[:, 0], batch.real), _hidden(_local(surprise, batch.real)[:, 0], batch.real)


def _twin(model: Model, batch: Batch) -> Tensor:
    told = given(batch)
    if can(model, "restores"):
        return cast(Restores, model).restore(batch.x, cond=batch.cond, **told).clamp(0, 1)
    return cast(Reconstructs, model).reconstruct(batch.x, batch.cond, **told).clamp(0, 1)


def _difference(x: Float[Tensor, "b c *space"], twin: Float[Tensor, "b c *space"]) -> Float[Tensor, "b *space"]:
    if x.ndim == 4:
        return (1 - ssim_map(x, twin, window=_SSIM_WINDOW))[:, 0]
    return local_mean((x - twin).abs(), _LOCAL_WINDOW).mean(1)


def _local(values: Float[Tensor, "b 1 *space"], real: Tensor | None) -> Float[Tensor, "b 1 *space"]:
    """Mean over the real voxels around each voxel."""
    if real is None:
        return local_mean(values, _LOCAL_WINDOW)
    weight = real[:, None].to(values)
    return local_mean(values * weight, _LOCAL_WINDOW) / local_mean(weight, _LOCAL_WINDOW).clamp(min=1e-6)


def _mean(values: Float[Tensor, "b *space"], real: Tensor | None) -> Float[Tensor, " b"]:
    """Mean of each map over its real voxels."""
    if real is None:
        return values.flatten(1).mean(1)
    return (values * real).flatten(1).sum(1) / real.flatten(1).sum(1).clamp(min=1)


def _hidden(values: Float[Tensor, "b *space"], real: Tensor | None) -> Float[Tensor, "b *space"]:
    return values if real is None else values.masked_fill(~real, torch.nan)


def _scored_by_tail(model: Model) -> bool:
    return model.config.dims == 3 and can(model, *_TWINS)


# -- calibration ---------------------------------------------------------------------------------------


def calibrate(model: Model, healthy: ScanDataset) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What held-out healthy scans score, as plain numbers and tensors for a bundle.

    Raises:
        CapabilityError: the model cannot score.
    """
    means: list[float] = []
    maps: list[np.ndarray] = []
    for batch in healthy.batches(1 if model.config.dims == 3 else 64):
        scores, residual = examined(model, batch)
        means += scores.tolist()
        if residual is not None:
            maps.append(residual[: max(0, _MOST_MAPS[model.config.dims] - sum(map(len, maps)))].cpu().numpy())
    if len(means) < 3 or not maps:
        return {"scores": means, "scans": len(means)}, {}
    learnt = normals(np.concatenate(maps), two_sided=not can(model, *_TWINS))
    tails = learnt.tails.tolist()
    numbers = {"scores": tails if _scored_by_tail(model) else means, "maxima": learnt.maxima.tolist(), "tails": tails}
    numbers["scans"] = len(numbers["scores"])
    return numbers, {"mean": torch.from_numpy(learnt.mean), "sd": torch.from_numpy(learnt.sd)}


__all__ = ["Detector", "calibrate", "can_score", "examined", "makes_maps", "require_scoring"]
