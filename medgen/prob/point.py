"""A distribution that is one point: what an invertible model knows of a scan's code."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints


class Point(Distribution):
    """All mass at one place: codes of a bijection are certain.

    Args:
        value: (b, *event); the first axis is the batch.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, value: Tensor) -> None:
        self._value = value
        super().__init__(value.shape[:1], value.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self._value

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """The point, as often as asked."""
        return self._value.expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """0 at the point, minus infinity elsewhere: (b,)."""
        same = (value == self._value).flatten(1).all(1)
        return torch.where(same, 0.0, -torch.inf)


__all__ = ["Point"]
