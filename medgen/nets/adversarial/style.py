"""Generators that are told a style at every convolution (StyleGAN, StyleGAN2)."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.adversarial.base import Architecture, Critic, Frame, Generator, doubled
from medgen.nets.adversarial.growing import equalised, pixel_normal
from medgen.nets.adversarial.residual import GrainGains, ResNet
from medgen.nets.adversarial.scales import enlarged
from medgen.nets.blocks import Unfold, channels_last, conv

_LEAK = 0.2


class Style(Architecture):
    """A code becomes a style, which scales the features that each convolution reads (Karras et al. 2020).

    A mapping network makes the style w of the code and the condition; the coarsest features are learned and the same
    for all scans; noise enters at every level (Karras et al. 2019); scans of all levels are summed.

    Args:
        kind: 'style'.
        mapping: layers from code to style.
    """

    kind: Literal["style"] = "style"
    mapping: int = Field(default=4, ge=2, le=8)

    def generator(self, frame: Frame) -> Generator:
        """Modulated convolutions at every level, and noise."""
        return _StyleGenerator(frame, self.mapping)

    def critic(self, frame: Frame) -> Critic:
        """Residual blocks that halve the size."""
        return ResNet().critic(frame)


class Modulated(nn.Module):
    """A convolution whose weights a style scales feature by feature, then divided by what that does to the spread.

        w'_oik = s_i w_oik,    w''_oik = w'_oik / sqrt(sum_ik w'_oik^2),    y_o = sum_i w''_oi * x_i + b_o

    Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", equations 1 and 3. Scaling what goes in
    and what comes out does the same with one weight for all scans.

    Args:
        dims: 2 or 3.
        inside, outside: features.
        style: numbers of a style.
        kernel: voxels along each axis.
        demodulated: divide by the spread; not where scans are made.
    """

    def __init__(
        self, dims: int, inside: int, outside: int, style: int, *, kernel: int = 3, demodulated: bool = True
    ) -> None:
        super().__init__()
        layer: Any = channels_last(conv(dims, inside, outside, kernel), dims)
        layer.bias = None
        self.conv: Any = equalised(layer, gain=1)
        self.scales: Any = equalised(nn.Linear(style, inside), gain=1)
        self.bias, self.demodulated = nn.Parameter(torch.zeros(outside)), demodulated
        nn.init.ones_(self.scales.bias)

    def forward(self, x: Float[Tensor, "b w *space"], style: Float[Tensor, "b s"]) -> Float[Tensor, "b v *space"]:
        """Features of another width."""
        over = (..., *[None] * (x.ndim - 2))
        scales = self.scales(style)
        y = self.conv(x * scales[over])
        if self.demodulated:
            power = self.conv.weight.float().square().flatten(2).sum(2)
            spread = (scales.float().square()[:, None] * power).sum(2)
            y = y * (spread + 1e-8).rsqrt().to(y)[over]
        return y + self.bias[over]


class _StyleGenerator(Generator):
    def __init__(self, frame: Frame, mapping: int) -> None:
        super().__init__()
        dims, widths, style = frame.dims, frame.widths, frame.widths[-1]
        self.length, self.grains = frame.code, GrainGains(frame)
        self.draws = frame.code + self.grains.count
        layers: list[nn.Module] = []
        for inside in (frame.told, *[style] * (mapping - 1)):
            layers += [equalised(nn.Linear(inside, style)), nn.LeakyReLU(_LEAK)]
        self.mapping = nn.Sequential(*layers)
        self.start = nn.Parameter(torch.randn(widths[-1], *frame.at(frame.levels)))
        self.first = Modulated(dims, widths[-1], widths[-1], style)
        self.layers, self.greys, self.depth = nn.ModuleList(), nn.ModuleList(), frame.depth
        for level in reversed(range(frame.levels)):
            sizes = [widths[level + 1], *[widths[level]] * frame.depth]
            self.layers += [Modulated(dims, size, widths[level], style) for size in sizes]
        for width in reversed(widths):
            outside = frame.channels * frame.fold**dims
            self.greys.append(Modulated(dims, width, outside, style, kernel=1, demodulated=False))
        self.unfold = Unfold(dims, frame.fold)

    def forward(self, code: Tensor, told: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """One scan."""
        code, grain = code[:, : self.length], code[:, self.length :]
        style = self.mapping(self.joined(pixel_normal(code), told))
        x = _active(self.first(self.start.expand(len(code), *self.start.shape), style))
        scan = self.unfold(self.greys[0](x, style))
        for n, layer in enumerate(self.layers):
            level, nth = divmod(n, 1 + self.depth)
            x = self.grains(layer(doubled(x), style), grain, level) if nth == 0 else layer(x, style)
            x = _active(x)
            if nth == self.depth:
                scan = enlarged(scan) + self.unfold(self.greys[level + 1](x, style))
        return [scan]


def _active(x: Tensor) -> Tensor:
    """A leaky rectifier that keeps the spread of what it is given."""
    return functional.leaky_relu(x, _LEAK) * 2**0.5


__all__ = ["Modulated", "Style"]
