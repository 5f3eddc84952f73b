"""Anomalies that nobody has, drawn into healthy scans: what networks learn to find, and scores are chosen by.

Each scan gets none to `most` of them, each of one kind, in a random smooth shape of its own:

    blob         blended with one grey value (part of the texture stays)
    cut-paste    blended with another place of a scan of the batch (Li et al. 2021, "CutPaste"; Tan et al. 2020,
                 "Foreign patch interpolation")
    noise        coarse noise added
    deformation  bulged or shrunk about its middle

Shapes and kinds are medgen's own: nothing here looks at masks or lesions of anyone (see `medgen.data.lesions`).
"""

from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from medgen.nets.blocks import averaged
from medgen.nets.noise import coarse_noise

KINDS = ("blob", "cut-paste", "deformation", "noise")
# Radii as parts of the scan's mean edge.
_RADII = (0.04, 0.2)
# What changes less than this, on grey values, nobody could find.
_VISIBLE = 0.02


@dataclass(frozen=True, eq=False)
class Spoilt:
    """Scans with anomalies.

    Args:
        x: (b, c, *space) the scans.
        mask: (b, 1, *space) where anomalies are.
        clear: (b, 1, *space) False where an anomaly changed next to nothing, or reaches softly beyond its mask.
    """

    x: Float[Tensor, "b c *space"]
    mask: Bool[Tensor, "b 1 *space"]
    clear: Bool[Tensor, "b 1 *space"]


def spoilt(
    x: Float[Tensor, "b c *space"], kinds: tuple[str, ...] = KINDS, *, most: int = 3, least: int = 0,
    only_first: bool = False,
) -> Spoilt:  # fmt: skip
    """`x` with `least` to `most` anomalies a scan; torch's random state decides.

    With `only_first` the first scan alone, the others being there to cut from.

    >>> found = spoilt(torch.rand(5, 1, 32, 32), least=1)
    >>> bool(found.mask.any())
    True
    """
    wanted = x[:1] if only_first else x
    changed, inside = wanted.clone(), torch.zeros_like(wanted[:, :1], dtype=torch.bool)
    for n in range(len(wanted)):
        places = _foreground(x[n])
        for _ in range(int(torch.randint(least, most + 1, ()))):
            kind = kinds[int(torch.randint(len(kinds), ()))]
            box, shape, middle, radius = drawn_shape(x[n], places)
            here = (slice(n, n + 1), slice(None), *box)
            changed[here] = _drawn(kind, changed[here], x, shape, middle, radius)
            inside[here] |= shape > 0.5
    difference = averaged((changed - wanted).abs().amax(1, keepdim=True), 3)
    return Spoilt(changed.clamp(0, 1), inside, inside == (difference > _VISIBLE))


def drawn_shape(
    x: Float[Tensor, "c *space"], places: Float[Tensor, "n d"]
) -> tuple[tuple[slice, ...], Float[Tensor, "1 1 *box"], Float[Tensor, " d"], float]:
    """A smooth shape about one of `places`, 1 inside with a soft edge.

    Returns:
        The box of voxels it lies in, its values there, its middle in the box's voxels, its radius.
    """
    space, dims = x.shape[1:], x.ndim - 1
    radius = max(1.0, sum(space) / dims * float(torch.empty(()).uniform_(log(_RADII[0]), log(_RADII[1])).exp()))
    middle = places[int(torch.randint(len(places), ()))]
    reach = 2 * radius + 3
    box = tuple(slice(max(0, int(m - reach)), min(n, int(m + reach) + 1)) for m, n in zip(middle, space, strict=True))
    middle = middle - torch.tensor([one.start for one in box]).to(x)
    offsets = _axes(tuple(one.stop - one.start for one in box), x) - middle.reshape(-1, *[1] * dims)
    turn = torch.linalg.qr(torch.randn(dims, dims))[0]
    stretch = torch.empty(dims, 1).uniform_(log(0.6), log(1.6)).exp()
    distance = torch.einsum("ij,j...->i...", (turn / (radius * stretch)).to(x), offsets).norm(dim=0)
    waves = coarse_noise(offsets[None, :1], 1.0, max(2, round(radius)))[0, 0]
    edge = float(torch.empty(()).uniform_(0.3, 1.5))
    return box, torch.sigmoid((1 - distance - 0.35 * waves) * radius / edge)[None, None], middle, radius


def _foreground(x: Float[Tensor, "c *space"]) -> Float[Tensor, "n d"]:
    """Voxels that are not air; all where there is nothing else."""
    bright = x.amax(0) > 0.05
    return (bright if bool(bright.any()) else torch.ones_like(bright)).nonzero().to(x)


def _axes(space: tuple[int, ...], like: Tensor) -> Float[Tensor, "d *space"]:
    """Where every voxel lies along each axis."""
    lines = [torch.arange(n, device=like.device, dtype=like.dtype) for n in space]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))


def _drawn(
    kind: str, x: Float[Tensor, "1 c *space"], others: Float[Tensor, "b c *whole"], shape: Tensor, middle: Tensor,
    radius: float,
) -> Float[Tensor, "1 c *space"]:  # fmt: skip
    """One scan with one anomaly."""
    opacity = float(torch.empty(()).uniform_(0.25, 1.0))
    match kind:
        case "blob":
            value = torch.rand(1, x.shape[1], *[1] * (x.ndim - 2)).to(x)
            return x + opacity * shape * (value - x)
        case "cut-paste":
            other = others[int(torch.randint(len(others), ()))][None]
            starts = [
                int(torch.randint(n - size + 1, ())) for n, size in zip(other.shape[2:], x.shape[2:], strict=True)
            ]
            there = (slice(begin, begin + size) for begin, size in zip(starts, x.shape[2:], strict=True))
            patch = other[(slice(None), slice(None), *there)]
            patch = patch.flip(int(torch.randint(2, x.ndim, ()))) if torch.rand(()) < 0.5 else patch
            return x + opacity * shape * (patch - x)
        case "deformation":
            return _bulged(x, shape, middle)
        case "noise":
            coarseness = int(torch.randint(1, max(2, round(radius)) + 1, ()))
            strength = float(torch.empty(()).uniform_(0.05, 0.3))
            return x + shape * coarse_noise(x, strength, coarseness)
        case _:
            raise ValueError(f"no kind of anomaly is called {kind!r}; kinds: {', '.join(KINDS)}")


def _bulged(x: Float[Tensor, "1 c *space"], shape: Tensor, middle: Tensor) -> Float[Tensor, "1 c *space"]:
    """What lies inside moved outwards or inwards, most near the edge."""
    amount = float(torch.empty(()).uniform_(0.25, 0.7)) * (1 if torch.rand(()) < 0.5 else -1)
    axes = _axes(tuple(x.shape[2:]), x)
    at = axes - amount * shape[0] * (axes - middle.reshape(-1, *[1] * (x.ndim - 2)))
    sizes = [max(1, n - 1) for n in x.shape[2:]]
    grid = torch.stack([2 * a / n - 1 for a, n in zip(at.flip(0), reversed(sizes), strict=True)], -1)
    return functional.grid_sample(x, grid[None], padding_mode="border", align_corners=True)


__all__ = ["KINDS", "Spoilt", "drawn_shape", "spoilt"]
