"""Between grey values, which are whole numbers, and the real numbers that densities are about.

    x~ = (round(x (2^bits - 1)) + u) / 2^bits,   u in [0, 1)

With bits 0 data is continuous and nothing is changed.
"""

from math import log

import torch
from torch import Tensor


def grey(x: Tensor, bits: int) -> Tensor:
    """Whole grey values 0 to 2^bits - 1 of x on [0, 1]; values beyond count as its ends, NaN stays NaN."""
    return (x.clamp(0, 1) * (2**bits - 1)).round()


def dequantised(x: Tensor, u: Tensor, bits: int) -> Tensor:
    """x~ on [0, 1), from x on [0, 1] and noise u between two grey values."""
    return (grey(x, bits) + u) / 2**bits if bits else x


def quantised(x: Tensor, bits: int) -> Tensor:
    """The nearest grey value on [0, 1] below x~."""
    levels = 2**bits
    return (x * levels).floor().clamp(0, levels - 1) / (levels - 1) if bits else x


def nats_a_level(bits: int) -> float:
    """What the density of x~ loses a dimension when it is told per grey level."""
    return bits * log(2)


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) summed over channels, nats: (b, c, *positions) to (b, 1, *positions)."""
    return -0.5 * z.square().sum(1, keepdim=True) - 0.5 * z.shape[1] * log(2 * torch.pi)


__all__ = ["dequantised", "grey", "log_normal", "nats_a_level", "quantised"]
