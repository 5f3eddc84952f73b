"""Networks of several sizes at once: gradients at every size, and a pyramid of residuals."""

from collections.abc import Sequence
from math import prod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.adversarial.base import Architecture, Critic, Frame, Generator, beside_scan, doubled, halved, spectral
from medgen.nets.adversarial.growing import (
    CodeStage,
    Deviation,
    DownStage,
    FromGrey,
    Summary,
    ToGrey,
    up_stages,
    with_levels,
)  # fmt: skip
from medgen.nets.blocks import Fold, Unfold, channels_last, conv

_LEAK = 0.2


class MultiScale(Architecture):
    """A scan at every size, all seen by one critic (Karnewar & Wang 2020, "MSG-GAN: multi-scale gradients").

    Args:
        kind: 'multi-scale'.
    """

    kind: Literal["multi-scale"] = "multi-scale"
    whole: ClassVar[bool] = False

    def generator(self, frame: Frame) -> Generator:
        """Every level's features are made a scan of that size, too."""
        return _MultiScaleGenerator(with_levels(frame, self.kind))

    def critic(self, frame: Frame) -> Critic:
        """Every level joins its features with those of the scan of that size."""
        return _MultiScaleCritic(with_levels(frame, self.kind))


class _MultiScaleGenerator(Generator):
    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.levels, self.draws = frame.levels, frame.code
        self.begin, self.stages = CodeStage(frame), up_stages(frame)
        self.greys = nn.ModuleList(ToGrey(frame, width) for width in reversed(frame.widths))

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """At every size."""
        features = [self.begin(code, told)]
        for stage in self.stages:
            features.append(stage(doubled(features[-1])))
        return [grey(x) for grey, x in zip(self.greys, features, strict=True)]

    def seen(self, x: Float[Tensor, "b c *space"]) -> list[Tensor]:
        """At every size."""
        return sizes_of(x, self.levels)


class _MultiScaleCritic(Critic):
    def __init__(self, frame: Frame) -> None:
        super().__init__()
        widths = frame.widths
        self.levels, self.width = frame.levels, widths[-1]
        # The finest first. Every level's scan becomes as many features as the finest has.
        self.combine = nn.ModuleList(FromGrey(frame, widths[0]) for _ in widths)
        inside = [widths[0], *[width + widths[0] for width in widths[1:]]]
        self.deviations = nn.ModuleList(Deviation() for _ in range(frame.levels))
        self.stages = nn.ModuleList(
            DownStage(frame, inside[n] + 1, widths[n], widths[n + 1]) for n in range(frame.levels)
        )
        self.summary = Summary(frame, inside[-1])

    def forward(self, scans: Sequence[Tensor], beside: Tensor | None = None) -> Tensor:
        """(b, width), of scans at every size, or of one that is then averaged down."""
        scans = scans if len(scans) > 1 else sizes_of(scans[0], self.levels)
        coarser = [combine(beside_scan(x, beside)) for combine, x in zip(self.combine, reversed(scans), strict=True)]
        x = functional.leaky_relu(coarser[0], _LEAK)
        for n, (deviation, stage) in enumerate(zip(self.deviations, self.stages, strict=True)):
            x = torch.cat([stage(deviation(x)), coarser[n + 1]], 1)
        return self.summary(x)


class Laplacian(Architecture):
    """A generator and a critic for every level, which add detail to a coarser scan (Denton et al. 2015, "LAPGAN").

    A scan is its coarsest version and, level by level, the residual h from what the coarser one says:

        x_k = up(x_k+1) + h_k,    h_k = G_k(z_k, up(x_k+1)),    the coarsest x_K = G_K(z_K)

    In training every level starts from the real coarser scan, and its critic is shown that beside the residual: levels
    are networks of their own, trained side by side. The code is split over levels.

    Args:
        kind: 'laplacian'.
    """

    kind: Literal["laplacian"] = "laplacian"
    whole: ClassVar[bool] = False

    def generator(self, frame: Frame) -> Generator:
        """One for every level."""
        return _LaplacianGenerator(with_levels(frame, self.kind))

    def critic(self, frame: Frame) -> Critic:
        """One for every level, whose features are those of a patch: every level has a verdict."""
        return _LaplacianCritic(with_levels(frame, self.kind))


class _LaplacianGenerator(Generator):
    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.levels, self.draws = frame.levels, frame.code
        self.part = -(-frame.code // (frame.levels + 1))
        numbers = self.part + frame.numbers
        self.nets = nn.ModuleList(_LaplacianLevel(frame, level, numbers) for level in reversed(range(frame.levels + 1)))

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """At every size, each made of the one before."""
        scans: list[Tensor] = []
        for net, row in zip(self.nets, self._rows(code, told), strict=True):
            coarser = enlarged(scans[-1]) if scans else None
            residual = net(row, coarser)
            scans.append(residual if coarser is None else coarser + residual)
        return scans

    def drawn(self, code: Tensor, told: Tensor | None, image: Tensor | None, real: Tensor) -> list[Tensor]:
        """The coarsest scan; then, at every finer size, the real coarser one and the residual made for it."""
        sizes = sizes_of(real, self.levels)
        coarser = [None, *[enlarged(x) for x in sizes[:-1]]]
        made = [net(row, x) for net, row, x in zip(self.nets, self._rows(code, told), coarser, strict=True)]
        return [made[0], *[torch.cat([x, h], 1) for x, h in zip(coarser[1:], made[1:], strict=True) if x is not None]]

    def seen(self, x: Float[Tensor, "b c *space"]) -> list[Tensor]:
        """The coarsest scan; then, at every finer size, the coarser one and the residual from it."""
        return laplacian_pyramid(x, self.levels)

    def _rows(self, code: Tensor, told: Tensor | None) -> list[Tensor]:
        """Every level's part of the code, with the condition; a code too short for all is read again from its start."""
        count = (self.levels + 1) * self.part
        index = torch.arange(count, device=code.device) % code.shape[1]
        return [self.joined(part, told) for part in code[:, index].split(self.part, 1)]


class _LaplacianLevel(nn.Module):
    """A level's generator: a plane of noise beside the coarser scan, then convolutions."""

    def __init__(self, frame: Frame, level: int, numbers: int) -> None:
        super().__init__()
        dims, width = frame.dims, frame.widths[level]
        coarsest, voxels = level == frame.levels, frame.channels * frame.fold**dims
        self.plane = (width if coarsest else 1, *frame.at(level))
        self.code, self.fold = nn.Linear(numbers, prod(self.plane)), Fold(dims, frame.fold)
        layers: list[nn.Module] = []
        for inside in (width if coarsest else 1 + voxels, *[width] * frame.depth):
            layers += [spectral(conv(dims, inside, width), frame.spectral), nn.ReLU()]
        layers += [spectral(conv(dims, width, voxels), frame.spectral), Unfold(dims, frame.fold)]
        self.body = nn.Sequential(*layers)
        channels_last(self, dims)

    def forward(self, row: Float[Tensor, "b n"], coarser: Tensor | None) -> Tensor:
        """A scan, or a residual from the coarser one."""
        plane = self.code(row).reshape(-1, *self.plane)
        return self.body(plane if coarser is None else torch.cat([self.fold(coarser), plane], 1))


class _LaplacianCritic(Critic):
    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.levels, self.width = frame.levels, frame.widths[-1]
        self.nets = nn.ModuleList(_LaplacianLevelCritic(frame, level) for level in reversed(range(frame.levels + 1)))

    def forward(self, scans: Sequence[Tensor], beside: Tensor | None = None) -> Tensor:
        """(b, width, levels + 1), the coarsest first, of what `seen` gives, or of a scan that is taken apart."""
        scans = scans if len(scans) > 1 else laplacian_pyramid(scans[0], self.levels)
        return torch.stack([net(beside_scan(x, beside)) for net, x in zip(self.nets, scans, strict=True)], 2)


class _LaplacianLevelCritic(nn.Module):
    def __init__(self, frame: Frame, level: int) -> None:
        super().__init__()
        dims, width, last = frame.dims, frame.widths[level], frame.widths[-1]
        inside = (frame.channels * (1 if level == frame.levels else 2) + frame.beside) * frame.fold**dims
        sizes, space = [inside, *[width] * frame.depth], frame.at(level)
        layers: list[nn.Module] = [Fold(dims, frame.fold)]
        for n, size in enumerate(sizes):
            layers += [spectral(conv(dims, size, width, stride=1 if n == 0 else 2), frame.spectral)]
            layers += [nn.LeakyReLU(_LEAK)]
            space = space if n == 0 else tuple(-(-axis // 2) for axis in space)
        layers += [spectral(conv(dims, width, last), frame.spectral), nn.LeakyReLU(_LEAK)]
        self.body, self.weights = nn.Sequential(*layers), nn.Parameter(torch.ones(last, *space))
        channels_last(self, dims)

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b w"]:
        """A sum over positions, with a weight for each."""
        x = self.body(x) * self.weights
        return x.flatten(2).sum(2) / x[0, 0].numel() ** 0.5


def sizes_of(x: Float[Tensor, "b c *space"], levels: int) -> list[Tensor]:
    """Scans averaged down `levels` times, the coarsest first.

    >>> [tuple(scan.shape[2:]) for scan in sizes_of(torch.zeros(1, 1, 8, 12), 2)]
    [(2, 3), (4, 6), (8, 12)]
    """
    scans = [x]
    for _ in range(levels):
        scans.insert(0, halved(scans[0]))
    return scans


def enlarged(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *twice"]:
    """Twice the size along each axis, linear between voxels."""
    return functional.interpolate(x, scale_factor=2, mode="bilinear" if x.ndim == 4 else "trilinear")


def laplacian_pyramid(x: Float[Tensor, "b c *space"], levels: int) -> list[Tensor]:
    """The coarsest scan (b, c), then for every finer size the enlarged coarser scan and the residual (b, 2 c).

    Burt & Adelson 1983, "The Laplacian pyramid as a compact image code"; both halves of the last sum to the scan.
    """
    sizes = sizes_of(x, levels)
    coarser = [enlarged(scan) for scan in sizes[:-1]]
    return [sizes[0], *[torch.cat([up, scan - up], 1) for up, scan in zip(coarser, sizes[1:], strict=True)]]


__all__ = ["Laplacian", "MultiScale", "enlarged", "laplacian_pyramid", "sizes_of"]
