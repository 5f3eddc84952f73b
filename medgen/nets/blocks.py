"""Convolutional parts for images and volumes; `dims` is 2 or 3."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class _FullPrecisionWhereSmall(_ConvNd):
    """Convolves in the weights' own precision where an axis is shorter than the kernel.

    There, oneDNN's bfloat16 weight gradient reads memory nobody wrote (torch 2.13 on CPUs with avx512_bf16), which
    makes it random and sometimes infinite; such maps are so small that precision costs nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Same as ever, in another precision."""
        if x.device.type != "cpu" or min(x.shape[2:]) >= max(self.kernel_size):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype))


class _Conv2d(_FullPrecisionWhereSmall, nn.Conv2d):
    pass


class _Conv3d(_FullPrecisionWhereSmall, nn.Conv3d):
    pass


def conv(dims: Literal[2, 3] | int, inside: int, outside: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """A convolution that keeps the size (or divides it by `stride`)."""
    return lopsided(dims, inside, outside, (kernel,) * dims, stride=stride)


def lopsided(
    dims: int, inside: int, outside: int, kernels: Sequence[int], *, padded: Sequence[bool] = (), stride: int = 1,
    dilations: Sequence[int] | int = 1,
) -> nn.Module:  # fmt: skip
    """A convolution with a kernel size an axis, that keeps the size of all axes or of those that are `padded`."""
    kind: Any = _Conv2d if dims == 2 else _Conv3d
    padding = tuple(size // 2 if keep else 0 for size, keep in zip(kernels, padded or (True,) * dims, strict=True))
    dilations = dilations if isinstance(dilations, int) else tuple(dilations)
    return kind(inside, outside, tuple(kernels), stride=stride, padding=padding, dilation=dilations)


def norm(width: int) -> nn.GroupNorm:
    """Group normalisation with up to 8 groups: independent of the batch, so of batch size 1."""
    groups = next(g for g in (8, 4, 2, 1) if width % g == 0)
    return nn.GroupNorm(groups, width)


class Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))); starts as the identity (He et al. 2016, v2)."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            norm(width), nn.SiLU(), conv(dims, width, width), norm(width), nn.SiLU(), conv(dims, width, width)
        )
        for parameter in self.inner[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b w *space"]:
        """Same shape out as in."""
        return x + self.inner(x)


def to_blocks(x: Float[Tensor, "b c *space"], block: Sequence[int]) -> Float[Tensor, "b *coarse features"]:
    """Cut space into blocks of `block` voxels; each becomes one row of c * prod(block) features.

    >>> to_blocks(torch.zeros(1, 2, 4, 6), (2, 3)).shape
    torch.Size([1, 2, 2, 12])
    """
    batch, channels, *space = x.shape
    dims = len(space)
    split = [size for n, size in zip(space, block, strict=True) for size in (n // size, size)]
    coarse, fine = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    rows = x.reshape(batch, channels, *split).permute(0, *coarse, 1, *fine)
    return rows.reshape(*rows.shape[: 1 + dims], -1)


def from_blocks(rows: Float[Tensor, "b *coarse features"], block: Sequence[int]) -> Float[Tensor, "b c *space"]:
    """The inverse of `to_blocks`."""
    batch, *coarse, features = rows.shape
    dims, channels = len(coarse), features // prod(block)
    x = rows.reshape(batch, *coarse, channels, *block)
    order = [axis for n in range(dims) for axis in (1 + n, 2 + dims + n)]
    x = x.permute(0, 1 + dims, *order)
    return x.reshape(batch, channels, *[n * size for n, size in zip(coarse, block, strict=True)])


def squeezed(x: Float[Tensor, "b c *space"], block: Sequence[int]) -> Float[Tensor, "b features *coarse"]:
    """Blocks of voxels as channels."""
    return to_blocks(x, block).movedim(-1, 1)


def squeezes(spacing: tuple[float, ...], levels: int, alone: tuple[bool, ...]) -> tuple[tuple[int, ...], ...]:
    """Factors along each axis, level by level: halve the axes that are about as fine as the finest.

    >>> squeezes((1.0, 1.0, 5.0), 3, (False, False, False))
    ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    """
    now, found = list(spacing), []
    for _ in range(levels):
        finest = min((s for s, single in zip(now, alone, strict=True) if not single), default=0.0)
        factors = [1 if single or s > 1.5 * finest else 2 for s, single in zip(now, alone, strict=True)]
        now = [s * factor for s, factor in zip(now, factors, strict=True)]
        found.append(tuple(factors))
    return tuple(found)


def spread(part: Float[Tensor, "b 1 *positions"], space: tuple[int, ...]) -> Float[Tensor, "b 1 *space"]:
    """A position's value shared equally by its voxels."""
    voxels = 1
    for axis, size in enumerate(space, 2):
        factor = size // part.shape[axis]
        part, voxels = part.repeat_interleave(factor, axis), voxels * factor
    return part / voxels


class Fold(nn.Module):
    """Space to channels: blocks of `factor` voxels along each axis become channels."""

    def __init__(self, dims: int, factor: int) -> None:
        super().__init__()
        self.block = (factor,) * dims

    def forward(self, x: Float[Tensor, "b c *space"]) -> Tensor:
        """(b, c * factor**dims, *space / factor)."""
        return squeezed(x, self.block)


class Unfold(nn.Module):
    """Channels back to space; the inverse of `Fold`."""

    def __init__(self, dims: int, factor: int) -> None:
        super().__init__()
        self.block = (factor,) * dims

    def forward(self, x: Tensor) -> Float[Tensor, "b c *space"]:
        """(b, c, *space * factor)."""
        return from_blocks(x.movedim(1, -1), self.block)


class Up(nn.Module):
    """Twice the size along each axis: nearest neighbour, then a convolution (no checkerboard)."""

    def __init__(self, dims: int, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = conv(dims, inside, outside)

    def forward(self, x: Tensor) -> Tensor:
        """(b, outside, *2 space)."""
        return self.conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))


class ConditionBias(nn.Module):
    """Adds a learned vector per condition to every position; nothing when there are none.

    Args:
        numbers: of a scan's condition: how many classes, plus what covariates take.
        width: features.
    """

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(numbers, width) if numbers else None

    def forward(self, x: Float[Tensor, "b w *space"], cond: Tensor | None) -> Float[Tensor, "b w *space"]:
        """Same shape out as in; `cond` is class indices (b,) or a table (b, numbers)."""
        if self.table is None or cond is None:
            return x
        bias = self.table(cond) if cond.ndim == 1 else cond.to(x.dtype) @ self.table.weight
        return x + bias.reshape(*bias.shape, *[1] * (x.ndim - 2))


class Encoder(nn.Module):
    """Fold, then `levels` halvings with `depth` residual blocks each; widths grow towards the code.

    Args:
        dims: 2 or 3.
        channels: of the scan.
        width: features at the finest level, doubling per level up to `most`.
        levels: how many times the size is halved after folding.
        fold: block size turned into channels before anything else (cheap full resolution).
        depth: residual blocks a level.
        classes: how many classes to condition on, 0 for none.
    """

    def __init__(self, dims: int, channels: int, width: int, levels: int, *, fold: int, depth: int, classes: int):
        super().__init__()
        widths = level_widths(width, levels)
        self.fold = Fold(dims, fold)
        self.stem = conv(dims, channels * fold**dims, widths[0])
        self.condition = ConditionBias(classes, widths[0])
        layers: list[nn.Module] = []
        for level in range(levels):
            layers += [Residual(dims, widths[level]) for _ in range(depth)]
            layers += [conv(dims, widths[level], widths[level + 1], stride=2)]
        layers += [Residual(dims, widths[-1]) for _ in range(depth)]
        self.body = nn.Sequential(*layers, norm(widths[-1]), nn.SiLU())
        self.width = widths[-1]

    def forward(self, x: Float[Tensor, "b c *space"], cond: Tensor | None = None) -> Tensor:
        """Features (b, width, *space / (fold * 2**levels))."""
        return self.body(self.condition(self.stem(self.fold(x)), cond))


class Decoder(nn.Module):
    """The mirror of `Encoder`: features at the coarsest level to `channels` at full size."""

    def __init__(self, dims: int, channels: int, width: int, levels: int, *, fold: int, depth: int, classes: int):
        super().__init__()
        widths = level_widths(width, levels)
        self.condition = ConditionBias(classes, widths[-1])
        layers: list[nn.Module] = [Residual(dims, widths[-1]) for _ in range(depth)]
        for level in reversed(range(levels)):
            layers += [Up(dims, widths[level + 1], widths[level])]
            layers += [Residual(dims, widths[level]) for _ in range(depth)]
        self.body = nn.Sequential(*layers, norm(widths[0]), nn.SiLU())
        self.head = nn.Sequential(conv(dims, widths[0], channels * fold**dims), Unfold(dims, fold))
        self.width = widths[-1]

    def forward(self, features: Tensor, cond: Tensor | None = None) -> Float[Tensor, "b c *space"]:
        """A scan-sized output from features (b, width, *coarse)."""
        return self.head(self.body(self.condition(features, cond)))


def averaged(x: Float[Tensor, "b c *space"], window: int) -> Float[Tensor, "b c *space"]:
    """Mean over the voxels there are within a cube of `window` (odd, no longer than the scan) about each voxel."""
    pool = nn.functional.avg_pool2d if x.ndim == 4 else nn.functional.avg_pool3d
    window = min(window, *(n - 1 + n % 2 for n in x.shape[2:]))
    return pool(x, window, stride=1, padding=window // 2, count_include_pad=False)


def level_widths(width: int, levels: int, most: int = 4) -> list[int]:
    """Features a level: doubling, to at most `most` times the first.

    >>> level_widths(16, 3)
    [16, 32, 64, 64]
    """
    return [width * min(2**level, most) for level in range(levels + 1)]


def count_parameters(module: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def channels_last(module: nn.Module, dims: int) -> nn.Module:
    """The module with convolution weights laid out channels last, which CPUs and GPUs convolve faster."""
    if dims == 2:
        return nn.utils.convert_conv2d_weight_memory_format(module, torch.channels_last)
    return nn.utils.convert_conv3d_weight_memory_format(module, torch.channels_last_3d)


__all__ = [
    "ConditionBias", "Decoder", "Encoder", "Fold", "Residual", "Unfold", "Up", "averaged",
    "channels_last", "conv", "count_parameters", "from_blocks", "level_widths", "lopsided", "norm", "spread",
    "squeezed", "squeezes", "to_blocks",
]  # fmt: skip
