"""What several scores do to images and volumes: smoothing, gradients, and the tail of a map."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# The share of a map's voxels, the highest ones, whose mean is its tail: a lesion fills little of a scan.
_TAIL = 0.005


def smoothed(x: Float[Tensor, "b c *space"], sigma: float) -> Float[Tensor, "b c *space"]:
    """Gaussian average over the scan's own voxels: weights exp(-d^2 / 2 sigma^2), normalised also at the border.

    Args:
        x: images or volumes.
        sigma: in voxels; 0 changes nothing.

    >>> smoothed(torch.ones(1, 1, 5, 7), 2.0).allclose(torch.ones(1, 1, 5, 7))
    True
    """
    if sigma <= 0:
        return x
    for axis in range(2, x.ndim):
        place = torch.arange(x.shape[axis], device=x.device, dtype=x.dtype)
        weights = torch.softmax(-0.5 * ((place[:, None] - place[None, :]) / sigma).square(), 1)
        x = (x.movedim(axis, -1) @ weights.T).movedim(-1, axis)
    return x


def squared_gradient(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
    """Squared length of the intensity's gradient at each voxel, by central differences."""
    axes = [axis for axis in range(2, x.ndim) if x.shape[axis] > 1]
    slopes = torch.gradient(x, dim=axes) if axes else []
    return torch.stack([slope.square() for slope in slopes]).sum(0) if axes else torch.zeros_like(x)


def tail_mean(values: Float[Tensor, "b *space"], real: Bool[Tensor, "b *space"] | None = None) -> Float[Tensor, " b"]:
    """Mean of the highest half per cent of each map, over its real voxels."""
    found = []
    for row, one in enumerate(values):
        told = one.flatten() if real is None else one[real[row]]
        if not len(told):
            told = one.flatten()
        found.append(told.topk(max(1, round(_TAIL * len(told)))).values.mean())
    return torch.stack(found)


__all__ = ["smoothed", "squared_gradient", "tail_mean"]
