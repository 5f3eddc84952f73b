"""How far a scan lies from what the model makes of it: its reconstruction, or its healthy twin."""

from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.errors import CapabilityError
from medgen.metrics.image import local_mean, smoothed, ssim_map
from medgen.models.abilities import Ability, Perceives, Reconstructs, Restores
from medgen.models.base import Model, can
from medgen.scores.base import Found, Known, Models, Score, best_class, hidden, real_mean
from medgen.scores.filters import tail_mean
from medgen.scores.likelihoods import given

Reduction = Literal["mean", "tail"]
# Edge lengths of uniform windows in voxels, of structural similarity and of all else.
_SSIM_WINDOW, _LOCAL_WINDOW = 7, 5
_TWINS: tuple[Ability, ...] = ("restores", "reconstructs")


class Residual(Score):
    """How far a scan lies from its twin, at each voxel and as a whole.

        l1          local mean of |x - t|                    l2          local mean of (x - t)^2
        ssim        1 - SSIM(x, t)                           normalised  local mean of (x - t)^2 / s^2

    The mean over channels of what is found, and of one model the class that makes it least. `normalised` is the
    AE-U's score (Mao et al. 2020, "Abnormality detection in chest X-ray images using uncertainty prediction
    autoencoders", section 2.3): a model's own idea of the error at a voxel, s, is no reason to worry.

    Args:
        do: 'residual'.
        twin: what it is compared with; by default the restoration where the model restores.
        measure: by default structural similarity for images, the absolute difference for volumes.
        window: odd edge length of a uniform window in voxels; by default 7 for `ssim`, 5 for all else.
        sigma: standard deviation of a Gaussian window in voxels, in place of `window`.
        strength: of the restoration; by default as far as the model goes.
        reduce: the mean of all real voxels, or of the highest half per cent of them.
        features: weight of the mean squared difference between what the model's critic sees in scan and twin, in the
            scan's number (Schlegl et al. 2019, "f-AnoGAN", equation 4).
    """

    do: Literal["residual"] = "residual"
    twin: Literal["reconstruction", "restoration"] | None = None
    measure: Literal["l1", "l2", "ssim", "normalised"] | None = None
    window: int | None = Field(default=None, ge=1)
    sigma: float | None = Field(default=None, gt=0)
    strength: float | None = Field(default=None, ge=0)
    reduce: Reduction = "mean"
    features: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "Residual":
        if self.window is not None and (self.sigma is not None or self.window % 2 == 0):
            raise ValueError(f"a window is uniform and odd ({self.window}) or Gaussian (sigma {self.sigma}), not both")
        if self.strength is not None and self.twin == "reconstruction":
            raise ValueError("strength is of a restoration; a reconstruction has none")
        return self

    @property
    def needs(self) -> tuple[Ability, ...]:
        """What makes the twin."""
        only: dict[str | None, tuple[Ability, ...]] = {"reconstruction": ("reconstructs",), None: _TWINS}
        return only.get(self.twin, ("restores",))

    def check(self, models: Models) -> None:
        """Refuse models that make no such twin, or do not say how sure they are of it.

        Raises:
            CapabilityError: the model makes no such twin, or `normalised` asks one that predicts no uncertainty.
        """
        super().check(models)
        config = models[self.of].config
        if self.measure == "normalised" and not getattr(config, "uncertainty", False):
            raise CapabilityError(
                f"A normalised residual divides by the variance that the model predicts, and this {config.kind} "
                "predicts none. Train an autoencoder with model.uncertainty=true, or use another measure."
            )
        if self.features and not can(models[self.of], "perceives"):
            raise CapabilityError(
                f"A residual of features asks what the model's critic sees, and this {config.kind} does not say. "
                "Train a fanogan or bigan, or leave features out."
            )

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """The residual of the class that leaves the least."""
        model = models[self.of]
        return best_class(model, batch.to(model.device), lambda told: self._found(model, told))

    def _found(self, model: Model, batch: Batch) -> Found:
        twin = self._twin(model, batch)
        residual = self._difference(model, batch, twin)
        values = reduced(residual, batch.real, self.reduce)
        if self.features:
            seen, twins = (cast(Perceives, model).perceive(x, batch.cond) for x in (batch.x, twin))
            values = values + self.features * (seen - twins).square().mean(1)
        return Found(values[:, None], hidden(residual, batch.real))

    def _twin(self, model: Model, batch: Batch) -> Float[Tensor, "b c *space"]:
        told: dict[str, Any] = given(batch)
        if self.twin != "reconstruction" and can(model, "restores"):
            told |= {} if self.strength is None else {"strength": self.strength}
            return cast(Restores, model).restore(batch.x, cond=batch.cond, **told).clamp(0, 1)
        return cast(Reconstructs, model).reconstruct(batch.x, batch.cond, **told).clamp(0, 1)

    def _difference(self, model: Model, batch: Batch, twin: Tensor) -> Float[Tensor, "b *space"]:
        x = batch.x
        measure = self.measure or ("ssim" if x.ndim == 4 else "l1")
        if measure == "ssim":
            return (1 - ssim_map(x, twin, window=self.window or _SSIM_WINDOW, sigma=self.sigma))[:, 0]
        away = (x - twin).abs() if measure == "l1" else (x - twin).square()
        if measure == "normalised":
            away = away / cast(Any, model).uncertainty_map(x, batch.cond).square()
        if self.sigma is not None:
            return smoothed(away, self.sigma).mean(1)
        return local_mean(away, self.window or _LOCAL_WINDOW).mean(1)


def reduced(
    values: Float[Tensor, "b *space"], real: Bool[Tensor, "b *space"] | None, how: Reduction
) -> Float[Tensor, " b"]:
    """One number a map: the mean of its real voxels, or of the highest half per cent of them."""
    return tail_mean(values, real) if how == "tail" else real_mean(values, real)


__all__ = ["Reduction", "Residual", "reduced"]
