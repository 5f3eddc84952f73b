"""What a network is told of each scan: its condition, and an image on the same voxels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medgen.errors import DataError


@dataclass(frozen=True)
class Told:
    """Conditions and given images of `count` scans, each with a 1 that it is given; zeros where it is not.

    Args:
        count: scans.
        table: (count, numbers + 1); None for a network that takes no condition.
        image: (count, channels + 1, *space); None for a network that takes no image.
    """

    count: int
    table: Float[Tensor, "b numbers"] | None = None
    image: Float[Tensor, "b k *space"] | None = None

    def where(self, kept: Bool[Tensor, " b"]) -> "Told":
        """The same, but nothing of the scans where `kept` is False."""
        table, image = (x if x is None else x * _over(kept, x) for x in (self.table, self.image))
        return Told(self.count, table, image)


def condition_table(
    cond: Tensor | None, count: int, *, classes: int, numbers: int, device: torch.device
) -> Float[Tensor, "b numbers"] | None:
    """Class indices (b,) or rows (b, numbers) as rows with a 1 at their end; zeros without; None for no numbers."""
    if not numbers:
        return None
    table = torch.zeros(count, numbers + 1, device=device)
    if cond is not None:
        rows = torch.nn.functional.one_hot(cond, classes) if cond.ndim == 1 else cond
        table[:, : rows.shape[1]] = rows.to(table)
        table[:, -1] = 1
    return table


def context_image(
    context: Tensor | None, count: int, *, channels: int, space: Sequence[int], device: torch.device
) -> Float[Tensor, "b k *space"] | None:
    """The given image with a channel of 1 at its end; zeros without; None for no channels."""
    if not channels:
        return None
    image = torch.zeros(count, channels + 1, *space, device=device)
    if context is not None:
        image = torch.cat([context.to(image), torch.ones_like(image[:, -1:])], dim=1)
    return image


def require_context(context: Tensor | None, channels: int, space: Sequence[int]) -> None:
    """Refuse a given image that is not what a model was made for, or that is missing.

    Args:
        context: (b, channels, *space); None where `channels` is 0.
        channels, space: what it must have.

    Raises:
        DataError: it has not.
    """
    expected = (channels, *space) if channels else None
    found = None if context is None else tuple(context.shape[1:])
    if found != expected:
        raise DataError(
            f"With every scan this model is given {f'an image {expected}' if expected else 'no image'} as context; "
            f"found {found or 'none'}. Pass what it was trained with."
        )


def _over(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (like.ndim - 1))


__all__ = ["Told", "condition_table", "context_image", "require_context"]
