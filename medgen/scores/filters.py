"""What several scores do to images and volumes: gradients, and the tail of a map."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# The share of a map's voxels, the highest ones, whose mean is its tail: a lesion fills little of a scan.
_TAIL = 0.005


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


__all__ = ["squared_gradient", "tail_mean"]
