"""What the networks of every adversarial architecture have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from medgen.nets.blocks import level_widths


@dataclass(frozen=True)
class Frame:
    """What a network is made for.

    Args:
        shape: voxels along each axis.
        channels: values per voxel.
        code: numbers the generator begins with, besides the condition.
        numbers: of a scan's condition as the generator is told it; 0 for none.
        beside: channels that the critic sees beside the scan: a given image, or a condition on every voxel.
        context: channels of the image that the generator is given; 0 for none.
        width: features at the finest level.
        levels: halvings, after folding.
        fold: block size turned into channels first.
        depth: blocks a level.
        spectral: divide every weight by its largest singular value.
    """

    shape: tuple[int, ...]
    channels: int
    code: int
    numbers: int = 0
    beside: int = 0
    context: int = 0
    width: int = 32
    levels: int = 2
    fold: int = 1
    depth: int = 1
    spectral: bool = False

    @property
    def dims(self) -> int:
        """2 for images, 3 for volumes."""
        return len(self.shape)

    def at(self, level: int) -> tuple[int, ...]:
        """Positions along each axis after `level` halvings; level 0 is the folded scan."""
        return tuple(n // (self.fold * 2**level) for n in self.shape)

    @property
    def widths(self) -> list[int]:
        """Features at each level, the finest first."""
        return level_widths(self.width, self.levels)

    @property
    def told(self) -> int:
        """Numbers a generator begins with: its code and the condition."""
        return self.code + self.numbers


class Generator(nn.Module, ABC):
    """A network that makes scans of codes, on the scale -1 to 1, at one size or at several.

    `progress` tells those that grow how far training is; `draws` is how many normal numbers a scan takes, of which
    the first are its code and the rest noise.
    """

    progress: float = 1.0
    draws: int

    @abstractmethod
    def forward(
        self, code: Float[Tensor, "b k"], told: Tensor | None = None, image: Tensor | None = None
    ) -> list[Tensor]:
        """Scans (b, c, *space) at every size that the network makes, the coarsest first, full size last.

        Args:
            code: standard normal numbers, `draws` of them, or the code alone for scans without noise.
            told: the condition (b, numbers); None where the frame has none.
            image: what is given with the scan (b, context, *space).
        """

    def drawn(
        self, code: Float[Tensor, "b k"], told: Tensor | None, image: Tensor | None, real: Float[Tensor, "b c *space"]
    ) -> list[Tensor]:
        """What the critic sees of generated scans; `real` are the scans beside them."""
        return self(code, told, image)

    def seen(self, x: Float[Tensor, "b c *space"]) -> list[Tensor]:
        """What the critic sees of real scans: as many tensors as `drawn`, of the same shapes."""
        return [x]

    def joined(self, code: Float[Tensor, "b k"], told: Tensor | None) -> Float[Tensor, "b n"]:
        """Code and condition in one row."""
        return code if told is None else torch.cat([code, told.to(code)], 1)


class Critic(nn.Module, ABC):
    """A network that makes features of scans; `width` numbers for each scan, or each patch of it.

    `progress` tells those that grow how far training is.
    """

    progress: float = 1.0
    width: int

    @abstractmethod
    def forward(self, scans: Sequence[Tensor], beside: Tensor | None = None) -> Tensor:
        """Features (b, width), or (b, width, *patches), of what `Generator.seen` and `drawn` give.

        Args:
            scans: one scan, at every size.
            beside: (b, beside, *space), on the voxels of the full size.
        """


class Architecture(BaseModel, ABC):
    """How generator and critic are built; a field of the model's config, told apart by `kind`.

    `whole` says that the critic sees scans as they are: at full size, not in parts or as they grow; `guided` that the
    generator can be shown the scan that it begins with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    whole: ClassVar[bool] = True
    guided: ClassVar[bool] = False

    kind: Any

    @abstractmethod
    def generator(self, frame: Frame) -> Generator:
        """An untrained generator."""

    @abstractmethod
    def critic(self, frame: Frame) -> Critic:
        """An untrained critic."""


def spectral(module: nn.Module, wanted: bool = True) -> nn.Module:
    """A layer whose weight is divided by its largest singular value (Miyato et al. 2018, "Spectral normalization")."""
    return nn.utils.parametrizations.spectral_norm(module) if wanted else module


def halved(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *half"]:
    """The mean of each block of two voxels along each axis."""
    return functional.avg_pool2d(x, 2) if x.ndim == 4 else functional.avg_pool3d(x, 2)


def doubled(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *twice"]:
    """Every voxel twice along each axis."""
    return functional.interpolate(x, scale_factor=2, mode="nearest")


def beside_scan(x: Float[Tensor, "b c *space"], beside: Tensor | None) -> Tensor:
    """The scan with what is seen beside it, brought to the scan's size, as further channels."""
    if beside is None:
        return x
    factor = beside.shape[2] // x.shape[2]
    if factor > 1:
        beside = functional.avg_pool2d(beside, factor) if x.ndim == 4 else functional.avg_pool3d(beside, factor)
    return torch.cat([x, beside], 1)


__all__ = ["Architecture", "Critic", "Frame", "Generator", "beside_scan", "doubled", "halved", "spectral"]
