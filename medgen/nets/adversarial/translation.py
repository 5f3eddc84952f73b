"""Networks that make a scan of an image: a U-Net (pix2pix), normalisation by a mask (SPADE), critics of patches."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.adversarial.base import Architecture, Critic, Frame, Generator, beside_scan, doubled, halved, spectral
from medgen.nets.adversarial.growing import with_levels
from medgen.nets.blocks import Fold, Unfold, channels_last, conv, norm

_LEAK = 0.2


class Translation(Architecture):
    """A U-Net from the given image to a scan, and a critic of patches (Isola et al. 2017, "pix2pix").

    The code enters where the U-Net is coarsest, so that an image has more than one scan.

    Args:
        kind: 'unet'.
    """

    kind: Literal["unet"] = "unet"

    def generator(self, frame: Frame) -> Generator:
        """Of the given image and a code."""
        return _UNetGenerator(with_levels(_with_image(frame, self.kind), self.kind))

    def critic(self, frame: Frame) -> Critic:
        """A verdict a patch, on the scan and what is beside it."""
        return _PatchCritic(frame, scales=1)


class Spade(Architecture):
    """Features normalised, then scaled and shifted at every voxel by what the given image has there (Park et al. 2019).

    "Semantic image synthesis with spatially-adaptive normalization": a mask that enters as a network's input is washed
    out by normalisation; here it comes back at every block.

    Args:
        kind: 'spade'.
        norm: what is normalised over: 'batch', or 'instance', every scan alone.
    """

    kind: Literal["spade"] = "spade"
    norm: Literal["batch", "instance"] = "batch"

    def generator(self, frame: Frame) -> Generator:
        """Of a code, and the given image at every block."""
        return _SpadeGenerator(_with_image(frame, self.kind), self.norm)

    def critic(self, frame: Frame) -> Critic:
        """A verdict a patch at two scales, or one where the scan cannot be halved."""
        return _PatchCritic(frame, scales=min(2, frame.levels + 1))


def _with_image(frame: Frame, kind: str) -> Frame:
    """The frame, if a generator in it is given an image.

    Raises:
        ValueError: where it is not.
    """
    if frame.context < 1:
        raise ValueError(f"architecture '{kind}' makes scans of a given image: context must be 1 or more, found 0")
    return frame


def _given(image: Tensor | None) -> Tensor:
    if image is None:
        raise ValueError("this generator makes scans of an image, and none was given")
    return image


class _Normed(nn.Module):
    """Convolution, normalisation of every scan alone, rectifier."""

    def __init__(self, frame: Frame, inside: int, outside: int, *, stride: int = 1, leak: float = 0.0) -> None:
        super().__init__()
        layer: Any = conv(frame.dims, inside, outside, stride=stride)
        layer.bias = None  # the normalisation has one
        self.conv, self.norm, self.leak = spectral(layer, frame.spectral), norm(outside), leak

    def forward(self, x: Tensor) -> Tensor:
        """Features of another width."""
        return functional.leaky_relu(self.norm(self.conv(x)), self.leak)


class _UNetGenerator(Generator):
    def __init__(self, frame: Frame) -> None:
        super().__init__()
        dims, widths, levels, voxels = frame.dims, frame.widths, frame.levels, frame.fold**frame.dims
        self.draws, self.start = frame.code, (widths[-1], *frame.at(levels))
        first = spectral(conv(dims, frame.context * voxels, widths[0]), frame.spectral)
        self.stem = nn.Sequential(Fold(dims, frame.fold), first, nn.LeakyReLU(_LEAK))
        self.downs = nn.ModuleList(
            _Normed(frame, widths[n], widths[n + 1], stride=2, leak=_LEAK) for n in range(levels - 1)
        )
        # Without normalisation, which a single position would not survive.
        self.downs.append(spectral(conv(dims, widths[-2], widths[-1], stride=2), frame.spectral))
        self.code = nn.Linear(frame.told, prod(self.start))
        self.ups = nn.ModuleList(_Normed(frame, widths[n + 1] + widths[n], widths[n]) for n in reversed(range(levels)))
        last = spectral(conv(dims, widths[0], frame.channels * voxels), frame.spectral)
        self.last = nn.Sequential(last, Unfold(dims, frame.fold), nn.Tanh())
        channels_last(self, dims)

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """One scan."""
        x, skips = self.stem(_given(image)), []
        for down in self.downs:
            skips.append(x)
            x = down(x)
        x = functional.relu(x + self.code(self.joined(code, told)).reshape(-1, *self.start))
        for up in self.ups:
            x = up(torch.cat([doubled(x), skips.pop()], 1))
        return [self.last(x)]


class _SpadeNorm(nn.Module):
    """y = (1 + gain(m)) (x - mean) / spread + bias(m), gain and bias convolutions of the mask m, at every position."""

    def __init__(self, frame: Frame, width: int, kind: Literal["batch", "instance"]) -> None:
        super().__init__()
        dims = frame.dims
        plain = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
        self.norm = plain(width, affine=False) if kind == "batch" else None
        self.read = conv(dims, frame.context * frame.fold**dims, frame.width)
        self.tell = conv(dims, frame.width, 2 * width)

    def forward(self, x: Float[Tensor, "b w *space"], mask: Float[Tensor, "b m *fine"]) -> Float[Tensor, "b w *space"]:
        """Same shape out as in; of the mask the nearest voxels are read."""
        mask = functional.relu(self.read(functional.interpolate(mask, size=x.shape[2:], mode="nearest")))
        gain, bias = self.tell(mask).chunk(2, 1)
        x = _instance_normal(x) if self.norm is None else self.norm(x)
        return x * (1 + gain) + bias


def _instance_normal(x: Float[Tensor, "b w *space"]) -> Float[Tensor, "b w *space"]:
    """Every feature of every scan with mean 0 and spread 1; torch's refuses a single position."""
    spread, mean = torch.var_mean(x, dim=tuple(range(2, x.ndim)), keepdim=True, correction=0)
    return (x - mean) * (spread + 1e-5).rsqrt()


class _SpadeBlock(nn.Module):
    """shortcut(x) + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self, frame: Frame, inside: int, outside: int, kind: Literal["batch", "instance"]) -> None:
        super().__init__()
        dims = frame.dims
        self.norms = nn.ModuleList(_SpadeNorm(frame, width, kind) for width in (inside, outside))
        # The normalisation takes away what a bias adds.
        first: Any = conv(dims, inside, outside)
        first.bias = None
        self.first = spectral(first, frame.spectral)
        self.second = spectral(conv(dims, outside, outside), frame.spectral)
        self.shortcut = None if inside == outside else spectral(conv(dims, inside, outside, 1), frame.spectral)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Features of another width."""
        hidden = self.first(functional.leaky_relu(self.norms[0](x, mask), _LEAK))
        hidden = self.second(functional.leaky_relu(self.norms[1](hidden, mask), _LEAK))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class _SpadeGenerator(Generator):
    def __init__(self, frame: Frame, kind: Literal["batch", "instance"]) -> None:
        super().__init__()
        dims, widths = frame.dims, frame.widths
        self.draws, self.start, self.depth = frame.code, (widths[-1], *frame.at(frame.levels)), frame.depth
        self.code, self.fold = nn.Linear(frame.told, prod(self.start)), Fold(dims, frame.fold)
        sizes = [(widths[-1], widths[-1])] * frame.depth
        for level in reversed(range(frame.levels)):
            sizes += [(widths[level + 1], widths[level]), *[(widths[level], widths[level])] * (frame.depth - 1)]
        self.blocks = nn.ModuleList(_SpadeBlock(frame, inside, outside, kind) for inside, outside in sizes)
        self.last = spectral(conv(dims, widths[0], frame.channels * frame.fold**dims), frame.spectral)
        self.unfold = Unfold(dims, frame.fold)
        channels_last(self, dims)

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """One scan."""
        mask = self.fold(_given(image))
        x = self.code(self.joined(code, told)).reshape(-1, *self.start)
        for n, block in enumerate(self.blocks):
            x = doubled(x) if n and n % self.depth == 0 else x
            x = block(x, mask)
        return [torch.tanh(self.unfold(self.last(functional.leaky_relu(x, _LEAK))))]


class _PatchCritic(Critic):
    """Convolutions that see patches only; without normalisation, which penalties on slopes do not go with.

    Args:
        frame: of the network.
        scales: how many critics, each of a scan half the size of the one before.
    """

    def __init__(self, frame: Frame, scales: int) -> None:
        super().__init__()
        self.width = frame.widths[-1]
        self.nets = nn.ModuleList(_patches(frame) for _ in range(scales))
        channels_last(self, frame.dims)

    def forward(self, scans: Sequence[Tensor], beside: Tensor | None = None) -> Tensor:
        """(b, width, *patches); with several scales (b, width, scales, *patches), where coarse patches repeat."""
        x = beside_scan(scans[-1], beside)
        found: list[Tensor] = []
        for net in self.nets:
            x = halved(x) if found else x
            found.append(net(x))
        if len(found) == 1:
            return found[0]
        space = found[0].shape[2:]
        return torch.stack([functional.interpolate(part, size=space, mode="nearest") for part in found], 2)


def _patches(frame: Frame) -> nn.Module:
    """Features (b, width, *patches), a patch a position of the coarsest level."""
    dims, widths = frame.dims, frame.widths
    layers: list[nn.Module] = [Fold(dims, frame.fold)]
    inside = (frame.channels + frame.beside) * frame.fold**dims
    sizes = [inside, *widths, widths[-1]]
    for n, (before, after) in enumerate(pairwise(sizes)):
        stride = 2 if 0 < n <= frame.levels else 1
        layers += [spectral(conv(dims, before, after, stride=stride), frame.spectral), nn.LeakyReLU(_LEAK)]
    return nn.Sequential(*layers)


__all__ = ["Spade", "Translation"]
