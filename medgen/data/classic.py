"""The classical transforms as values: drawn once, written down, and repeated from what was written.

Content at p (mm about the middle of the field of view, along the voxel axes) moves to q = R S p + t and is bent, all of
it in one interpolation, by where each voxel of the result looks:

    p(q) = (R S)^-1 (q - t) + u(q)

with u a sum of plane waves, shortened where it would fold. Intensity follows: shading, gamma, blur, noise. What MONAI
has a transform for, MONAI does.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, exp
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from monai.transforms import AdjustContrast, GaussianSmooth, RandGaussianNoise, Resample
from monai.utils import convert_to_tensor
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from medgen.data.painting import indices, rotation, waves
from medgen.data.window import flat
from medgen.errors import ConfigError, DataError
from medgen.grid import Grid
from medgen.scan import Scan

Mirror = Literal["LR", "PA", "IS"]
Three = tuple[float, float, float]

# At strength 1: degrees; part of a length; part of the field of view; of that the bending, and how long its waves are.
_TURN, _SIZE, _UNEVEN, _SHIFT, _BEND, _WAVE = 10.0, 0.1, 0.03, 0.04, 0.008, (0.3, 0.6)
# At strength 1: logarithm of gamma; noise as part of the range; blur in voxels; shading.
_GAMMA, _NOISE, _BLUR, _SHADE = 0.35, 0.03, 0.8, 0.12
# Nothing folds while bending stretches less than this, and scaling shrinks to no less than that.
_STRETCH, _STRONGEST = 0.6, 3.0
_WAVES, _DEGREE = 6, 2


class Classical(BaseModel):
    """One draw of the classical transforms; the same numbers make the same scan.

    Args:
        rotate: degrees about the three voxel axes, after which axes are made right-angled; of an image the last alone.
        scale: of lengths along each axis.
        shift: mm along each axis.
        mirror: voxel axes that run backwards.
        bend: root mean square length of the bending, mm.
        waves: shortest and longest of its waves, mm.
        bend_seed: decides the waves.
        gamma: exponent of values on [0, 1].
        noise: standard deviation, a part of what lies between the 1st and the 99th percentile.
        noise_seed: decides it.
        blur: standard deviation, mm.
        shading: coefficients of Legendre polynomials of degree 1 and 2 over the field of view; the values above the
            lowest are multiplied by exp of their sum. Empty for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rotate: Three = (0.0, 0.0, 0.0)
    scale: Three = (1.0, 1.0, 1.0)
    shift: Three = (0.0, 0.0, 0.0)
    mirror: tuple[int, ...] = ()
    bend: float = Field(default=0.0, ge=0)
    waves: tuple[float, float] = (60.0, 120.0)
    bend_seed: int = Field(default=0, ge=0)
    gamma: float = Field(default=1.0, gt=0)
    noise: float = Field(default=0.0, ge=0)
    noise_seed: int = Field(default=0, ge=0)
    blur: float = Field(default=0.0, ge=0)
    shading: tuple[float, ...] = ()

    @classmethod
    def drawn(cls, seed: int, scan: Scan, *, strength: float = 1.0, mirror: Sequence[Mirror] = ()) -> "Classical":
        """Transforms for a scan of this size.

        Where values have a unit, such as HU, they keep their meaning: no gamma and no shading.

        Args:
            seed: decides everything.
            scan: whose field of view and unit count, and nothing else of it.
            strength: 1 is moderate; angles, lengths and noise grow with it.
            mirror: directions that may be exchanged, each in half of the draws. None by default: left and right matter.

        Raises:
            ConfigError: the strength is out of range, or there is no such direction.
        """
        if not 0 < strength <= _STRONGEST:
            raise ConfigError(f"strength: expected above 0, at most {_STRONGEST:g}; found {strength:g}.")
        if unknown := set(mirror) - set(get_args(Mirror)):
            raise ConfigError(f"mirror: expected some of {', '.join(get_args(Mirror))}; found {sorted(unknown)[0]!r}.")
        rng, grid = np.random.default_rng(seed), flat(scan).grid
        flatten = np.array([1, 1, 0]) if scan.is_planar or 1 in scan.grid.shape else np.ones(3)
        extent = np.asarray(grid.spacing) * grid.shape
        length = float(np.exp(np.log(extent[flatten > 0]).mean()))
        turn = rng.uniform(-_TURN, _TURN, 3) * strength * (flatten if flatten.all() else [0, 0, 1])
        size = np.exp(np.log1p(_SIZE * strength) * rng.uniform(-1, 1) + _UNEVEN * strength * rng.uniform(-1, 1, 3))
        shift = _SHIFT * strength * extent * rng.uniform(-1, 1, 3) * flatten
        backwards = [axis for axis in range(3) if flatten[axis] and rng.random() < 0.5 and _way(grid, axis) in mirror]
        bend, bend_seed, noise_seed = float(rng.uniform(0, _BEND)), int(rng.integers(2**31)), int(rng.integers(2**31))
        gamma, noise, blur = rng.uniform(-1, 1), rng.uniform(0, _NOISE), rng.uniform(0, _BLUR)
        noisy, blurred, shaded = rng.random(3) < (0.5, 0.3, 0.5)
        shading = rng.normal(0, _SHADE * strength, len(_orders(2 if not flatten.all() else 3)))
        meant = bool(scan.scale.unit)
        return cls(
            rotate=_three(turn), scale=_three(np.where(flatten > 0, size, 1.0)), shift=_three(shift),
            mirror=tuple(backwards), bend=round(bend * strength * length, 4), bend_seed=bend_seed,
            waves=(round(_WAVE[0] * length, 3), round(_WAVE[1] * length, 3)),
            gamma=1.0 if meant else round(exp(_GAMMA * strength * gamma), 5),
            noise=round(float(noise * strength), 5) if noisy else 0.0, noise_seed=noise_seed,
            blur=round(float(blur * strength * min(grid.spacing[:2])), 4) if blurred else 0.0,
            shading=() if meant or not shaded else tuple(round(float(one), 5) for one in shading),
        )  # fmt: skip

    def apply(self, scan: Scan, mask: Scan | None = None) -> tuple[Scan, Scan | None]:
        """The transformed scan on its own grid, in its unit and type, and the mask that moved with it.

        Images are interpolated with cubic splines, which keep their texture, volumes linearly, masks by the nearest
        voxel; beyond the field of view its border goes on. Values stay within the scan's range. What nobody measured
        counts as the lowest value.

        Args:
            scan: image or volume.
            mask: label map on the same grid.

        Raises:
            DataError: the mask is on another grid.
        """
        if mask is not None and not mask.grid.close(scan.grid):
            raise DataError(
                f"A mask moves with its scan, so both need one grid; found {mask.grid.shape} beside {scan.grid.shape} "
                "voxels, or another place. Bring the mask onto the scan's grid first."
            )
        work = flat(scan)
        looks, planar = torch.from_numpy(self._looks(work.grid)), work.is_planar
        values = work.physical()
        values = np.nan_to_num(values, nan=float(np.nanmin(values)))
        moved = _resampled(values, looks, 3 if planar else "bilinear")
        made = stored_as(work, self._valued(moved, values, work.grid))
        made = made.onto(scan.grid, outside=0)
        return made, None if mask is None else self._moved(mask, looks)

    def moved(self, mask: Scan) -> Scan:
        """A label map on its own grid, moved as a scan would be."""
        return self._moved(mask, torch.from_numpy(self._looks(flat(mask).grid)))

    def _moved(self, mask: Scan, looks: Tensor) -> Scan:
        drawn = flat(mask)
        regions = _resampled(drawn.voxels, looks, "nearest").astype(drawn.voxels.dtype)
        label = replace(drawn.with_header(synthetic=True, padding=None), voxels=regions, is_label=True, valid=None)
        return label.onto(mask.grid, outside=0)

    # -- where voxels look -------------------------------------------------------------------------

    def _looks(self, grid: Grid) -> Float[np.ndarray, "dims *space"]:
        """Voxel positions about the middle, of what each voxel of the result shows."""
        dims = 2 if grid.shape[2] == 1 else 3
        # Along the voxel axes, made right-angled, so that a rotation in mm is one whatever the spacing.
        _, local = np.linalg.qr(grid.affine[:3, :3])
        local = local * np.sign(np.diag(local))[:, None]
        back = np.linalg.inv(local)
        undo = np.linalg.inv(rotation(*self.rotate) @ np.diag(self.scale))
        matrix, start = back @ undo @ local, -back @ undo @ np.asarray(self.shift)
        axes = np.meshgrid(*[_about_middle(n) for n in grid.shape], indexing="ij", sparse=True)
        found = [sum(m * a for m, a in zip(row, axes, strict=True)) + s for row, s in zip(matrix, start, strict=True)]
        looks = np.stack([np.broadcast_to(one, grid.shape) for one in found]).astype(np.float32)
        if self.bend:
            looks += np.einsum("ab,b...->a...", back.astype(np.float32), self._bending(grid, local))
        for axis in self.mirror:
            looks[axis] *= -1
        return looks[:dims, ..., 0] if dims == 2 else looks

    def _bending(self, grid: Grid, local: np.ndarray) -> Float[np.ndarray, "3 i j k"]:
        """u in mm, computed on a lattice as coarse as the waves allow."""
        extent = np.asarray(grid.shape) * grid.spacing
        counts = [min(n, ceil(8 * e / self.waves[0]) + 1) for n, e in zip(grid.shape, extent, strict=True)]
        places = [np.linspace(-(n - 1) / 2, (n - 1) / 2, m) for n, m in zip(grid.shape, counts, strict=True)]
        points = np.stack(np.meshgrid(*places, indexing="ij"), -1) @ local.T
        rng, dims = np.random.default_rng(self.bend_seed), 2 if grid.shape[2] == 1 else 3
        u = np.stack([waves(points, rng, _WAVES, self.waves) for _ in range(dims)] + [np.zeros(counts)] * (3 - dims))
        u *= self.bend / dims**0.5
        steep = np.zeros(counts)
        for axis, place in enumerate(places):
            if len(place) > 1:
                change = np.gradient(u, place * grid.spacing[axis], axis=axis + 1)
                steep += np.square(change).sum(0)
        u *= min(1.0, _STRETCH / max(float(np.sqrt(steep.max())), 1e-9))
        coarse = torch.from_numpy(u.astype(np.float32))[None]
        return functional.interpolate(coarse, grid.shape, mode="trilinear", align_corners=True)[0].numpy()

    # -- what they show ----------------------------------------------------------------------------

    def _valued(self, moved: np.ndarray, source: np.ndarray, grid: Grid) -> Float[np.ndarray, "c i j k"]:
        """Physical values after shading, gamma, blur and noise, within the range of each channel of the source."""
        shade = np.exp(self._shade(grid)) if self.shading else None
        shown = []
        for number, (values, original) in enumerate(zip(moved, source, strict=True)):
            low, high = float(original.min()), float(original.max())
            span = max(high - low, 1e-12)
            x = torch.from_numpy(np.clip((values - low) / span, 0, 1).astype(np.float32))
            if shade is not None:
                x = (x * torch.from_numpy(shade)).clamp(0, 1)
            if self.gamma != 1:
                x = _plain(AdjustContrast(self.gamma)(x))
            if self.blur:
                x = _blurred(x, [self.blur / one for one in grid.spacing])
            if self.noise:
                # Of the values that nearly all voxels have: a bright vessel makes no scan noisier.
                usual = float(np.subtract(*np.percentile(original, [99, 1]))) / span or 1.0
                noise = RandGaussianNoise(prob=1, std=self.noise * usual, sample_std=False)
                noise.set_random_state(seed=(self.noise_seed + number) % 2**32)
                x = _plain(noise(x))
            shown.append(np.clip(low + span * x.clamp(0, 1).numpy().astype(np.float64), low, high))
        return np.stack(shown)

    def _shade(self, grid: Grid) -> Float[np.ndarray, "i j k"]:
        """The logarithm of the shading, of mean 0."""
        dims = 2 if grid.shape[2] == 1 else 3
        coefficients = np.zeros((_DEGREE + 1,) * 3)
        for order, one in zip(_orders(dims), self.shading, strict=True):
            coefficients[order] = one
        i, j, k = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in grid.shape)
        field = np.polynomial.legendre.leggrid3d(i, j, k, coefficients)
        return (field - field.mean()).astype(np.float32)


def stored_as(scan: Scan, physical: Float[np.ndarray, "c i j k"]) -> Scan:
    """Physical values in a scan's own unit and type, on its grid, marked as made; all of them count as measured."""
    kind, stored = scan.voxels.dtype, np.asarray(scan.scale.stored(physical))
    stored = stored.round() if kind.kind in "iub" else stored
    # What rounding makes of the ends of the range stays within it.
    stored = np.clip(stored, np.nanmin(scan.voxels), np.nanmax(scan.voxels)).astype(kind)
    scale = replace(scan.scale, clip=None)
    return replace(scan.with_header(synthetic=True, padding=None), voxels=stored, scale=scale, valid=None)


# -- batches ---------------------------------------------------------------------------------------------


def classical_batch(
    x: Float[Tensor, "b c *space"],
    generator: torch.Generator,
    strength: float = 1.0,
    labels: Int[Tensor, "b *space"] | None = None,
    *,
    spacing: Sequence[float] = (),
) -> tuple[Float[Tensor, "b c *space"], Int[Tensor, "b *space"] | None]:
    """The same kinds of transforms for a batch in a training loop: one `grid_sample` of scans, one of labels.

    Each scan has its own rotation, scaling, shift, bending, gamma and noise; nothing is mirrored. What is drawn comes
    from `generator` alone.

    Args:
        x: scans on [0, 1], on any device.
        generator: decides everything; on the CPU.
        strength: as of `Classical`.
        labels: label maps that move with them.
        spacing: of voxels along each axis, in any unit; all alike by default.

    >>> moved, _ = classical_batch(torch.rand(2, 1, 16, 16), torch.Generator().manual_seed(0))
    >>> tuple(moved.shape)
    (2, 1, 16, 16)
    """
    count, dims, space = len(x), x.ndim - 2, tuple(x.shape[2:])

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(count, *shape, generator=generator) - 1

    # Everything in units of half the field of view's length along each axis, as grid_sample has it.
    half = torch.tensor(space) * torch.tensor([float(one) for one in spacing] or [1.0] * dims)
    turns = torch.deg2rad(_TURN * strength * uniform(1 if dims == 2 else 3))
    linear = torch.eye(dims).repeat(count, 1, 1)
    for plane, (a, b) in enumerate([(0, 1), (1, 2), (0, 2)][: turns.shape[1]]):
        turn = torch.eye(dims).repeat(count, 1, 1)
        turn[:, a, a] = turn[:, b, b] = turns[:, plane].cos()
        turn[:, b, a], turn[:, a, b] = turns[:, plane].sin(), -turns[:, plane].sin()
        linear = linear @ turn
    sizes = ((1 + _SIZE * strength) ** uniform(1)) * torch.exp(_UNEVEN * strength * uniform(dims))
    linear = linear * sizes[:, None] * half[None, None, :] / half[None, :, None]
    order = list(reversed(range(dims)))
    theta = torch.cat([linear, (2 * _SHIFT * strength * uniform(dims))[..., None]], 2)[:, order]
    looks = functional.affine_grid(theta[:, :, [*order, dims]], [count, 1, *space], align_corners=False)
    # Bending: random vectors at a coarse lattice, smooth between them; a node's part of the field of view is a wave's.
    nodes = torch.randn(count, dims, *([6] * dims), generator=generator) * torch.rand(
        count, *([1] * (dims + 1)), generator=generator
    )
    mode = "bicubic" if dims == 2 else "trilinear"
    bent = functional.interpolate(nodes, space, mode=mode, align_corners=True)
    looks = looks + 2 * _BEND * strength * bent.movedim(1, -1)
    looks = looks.to(x)
    how = "bicubic" if dims == 2 else "bilinear"
    moved = functional.grid_sample(x, looks, mode=how, padding_mode="border", align_corners=False).clamp(0, 1)
    each = (count, *([1] * (dims + 1)))
    moved = moved.clamp(min=1e-6) ** torch.exp(_GAMMA * strength * uniform(1)).reshape(each).to(x)
    level = (_NOISE * strength * torch.rand(count, generator=generator)).reshape(each).to(x)
    moved = (moved + level * torch.randn(x.shape, generator=generator).to(x)).clamp(0, 1)
    if labels is None:
        return moved, None
    regions = functional.grid_sample(
        labels[:, None].to(x), looks, mode="nearest", padding_mode="border", align_corners=False
    )
    return moved, regions[:, 0].round().to(labels.dtype)


# -- parts -----------------------------------------------------------------------------------------------


def _three(values: np.ndarray) -> Three:
    a, b, c = (round(float(one), 5) for one in values)
    return a, b, c


def _way(grid: Grid, axis: int) -> str:
    """The direction that a voxel axis runs nearest to, as in `Mirror`."""
    return next(pair for pair in get_args(Mirror) if grid.axcodes[axis] in pair)


def _orders(dims: int) -> list[tuple[int, int, int]]:
    """Degrees along each axis of the polynomials of degree 1 and 2."""
    found = [(int(a), int(b), int(c)) for a, b, c in indices((_DEGREE + 1,) * 3).reshape(-1, 3)]
    return [one for one in found if 1 <= sum(one) <= _DEGREE and (dims == 3 or not one[2])]


def _about_middle(size: int) -> Float[np.ndarray, " n"]:
    return np.arange(size) - (size - 1) / 2


def _resampled(values: np.ndarray, looks: Tensor, mode: str | int) -> np.ndarray:
    """Values (c, i, j, k) where each voxel looks, by MONAI's resampler."""
    space = values[..., 0] if looks.ndim == 3 else values
    resample = Resample(mode=mode, padding_mode="nearest" if isinstance(mode, int) else "border", dtype=np.float32)
    moved = _plain(resample(torch.from_numpy(np.ascontiguousarray(space, dtype=np.float32)), looks)).numpy()
    return moved[..., None] if looks.ndim == 3 else moved


def _blurred(x: Tensor, sigma: Sequence[float]) -> Tensor:
    """Gaussian blur of voxels (i, j, k), those beyond the border without a say."""
    smooth = GaussianSmooth(sigma[:2] if x.shape[2] == 1 else sigma)
    space = x[None, ..., 0] if x.shape[2] == 1 else x[None]
    blurred = _plain(smooth(space)) / _plain(smooth(torch.ones_like(space)))
    return blurred[0, ..., None] if x.shape[2] == 1 else blurred[0]


def _plain(values: Any) -> Tensor:
    """Without MONAI's metadata."""
    return cast(Tensor, convert_to_tensor(values, dtype=torch.float32, track_meta=False))


__all__ = ["Classical", "Mirror", "classical_batch", "stored_as"]
