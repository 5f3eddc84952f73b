"""Residual generators and critics, from SNGAN to BigGAN and R3GAN: what sets them apart is a field."""

from collections.abc import Sequence
from math import prod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.adversarial.attention import Attention, AttentionName
from medgen.nets.adversarial.base import Architecture, Critic, Frame, Generator, beside_scan, doubled, halved, spectral
from medgen.nets.blocks import Fold, Unfold, channels_last, conv

_LEAK = 0.2
NormName = Literal["none", "batch", "condition"]


class ResNet(Architecture):
    """Residual blocks that halve or double the size (Gulrajani et al. 2017; Miyato et al. 2018).

    Args:
        kind: 'resnet'.
        norm: of the generator: 'none' (R3GAN), 'batch', or 'condition', whose gain and bias the condition decides.
        attention: self-attention in both networks: 'none', 'full' (SAGAN) or 'local' (YLG).
        attend: at which level, in halvings.
        split: every block's normalisation is told its own part of the code (BigGAN).
        noise: noise at every position of every level of the generator, weighted by learned gains (Karras et al. 2019).
        pool: the critic's features: 'sum' over positions, or 'weighted', one weight a position.
    """

    kind: Literal["resnet"] = "resnet"
    guided: ClassVar[bool] = True
    norm: NormName = "none"
    attention: AttentionName = "none"
    attend: int = Field(default=1, ge=0)
    split: bool = False
    noise: bool = False
    pool: Literal["sum", "weighted"] = "weighted"

    def generator(self, frame: Frame) -> Generator:
        """A linear map to the coarsest positions, then blocks that double the size."""
        return _ResNetGenerator(frame, self)

    def critic(self, frame: Frame) -> Critic:
        """Blocks that halve the size."""
        return _ResNetCritic(frame, self)


class Normalisation(nn.Module):
    """Normalises over the batch, then applies a gain and a bias: learned, or linear in what is told.

    de Vries et al. 2017, "Modulating early visual processing by language"; Miyato & Koyama 2018 for classes.
    """

    def __init__(self, dims: int, width: int, kind: NormName, told: int) -> None:
        super().__init__()
        plain = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
        tells = kind == "condition" and told > 0
        self.norm = None if kind == "none" else plain(width, affine=not tells)
        self.gain, self.bias = (nn.Linear(told, width, bias=n == 1) if tells else None for n in range(2))
        for layer in (self.gain, self.bias):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Float[Tensor, "b w *space"], told: Tensor | None) -> Float[Tensor, "b w *space"]:
        """Same shape out as in."""
        x = x if self.norm is None else self.norm(x)
        if self.gain is None or self.bias is None:
            return x
        over = (..., *[None] * (x.ndim - 2))
        return x * (1 + self.gain(told)[over]) + self.bias(told)[over]


class _Block(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), at another size where asked; without norms it starts as the identity."""

    def __init__(self, frame: Frame, inside: int, outside: int, *, norm: NormName, told: int, size: str) -> None:
        super().__init__()
        dims, self.size, self.norm = frame.dims, size, norm
        self.norms = nn.ModuleList([Normalisation(dims, width, norm, told) for width in (inside, outside)])
        self.first = spectral(conv(dims, inside, outside), frame.spectral)
        second = conv(dims, outside, outside)
        self.skip = None if inside == outside else spectral(conv(dims, inside, outside, 1), frame.spectral)
        if norm == "none" and not frame.spectral:
            nn.init.zeros_(next(second.parameters()))
        self.second = spectral(second, frame.spectral)

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        """Features at the new size."""
        hidden = self._active(self.norms[0](x, told))
        if self.size == "double":
            hidden, x = doubled(hidden), doubled(x)
        hidden = self.first(hidden)
        if self.size == "half":  # between the convolutions, which costs less than after them
            hidden, x = halved(hidden), halved(x)
        hidden = self.second(self._active(self.norms[1](hidden, told)))
        return hidden + (x if self.skip is None else self.skip(x))

    def _active(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(x, _LEAK) if self.norm == "none" else functional.relu(x)


class _ResNetGenerator(Generator):
    def __init__(self, frame: Frame, kind: ResNet) -> None:
        super().__init__()
        dims, widths, levels = frame.dims, frame.widths, frame.levels
        self.start, self.length = (widths[-1], *frame.at(levels)), frame.code
        # BigGAN's blocks are told a part of the code each, others the condition.
        self.parts = levels * frame.depth + 1 if kind.split else 1
        part = -(-frame.code // self.parts)
        self.code = spectral(nn.Linear(part + frame.numbers, prod(self.start)), frame.spectral)
        sizes = {"norm": kind.norm, "told": frame.numbers + (part if kind.split else 0)}
        self.blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            self.blocks.append(_Block(frame, widths[level + 1], widths[level], size="double", **sizes))
            self.blocks += [
                _Block(frame, widths[level], widths[level], size="same", **sizes) for _ in range(1, frame.depth)
            ]
        self.depth = frame.depth
        self.attention, self.attended = _attention(frame, kind), levels - 1 - _attended_level(frame, kind)
        self.grains = GrainGains(frame) if kind.noise else None
        self.draws = frame.code + (self.grains.count if self.grains else 0)
        plain = kind.norm == "none"
        self.norm, self.leak = Normalisation(dims, widths[0], "none" if plain else "batch", 0), _LEAK if plain else 0.0
        self.last = spectral(conv(dims, widths[0], frame.channels * frame.fold**dims), frame.spectral)
        inside = frame.context * frame.fold**dims
        self.looks = nn.ModuleList(conv(dims, inside, widths[level]) for level in reversed(range(levels)) if inside)
        # What the scan to begin with shows at the finest level takes more than one layer to change.
        self.refine = _Block(frame, widths[0], widths[0], size="same", **sizes) if inside else None
        self.fold, self.unfold, self.bounded = Fold(dims, frame.fold), Unfold(dims, frame.fold), not plain
        if inside and not frame.spectral:  # the scan to begin with is what it begins with
            for parameter in self.last.parameters():
                nn.init.zeros_(parameter)
        channels_last(self, dims)

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """One scan."""
        code, grain = code[:, : self.length], code[:, self.length :]
        size = -(-self.length // self.parts)
        rows = functional.pad(code, (0, size * self.parts - self.length)).split(size, 1)
        x = self.code(self.joined(rows[0], told)).reshape(-1, *self.start)
        guides = [] if image is None else self._guides(image)
        for n, block in enumerate(self.blocks):
            x = block(x, told if self.parts == 1 else self.joined(rows[n + 1], told))
            level, nth = divmod(n, self.depth)
            if nth == 0:
                x = x if self.grains is None else self.grains(x, grain, level)
                x = x if image is None else x + self.looks[level](guides[level])
            if nth == self.depth - 1 and self.attention is not None and level == self.attended:
                x = self.attention(x)
        if self.refine is not None:
            x = self.refine(x, told if self.parts == 1 else self.joined(rows[0], told))
        x = self.unfold(self.last(functional.leaky_relu(self.norm(x, None), self.leak)))
        return [torch.tanh(x) if self.bounded else x]

    def _guides(self, image: Tensor) -> list[Tensor]:
        """The scan to begin with at every level, the coarsest first."""
        guides = [self.fold(image)]
        for _ in self.looks[1:]:
            guides.append(halved(guides[-1]))
        return guides[::-1]


class GrainGains(nn.Module):
    """Noise for every position of every level of a generator, each feature with a gain that starts at zero.

    Args:
        frame: of the generator; `count` normal numbers a scan.
    """

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.spaces = [frame.at(level) for level in reversed(range(frame.levels))]
        self.count = sum(prod(space) for space in self.spaces)
        self.gains = nn.ParameterList(torch.zeros(frame.widths[level]) for level in reversed(range(frame.levels)))

    def forward(self, x: Float[Tensor, "b w *space"], grain: Float[Tensor, "b n"], level: int) -> Tensor:
        """Features with noise; `level` counts from the coarsest. Without any numbers in `grain` there is none."""
        if not grain.shape[1]:
            return x
        sizes = [prod(space) for space in self.spaces]
        noise = grain.split(sizes, 1)[level].reshape(-1, 1, *self.spaces[level])
        return x + self.gains[level].reshape(-1, *[1] * len(self.spaces[level])) * noise


class _ResNetCritic(Critic):
    def __init__(self, frame: Frame, kind: ResNet) -> None:
        super().__init__()
        dims, widths, levels = frame.dims, frame.widths, frame.levels
        self.fold, self.width = Fold(dims, frame.fold), widths[-1]
        inside = (frame.channels + frame.beside) * frame.fold**dims
        self.stem = spectral(conv(dims, inside, widths[0]), frame.spectral)
        norm: NormName = "none"
        blocks: list[nn.Module] = []
        for level in range(levels):
            at = level == _attended_level(frame, kind)
            attention = _attention(frame, kind) if at else None
            blocks += [] if attention is None else [attention]
            blocks += [
                _Block(frame, widths[level], widths[level], norm=norm, told=0, size="same")
                for _ in range(1, frame.depth)
            ]
            blocks += [_Block(frame, widths[level], widths[level + 1], norm=norm, told=0, size="half")]
        blocks += [_Block(frame, widths[-1], widths[-1], norm=norm, told=0, size="same")]
        self.body = nn.Sequential(*blocks)
        self.weights = nn.Parameter(torch.ones(self.width, *frame.at(levels))) if kind.pool == "weighted" else None
        channels_last(self, dims)

    def forward(self, scans: Sequence[Tensor], beside: Tensor | None = None) -> Tensor:
        """(b, width)."""
        x = functional.leaky_relu(self.body(self.stem(self.fold(beside_scan(scans[-1], beside)))), _LEAK)
        x = x if self.weights is None else x * self.weights
        return x.flatten(2).sum(2) / x[0, 0].numel() ** 0.5


def _attended_level(frame: Frame, kind: ResNet) -> int:
    return max(0, min(kind.attend, frame.levels - 1))


def _attention(frame: Frame, kind: ResNet) -> Attention | None:
    if kind.attention == "none":
        return None
    level = _attended_level(frame, kind)
    return Attention(frame.dims, frame.widths[level], frame.at(level), kind.attention, normed=frame.spectral)


__all__ = ["GrainGains", "NormName", "Normalisation", "ResNet"]
