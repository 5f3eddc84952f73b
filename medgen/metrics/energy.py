"""How far a set of generated scans is from real ones, cheap enough to be asked during training."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from medgen.metrics.sets import neighbour_shares

_SCALES = 3
# Distances a voxel below which scans are all alike, as parts of the grey range.
_ALIKE = 1e-3


def bands(x: Float[Tensor, "n c *space"]) -> list[Float[Tensor, "n _"]]:
    """A scan as groups of numbers: the detail that each halving takes away, how much of it where, and what is left.

    Args:
        x: scans.
    """
    pool = functional.avg_pool2d if x.ndim == 4 else functional.avg_pool3d
    found = []
    for _ in range(_SCALES):
        if min(x.shape[2:]) < 2:
            break
        coarse = pool(x, 2, ceil_mode=True)
        back = functional.interpolate(coarse, size=x.shape[2:], mode="nearest")
        detail = x - back
        found += [detail.flatten(1), pool(detail.abs(), 2, ceil_mode=True).flatten(1)]
        x = coarse
    return [*found, x.flatten(1)]


def energy_score(real: Float[Tensor, "n c *space"], drawn: Float[Tensor, "m c *space"]) -> Float[Tensor, " n"]:
    """How badly a set of draws foretells each real scan; its mean is least for draws of the scans' own distribution.

        ES(x) = mean_j |x - g_j| - 1/2 mean_{j != k} |g_j - g_k|

    Gneiting & Raftery 2007, "Strictly proper scoring rules", section 4.2; the mean over the groups of `bands`, each on
    the scale of the distances between scans (of its size where there is one scan only).

    Args:
        real: scans.
        drawn: two or more draws.

    >>> x = torch.randn(64, 1, 8, 8)
    >>> bool(energy_score(x, torch.randn(64, 1, 8, 8)).mean() < energy_score(x, torch.zeros(64, 1, 8, 8)).mean())
    True
    """
    total = torch.zeros(len(real), device=real.device)
    groups = list(zip(bands(real), bands(drawn), strict=True))
    for one, other in groups:
        scale = torch.cdist(one, one).mean() if len(one) > 1 else one.norm(dim=1).mean()
        scale = scale.clamp(min=_ALIKE * one.shape[1] ** 0.5)
        within = torch.cdist(other, other).sum() / (len(other) * max(1, len(other) - 1))
        total += (torch.cdist(one, other).mean(1) - within / 2) / scale
    return total / len(groups)


def coverage(real: Float[Tensor, "n c *space"], drawn: Float[Tensor, "m c *space"]) -> float:
    """Share of real scans with a draw among their nearest neighbours (Naeem et al. 2020, equation 6, k = 5).

    1 where draws are everywhere that scans are; it falls when the generator forgets some kinds of them.
    """
    rows, other = real.flatten(1), drawn.flatten(1)
    sides = ((rows, rows), (other, other), (rows, other))
    within, made, across = (torch.cdist(a, b).double().cpu().numpy() for a, b in sides)
    return neighbour_shares(within, made, across)["coverage"]


def variety(real: Float[Tensor, "n c *space"], drawn: Float[Tensor, "m c *space"]) -> float:
    """How far draws are from one another, over how far scans are: 1 as it should be, 0 where all draws are alike."""
    scans, draws = (torch.nn.functional.pdist(x.flatten(1)).mean() for x in (real, drawn))
    return float(draws / scans.clamp(min=1e-9))


__all__ = ["bands", "coverage", "energy_score", "variety"]
