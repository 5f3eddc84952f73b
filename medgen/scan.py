"""A scan: voxels that know where they are, what their numbers mean and what they came from."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float, Shaped

from medgen.errors import DataError
from medgen.grid import Grid

# Two lattices coincide when no voxel centre is further off than this part of a voxel.
_LATTICE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Scale:
    """What the stored numbers mean: physical = slope * stored + intercept, in `unit`.

    DICOM's Modality LUT and NIfTI's scl fields are exactly this; normalising a scan edits its Scale
    instead of forgetting it. `clip` records the physical range that values were cut to, if any.

    >>> Scale(2.0, -1024.0, "HU").physical(np.array([0, 512])).tolist()
    [-1024.0, 0.0]
    """

    slope: float | int = 1.0
    intercept: float | int = 0.0
    unit: str = ""
    clip: tuple[float | int, float | int] | None = None

    def __post_init__(self) -> None:
        if not np.isfinite([self.slope, self.intercept]).all() or self.slope == 0:
            raise DataError(f"A scale needs a finite slope other than 0; found {self.slope}, {self.intercept}.")

    def physical(self, stored: np.ndarray) -> np.ndarray:
        """Physical values of stored ones, float32 (float64 stays)."""
        kind = np.float64 if stored.dtype == np.float64 else np.float32
        return stored.astype(kind) * kind(self.slope) + kind(self.intercept)

    def stored(self, physical: np.ndarray | float | int) -> np.ndarray | float:
        """Stored values of physical ones, not rounded."""
        return (np.asarray(physical) - self.intercept) / self.slope

    def normalised(self, low: float | int, high: float | int) -> "Scale":
        """The Scale after stored values were mapped by (stored - low) / (high - low)."""
        return replace(self, slope=self.slope * (high - low), intercept=self.slope * low + self.intercept)


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

    def with_header(self, **changes: object) -> "Scan":
        """The same scan with some header fields changed."""
        return replace(self, header=replace(self.header, **changes))

    def onto(self, grid: Grid, *, outside: float | int) -> "Scan":
        """This scan on another grid: an exact copy where the lattices coincide, else one interpolation.

        Linear for images (after a Gaussian low-pass along every axis that gets coarser, with the
        width that turns the old voxel profile into the new one: Cardoso et al. 2015, "Scale
        factor point spread function matching"), nearest neighbour for labels. Voxels that were not
        measured do not take part.

        Args:
            grid: where the voxels shall be.
            outside: physical value beyond the field of view (CT -1024; maps NaN).
        """
        if self.grid == grid:
            return self
        matrix = self.grid.index_of(grid)
        lattice = _coinciding(matrix, grid.shape)
        fill = float(self.scale.stored(outside))
        return self._interpolated(grid, matrix, fill) if lattice is None else self._copied(grid, lattice, fill)

    def _copied(self, grid: Grid, lattice: np.ndarray, fill: float) -> "Scan":
        """The same numbers at their new places, `fill` where there are none; a view if there are none such."""
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

        def moved(values: np.ndarray, fill: float | int, dtype: np.dtype) -> np.ndarray:
            lead = values.ndim - 3
            turned = values.transpose(*range(lead), *[lead + old for old in order])
            taken = turned[(..., *[slice(None, None, step) for step in steps])][(..., *take)]
            if covered:
                return taken
            out = np.full((*values.shape[:lead], *grid.shape), fill, dtype=dtype)
            out[(..., *put)] = taken
            return out

        dtype, fill = _holding(self.voxels.dtype, fill)
        valid = None if self.valid is None else moved(self.valid, True, self.valid.dtype)
        return replace(self, voxels=moved(self.voxels, fill, dtype), grid=grid, valid=valid)

    def _interpolated(self, grid: Grid, matrix: np.ndarray, fill: float) -> "Scan":
        """One interpolation of every channel; unmeasured voxels have no say in it."""
        if self.is_label:
            dtype, fill = _holding(self.voxels.dtype, fill)
            moved = [_resample(values.astype(dtype), matrix, grid.shape, fill, "nearest") for values in self.voxels]
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
            return replace(self, voxels=np.stack([spread(values, fill) for values in voxels]), grid=grid, valid=None)
        # Normalised convolution: unmeasured voxels have weight 0 instead of a made-up value.
        weight = spread(known.astype(voxels.dtype), 0.0)
        seen = weight > 0.5
        inside = _resample(np.ones(self.grid.shape, np.uint8), matrix, grid.shape, 0, "nearest") > 0
        hole = np.nan
        if self.valid is not None:
            hole = fill if self.header.padding is None else self.header.padding
        unseen = np.where(inside, hole, fill)
        moved = [
            np.where(seen, spread(np.where(known, values, 0), 0.0) / np.where(seen, weight, 1), unseen)
            for values in voxels
        ]
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


def _holding(dtype: np.dtype, value: float | int) -> tuple[np.dtype, float | int]:
    """The type, floating if it must be, that holds `value`, and the value as that type holds it."""
    if np.issubdtype(dtype, np.floating):
        return dtype, value
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if (
        np.isfinite(value)
        and low <= (whole := round(value)) <= high
        and abs(value - whole) <= 1e-6 * max(1, abs(value))
    ):
        return dtype, whole
    return np.result_type(dtype, np.float32), value


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


__all__ = ["Header", "Scale", "Scan"]
