"""The first adversarial networks: perceptrons, and plain strided convolutions."""

from collections.abc import Sequence
from math import prod
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from medgen.nets.adversarial.base import Architecture, Critic, Frame, Generator, beside_scan, spectral
from medgen.nets.blocks import Fold, Unfold, conv

_LEAK = 0.2
# Spread of the first weights (Radford et al. 2016, section 4).
_SPREAD = 0.02


class Perceptron(Architecture):
    """Fully connected layers (Goodfellow et al. 2014): a scan is a row of numbers, without neighbours.

    Args:
        kind: 'perceptron'.
        hidden: units of a hidden layer; 0: sixteen times the width.
        dropout: part of the critic's units left out in training.
    """

    kind: Literal["perceptron"] = "perceptron"
    hidden: int = Field(default=0, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def generator(self, frame: Frame) -> Generator:
        """Hidden layers with rectifiers, then every voxel at once."""
        return _PerceptronGenerator(frame, self.hidden or 16 * frame.width)

    def critic(self, frame: Frame) -> Critic:
        """Hidden layers with leaky rectifiers."""
        return _PerceptronCritic(frame, self.hidden or 16 * frame.width, self.dropout)


class _PerceptronGenerator(Generator):
    def __init__(self, frame: Frame, hidden: int) -> None:
        super().__init__()
        self.shape, self.draws = (frame.channels, *frame.shape), frame.code
        layers: list[nn.Module] = []
        for inside in (frame.told, *[hidden] * frame.depth):
            layers += [spectral(nn.Linear(inside, hidden), frame.spectral), nn.ReLU()]
        layers += [spectral(nn.Linear(hidden, prod(self.shape)), frame.spectral), nn.Tanh()]
        self.body = nn.Sequential(*layers)

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """One scan."""
        return [self.body(self.joined(code, told)).reshape(-1, *self.shape)]


class _PerceptronCritic(Critic):
    def __init__(self, frame: Frame, hidden: int, dropout: float) -> None:
        super().__init__()
        self.width = hidden
        layers: list[nn.Module] = []
        for inside in ((frame.channels + frame.beside) * prod(frame.shape), *[hidden] * frame.depth):
            layers += [spectral(nn.Linear(inside, hidden), frame.spectral), nn.LeakyReLU(_LEAK), nn.Dropout(dropout)]
        self.body = nn.Sequential(*layers)

    def forward(self, scans: Sequence[Tensor], beside: Tensor | None = None) -> Tensor:
        """(b, width)."""
        return self.body(beside_scan(scans[-1], beside).flatten(1))


class DCGAN(Architecture):
    """Strided convolutions with batch normalisation (Radford et al. 2016, "Unsupervised representation learning").

    Args:
        kind: 'dcgan'.
        norm: normalise the critic over the batch, too; without for losses that look at single scans.
        dropout: part of the critic's features left out in training.
    """

    kind: Literal["dcgan"] = "dcgan"
    norm: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def generator(self, frame: Frame) -> Generator:
        """A linear map to the coarsest positions, then transposed convolutions."""
        return _DCGANGenerator(frame)

    def critic(self, frame: Frame) -> Critic:
        """Convolutions of stride 2 with leaky rectifiers; features are all there is at the coarsest positions."""
        return _DCGANCritic(frame, self.norm and not frame.spectral, self.dropout)


class _DCGANGenerator(Generator):
    def __init__(self, frame: Frame) -> None:
        super().__init__()
        dims, widths = frame.dims, frame.widths
        self.start, self.draws = (widths[-1], *frame.at(frame.levels)), frame.code
        self.code = spectral(nn.Linear(frame.told, prod(self.start)), frame.spectral)
        up = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        layers: list[nn.Module] = [_batch_norm(dims, widths[-1]), nn.ReLU()]
        for level in reversed(range(frame.levels)):
            step = up(widths[level + 1], widths[level], 4, stride=2, padding=1)
            layers += [spectral(step, frame.spectral), _batch_norm(dims, widths[level]), nn.ReLU()]
        layers += [spectral(conv(dims, widths[0], frame.channels * frame.fold**dims), frame.spectral)]
        self.body = nn.Sequential(*layers, Unfold(dims, frame.fold), nn.Tanh())
        if not frame.spectral:
            _begin(self)

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """One scan."""
        return [self.body(self.code(self.joined(code, told)).reshape(-1, *self.start))]


class _DCGANCritic(Critic):
    def __init__(self, frame: Frame, norm: bool, dropout: float) -> None:
        super().__init__()
        dims, widths = frame.dims, frame.widths
        self.fold = Fold(dims, frame.fold)
        inside = (frame.channels + frame.beside) * frame.fold**dims
        layers: list[nn.Module] = [spectral(conv(dims, inside, widths[0]), frame.spectral), nn.LeakyReLU(_LEAK)]
        down = nn.Conv2d if dims == 2 else nn.Conv3d
        for level in range(frame.levels):
            step = down(widths[level], widths[level + 1], 4, stride=2, padding=1)
            layers += [spectral(step, frame.spectral)]
            layers += [_batch_norm(dims, widths[level + 1])] if norm else []
            layers += [nn.LeakyReLU(_LEAK), nn.Dropout(dropout)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.width = widths[-1] * prod(frame.at(frame.levels))
        if not frame.spectral:
            _begin(self)

    def forward(self, scans: Sequence[Tensor], beside: Tensor | None = None) -> Tensor:
        """(b, width)."""
        return self.body(self.fold(beside_scan(scans[-1], beside)))


def _batch_norm(dims: int, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if dims == 2 else nn.BatchNorm3d(width)


def _begin(module: nn.Module) -> None:
    """Weights from a narrow normal distribution, as the paper has them."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear):
            nn.init.normal_(layer.weight, std=_SPREAD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


__all__ = ["DCGAN", "Perceptron"]
