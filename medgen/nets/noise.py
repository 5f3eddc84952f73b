"""Noise with structure, for networks that learn to take it away."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Noise goes where a scan is brighter than this; what is darker is air.
_AIR = 0.01


def coarse_noise(like: Float[Tensor, "b c *space"], sigma: float, coarseness: int) -> Float[Tensor, "b c *space"]:
    """Gaussian values of standard deviation `sigma`, `coarseness` voxels apart, interpolated linearly between them.

    Where the values lie is drawn, too, the same for the whole batch; torch's random state decides.
    """
    counts = [-(-size // coarseness) + 2 for size in like.shape[2:]]
    values = sigma * torch.randn(*like.shape[:2], *counts, device=like.device)
    mode = "bilinear" if len(counts) == 2 else "trilinear"
    fine = nn.functional.interpolate(values, scale_factor=float(coarseness), mode=mode)
    # The outermost half block is not between values.
    for axis, size in enumerate(like.shape[2:], 2):
        begin = coarseness // 2 + int(torch.randint(coarseness, ()))
        fine = fine.narrow(axis, begin, size)
    return fine


def foreground_noise(x: Float[Tensor, "b c *space"], sigma: float, coarseness: int) -> Float[Tensor, "b c *space"]:
    """Coarse noise where any channel is brighter than air, 0 elsewhere (Kascenas et al. 2022, section 3.1)."""
    return coarse_noise(x, sigma, coarseness) * (x.amax(1, keepdim=True) > _AIR)


__all__ = ["coarse_noise", "foreground_noise"]
