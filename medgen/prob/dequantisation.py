"""Between grey values, which are whole numbers, and the real numbers that densities are about.

    x~ = (round(x (2^bits - 1)) + u) / 2^bits,   u in [0, 1)

With bits 0 data is continuous and nothing is changed.
"""

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def grey(x: Tensor, bits: int) -> Tensor:
    """Whole grey values 0 to 2^bits - 1 of x on [0, 1]; values beyond count as its ends, NaN stays NaN.

    The gradient is that of values that are not rounded, as a density is about those between two grey values.
    """
    return rounded(x.clamp(0, 1) * (2**bits - 1))


def rounded(x: Tensor) -> Tensor:
    """The nearest whole number, with the gradient of the identity."""
    return _Rounded.apply(x) if x.requires_grad else x.round()  # pyright: ignore[reportReturnType]


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


def level_densities(
    noises: Sequence[Tensor], ladjs: Sequence[Tensor], costs: Sequence[float]
) -> dict[str, Float[Tensor, " b"]]:
    """What the log density of a flow is the sum of, nats: of each level its noise and its volume.

    Args:
        noises: of every level, (b, c, *positions).
        ladjs: of every level, (b, 1, *positions).
        costs: nats a position of every level, which count with the noise.
    """
    found = {}
    for number, (noise, ladj, cost) in enumerate(zip(noises, ladjs, costs, strict=True)):
        found[f"level {number}: noise"] = (log_normal(noise) - cost).flatten(1).sum(1)
        found[f"level {number}: volume"] = ladj.flatten(1).sum(1)
    return found


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


__all__ = ["dequantised", "grey", "level_densities", "log_normal", "nats_a_level", "quantised", "rounded"]
