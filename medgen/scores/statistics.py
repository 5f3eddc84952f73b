"""Scores that ask no model and learn nothing: classical statistics of an image or a volume, and the plainest baselines.

Ill scans are often smoother, or noisier, or less symmetric than healthy ones, which a likelihood may miss or even
reward (Serra et al. 2020, "Input complexity and out-of-distribution detection with likelihood-based generative
models"). Each statistic is a column; whether a low or a high value is unusual is not known, so both are.
"""

from collections.abc import Callable
from io import BytesIO
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from medgen.data.dataset import Batch
from medgen.metrics.image import smoothed
from medgen.scores.base import Found, Healthy, Known, Models, Score, hidden, real_mean
from medgen.scores.filters import squared_gradient

StatisticName = Literal[
    "mean", "sd", "skewness", "gradient", "finest", "fine", "middle", "coarse", "png", "symmetry",
]  # fmt: skip
# Bands are differences of Gaussians, each twice as wide as the one before, in voxels.
_BANDS: dict[str, tuple[float, float]] = {
    "finest": (0, 0.7), "fine": (0.7, 1.4), "middle": (1.4, 2.8), "coarse": (2.8, 5.6),
}  # fmt: skip
# Energies are told apart down to about a tenth of a thousandth of the intensity range.
_LEAST_ENERGY = 1e-8
# Healthy tissue is brighter, on the mean, than this share of the brightest.
_TISSUE = 0.1


class ModelFree(Score):
    """A score that asks no model."""

    @property
    def asks(self) -> tuple[str, ...]:
        """Nobody."""
        return ()


class Statistics(ModelFree):
    """Classical statistics of a scan, one column each; means over channels.

        mean, sd, skewness  of the intensities
        gradient            log of the mean squared gradient
        finest ... coarse   log of the mean square of (G_s - G_2s) x: detail of about s voxels
        png                 bytes of a lossless code of the scan in 8 bits
        symmetry            correlation with the mirror image along the first axis

    All but 'png' and 'symmetry' are over real voxels.

    Args:
        which: the columns.
    """

    two_sided: ClassVar[bool] = True

    do: Literal["statistics"] = "statistics"
    which: tuple[StatisticName, ...] = get_args(StatisticName)

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics."""
        return self.which

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Its statistics."""
        return Found(torch.stack([statistic(name, batch.x, batch.real) for name in self.which], 1))


class Intensity(ModelFree):
    """The mean intensity; the map is the intensity itself, the baseline that a threshold is.

    Meissen et al. 2021, "Challenging current semi-supervised anomaly segmentation methods for brain MRI", section 2.

    Args:
        bright: whether the map is high where the scan is bright; else where it is dark although healthy scans are
            not, on the mean.
    """

    two_sided: ClassVar[bool] = True

    do: Literal["intensity"] = "intensity"
    bright: bool = True

    def learn(self, models: Models, healthy: Healthy) -> dict[str, Tensor]:
        """Where healthy scans have tissue."""
        if self.bright:
            return {}
        total, count = torch.zeros(()), 0
        for batch in healthy.train():
            total, count = total + batch.x.mean(1).sum(0).cpu(), count + len(batch.x)
        return {"tissue": total / count > _TISSUE * (total / count).max()}

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Its mean intensity, and its intensity as a map."""
        x = batch.x.mean(1)
        shown = x if self.bright else (1 - x) * known["tissue"].to(x.device)
        return Found(real_mean(x, batch.real)[:, None], hidden(shown, batch.real))


class GradientEnergy(ModelFree):
    """The log of the mean squared gradient: how much detail a scan has."""

    two_sided: ClassVar[bool] = True

    do: Literal["gradient-energy"] = "gradient-energy"

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Its gradient energy."""
        return Found(statistic("gradient", batch.x, batch.real)[:, None])


class CodeLength(ModelFree):
    """How many bytes PNG, a lossless code, needs: how complex a scan is."""

    two_sided: ClassVar[bool] = True

    do: Literal["png"] = "png"

    @torch.no_grad()
    def __call__(self, models: Models, batch: Batch, known: Known) -> Found:
        """Its length in bytes."""
        return Found(statistic("png", batch.x, batch.real)[:, None])


# -- one statistic -------------------------------------------------------------------------------------


def statistic(
    name: StatisticName, x: Float[Tensor, "b c *space"], real: Bool[Tensor, "b *space"] | None = None
) -> Float[Tensor, " b"]:
    """One statistic of each scan."""
    return _STATISTICS[name](x, real)


def _central(x: Float[Tensor, "b c *space"], real: Bool[Tensor, "b *space"] | None, power: int) -> Float[Tensor, "b c"]:
    """Central moment of each channel."""
    mean = _per_channel(x, real)
    return _per_channel((x - mean.reshape(*mean.shape, *[1] * (x.ndim - 2))) ** power, real)


def _per_channel(x: Float[Tensor, "b c *space"], real: Bool[Tensor, "b *space"] | None) -> Float[Tensor, "b c"]:
    return torch.stack([real_mean(x[:, c], real) for c in range(x.shape[1])], 1)


def _skewness(x: Tensor, real: Tensor | None) -> Tensor:
    return (_central(x, real, 3) / _central(x, real, 2).clamp(min=_LEAST_ENERGY) ** 1.5).mean(1)


def _log_energy(squares: Tensor, real: Tensor | None) -> Tensor:
    return (_per_channel(squares, real) + _LEAST_ENERGY).log().mean(1)


def _band(name: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    inner, outer = _BANDS[name]
    return lambda x, real: _log_energy((smoothed(x, inner) - smoothed(x, outer)).square(), real)


def _png_bytes(x: Tensor, real: Tensor | None) -> Tensor:
    """Of grey images; a volume's slices along its last axis and the channels add up."""
    whole = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    slices = whole if x.ndim == 4 else whole.movedim(-1, 2).flatten(1, 2)
    return x.new_tensor([sum(_coded(plane) for plane in scan.cpu().numpy()) for scan in slices])


def _coded(plane: np.ndarray) -> int:
    held = BytesIO()
    Image.fromarray(plane).save(held, "PNG", optimize=True)
    return held.tell()


def _symmetry(x: Tensor, real: Tensor | None) -> Tensor:
    centred = (x - x.flatten(2).mean(2).reshape(*x.shape[:2], *[1] * (x.ndim - 2))).flatten(2)
    mirrored = centred.reshape(x.shape).flip(2).flatten(2)
    energy = centred.square().mean(2)
    return ((centred * mirrored).mean(2) / energy.clamp(min=_LEAST_ENERGY)).mean(1)


_STATISTICS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "mean": lambda x, real: _per_channel(x, real).mean(1),
    "sd": lambda x, real: _central(x, real, 2).sqrt().mean(1),
    "skewness": _skewness,
    "gradient": lambda x, real: _log_energy(squared_gradient(x), real),
    "png": _png_bytes,
    "symmetry": _symmetry,
} | {name: _band(name) for name in _BANDS}


__all__ = ["CodeLength", "GradientEnergy", "Intensity", "ModelFree", "StatisticName", "Statistics", "statistic"]
