"""Randomness as an argument: seeds derived from integers, noise that depends on nothing else."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def derived_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; distinct parts give unrelated seeds.

    >>> derived_seed(0, 1) != derived_seed(1, 0)
    True
    """
    digest = hashlib.sha256(",".join(str(int(part)) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_noise(shape: tuple[int, ...], *, seed: int, first: int = 0) -> "Tensor":
    """Standard normal noise of `shape`, made on the CPU, where row i depends on (seed, first + i) alone."""
    import torch

    rows = []
    for i in range(shape[0]):
        generator = torch.Generator().manual_seed(derived_seed(seed, first + i))
        rows.append(torch.randn(shape[1:], generator=generator))
    return torch.stack(rows)


__all__ = ["derived_seed", "seeded_noise"]
