"""Networks that grow: coarse scans first, and finer levels that fade in while training goes on."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, prod
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import register_parametrization

from medgen.nets.adversarial.base import Architecture, Critic, Frame, Generator, beside_scan, doubled, halved, spectral
from medgen.nets.blocks import Fold, Unfold, channels_last, conv

_LEAK = 0.2
# Part of training after which all levels are there, for good.
_WHOLE = 0.75
# How much of a batch's deviation goes into the running mean that counts in evaluation.
_SHARE = 0.1


class Growing(Architecture):
    """Levels added one after the other, each faded in, then trained on (Karras et al. 2018, "Progressive growing").

    `progress` of both networks, set from outside, runs from 0 to 1; see `grown`. One layer makes scans of the first
    features of every level, another features of scans, so that no level's own layer is left over when the next is
    there.

    Args:
        kind: 'progressive'.
    """

    kind: Literal["progressive"] = "progressive"
    whole: ClassVar[bool] = False

    def generator(self, frame: Frame) -> Generator:
        """From coarse to fine."""
        return _GrowingGenerator(with_levels(frame, self.kind))

    def critic(self, frame: Frame) -> Critic:
        """From fine to coarse."""
        return _GrowingCritic(with_levels(frame, self.kind))


def grown(progress: float, levels: int) -> float:
    """How many levels have been added, the part of the one that fades in included.

    The coarsest size is held, then each level fades in and is held for equally long; at 3/4 all is there.

    >>> [grown(t, 2) for t in (0.0, 0.1875, 0.28125, 0.375, 0.5, 0.75, 1.0)]
    [0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0]
    """
    whole, part = divmod(2 * levels * progress / _WHOLE, 2)
    return min(float(levels), whole + max(0.0, part - 1))


class _GrowingGenerator(Generator):
    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.levels, self.draws = frame.levels, frame.code
        self.begin, self.stages = CodeStage(frame), up_stages(frame)
        self.wide = frame.widths[0]
        self.grey = ToGrey(frame, self.wide)

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """At every size; sizes not grown yet are the last one that is, with every voxel repeated."""
        now = grown(self.progress, self.levels)
        x = self.begin(code, told)
        scans = [self.grey(x[:, : self.wide])]
        for level, stage in enumerate(self.stages):
            share = min(1.0, now - level)
            if share <= 0:
                scans.append(doubled(scans[-1]))
                continue
            x = stage(doubled(x))
            scan = self.grey(x[:, : self.wide])
            scans.append(scan if share == 1 else torch.lerp(doubled(scans[-1]), scan, share))
        return scans

    def drawn(self, code: Tensor, told: Tensor | None, image: Tensor | None, real: Tensor) -> list[Tensor]:
        """At full size, no finer than what is grown."""
        return self(code, told, image)[-1:]

    def seen(self, x: Float[Tensor, "b c *space"]) -> list[Tensor]:
        """At full size, no finer than what is grown, fading as generated scans do."""
        now = grown(self.progress, self.levels)
        missing = self.levels - ceil(now)
        for _ in range(missing):
            x = halved(x)
        if now % 1:
            x = torch.lerp(doubled(halved(x)), x, now % 1)
        for _ in range(missing):
            x = doubled(x)
        return [x]


class _GrowingCritic(Critic):
    def __init__(self, frame: Frame) -> None:
        super().__init__()
        widths = frame.widths
        self.levels, self.width = frame.levels, widths[-1]
        self.widths = widths
        self.ungrey = FromGrey(frame, widths[0])
        self.stages = nn.ModuleList(DownStage(frame, width, width, after) for width, after in pairwise(widths))
        self.summary = Summary(frame, widths[-1])

    def forward(self, scans: Sequence[Tensor], beside: Tensor | None = None) -> Tensor:
        """(b, width)."""
        now = grown(self.progress, self.levels)
        finest, x = self.levels - ceil(now), beside_scan(scans[-1], beside)
        for _ in range(finest):
            x = halved(x)
        features = self._features(x, finest)
        for level in range(finest, self.levels):
            features = self.stages[level](features)
            if level == finest and now % 1:
                features = torch.lerp(self._features(halved(x), level + 1), features, now % 1)
        return self.summary(features)

    def _features(self, x: Tensor, level: int) -> Tensor:
        """Of a scan; those that only coarser levels have are zero."""
        features = functional.leaky_relu(self.ungrey(x), _LEAK)
        missing = self.widths[level] - features.shape[1]
        return functional.pad(features, (0, 0) * (x.ndim - 2) + (0, missing))


def equalised(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """A layer with normal weights that are scaled when used, not when set, so that all learn at the same pace.

        w = gain w' / sqrt(inputs of one output),    w' ~ N(0, 1) at the start

    Karras et al. 2018, section 4.1.
    """
    parts: Any = layer
    nn.init.normal_(parts.weight)
    if parts.bias is not None:
        nn.init.zeros_(parts.bias)
    register_parametrization(layer, "weight", _Scaled(gain / parts.weight[0].numel() ** 0.5))
    return layer


class _Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is used."""
        return weight * self.scale


def paced(frame: Frame, layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """An equalised layer, or one divided by its largest singular value where the frame says so."""
    channels_last(layer, frame.dims)
    return spectral(layer) if frame.spectral else equalised(layer, gain)


def pixel_normal(x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b w *space"]:
    """Every position's features divided by their root mean square (Karras et al. 2018, section 4.2)."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class Deviation(nn.Module):
    """One more feature: how far scans of a batch differ, the mean of all features' standard deviations over the batch.

    Karras et al. 2018, section 3. In evaluation it is what it was on average in training, so that what is said of a
    scan does not depend on its neighbours.
    """

    usual: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("usual", torch.zeros(()))

    def forward(self, x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b v *space"]:
        """One feature more."""
        spread = self.usual
        if self.training:
            spread = (x.float().var(0, correction=0) + 1e-8).sqrt().mean()
            with torch.no_grad():
                self.usual.lerp_(spread, _SHARE)
        return torch.cat([x, spread.to(x).expand(len(x), 1, *x.shape[2:])], 1)


class CodeStage(nn.Module):
    """From a code, divided by its root mean square, and a condition to features at the coarsest positions."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.start = (frame.widths[-1], *frame.at(frame.levels))
        self.code = paced(frame, nn.Linear(frame.told, prod(self.start)))
        self.conv = paced(frame, conv(frame.dims, frame.widths[-1], frame.widths[-1]))

    def forward(self, code: Float[Tensor, "b k"], told: Tensor | None) -> Tensor:
        """(b, width, *coarsest)."""
        row = pixel_normal(code)
        row = row if told is None else torch.cat([row, told.to(row)], 1)
        x = pixel_normal(functional.leaky_relu(self.code(row).reshape(-1, *self.start), _LEAK))
        return pixel_normal(functional.leaky_relu(self.conv(x), _LEAK))


class UpStage(nn.Module):
    """A level's convolutions, each with a leaky rectifier and every position's features normalised."""

    def __init__(self, frame: Frame, inside: int, outside: int) -> None:
        super().__init__()
        sizes = [inside, *[outside] * frame.depth]
        self.convs = nn.ModuleList(paced(frame, conv(frame.dims, size, outside)) for size in sizes)

    def forward(self, x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b v *space"]:
        """Features of another width."""
        for layer in self.convs:
            x = pixel_normal(functional.leaky_relu(layer(x), _LEAK))
        return x


def up_stages(frame: Frame) -> nn.ModuleList:
    """For every level but the coarsest, from coarse to fine."""
    widths = frame.widths
    return nn.ModuleList(UpStage(frame, widths[n + 1], widths[n]) for n in reversed(range(frame.levels)))


class DownStage(nn.Module):
    """A level's convolutions with leaky rectifiers, then half the size."""

    def __init__(self, frame: Frame, inside: int, middle: int, outside: int) -> None:
        super().__init__()
        sizes = [inside, *[middle] * frame.depth, outside]
        self.convs = nn.ModuleList(paced(frame, conv(frame.dims, before, after)) for before, after in pairwise(sizes))

    def forward(self, x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b v *half"]:
        """Features of another width, at half the size."""
        for layer in self.convs:
            x = functional.leaky_relu(layer(x), _LEAK)
        return halved(x)


class Summary(nn.Module):
    """From features at the coarsest positions, and how far scans differ in them, to a row of features."""

    def __init__(self, frame: Frame, inside: int) -> None:
        super().__init__()
        self.deviation = Deviation()
        self.conv = paced(frame, conv(frame.dims, inside + 1, frame.widths[-1]))
        self.weights = nn.Parameter(torch.ones(frame.widths[-1], *frame.at(frame.levels)))

    def forward(self, x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b v"]:
        """A sum over positions, with a weight for each."""
        x = functional.leaky_relu(self.conv(self.deviation(x)), _LEAK) * self.weights
        return x.flatten(2).sum(2) / x[0, 0].numel() ** 0.5


class ToGrey(nn.Module):
    """From features to a scan: a linear map of every position, then blocks of voxels in place."""

    def __init__(self, frame: Frame, inside: int) -> None:
        super().__init__()
        self.conv = paced(frame, conv(frame.dims, inside, frame.channels * frame.fold**frame.dims, 1), gain=1)
        self.unfold = Unfold(frame.dims, frame.fold)

    def forward(self, x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b c *voxels"]:
        """Unbounded, about -1 to 1."""
        return self.unfold(self.conv(x))


class FromGrey(nn.Module):
    """From a scan and what is seen beside it to features, by a linear map of every position."""

    def __init__(self, frame: Frame, outside: int) -> None:
        super().__init__()
        inside = (frame.channels + frame.beside) * frame.fold**frame.dims
        self.fold = Fold(frame.dims, frame.fold)
        self.conv = paced(frame, conv(frame.dims, inside, outside, 1))

    def forward(self, x: Float[Tensor, "b c *voxels"]) -> Float[Tensor, "b w *space"]:
        """Features at the folded size."""
        return self.conv(self.fold(x))


def with_levels(frame: Frame, kind: str) -> Frame:
    """The frame, if it has any halvings.

    Raises:
        ValueError: where it has none.
    """
    if frame.levels < 1:
        raise ValueError(f"architecture '{kind}' works at several sizes: levels must be 1 or more, found 0")
    return frame


__all__ = [
    "CodeStage", "Deviation", "DownStage", "FromGrey", "Growing", "Summary", "ToGrey", "UpStage", "equalised", "grown",
    "paced", "pixel_normal", "up_stages", "with_levels",
]  # fmt: skip
