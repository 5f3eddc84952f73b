"""A scan: voxels that know where they are, what their numbers mean and what they came from."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from jaxtyping import Bool, Float, Shaped

from medgen.errors import DataError
from medgen.grid import Grid

# A number for all channels, or a tuple of one for each.
PerChannel = float | int | tuple[float | int, ...]
_Range = tuple[float | int, float | int]

# Two lattices coincide when no voxel centre is further off than this part of a voxel.
_LATTICE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Scale:
    """What the stored numbers mean: physical = slope * stored + intercept, in `unit`.

    DICOM's Modality LUT and NIfTI's scl fields are exactly this; normalising a scan edits its Scale
    instead of forgetting it. Several modalities of a patient have a line each: then values are (..., c, i, j, k).

    Args:
        slope, intercept: of all channels, or both a tuple of one a channel.
        unit: of the physical values, such as 'HU'.
        clip: the physical range that values were cut to, if any; one a channel where slopes are.

    Raises:
        DataError: a slope is 0 or not finite, or there are not as many intercepts as slopes.

    >>> Scale(2.0, -1024.0, "HU").physical(np.array([0, 512])).tolist()
    [-1024.0, 0.0]
    >>> Scale((2.0, 10.0), (0.0, 5.0)).physical(np.ones((2, 1, 1, 1))).ravel().tolist()
    [2.0, 15.0]
    """

    slope: PerChannel = 1.0
    intercept: PerChannel = 0.0
    unit: str = ""
    clip: _Range | tuple[_Range, ...] | None = None

    def __post_init__(self) -> None:
        if np.shape(self.slope) != np.shape(self.intercept) or np.shape(self.slope) == (0,):
            raise DataError(f"A scale needs an intercept for every slope; found {self.slope}, {self.intercept}.")
        if not np.isfinite([self.slope, self.intercept]).all() or not np.all(self.slope):
            raise DataError(f"A scale needs a finite slope other than 0; found {self.slope}, {self.intercept}.")

    @property
    def numbers(self) -> tuple[float | int, float | int]:
        """Slope and intercept where all channels share them.

        Raises:
            DataError: each channel has its own.
        """
        if isinstance(self.slope, tuple) or isinstance(self.intercept, tuple):
            raise DataError(
                f"Expected one scale for all channels; found {self.slope}, {self.intercept}. Take one channel of the "
                "scan (Scan.channel), or its physical values (Scan.in_one_scale)."
            )
        return self.slope, self.intercept

    def channel(self, number: int) -> "Scale":
        """The Scale of one channel."""
        if not isinstance(self.slope, tuple) or not isinstance(self.intercept, tuple):
            return self
        clip = None if self.clip is None else cast(_Range, self.clip[number])
        return Scale(self.slope[number], self.intercept[number], self.unit, clip)

    def physical(self, stored: np.ndarray) -> np.ndarray:
        """Physical values of stored ones, float32 (float64 stays)."""
        kind = np.dtype(np.float64 if stored.dtype == np.float64 else np.float32)
        return stored.astype(kind) * _across(self.slope, kind) + _across(self.intercept, kind)

    def stored(self, physical: np.ndarray | float | int) -> np.ndarray | float:
        """Stored values of physical ones, not rounded."""
        values = np.asarray(physical)
        kind = values.dtype if values.dtype.kind == "f" else np.dtype(np.float64)
        return (values - _across(self.intercept, kind)) / _across(self.slope, kind)

    def normalised(self, low: float | int, high: float | int) -> "Scale":
        """The Scale after stored values were mapped by (stored - low) / (high - low)."""
        slope, intercept = np.asarray(self.slope), np.asarray(self.intercept)
        return replace(self, slope=_told(slope * (high - low)), intercept=_told(slope * low + intercept))

    def between(self, other: "Scale", part: float) -> "Scale":
        """What values mean `part` of the way from here to another Scale of this unit."""
        slope = (1 - part) * np.asarray(self.slope) + part * np.asarray(other.slope)
        intercept = (1 - part) * np.asarray(self.intercept) + part * np.asarray(other.intercept)
        return Scale(_told(slope), _told(intercept), self.unit)


def _across(value: PerChannel, kind: np.dtype) -> np.ndarray:
    """A number of this kind; one a channel, to go over (c, i, j, k)."""
    return np.reshape(np.asarray(value, kind), (-1, 1, 1, 1) if isinstance(value, tuple) else ())


def _told(values: np.ndarray | np.generic) -> PerChannel:
    """An array of no axis as a number, of one as a tuple."""
    return tuple(values.tolist()) if values.ndim else values.item()


@dataclass(frozen=True)
class Header:
    """What is known of a scan besides place and scale; nothing here identifies a person.

    Args:
        modality: DICOM's two-letter code ('MR', 'CT', 'DX', 'OT', ...), '' where unknown.
        body_part: such as 'BRAIN' or 'CHEST', '' where unknown.
        space: NIfTI xform code: 0 unknown, 1 scanner, 2 aligned, 3 Talairach, 4 MNI.
        photometric: 'MONOCHROME1' (stored small is bright), 'MONOCHROME2' or 'RGB'.
        synthetic: the content, or part of it, was made artificially.
        lossy: the pixels have been through lossy compression at some time.
        padding: the stored value that fills pixels nobody measured; they are not in `Scan.valid`.
        channels: a name for each channel, empty where there is nothing to tell.
    """

    modality: str = ""
    body_part: str = ""
    space: int = 1
    photometric: str = "MONOCHROME2"
    synthetic: bool = False
    lossy: bool = False
    padding: float | int | None = None
    channels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Scan:
    """Voxels on a Grid, with a Scale and a Header; immutable.

    Args:
        voxels: stored values (c, i, j, k); a view in any memory order.
        grid: where they are; its shape equals the last three axes.
        scale: what the numbers mean.
        header: modality and the like.
        is_label: values are names of regions, so they move by nearest neighbour, always.
        valid: (i, j, k), False where nothing was measured (DICOM padding); None: all was.

    Raises:
        DataError: the shapes contradict each other.

    >>> grid = Grid((2, 2, 2), np.eye(4))
    >>> scan = Scan(np.arange(8.0, dtype=np.float32).reshape(1, 2, 2, 2), grid)
    >>> flipped = scan.onto(grid.flip(0), outside=0)
    >>> bool((flipped.onto(grid, outside=0).voxels == scan.voxels).all())
    True
    """

    voxels: Shaped[np.ndarray, "c i j k"]
    grid: Grid
    scale: Scale = field(default_factory=Scale)
    header: Header = field(default_factory=Header)
    is_label: bool = False
    valid: Bool[np.ndarray, "i j k"] | None = None

    def __post_init__(self) -> None:
        if self.voxels.ndim != 4 or self.voxels.shape[1:] != self.grid.shape or self.voxels.shape[0] < 1:
            raise DataError(f"Voxels (c, i, j, k) must fit the grid {self.grid.shape}; found {self.voxels.shape}.")
        if self.valid is not None and self.valid.shape != self.grid.shape:
            raise DataError(f"The valid mask {self.valid.shape} must have the grid's shape {self.grid.shape}.")
        if np.shape(self.scale.slope) not in ((), (self.channels,)):
            raise DataError(f"A scale of {np.size(self.scale.slope)} channels does not fit a scan of {self.channels}.")
        for name in ("voxels", "valid"):
            if (held := getattr(self, name)) is not None:
                frozen = held.view()
                frozen.setflags(write=False)
                object.__setattr__(self, name, frozen)

    @property
    def channels(self) -> int:
        """How many values each voxel has."""
        return self.voxels.shape[0]

    @property
    def is_planar(self) -> bool:
        """Whether this is one image rather than a volume."""
        return self.grid.shape[2] == 1

    def physical(self) -> Float[np.ndarray, "c i j k"]:
        """Values in `scale.unit`, NaN where nothing was measured."""
        values = self.scale.physical(self.voxels)
        if self.valid is not None:
            values[:, ~self.valid] = np.nan
        return values

    def with_voxels(self, voxels: np.ndarray, *, scale: Scale | None = None) -> "Scan":
        """The same place and header with other stored values."""
        return replace(self, voxels=voxels, scale=scale or self.scale)

    def channel(self, number: int) -> "Scan":
        """One channel by itself, with its own Scale and name."""
        header = replace(self.header, channels=self.header.channels[number : number + 1])
        voxels = self.voxels[number : number + 1]
        return replace(self, voxels=voxels, scale=self.scale.channel(number), header=header)

    def in_one_scale(self) -> "Scan":
        """The scan as files hold it that know one slope for all channels: physical values where there are several."""
        if not isinstance(self.scale.slope, tuple):
            return self
        header, scale = replace(self.header, padding=None), Scale(unit=self.scale.unit)
        return replace(self, voxels=self.scale.physical(self.voxels), scale=scale, header=header)

    def with_header(self, **changes: object) -> "Scan":
        """The same scan with some header fields changed."""
        return replace(self, header=replace(self.header, **changes))

    def onto(self, grid: Grid, *, outside: PerChannel) -> "Scan":
        """This scan on another grid: an exact copy where the lattices coincide, else one interpolation.

        Linear for images (after a Gaussian low-pass along every axis that gets coarser, with the
        width that turns the old voxel profile into the new one: Cardoso et al. 2015, "Scale
        factor point spread function matching"), nearest neighbour for labels. Voxels that were not
        measured do not take part.

        Args:
            grid: where the voxels shall be.
            outside: physical value beyond the field of view (CT -1024; maps NaN), or one a channel.

        Raises:
            DataError: there is a value outside for each of more channels, or fewer.
        """
        if self.grid == grid:
            return self
        matrix = self.grid.index_of(grid)
        lattice = _coinciding(matrix, grid.shape)
        told = outside if isinstance(outside, tuple) else (outside,) * self.channels
        if len(told) != self.channels:
            raise DataError(f"Expected one value outside, or {self.channels}, one a channel; found {len(told)}.")
        fills = [float(self.scale.channel(n).stored(value)) for n, value in enumerate(told)]
        return self._interpolated(grid, matrix, fills) if lattice is None else self._copied(grid, lattice, fills)

    def _copied(self, grid: Grid, lattice: np.ndarray, fills: Sequence[float]) -> "Scan":
        """The same numbers at their new places, each channel's fill where there are none; a view if none such."""
        order = [int(np.flatnonzero(column)[0]) for column in lattice[:3, :3].T]
        steps = [int(lattice[old, new]) for new, old in enumerate(order)]
        take, put = [], []
        for old, step, length in zip(order, steps, grid.shape, strict=True):
            before, size = int(lattice[old, 3]), self.grid.shape[old]
            # On the axis counted in the new direction, new voxel n is old voxel start + n.
            start = before if step > 0 else size - 1 - before
            first = min(max(0, -start), length)
            last = min(max(first, size - start), length)
            take.append(slice(start + first, start + last))
            put.append(slice(first, last))
        covered = all(part == slice(0, length) for part, length in zip(put, grid.shape, strict=True))

        def moved(values: np.ndarray, fill: np.ndarray | bool, dtype: np.dtype) -> np.ndarray:
            lead = values.ndim - 3
            turned = values.transpose(*range(lead), *[lead + old for old in order])
            taken = turned[(..., *[slice(None, None, step) for step in steps])][(..., *take)]
            if covered:
                return taken
            out = np.full((*values.shape[:lead], *grid.shape), fill, dtype=dtype)
            out[(..., *put)] = taken
            return out

        dtype, held = _holding(self.voxels.dtype, fills)
        valid = None if self.valid is None else moved(self.valid, True, self.valid.dtype)
        return replace(self, voxels=moved(self.voxels, np.reshape(held, (-1, 1, 1, 1)), dtype), grid=grid, valid=valid)

    def _interpolated(self, grid: Grid, matrix: np.ndarray, fills: Sequence[float]) -> "Scan":
        """One interpolation of every channel; unmeasured voxels have no say in it."""
        if self.is_label:
            dtype, held = _holding(self.voxels.dtype, fills)
            each = zip(self.voxels, held, strict=True)
            moved = [_resample(values.astype(dtype), matrix, grid.shape, fill, "nearest") for values, fill in each]
            valid = None if self.valid is None else _resample(self.valid, matrix, grid.shape, 1, "nearest")
            return replace(self, voxels=np.stack(moved), grid=grid, valid=valid)
        sigma = _antialias_sigma(matrix, self.grid.shape)

        def spread(values: np.ndarray, fill: float) -> np.ndarray:
            return _resample(_smooth(values, sigma), matrix, grid.shape, fill, "linear")

        voxels = self.voxels.astype(np.result_type(self.voxels.dtype, np.float32), copy=False)
        known = np.isfinite(voxels).all(axis=0)
        if self.valid is not None:
            known &= self.valid
        if known.all():
            moved = [spread(values, fill) for values, fill in zip(voxels, fills, strict=True)]
            return replace(self, voxels=np.stack(moved), grid=grid, valid=None)
        # Normalised convolution: unmeasured voxels have weight 0 instead of a made-up value.
        weight = spread(known.astype(voxels.dtype), 0.0)
        seen = weight > 0.5
        inside = _resample(np.ones(self.grid.shape, np.uint8), matrix, grid.shape, 0, "nearest") > 0
        moved = []
        for values, fill in zip(voxels, fills, strict=True):
            hole = np.nan
            if self.valid is not None:
                hole = fill if self.header.padding is None else self.header.padding
            unseen = np.where(inside, hole, fill)
            inner = spread(np.where(known, values, 0), 0.0) / np.where(seen, weight, 1)
            moved.append(np.where(seen, inner, unseen))
        valid = None if self.valid is None else seen | ~inside
        return replace(self, voxels=np.stack(moved).astype(voxels.dtype), grid=grid, valid=valid)


def _coinciding(matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
    """The exact signed permutation with integer shift that `matrix` is over `shape`, or None."""
    rounded = np.round(matrix)
    steps = np.abs(rounded[:3, :3])
    if not (np.array_equal(np.sort(steps, axis=0)[:2], np.zeros((2, 3))) and (steps.sum(1) == 1).all()):
        return None
    error = np.abs(matrix - rounded)
    furthest = error[:3, :3] @ (np.asarray(shape) - 1) + error[:3, 3]
    # The extent of a single slice does not show its step; a thicker slice is no copy but an average.
    return rounded if furthest.max() < _LATTICE_TOLERANCE and error[:3, :3].max() < 1e-2 else None


def _holding(dtype: np.dtype, values: Sequence[float]) -> tuple[np.dtype, Sequence[float | int]]:
    """The type, floating if it must be, that holds all `values`, and them as that type holds them."""
    if np.issubdtype(dtype, np.floating):
        return dtype, values
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    wholes = [round(value) for value in values if np.isfinite(value)]
    if len(wholes) == len(values) and all(
        low <= whole <= high and abs(value - whole) <= 1e-6 * max(1, abs(value))
        for value, whole in zip(values, wholes, strict=True)
    ):
        return dtype, wholes
    return np.result_type(dtype, np.float32), values


def _antialias_sigma(matrix: np.ndarray, shape: Sequence[int]) -> tuple[float, ...]:
    """Gaussian widths in old voxels that widen an old voxel's profile to a new voxel's."""
    step = np.abs(matrix[:3, :3]).max(axis=1)
    factor = np.where(np.asarray(shape) > 1, np.maximum(step, 1.0), 1.0)
    return tuple(float(s) for s in np.sqrt(factor**2 - 1) / (2 * np.sqrt(2 * np.log(2))))


def _smooth(values: np.ndarray, sigma: Sequence[float]) -> np.ndarray:
    if max(sigma) < 1e-3:
        return values
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, sigma, mode="nearest")


def _resample(values: np.ndarray, matrix: np.ndarray, shape: Sequence[int], fill: float | int, how: str) -> np.ndarray:
    """Sample `values` (i, j, k) at matrix @ target index; SimpleITK works in plain index space here."""
    import SimpleITK

    kind = np.uint8 if values.dtype.kind == "b" else values.dtype
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values.T, dtype=kind))
    move = SimpleITK.AffineTransform(3)
    move.SetMatrix(matrix[:3, :3].ravel().tolist())
    move.SetTranslation(matrix[:3, 3].tolist())
    interpolator = SimpleITK.sitkNearestNeighbor if how == "nearest" else SimpleITK.sitkLinear
    identity = np.eye(3).ravel().tolist()
    size = [int(n) for n in shape]
    moved = SimpleITK.Resample(image, size, move, interpolator, [0.0] * 3, [1.0] * 3, identity, fill)
    return SimpleITK.GetArrayFromImage(moved).T.astype(values.dtype, copy=False)


__all__ = ["Header", "PerChannel", "Scale", "Scan"]
