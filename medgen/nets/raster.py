"""A number after another: networks that say of every channel of every voxel what is likely, given all before it.

Voxels are in raster order, the last axis fastest, and channels of a voxel one after another. A network says `outside`
numbers a channel; `walk` says the same voxel by voxel, for sampling.
"""

from collections.abc import Sequence
from math import prod
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.blocks import conv
from medgen.nets.causal import CausalStack, Walk
from medgen.nets.conditioner import Guide
from medgen.nets.masked import MaskedMLP, MaskedWalk
from medgen.nets.rowlstm import RowLSTM, RowWalk

# Neighbours differ by some hundredths.
_STEP = 8.0


class RasterNet(nn.Module):
    """Convolutions over earlier voxels, and a small network a channel that sees the earlier channels of the voxel.

    Args:
        body: takes `inside(dims, channels)`; of `outside` features (one channel) or `width` (several).
        guide: what every layer is told besides the scan; None for nothing.
        channels: of the scan.
        outside: numbers a channel.
        width: features the channels' networks start from.
    """

    def __init__(
        self, body: CausalStack | RowLSTM, guide: Guide | None, *, channels: int, outside: int, width: int
    ) -> None:
        super().__init__()
        self.body, self.guide, self.channels = body, guide, channels
        several = range(channels if channels > 1 else 0)
        self.earlier = nn.ModuleList([conv(body.dims, k, width, 1) if k else nn.Identity() for k in several])
        self.heads = nn.ModuleList([conv(body.dims, width, outside, 1) for _ in several])
        # What is told also speaks for itself: where a voxel lies and of which class the scan is says much of it.
        self.told = conv(body.dims, guide.width, channels * outside, 1) if guide is not None else None
        for parameter in [] if self.told is None else self.told.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def inside(dims: int, channels: int) -> int:
        """Channels that a body is shown."""
        return channels * (1 + dims) + 1

    def forward(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None
    ) -> Float[Tensor, "b c outside *space"]:
        """Numbers of every channel of every voxel."""
        given = self.given(x.shape[2:], cond, context)
        features, channels = self.body(entered(x), None, given), x.shape[1]
        found = torch.stack([self.head(features, 2 * x[:, :k] - 1) for k in range(channels)], 1)
        return found if given is None else found + self.alone(given)

    def head(self, features: Tensor, earlier: Tensor) -> Tensor:
        """A channel's numbers, from features and the channels before it."""
        if not self.heads:
            return features
        k = earlier.shape[1]
        with torch.autocast(features.device.type, enabled=False):
            return self.heads[k](functional.silu(features + self.earlier[k](earlier) if k else features))

    def alone(self, given: Tensor) -> Tensor:
        """What a guide's map says of every channel by itself."""
        assert self.told is not None
        return self.told(given).unflatten(1, (len(self.heads) or 1, -1))

    def given(self, space: Sequence[int], cond: Tensor | None, context: Tensor | None) -> Tensor | None:
        """The map of what every layer is told."""
        if self.guide is None:
            return None
        return self.guide(cond, context, self.guide.place((0,) * len(space), space, space))

    @torch.no_grad()
    def start(self, output: Float[Tensor, "outside channels"]) -> None:
        """Begin with these numbers for every voxel."""
        layers = cast("list[nn.Conv2d]", list(self.heads) or [self.body.last])
        for layer, numbers in zip(layers, output.T, strict=True):
            layer.weight.mul_(0.1)
            assert layer.bias is not None
            layer.bias.copy_(numbers)

    def walk(
        self, space: Sequence[int], count: int, cond: Tensor | None = None, context: Tensor | None = None
    ) -> "RasterWalk":
        """The same voxel by voxel."""
        given = self.given(space, cond, context)
        alone = None if given is None else self.alone(given)
        x = next(self.parameters()).new_zeros(count, self.channels, *space)
        return RasterWalk(self, self.body.walk(space, count, None, given), alone, x)


class RasterWalk:
    """The numbers of a `RasterNet`, one voxel and channel after another."""

    def __init__(self, net: RasterNet, walk: Walk | RowWalk, alone: Tensor | None, x: Tensor) -> None:
        self.net, self.walk, self.alone, self.x, self.features = net, walk, alone, x, torch.empty(0)

    def fill(self, x: Float[Tensor, "b c *space"]) -> None:
        """Say what the scan is; from then on one may begin at any row or slice."""
        self.x.copy_(x)
        self.walk.fill(entered(x))

    def at(self, index: Sequence[int], earlier: Float[Tensor, "b k"]) -> Float[Tensor, "b outside"]:
        """The numbers of the channel after `earlier` ones."""
        if earlier.shape[1] == 0:
            self.features = self.walk.at(index)
        found = self.net.head(self.features, (2 * earlier - 1).reshape(*earlier.shape, *[1] * len(index))).flatten(1)
        if self.alone is None:
            return found
        alone = self.alone[:, earlier.shape[1]]
        return (
            found
            + alone[(slice(None), slice(None), *(min(i, n - 1) for i, n in zip(index, alone.shape[2:], strict=True)))]
        )

    def put(self, index: Sequence[int], values: Float[Tensor, "b c"]) -> None:
        """Say what a voxel is."""
        self.x[(slice(None), slice(None), *index)] = values
        steps = []
        for axis, n in enumerate(index):
            before = (*index[:axis], max(0, n - 1), *index[axis + 1 :])
            steps.append(_STEP * (values - self.x[(slice(None), slice(None), *before)]))
        self.walk.put(index, torch.cat([2 * values - 1, *steps, torch.ones_like(values[:, :1])], 1))


def entered(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b d *space"]:
    """What convolutions see: x on -1 to 1, how it differs from the voxel before along each axis, and a 1.

    What is told of a voxel takes no later one. Differences are small and say most of what comes next; the 1 tells
    voxels from the border (Salimans et al. 2017).
    """
    steps = [_STEP * x.diff(dim=axis, prepend=x.narrow(axis, 0, 1)) for axis in range(2, x.ndim)]
    return torch.cat([2 * x - 1, *steps, torch.ones_like(x[:, :1])], 1)


class RasterMLP(nn.Module):
    """A masked MLP over all channels of all voxels.

    Args:
        size: channels of the scan, and voxels along each axis.
        outside: numbers a channel.
        width, depth: of the hidden layers.
        conditions: numbers of a condition.
        told: numbers that every voxel may see, such as a code.
        context: channels of an image that is given.
        dropout: in training.
    """

    def __init__(
        self, size: Sequence[int], outside: int, width: int, depth: int, *, conditions: int = 0,
        told: int = 0, context: int = 0, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels, self.shape = size[0], tuple(size[1:])
        told += context * prod(self.shape)
        self.mlp = MaskedMLP(prod(size), outside, width, depth, told=told, conditions=conditions, dropout=dropout)

    def forward(
        self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None, context: Tensor | None = None,
        code: Float[Tensor, "b told"] | None = None,
    ) -> Float[Tensor, "b c outside *space"]:  # fmt: skip
        """Numbers of every channel of every voxel."""
        with torch.autocast(x.device.type, enabled=False):
            found = self.mlp(_rows(x), cond, self._told(context, code))
        found = found.reshape(len(x), *self.shape, self.channels, -1)
        return found.movedim(-1, 1).movedim(-1, 1)

    def _told(self, context: Tensor | None, code: Tensor | None) -> Tensor | None:
        parts = ([] if code is None else [code]) + ([] if context is None else [context.flatten(1)])
        return torch.cat(parts, 1) if parts else None

    @torch.no_grad()
    def start(self, output: Float[Tensor, "outside places"]) -> None:
        """Begin with these numbers, place by place: channels of the first voxel, channels of the second, and so on."""
        self.mlp.last.bias.copy_(output.T.flatten())

    def walk(
        self, space: Sequence[int], count: int, cond: Tensor | None = None, context: Tensor | None = None,
        code: Tensor | None = None,
    ) -> "RasterMLPWalk":  # fmt: skip
        """The same voxel by voxel."""
        return RasterMLPWalk(self, self.mlp.walk(count, cond, self._told(context, code)))


class RasterMLPWalk:
    """The numbers of a `RasterMLP`, one voxel and channel after another."""

    def __init__(self, net: RasterMLP, walk: MaskedWalk) -> None:
        self.net, self.walk, self.rows, self.known = net, walk, None, 0

    def fill(self, x: Float[Tensor, "b c *space"]) -> None:
        """Say what the scan is; from then on one may begin at any row or slice."""
        self.rows = _rows(x)

    @torch.no_grad()
    def at(self, index: Sequence[int], earlier: Float[Tensor, "b k"]) -> Float[Tensor, "b outside"]:
        """The numbers of the channel after `earlier` ones."""
        place = self._place(index)
        while self.rows is not None and self.known < place:
            self._put(self.rows[:, self.known])
        self._until(place, 2 * earlier - 1)
        return self.walk.at(place + earlier.shape[1])

    @torch.no_grad()
    def put(self, index: Sequence[int], values: Float[Tensor, "b c"]) -> None:
        """Say what a voxel is."""
        self._until(self._place(index), 2 * values - 1)

    def _until(self, place: int, values: Tensor) -> None:
        for k in range(self.known - place, values.shape[1]):
            self._put(values[:, k])

    def _put(self, value: Tensor) -> None:
        self.walk.put(self.known, value)
        self.known += 1

    def _place(self, index: Sequence[int]) -> int:
        place = 0
        for n, size in zip(index, self.net.shape, strict=True):
            place = place * size + n
        return place * self.net.channels


def _rows(x: Tensor) -> Tensor:
    """(b, voxels * channels) on -1 to 1, channels of a voxel beside each other."""
    return (2 * x - 1).flatten(2).transpose(1, 2).flatten(1)


__all__ = ["RasterMLP", "RasterMLPWalk", "RasterNet", "RasterWalk", "entered"]
