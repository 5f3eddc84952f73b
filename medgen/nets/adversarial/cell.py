"""The generator that a search found (AutoGAN)."""

from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.adversarial.base import Architecture, Critic, Frame, Generator, spectral
from medgen.nets.adversarial.growing import with_levels
from medgen.nets.adversarial.residual import ResNet
from medgen.nets.blocks import Unfold, channels_last, conv

# What the search found for CIFAR-10 (Gong et al. 2019; the authors publish it as one row of numbers). Each cell has:
#   convolution    0 before, 1 after the activation
#   normalisation  0 none, 1 over the batch, 2 over the scan
#   upsampling     0 linear, 1 nearest, 2 transposed convolution
#   shortcut       1 if what comes in is added to what goes out
#   skips          from the second cell on: a bit for every cell before, 1 if its inner features are added; the lowest
#                  is the cell just before
GENOTYPE = ((1, 0, 1, 1), (1, 0, 0, 1, 1), (1, 0, 1, 0, 3))


class Cell(Architecture):
    """Cells that a controller put together, one a level (Gong et al. 2019, "AutoGAN: neural architecture search").

    The three cells found for CIFAR-10; with fewer levels the first of them, with more the last again and again.

    Args:
        kind: 'autogan'.
    """

    kind: Literal["autogan"] = "autogan"

    def generator(self, frame: Frame) -> Generator:
        """One cell for every doubling of the size."""
        return _CellGenerator(with_levels(frame, self.kind))

    def critic(self, frame: Frame) -> Critic:
        """Residual blocks that halve the size."""
        return ResNet(pool="sum").critic(frame)


class Wiring(NamedTuple):
    """How a cell is built.

    Args:
        up: how features are brought to twice the size.
        shortcut: what comes in is added to what goes out.
        skips: how many cells back those are whose inner features are added.
    """

    up: Literal["nearest", "linear"]
    shortcut: bool
    skips: tuple[int, ...]


def wirings(cells: int) -> list[Wiring]:
    """What `GENOTYPE` says of so many cells: all without normalisation, activation before convolution.

    >>> wirings(2)[1]
    Wiring(up='linear', shortcut=True, skips=(1,))
    """
    found = []
    for n in range(cells):
        _, _, up, shortcut, *skips = GENOTYPE[min(n, len(GENOTYPE) - 1)]
        bits = skips[0] if skips else 0
        back = tuple(k for k in range(1, n + 1) if bits >> (k - 1) & 1)
        found.append(Wiring("nearest" if up else "linear", bool(shortcut), back))
    return found


class _Cell(nn.Module):
    """conv(act(h + skips)) + shortcut, h = conv(up(act(x)))."""

    def __init__(self, frame: Frame, level: int, wiring: Wiring) -> None:
        super().__init__()
        dims, widths = frame.dims, frame.widths
        inside, outside = widths[level + 1], widths[level]
        self.wiring, self.space = wiring, frame.at(level)
        self.mode = "nearest" if wiring.up == "nearest" else {2: "bilinear", 3: "trilinear"}[dims]
        self.first = spectral(conv(dims, inside, outside), frame.spectral)
        self.second = spectral(conv(dims, outside, outside), frame.spectral)
        self.shortcut = spectral(conv(dims, inside, outside, 1), frame.spectral) if wiring.shortcut else None
        # The cell k steps back left off k levels coarser.
        self.skips = nn.ModuleList(
            spectral(conv(dims, widths[level + back], outside, 1), frame.spectral) for back in wiring.skips
        )

    def forward(self, x: Tensor, before: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Inner features, which later cells may add to theirs, and what goes out; `before` are those of other cells."""
        inner = self.first(self._up(functional.relu(x)))
        for skip, back in zip(self.skips, self.wiring.skips, strict=True):
            inner = inner + skip(self._up(before[-back]))
        out = self.second(functional.relu(inner))
        return inner, out if self.shortcut is None else out + self.shortcut(self._up(x))

    def _up(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, size=self.space, mode=self.mode)


class _CellGenerator(Generator):
    def __init__(self, frame: Frame) -> None:
        super().__init__()
        dims, widths = frame.dims, frame.widths
        self.start, self.draws = (widths[-1], *frame.at(frame.levels)), frame.code
        self.code = spectral(nn.Linear(frame.told, prod(self.start)), frame.spectral)
        self.cells = nn.ModuleList(
            _Cell(frame, level, wiring)
            for level, wiring in zip(reversed(range(frame.levels)), wirings(frame.levels), strict=True)
        )
        self.norm = nn.BatchNorm2d(widths[0]) if dims == 2 else nn.BatchNorm3d(widths[0])
        self.last = spectral(conv(dims, widths[0], frame.channels * frame.fold**dims), frame.spectral)
        self.unfold = Unfold(dims, frame.fold)
        channels_last(self, dims)

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """One scan."""
        x, inner = self.code(self.joined(code, told)).reshape(-1, *self.start), []
        for cell in self.cells:
            features, x = cell(x, inner)
            inner.append(features)
        return [torch.tanh(self.unfold(self.last(functional.relu(self.norm(x)))))]


__all__ = ["GENOTYPE", "Cell", "Wiring", "wirings"]
