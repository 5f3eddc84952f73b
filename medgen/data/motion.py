"""Random augmentation of training scans, its small motion quick enough for thousands of images a minute."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from monai.transforms import Compose, RandAdjustContrast, RandFlip, RandGaussianNoise, RandomizableTransform, Transform
from monai.utils import convert_to_tensor
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional


class RandMove(RandomizableTransform):
    """Rotation about the centre, scaling and shift, as MONAI's `RandAffine` draws them, in one torch call.

    Images are interpolated with cubic splines, which keep the noise texture that densities are learned from;
    volumes linearly, as torch has no cubic there. Values never leave the range they had.

    Args:
        prob: of moving at all.
        rotate: largest angle in each plane, radians.
        shift: largest shift along each axis, voxels.
        scale: largest change of size along each axis, a fraction.
    """

    def __init__(self, prob: float, *, rotate: float, shift: float, scale: float) -> None:
        super().__init__(prob)
        self.rotate, self.shift, self.scale = rotate, shift, scale
        self._matrix = np.eye(3, 4)

    def randomize(self, data: Any) -> None:
        """Draw for `data` axes of space."""
        super().randomize(None)
        dims = int(data)
        angles = self.R.uniform(-self.rotate, self.rotate, 1 if dims == 2 else 3)
        sizes = self.R.uniform(1 - self.scale, 1 + self.scale, dims)
        shifts = self.R.uniform(-self.shift, self.shift, dims)
        turn = np.eye(dims)
        for (a, b), angle in zip([(0, 1), (1, 2), (0, 2)], angles, strict=False):
            plane = np.eye(dims)
            plane[[a, a, b, b], [a, b, a, b]] = [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
            turn = turn @ plane
        self._matrix = np.concatenate([turn * sizes, shifts[:, None]], 1)

    def __call__(self, x: Float[Tensor, "c *space"]) -> Float[Tensor, "c *space"]:
        """The moved scan; all channels move alike."""
        self.randomize(x.ndim - 1)
        if not self._do_transform:
            return x
        dims, space = x.ndim - 1, torch.tensor(x.shape[1:], dtype=torch.float64)
        # From voxels about the centre to grid_sample's (-1, 1), whose axes come last first.
        matrix = torch.from_numpy(self._matrix)
        scaled = matrix[:, :dims] * space[None, :] / space[:, None]
        theta = torch.cat([scaled, (2 * matrix[:, dims] / space)[:, None]], 1)
        order = [*reversed(range(dims)), dims]
        theta = theta.flip(0)[:, order].to(x.dtype)
        grid = functional.affine_grid(theta[None], [1, *x.shape], align_corners=False)
        mode = "bicubic" if dims == 2 else "bilinear"
        moved = functional.grid_sample(x[None], grid, mode=mode, padding_mode="border", align_corners=False)[0]
        axes = tuple(range(1, x.ndim))
        return moved.clamp(x.amin(axes, keepdim=True), x.amax(axes, keepdim=True))


class _Augment(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    prob: float = Field(default=0.5, gt=0, le=1)


class Flip(_Augment):
    """Mirror along one axis; only where left and right may be exchanged."""

    do: Literal["flip"] = "flip"
    axis: int = Field(default=0, ge=0, le=2)

    def transform(self, dims: int) -> Transform:
        """MONAI's transform."""
        return RandFlip(prob=self.prob, spatial_axis=self.axis)


class Affine(_Augment):
    """Small rotation (radians), shift (voxels) and scaling (fraction)."""

    do: Literal["affine"] = "affine"
    rotate: float = 0.05
    shift: float = 2.0
    scale: float = 0.05

    def transform(self, dims: int) -> Transform:
        """What MONAI's `RandAffine` does, seven times faster on small images."""
        return RandMove(self.prob, rotate=self.rotate, shift=self.shift, scale=self.scale)


class Noise(_Augment):
    """White noise of at most this standard deviation."""

    do: Literal["noise"] = "noise"
    std: float = 0.02

    def transform(self, dims: int) -> Transform:
        """MONAI's transform."""
        return RandGaussianNoise(prob=self.prob, std=self.std)


class Gamma(_Augment):
    """Contrast x ** gamma."""

    do: Literal["gamma"] = "gamma"
    low: float = 0.8
    high: float = 1.25

    def transform(self, dims: int) -> Transform:
        """MONAI's transform."""
        return RandAdjustContrast(prob=self.prob, gamma=(self.low, self.high))


Augment = Annotated[Flip | Affine | Noise | Gamma, Field(discriminator="do")]


def augmented(item: Mapping[str, Any], augment: Compose) -> dict[str, Tensor]:
    """The scan after all steps; what lies on its voxels moves with it and keeps its values, label channels among it."""
    x, channels = item["x"], len(item["x"])
    images = channels - item.get("labels", 0)
    beside = {name: item[name].reshape(-1, *x.shape[1:]) for name in ("context", "real") if name in item}
    for step in augment.transforms:
        if isinstance(step, RandMove | RandFlip):
            moved = step(torch.cat([x, *(values.float() for values in beside.values())]))
            # Out comes MONAI's tensor with metadata, which nothing here needs and every later operation would copy.
            moved = convert_to_tensor(moved, dtype=torch.float32, track_meta=False)
            x, *parts = moved.split([channels, *map(len, beside.values())])
            beside = {name: part > 0.5 for name, part in zip(beside, parts, strict=True)}
        else:
            # Noise and contrast are of images: a label's channel tells where a boundary is.
            shown = convert_to_tensor(step(x[:images]), dtype=torch.float32, track_meta=False)
            x = torch.cat([shown, x[images:]]) if images < channels else shown
    return {"x": x} | {name: values.reshape(item[name].shape).to(item[name]) for name, values in beside.items()}


__all__ = ["Affine", "Augment", "Flip", "Gamma", "Noise", "RandMove", "augmented"]
