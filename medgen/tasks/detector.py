"""From a model to one number and one map per scan, calibrated on held-out healthy scans.

The scan is compared with its healthy twin (where the model restores; else with its reconstruction):

    images   residual = 1 - SSIM,                 score = its mean
    volumes  residual = local mean of |x - twin|,  score = mean of the highest half per cent of the z-map

The z-map says how many healthy standard deviations a residual lies above the healthy mean at that place.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medgen.bundle import Bundle
from medgen.data.dataset import ScanDataset
from medgen.errors import CapabilityError
from medgen.metrics.image import local_mean, ssim_map
from medgen.models import FAMILIES, family
from medgen.models.base import Model, Reconstructs, Restores
from medgen.tasks.calibration import Normals, normals, tail_mean

# Windows in voxels; beyond so many maps the spread at a voxel is known well enough.
_SSIM_WINDOW, _L1_WINDOW = 7, 5
_MOST_MAPS = {2: 512, 3: 64}


@dataclass(frozen=True, eq=False)
class Detector:
    """A bundle's model with what it knows of healthy scans.

    Args:
        model: reconstructs, and perhaps restores.
        scores: of held-out healthy scans.
        normals: their residual maps; None with fewer than two.
    """

    model: Model
    scores: Float[np.ndarray, " n"]
    normals: Normals | None

    @classmethod
    def of(cls, bundle: Bundle) -> "Detector":
        """The detector in a bundle.

        Raises:
            CapabilityError: its model does not reconstruct.
        """
        require_reconstruction(bundle.model)
        known = None
        if "mean" in bundle.tensors:
            told = {name: np.asarray(bundle.calibration[name]) for name in ("maxima", "tails")}
            known = Normals(bundle.tensors["mean"].numpy(), bundle.tensors["sd"].numpy(), **told)
        return cls(bundle.model, np.asarray(bundle.calibration.get("scores", [])), known)

    def __call__(self, x: Float[Tensor, "1 c *space"]) -> tuple[float, Float[np.ndarray, "*space"] | None]:
        """Score and z-map of one prepared scan; without healthy maps the mean residual and None."""
        residual = residual_map(self.model, x)[0].cpu().numpy()
        z = None if self.normals is None else self.normals.z_map(residual).astype(np.float32)
        return (tail_mean(z) if z is not None and x.ndim == 5 else float(residual.mean())), z


@torch.no_grad()
def residual_map(model: Model, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b *space"]:
    """How a scan differs from its healthy twin at every voxel.

    A model of several classes is asked for a twin of each; the nearest one counts, whatever the scan's
    label says, so labelled and unlabelled scans are scored alike.

    Raises:
        CapabilityError: the model does not reconstruct.
    """
    require_reconstruction(model)
    classes = range(len(model.config.classes)) if model.config.classes else [None]
    maps = []
    for name in classes:
        cond = None if name is None else torch.full((len(x),), name, dtype=torch.long, device=x.device)
        maps.append(_difference(x, _twin(model, x, cond)))
    found = torch.stack(maps)
    nearest = found.flatten(2).mean(2).argmin(0)
    return found[nearest, torch.arange(len(x), device=x.device)]


def _twin(model: Model, x: Tensor, cond: Tensor | None) -> Tensor:
    if "restores" in model.abilities(model.config):
        return cast(Restores, model).restore(x, cond=cond).clamp(0, 1)
    return cast(Reconstructs, model).reconstruct(x, cond).clamp(0, 1)


def _difference(x: Float[Tensor, "b c *space"], twin: Float[Tensor, "b c *space"]) -> Float[Tensor, "b *space"]:
    if x.ndim == 4:
        return (1 - ssim_map(x, twin, window=_SSIM_WINDOW))[:, 0]
    return local_mean((x - twin).abs(), _L1_WINDOW).mean(1)


def require_reconstruction(model: Model) -> None:
    """Refuse a model that cannot score anomalies, naming families that can.

    Raises:
        CapabilityError: the model does not reconstruct.
    """
    if "reconstructs" not in model.abilities(model.config):
        able = [name for name in FAMILIES if "reconstructs" in family(name).abilities(model.config)]
        raise CapabilityError(
            f"{model.config.kind} cannot score anomalies: it does not reconstruct. Models that can: {', '.join(able)}."
        )


def calibrate(model: Model, healthy: ScanDataset) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What held-out healthy scans score, as plain numbers and tensors for a bundle.

    Raises:
        CapabilityError: the model does not reconstruct.
    """
    volumes = model.config.dims == 3
    means: list[float] = []
    maps: list[np.ndarray] = []
    for batch in healthy.batches(1 if volumes else 64):
        residual = residual_map(model, batch.x)
        means += residual.flatten(1).mean(1).tolist()
        maps.append(residual[: max(0, _MOST_MAPS[model.config.dims] - sum(map(len, maps)))].numpy())
    if len(means) < 3:
        return {"scores": means, "scans": len(means)}, {}
    learnt = normals(np.concatenate(maps))
    tails = learnt.tails.tolist()
    numbers = {"scores": tails if volumes else means, "maxima": learnt.maxima.tolist(), "tails": tails}
    numbers["scans"] = len(numbers["scores"])
    return numbers, {"mean": torch.from_numpy(learnt.mean), "sd": torch.from_numpy(learnt.sd)}


__all__ = ["Detector", "calibrate", "require_reconstruction", "residual_map"]
