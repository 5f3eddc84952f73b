"""The small network that metrics teach: its ladder of levels, the order in which it is shown scans, and how coarse."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Ladder(nn.Module):
    """Five convolutions on three levels of halved edges (by `widths`), with batch normalisation; the last level's maps.

    Args:
        channels: of a scan.
        widths: channels of each level, the finest first; it has one convolution, the others two.
        dims: 2 or 3.
    """

    def __init__(self, channels: int, widths: Sequence[int], dims: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.pool = functional.max_pool2d if dims == 2 else functional.max_pool3d
        levels, inside = [], channels
        for width in widths:
            level = [conv(inside, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
            if levels:  # the finest level costs most and sees least
                level += [conv(width, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
            levels.append(nn.Sequential(*level))
            inside = width
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Float[Tensor, "n c *space"]) -> Float[Tensor, "n w *coarse"]:
        """The maps of the coarsest level."""
        for n, level in enumerate(self.levels):
            x = level(self.pool(x, 2) if n and min(x.shape[2:]) > 1 else x)
        return x


def shuffled_rows(count: int, size: int, steps: int) -> list[Tensor]:
    """Rows of each of `steps` steps of `size` rows: shuffled passes over `count` scans, by torch's random state."""
    passes = -(-steps * size // count)
    return list(torch.cat([torch.randperm(count) for _ in range(passes)])[: steps * size].split(size))


def averaged_down(scans: Float[Tensor, "n c *space"], edge: int) -> Float[Tensor, "n c *coarse"]:
    """Means over blocks of voxels, such that no axis is longer than `edge`; as they are where none is.

    >>> averaged_down(torch.ones(1, 1, 50, 64), 32).shape
    torch.Size([1, 1, 25, 32])
    """
    factor = -(-max(scans.shape[2:]) // edge)
    pool = functional.avg_pool2d if scans.ndim == 4 else functional.avg_pool3d
    return pool(scans, factor, ceil_mode=True) if factor > 1 else scans


__all__ = ["Ladder", "averaged_down", "shuffled_rows"]
