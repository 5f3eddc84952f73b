"""The row LSTM: a recurrence over rows (slices in volumes), whole rows at a time.

Van den Oord et al. 2016 ("Pixel recurrent neural networks", section 3.1 and equation 3): gates come from what lies
before within the row (input to state, masked) and from the row above (state to state, a convolution along the row):

    o, f, i, g = s(K_ss * h_above + K_is * x),   c = f c_above + i g,   h = o tanh(c)

In volumes the recurrence runs over slices, and what lies before within the slice is told by causal stacks. A state
sees the row above within its kernel, so the context is a triangle, as in the paper; every layer widens it.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.blocks import channels_last, conv, lopsided
from medgen.nets.causal import CausalStack, Style


class RowLSTM(nn.Module):
    """A feature map from earlier positions alone, by recurrence over the first axis.

    Args:
        dims: 2 or 3.
        inside, outside: channels.
        width: features of the state.
        depth: LSTM layers, each added to the one before.
        kernel: width of the convolutions along the row, or within the slice.
        given: channels of a feature map that every layer is told, 0 for none.
        dropout: part of what a layer adds that is dropped in training.

    Example:
        >>> RowLSTM(2, 1, 5, width=8, depth=2)(torch.zeros(3, 1, 6, 7)).shape
        torch.Size([3, 5, 6, 7])
    """

    def __init__(
        self, dims: int, inside: int, outside: int, width: int, depth: int, *, kernel: int = 3, given: int = 0,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        assert depth > 0
        self.dims, self.width = dims, width
        self.within = CausalStack(dims, inside, width, width, 2, given=given, style=Style(kernel=kernel, first=1))
        self.layers = nn.ModuleList([_Layer(dims, width, kernel, given, dropout) for _ in range(depth)])
        self.last = conv(dims, width, outside, 1)
        channels_last(self, dims)

    def forward(
        self, features: Float[Tensor, "b inside *space"], cond: Tensor | None = None, given: Tensor | None = None
    ) -> Float[Tensor, "b outside *space"]:
        """The output everywhere; what is known besides is told by `given` (b or 1, given, *space) alone."""
        y = self.within(features, None, given)
        for layer in self.recurrences():
            y, _, _ = layer(y, given)
        with torch.autocast(y.device.type, enabled=False):
            return self.last(functional.silu(y.to(self.last.weight.dtype)))

    def walk(
        self, space: Sequence[int], count: int, cond: Tensor | None = None, given: Tensor | None = None
    ) -> "RowWalk":
        """The same position by position."""
        return RowWalk(self, tuple(space), count, given)

    def recurrences(self) -> "list[_Layer]":
        """The layers, first to last."""
        return cast("list[_Layer]", list(self.layers))


class RowWalk:
    """The output of a `RowLSTM` at one position after another, in raster order."""

    def __init__(self, net: RowLSTM, space: tuple[int, ...], count: int, given: Tensor | None) -> None:
        self.net, self.given = net, given
        self.within = net.within.walk(space, count, None, given)
        weight = net.last.weight
        assert isinstance(weight, Tensor)

        def empty(channels: int) -> Tensor:
            return weight.new_zeros(count, channels, *space)

        layers = net.recurrences()
        self.layers = layers
        self.told = [layer.told(given) for layer in layers]
        # What enters each layer, with one position before the row; states; what the row above says.
        self.enters = [functional.pad(empty(net.width), (layer.left, 0)) for layer in layers]
        self.states = [(empty(net.width), empty(net.width)) for _ in layers]
        self.above = [empty(4 * net.width)[:, :, :1] for _ in layers]

    @torch.no_grad()
    def fill(self, features: Float[Tensor, "b inside *space"]) -> None:
        """Say what is everywhere; from then on one may begin at any row."""
        self.within.fill(features)
        y = self.net.within(features, None, self.given)
        for layer, enters, (h, c) in zip(self.layers, self.enters, self.states, strict=True):
            enters[..., layer.left :].copy_(y)
            y, found_h, found_c = layer(y, self.given)
            h.copy_(found_h)
            c.copy_(found_c)

    def put(self, index: Sequence[int], features: Float[Tensor, "b inside"]) -> None:
        """Say what is at a position."""
        self.within.put(index, features)

    @torch.no_grad()
    def at(self, index: Sequence[int]) -> Float[Tensor, "b outside *one"]:
        """The output at a position."""
        row, ones = index[0], [1] * self.net.dims
        if not any(index[1:]) and row:
            for layer, above, (h, _) in zip(self.layers, self.above, self.states, strict=True):
                above.copy_(layer.above(h[:, :, row - 1 : row]))
        y = self.within.at(index)
        here = (slice(None), slice(None), *index)
        before = (slice(None), slice(None), max(0, row - 1), *index[1:])
        for number, layer in enumerate(self.layers):
            enters, (h, c) = self.enters[number], self.states[number]
            enters[(slice(None), slice(None), *index[:-1], index[-1] + layer.left)] = y.flatten(1)
            window = enters
            for axis, n in enumerate(index[:-1]):
                window = window.narrow(2 + axis, n, 1)
            gates = layer.enter(window.narrow(-1, index[-1], layer.left + 1))
            gates = gates + self.above[number][(slice(None), slice(None), 0, *index[1:])].reshape(gates.shape)
            told = self.told[number]
            if told is not None:
                spread = told.expand(*told.shape[:2], *enters.shape[2:-1], enters.shape[-1] - layer.left)
                gates = gates + spread[here].reshape(len(told), -1, *ones)
            old = c[before].reshape(y.shape) if row else torch.zeros_like(y)
            state, cell = _cell(gates, old)
            h[here], c[here] = state.flatten(1), cell.flatten(1)
            y = y + layer.out(layer.dropout(state))
        return self.net.last(functional.silu(y))


class _Layer(nn.Module):
    """One LSTM over rows, added to what enters it."""

    def __init__(self, dims: int, width: int, kernel: int, given: int, dropout: float) -> None:
        super().__init__()
        self.left = kernel // 2
        along = (*[1] * (dims - 1), self.left + 1)
        self.enter = lopsided(dims, width, 4 * width, along, padded=(False,) * dims)
        self.above = lopsided(dims, width, 4 * width, (1, *[kernel] * (dims - 1)))
        self.given = conv(dims, given, 4 * width, 1) if given else None
        self.dropout = nn.Dropout(dropout)
        self.out = conv(dims, width, width, 1)

    def told(self, given: Tensor | None) -> Tensor | None:
        """What the given map adds to the gates."""
        return self.given(given) if self.given is not None and given is not None else None

    def forward(self, y: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Everywhere: what leaves, and the states h and c."""
        gates = self.enter(functional.pad(y, (self.left, 0)))
        told = self.told(given)
        gates = gates if told is None else gates + told
        h, c, states, cells = None, torch.zeros_like(y[:, :, :1]), [], []
        for row in gates.split(1, 2):
            h, c = _cell(row if h is None else row + self.above(h), c)
            states.append(h)
            cells.append(c)
        found = torch.cat(states, 2)
        return y + self.out(self.dropout(found)), found, torch.cat(cells, 2)


def _cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The next h and c."""
    out, forget, enter, new = gates.float().chunk(4, 1)
    cell = torch.sigmoid(forget + 1) * cell + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(cell), cell


__all__ = ["RowLSTM", "RowWalk"]
