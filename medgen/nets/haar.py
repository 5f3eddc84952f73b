"""The Haar wavelet: blocks of voxels to their mean and what the mean leaves out, and back, exactly."""

from collections.abc import Sequence
from math import log, prod

import torch
from jaxtyping import Float
from torch import Tensor

from medgen.nets.blocks import from_blocks, to_blocks


def haar(
    x: Float[Tensor, "b c *space"], factors: Sequence[int]
) -> tuple[Float[Tensor, "b c *coarse"], Float[Tensor, "b d *coarse"]]:
    """Mean of every block, on the scale of x, and the d = c (f - 1) differences within it; f = prod(factors).

    Rows of a Hadamard matrix H over f: y = H x / f along each block (Haar 1910; Mallat 1989, section 3).

    >>> mean, details = haar(torch.arange(8.0).reshape(1, 1, 2, 4), (2, 2))
    >>> mean.flatten().tolist(), details.shape
    ([2.5, 4.5], torch.Size([1, 3, 1, 2]))
    """
    size, channels = prod(factors), x.shape[1]
    rows = to_blocks(x, factors)
    with torch.autocast(x.device.type, enabled=False):
        bands = rows.unflatten(-1, (channels, size)) @ _hadamard(factors).to(x).T / size
    bands = bands.movedim((-2, -1), (1, 2))
    return bands[:, :, 0], bands[:, :, 1:].flatten(1, 2)


def unhaar(
    coarse: Float[Tensor, "b c *coarse"], details: Float[Tensor, "b d *coarse"], factors: Sequence[int]
) -> Float[Tensor, "b c *space"]:
    """The inverse of `haar`."""
    bands = torch.cat([coarse[:, :, None], details.unflatten(1, (coarse.shape[1], -1))], 2)
    with torch.autocast(coarse.device.type, enabled=False):
        rows = bands.movedim((1, 2), (-2, -1)) @ _hadamard(factors).to(coarse)
    return from_blocks(rows.flatten(-2), factors)


def haar_ladj(channels: int, factors: Sequence[int]) -> float:
    """log |det| of `haar` a block: each channel's is f^(-f/2)."""
    size = prod(factors)
    return -0.5 * channels * size * log(size)


def _hadamard(factors: Sequence[int]) -> Float[Tensor, "f f"]:
    matrix = torch.ones(1, 1)
    for factor in factors:
        if factor == 2:
            matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix


__all__ = ["haar", "haar_ladj", "unhaar"]
