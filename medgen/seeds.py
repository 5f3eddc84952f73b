"""Randomness as an argument: seeds derived from integers, noise that depends on nothing else."""

import hashlib
import math
from collections.abc import Sequence
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


def voxel_uniform(shape: tuple[int, ...], *, seed: int, origin: tuple[int, ...] = (), channels: int = 1) -> "Tensor":
    """Uniform noise on (0, 1), (channels, *shape), that is a function of (seed, channel, absolute voxel).

    A tile of a volume has the same noise wherever the tile begins and whatever else is computed: each
    voxel's coordinates are mixed into 64 bits (Steele et al. 2014, "Fast splittable pseudorandom number
    generators", the finaliser of SplitMix).

    Args:
        shape: voxels along each axis.
        seed: any integer.
        origin: absolute coordinates of the first voxel; zeros by default.
        channels: independent values a voxel.

    >>> whole = voxel_uniform((6, 6), seed=1)
    >>> bool((voxel_uniform((2, 3), seed=1, origin=(4, 3)) == whole[:, 4:, 3:]).all())
    True
    """
    import torch

    starts, noise = origin or (0,) * len(shape), torch.empty(channels, *shape, dtype=torch.float32)
    # Whole numbers take 64 bits each: of a large volume only some planes have theirs at a time.
    planes = max(1, 2**18 // max(1, channels * math.prod(shape[1:])))
    for first in range(0, shape[0], planes):
        part = noise[:, first : first + planes]
        # 23 bits: with 24 the largest value would be rounded to 1.
        bits = _bits(part.shape, (0, starts[0] + first, *starts[1:]), seed) >> 40
        part.copy_((bits.bitwise_and(2**23 - 1).to(torch.float32) + 0.5) / 2**23)
    return noise


def voxel_normal(shape: tuple[int, ...], *, seed: int, origin: tuple[int, ...] = (), channels: int = 1) -> "Tensor":
    """Standard normal noise (channels, *shape) that is a function of (seed, channel, absolute voxel)."""
    import torch

    uniform = voxel_uniform(shape, seed=seed, origin=origin, channels=channels)
    return torch.special.ndtri(uniform.double()).float()


# The golden ratio in 64 bits, and the finaliser's multipliers, as signed integers.
_ODD = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def _bits(shape: Sequence[int], starts: Sequence[int], seed: int) -> "Tensor":
    """64 bits for every place of a box that begins at `starts`."""
    import torch

    bits = _mixed(torch.full((1,) * len(shape), derived_seed(seed, 0), dtype=torch.int64))
    for axis, (start, size) in enumerate(zip(starts, shape, strict=True)):
        place = torch.arange(start, start + size, dtype=torch.int64)
        bits = _mixed(bits + _ODD * (place.reshape([-1 if a == axis else 1 for a in range(len(shape))]) + 1))
    return bits


def _mixed(bits: "Tensor") -> "Tensor":
    """Every output bit depends on every input bit; int64 arithmetic wraps around."""
    for shift, multiplier in _MULTIPLIERS:
        bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * multiplier
    return bits ^ ((bits >> 31) & (2**33 - 1))


__all__ = ["derived_seed", "seeded_noise", "voxel_normal", "voxel_uniform"]
