"""The networks inside couplings: few layers, a small and known reach."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medgen.nets.blocks import ConditionBias, channels_last, conv, squeezed


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
        hidden = self.middle(torch.relu_(hidden))
        return self.last(torch.relu_(hidden))


class Guide(nn.Module):
    """What couplings are told besides the scan, as one feature map: condition, given image and place.

    Args:
        dims: 2 or 3.
        width: channels of the map.
        numbers: of a scan's condition, 0 for none.
        context: channels of the given image, 0 for none.
        block: voxels along each axis that become one position of this map.
        place: positions along each axis, to learn a feature vector for each of them; None for none.
    """

    def __init__(
        self, dims: int, width: int, *, numbers: int, context: int, block: Sequence[int], place: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.block = tuple(block)
        self.condition = ConditionBias(numbers, width)
        size = context
        for factor in self.block:
            size *= factor
        self.image = nn.Sequential(conv(dims, size, width), nn.SiLU(), conv(dims, width, width)) if context else None
        self.place = nn.Parameter(0.1 * torch.randn(1, width, *place)) if place else None
        self.start = nn.Parameter(torch.zeros(1, width, *[1] * dims))

    def forward(self, cond: Tensor | None, context: Tensor | None) -> Tensor:
        """(b or 1, width, *positions or ones)."""
        told = self.start if self.place is None else self.start + self.place
        if self.image is not None and context is not None:
            told = told + self.image(squeezed(context, self.block))
        if cond is not None and self.condition.table is not None:
            told = self.condition(told.expand(len(cond), *told.shape[1:]), cond)
        return torch.nn.functional.silu(told)


__all__ = ["Conditioner", "Guide"]
