"""The networks inside couplings: few layers, a small and known reach."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.blocks import ConditionBias, channels_last, conv

# Slope below zero: networks this narrow would lose features for good to plain rectifiers.
_LEAK = 0.05


class Conditioner(nn.Module):
    """Three convolutions from kept channels to a coupling's parameters; starts at zero.

    There is no normalisation over space: what happens at a voxel depends on `reach` voxels about it and
    on nothing else, so a tile with real neighbours gives the values of the whole.

    Args:
        dims: 2 or 3.
        inside, outside: channels; with none inside the parameters follow from the guide alone.
        width: features.
        given: channels of the feature map that is told besides, 0 for none.
        kernels: width of the three convolutions.
    """

    def __init__(
        self, dims: int, inside: int, outside: int, width: int, *, given: int = 0, kernels: Sequence[int] = (3, 1, 3)
    ) -> None:
        super().__init__()
        first, middle, last = kernels
        self.first = conv(dims, inside, width, first) if inside else None
        self.told = conv(dims, given, width, 1) if given else None
        self.middle = conv(dims, width, width, middle)
        self.last = conv(dims, width, outside, last)
        self.reach = sum(kernel // 2 for kernel in kernels)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)
        channels_last(self, dims)

    def forward(self, kept: Float[Tensor, "b c *space"], given: Tensor | None = None) -> Tensor:
        """Parameters (b, outside, *space); `given` (b or 1, k, *space or ones)."""
        hidden = kept.new_zeros(len(kept), 1, *kept.shape[2:]) if self.first is None else self.first(kept)
        if self.told is not None and given is not None:
            hidden = hidden + self.told(given)
        hidden = self.middle(functional.leaky_relu_(hidden, _LEAK))
        return self.last(functional.leaky_relu_(hidden, _LEAK))


class Guide(nn.Module):
    """What couplings are told besides the scan, as one feature map: condition, what is seen there, and place.

    Args:
        dims: 2 or 3.
        width: channels of the map.
        numbers: of a scan's condition, 0 for none.
        seen: channels of an image on the same positions, such as the coarser scan, 0 for none.
        extent: positions of the training scans along each axis.
        places: learn a feature vector for each place, at most so many along an axis, interpolated between; 0: none.
    """

    def __init__(
        self, dims: int, width: int, *, numbers: int = 0, seen: int = 0, extent: Sequence[int], places: int = 0
    ) -> None:
        super().__init__()
        self.extent, self.width = tuple(extent), width
        self.condition = ConditionBias(numbers, width)
        self.look = nn.Sequential(conv(dims, seen, width), nn.SiLU(), conv(dims, width, width)) if seen else None
        kept = [min(n, places) for n in extent]
        self.places = nn.Parameter(0.1 * torch.randn(1, width, *kept)) if places else None
        self.start = nn.Parameter(torch.zeros(1, width, *[1] * dims))
        self.reach = 2 if seen else 0

    def place(
        self, origin: Sequence[int], size: Sequence[int], whole: Sequence[int]
    ) -> Float[Tensor, "1 k *size"] | None:
        """What has been learned of where positions lie, about the scan's centre; beyond training's extent, of its edge.

        Args:
            origin, size: of a box of positions.
            whole: positions of the whole scan.
        """
        if self.places is None:
            return None
        lines = []
        for start, count, extent, total in zip(origin, size, self.extent, whole, strict=True):
            at = torch.arange(start, start + count, dtype=torch.float64) + 0.5 - total / 2
            lines.append((2 * at / extent).to(self.places))
        # grid_sample takes the last axis first.
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1)[None]
        return functional.grid_sample(self.places, grid, padding_mode="border", align_corners=False)

    def forward(self, cond: Tensor | None, seen: Tensor | None, place: Tensor | None) -> Tensor:
        """(b or 1, width, *positions or ones)."""
        told = self.start if place is None else self.start + place
        if self.look is not None and seen is not None:
            told = told + self.look(seen)
        if cond is not None and self.condition.table is not None:
            told = self.condition(told.expand(len(cond), *told.shape[1:]), cond)
        return functional.silu(told)


__all__ = ["Conditioner", "Guide"]
