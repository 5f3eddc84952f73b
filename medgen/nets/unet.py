"""A U-Net that is told a time and a condition, for images and volumes; what flow matching learns a velocity with.

Ronneberger et al. 2015 for the shape; Ho et al. 2020 and Dhariwal & Nichol 2021 (section 3) for time as a scale
and a shift after every normalisation, and for attention where the map is coarse.
"""

from math import log

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medgen.nets.blocks import Fold, Unfold, Up, channels_last, conv, level_widths, norm


class TimeEmbedding(nn.Module):
    """Numbers for a time between 0 and 1: sines and cosines of 1 to 32 half turns, then two layers.

    Args:
        width: features out.
        waves: frequencies, half of them sines.
    """

    frequencies: Tensor

    def __init__(self, width: int, waves: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, log(32), waves)) * torch.pi, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * waves, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b w"]:
        """One row a time."""
        angles = time[:, None] * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))


class TimedResidual(nn.Module):
    """x + conv(act((1 + scale) * norm(conv(act(norm(x)))) + shift)), scale and shift from an embedding.

    Starts as the identity, or as a 1-wide convolution where the width changes.

    Args:
        dims: 2 or 3.
        inside, outside: features in and out.
        embedding: length of the embedding.
    """

    def __init__(self, dims: int, inside: int, outside: int, embedding: int) -> None:
        super().__init__()
        self.skip = conv(dims, inside, outside, 1) if inside != outside else nn.Identity()
        self.before = nn.Sequential(norm(inside), nn.SiLU(), conv(dims, inside, outside))
        self.film = nn.Linear(embedding, 2 * outside)
        self.norm = norm(outside)
        self.after = nn.Sequential(nn.SiLU(), conv(dims, outside, outside))
        for parameter in (*self.film.parameters(), *self.after[-1].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b v *space"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b w *space"]:
        """Same size out as in."""
        scale, shift = _over(self.film(embedding), x.ndim).chunk(2, dim=1)
        return self.skip(x) + self.after(self.norm(self.before(x)) * (1 + scale) + shift)


class Attention(nn.Module):
    """x + every position looking at every other one; starts as the identity (Vaswani et al. 2017).

    Args:
        dims: 2 or 3.
        width: features.
        head: features a head has, at most.
    """

    def __init__(self, dims: int, width: int, head: int = 32) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, width // head), 0, -1) if width % n == 0)
        self.norm = norm(width)
        self.looks = conv(dims, width, 3 * width, 1)
        self.out = conv(dims, width, width, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b w *space"]:
        """Same shape out as in."""
        batch, width, *space = x.shape
        parts = self.looks(self.norm(x)).reshape(batch, 3, self.heads, width // self.heads, -1).transpose(-1, -2)
        seen = nn.functional.scaled_dot_product_attention(parts[:, 0], parts[:, 1], parts[:, 2])
        return x + self.out(seen.transpose(-1, -2).reshape(batch, width, *space))


class UNet(nn.Module):
    """Scans in, scans out, with skips from every level down to the same level up; starts at zero.

    Every axis must be a multiple of fold * 2**levels. Where a voxel lies is told to the network as one
    number an axis, as scans of one body part have much the same anatomy in the same place.

    Args:
        dims: 2 or 3.
        channels: in and out.
        width: features at the finest level, doubling per level up to four times.
        levels: how many times the size is halved after folding.
        fold: block size turned into channels before anything else; 2 makes volumes eight times cheaper.
        depth: residual blocks a level, on the way down and again on the way up.
        conditions: numbers of a scan's condition, 0 for none.
        attention: whether positions of the coarsest level look at one another.

    Example:
        >>> net = UNet(2, (3, 1), width=8, levels=1, fold=2, depth=1)
        >>> net(torch.zeros(5, 3, 8, 12), torch.zeros(5)).shape
        torch.Size([5, 1, 8, 12])
    """

    def __init__(
        self, dims: int, channels: tuple[int, int], width: int, levels: int, *, fold: int = 1, depth: int = 1,
        conditions: int = 0, attention: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        widths, embedding = level_widths(width, levels), 4 * width
        inside, outside = channels
        self.fold = Fold(dims, fold)
        self.stem = conv(dims, inside * fold**dims + dims, widths[0])
        self.time = TimeEmbedding(embedding)
        self.condition = nn.Linear(conditions, embedding, bias=False) if conditions else None
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            here, coarser = widths[level], widths[level + 1]
            self.down.append(_Blocks(TimedResidual(dims, here, here, embedding) for _ in range(depth)))
            self.shrink.append(conv(dims, here, coarser, stride=2))
            self.grow.append(Up(dims, coarser, here))
            sizes = [2 * here] + [here] * (depth - 1)
            self.up.append(_Blocks(TimedResidual(dims, size, here, embedding) for size in sizes))
        self.bottom = nn.ModuleList(TimedResidual(dims, widths[-1], widths[-1], embedding) for _ in range(2))
        self.attention = Attention(dims, widths[-1]) if attention else nn.Identity()
        last = conv(dims, widths[0], outside * fold**dims)
        self.head = nn.Sequential(norm(widths[0]), nn.SiLU(), last, Unfold(dims, fold))
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        channels_last(self, dims)

    def forward(
        self, x: Float[Tensor, "b c *space"], time: Float[Tensor, " b"], cond: Float[Tensor, "b numbers"] | None = None
    ) -> Float[Tensor, "b k *space"]:
        """The network's output for scans `x`, each at its own time, under conditions `cond`."""
        embedding = self.time(time)
        if self.condition is not None and cond is not None:
            embedding = embedding + self.condition(cond)
        embedding = nn.functional.silu(embedding)
        x = self.fold(x)
        x = self.stem(torch.cat([x, _places(x)], dim=1))
        skips = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            x = blocks(x, embedding)
            skips.append(x)
            x = shrink(x)
        x = self.bottom[1](self.attention(self.bottom[0](x, embedding)), embedding)
        for blocks, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            x = blocks(torch.cat([grow(x), skips.pop()], dim=1), embedding)
        return self.head(x)


class _Blocks(nn.ModuleList):
    """One block after another, all told the same."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block in self:
            x = block(x, embedding)
        return x


def _places(x: Tensor) -> Tensor:
    """Where each position lies along each axis, from -1 to 1 (b, dims, *space)."""
    axes = [torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(x), -1, *x.shape[2:])


def _over(rows: Float[Tensor, "b w"], ndim: int) -> Tensor:
    return rows.reshape(*rows.shape, *[1] * (ndim - 2))


__all__ = ["Attention", "TimeEmbedding", "TimedResidual", "UNet"]
