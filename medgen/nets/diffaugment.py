"""Random changes of what a critic sees, the same kind for real and for generated scans, with gradients through them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# Largest shift and edge of the hole as parts of an axis, and largest exponent of the contrast.
_SHIFT, _HOLE, _GAMMA = 0.125, 0.4, 1.4


@dataclass(frozen=True)
class Change:
    """One random change a scan: translation, cutout and gamma, as suits scans.

    Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", without the colours that scans do
    not have. A critic that never sees a scan twice alike cannot learn the training scans by heart, and as generated
    scans are changed alike the generator does not learn the changes.

    Args:
        shift: along each axis, as parts of it.
        hole: centre of the cutout along each axis, as parts of it.
        gamma: exponent of the contrast.
        kept: 1 for the scans that are changed, 0 for the others.
    """

    shift: Float[Tensor, "b dims"]
    hole: Float[Tensor, "b dims"]
    gamma: Float[Tensor, " b"]
    kept: Float[Tensor, " b"]

    @classmethod
    def drawn(cls, count: int, dims: int, share: float, device: torch.device) -> "Change":
        """Of torch's random state; `share` of the scans are changed."""
        shift = (torch.rand(count, dims, device=device) * 2 - 1) * _SHIFT
        hole = torch.rand(count, dims, device=device)
        gamma = _GAMMA ** (torch.rand(count, device=device) * 2 - 1)
        return cls(shift, hole, gamma, (torch.rand(count, device=device) < share).float())

    def __call__(self, scans: Sequence[Tensor], *, values: bool = True) -> list[Tensor]:
        """The scans (b, c, *space) at every size, changed alike; without `values` they only move, as masks do."""
        return [self._one(scan, values) for scan in scans]

    def _one(self, x: Float[Tensor, "b c *space"], values: bool) -> Float[Tensor, "b c *space"]:
        space = x.shape[2:]
        over = (slice(None), *[None] * (x.ndim - 1))
        if values:
            unit = (x + 1) / 2
            # Slope and sign survive at 0, where background is, and outside [0, 1], where an untrained generator may be.
            curved = unit * (unit.abs() + 1e-3) ** (self.gamma[over] - 1)
            x = torch.where(self.kept[over] > 0, 2 * curved - 1, x)
        rows = torch.arange(len(x), device=x.device)[(slice(None), *[None] * len(space))]
        index, inside = [], torch.zeros(len(x), *space, dtype=torch.bool, device=x.device)
        for axis, size in enumerate(space):
            line = torch.arange(size, device=x.device)
            moved = (self.shift[:, axis] * self.kept * size).round().long()
            index.append(_along((line[None] + moved[:, None]).clamp(0, size - 1), axis, len(space)))
            reach = ((line[None] + 0.5) / size - self.hole[:, axis, None]).abs() < _HOLE / 2
            near = _along(reach, axis, len(space))
            inside = near.expand_as(inside) if axis == 0 else inside & near
        x = x.movedim(1, -1)[(rows, *index)].movedim(-1, 1)
        hole = inside & (self.kept[(slice(None), *[None] * len(space))] > 0)
        return x.masked_fill(hole[:, None], -1.0 if values else 0.0)


def consistent(one: Float[Tensor, "b p"], other: Float[Tensor, "b p"]) -> Float[Tensor, " b"]:
    """How far two verdicts about a scan are apart (Zhang et al. 2020, "Consistency regularization", equation 3)."""
    return functional.mse_loss(one, other, reduction="none").mean(1)


def _along(rows: Tensor, axis: int, dims: int) -> Tensor:
    """(b, n) laid along one axis of space."""
    return rows.reshape(len(rows), *[rows.shape[1] if a == axis else 1 for a in range(dims)])


__all__ = ["Change", "consistent"]
