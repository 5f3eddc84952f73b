"""Small random motion of training scans, quick enough for thousands of small images a minute."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from monai.transforms import RandomizableTransform
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


__all__ = ["RandMove"]
