"""How a scan becomes what a model sees: a list of typed steps, pure Scan to Scan, JSON both ways.

Geometry comes first and is done on Grids alone, so a scan is moved once however many steps there
are; intensity comes second and edits the Scale, so physical values stay known. Slices come last: they
say that a model of images sees the volume slice by slice, and leave the volume as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from types import EllipsisType
from typing import Annotated, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from medgen.errors import DataError
from medgen.grid import Grid
from medgen.scan import Scale, Scan


class Step(BaseModel):
    """One step of a recipe; `do` says which."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Orient(Step):
    """Flip and permute axes to run nearest to `axcodes`; an exact copy."""

    do: Literal["orient"] = "orient"
    axcodes: str = "RAS"

    def place(self, grid: Grid, scan: Scan | None = None) -> Grid:
        """The grid after this step."""
        return grid.reorient(self.axcodes)


class Respace(Step):
    """Other distances between voxels, in mm, over the same field of view."""

    do: Literal["respace"] = "respace"
    spacing: tuple[float, float, float]

    def place(self, grid: Grid, scan: Scan | None = None) -> Grid:
        """The grid after this step; spacing that agrees within 1 % stays, so that nothing is interpolated for it."""
        spacing = [
            old if abs(old / new - 1) < 0.01 else new for old, new in zip(grid.spacing, self.spacing, strict=True)
        ]
        return grid if np.allclose(spacing, grid.spacing, rtol=0) else grid.respaced(spacing)


class CropOrPad(Step):
    """A window of `shape` voxels: about the middle of the scan, of its foreground, or a world position.

    Args:
        shape: voxels along i, j, k.
        about: 'centre', 'foreground', or (x, y, z) in RAS+ mm for scans that share a space.
    """

    do: Literal["crop_or_pad"] = "crop_or_pad"
    shape: tuple[int, int, int]
    about: Literal["centre", "foreground"] | tuple[float, float, float] = "centre"

    def place(self, grid: Grid, scan: Scan | None = None) -> Grid:
        """The grid after this step, on the same lattice; without a scan its foreground is taken to be in the middle."""
        about = self.about
        if about == "foreground" and scan is not None:
            about = foreground_centre(scan)
        if isinstance(about, str):
            return grid.centred(self.shape)
        start = np.round(grid.index(about) - (np.asarray(self.shape) - 1) / 2 - 1e-6).astype(int)
        return grid.patch(start.tolist(), self.shape)


class Window(Step):
    """Cut physical values to [low, high] and map them to [0, 1]: Hounsfield units, 8-bit pictures."""

    do: Literal["window"] = "window"
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> "Window":
        if not self.low < self.high:
            raise ValueError(f"window needs low < high, not {self.low}, {self.high}")
        return self

    def limits(self, values: Float[np.ndarray, "c i j k"]) -> tuple[float, float]:
        """The physical values that become 0 and 1."""
        return self.low, self.high


class Percentiles(Step):
    """Map the scan's own foreground percentiles to [0, 1] and cut beyond; for arbitrary units (MR).

    Args:
        low, high: percentiles of the foreground; `low` 0 means the lowest value.
        apart: each channel has a range of its own, as modalities of unlike brightness need; those of a colour picture
            keep one, so that colours stay.
    """

    do: Literal["percentiles"] = "percentiles"
    low: float = Field(default=0.0, ge=0, lt=100)
    high: float = Field(default=99.5, gt=0, le=100)
    apart: bool = False

    def limits(self, values: Float[np.ndarray, "c i j k"]) -> tuple[float, float]:
        """The physical values that become 0 and 1."""
        known = values[np.isfinite(values)]
        inside = known[known > foreground_level(known)]
        sample = inside if len(inside) > 16 else known
        low = float(known.min()) if self.low == 0 else float(np.percentile(sample, self.low))
        return low, float(np.percentile(sample, self.high))


Plane = Literal["sagittal", "coronal", "axial"]
# The voxel axis across each plane of a volume that runs RAS: i, j, k.
_ACROSS: dict[str, int] = {plane: axis for axis, plane in enumerate(get_args(Plane))}


@dataclass(frozen=True)
class Place:
    """Where a slice lies: in its volume, and in the middle of the frame that holds slices of every plane.

    Args:
        plane: which way it is cut.
        number: voxels before it along the axis across.
        index: of it in (..., i, j, k).
        inside: of it in (..., *frame).
    """

    plane: Plane
    number: int
    index: tuple[EllipsisType | int | slice, ...]
    inside: tuple[EllipsisType | slice, ...]

    @property
    def name(self) -> str:
        """Such as 'axial/12'."""
        return f"{self.plane}/{self.number}"


class Slices(Step):
    """A model of images sees the volume slice by slice, along one plane or several; the volume stays as it is.

    Slices keep the order of the volume's axes: sagittal ones run j, k, coronal ones i, k, axial ones i, j. All have
    one shape, the frame: the most rows and the most columns of any plane, a smaller slice in the middle.

    >>> Slices(planes=("sagittal", "axial")).frame((4, 6, 5))
    (6, 6)
    """

    do: Literal["slices"] = "slices"
    planes: tuple[Plane, ...] = Field(default=("axial",), min_length=1)

    @field_validator("planes")
    @classmethod
    def _once(cls, planes: tuple[Plane, ...]) -> tuple[Plane, ...]:
        if len(set(planes)) < len(planes):
            raise ValueError(f"each plane is named once, not {', '.join(planes)}")
        return planes

    def frame(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a slice of a volume of `shape`, padded."""
        rows, columns = zip(*(_within(plane, shape) for plane in self.planes), strict=True)
        return max(rows), max(columns)

    def places(self, shape: Sequence[int]) -> list[Place]:
        """Every slice of a volume of `shape`, plane after plane."""
        frame, found = self.frame(shape), []
        for plane in self.planes:
            sizes = _within(plane, shape)
            starts = [(most - size) // 2 for most, size in zip(frame, sizes, strict=True)]
            inside = (..., *(slice(start, start + size) for start, size in zip(starts, sizes, strict=True)))
            for number in range(shape[_ACROSS[plane]]):
                index = tuple(number if axis == _ACROSS[plane] else slice(None) for axis in range(3))
                found.append(Place(plane, number, (..., *index), inside))
        return found

    def shares(self, mask: Bool[np.ndarray, "i j k"]) -> Float[np.ndarray, " slices"]:
        """How much of a mask each slice shows, as a part of what the fullest of its plane shows; 0 of an empty mask."""
        found = []
        for plane in self.planes:
            areas = mask.sum(axis=tuple(axis for axis in range(3) if axis != _ACROSS[plane]))
            found.append(areas / max(1, areas.max()))
        return np.concatenate(found)

    def strides(self, multiple: int | Sequence[int]) -> tuple[int, int, int]:
        """What each axis of the volume is a multiple of, so that the frame's axes are multiples of `multiple`."""
        rows, columns = (multiple, multiple) if isinstance(multiple, int) else multiple
        asked: list[list[int]] = [[], [], []]
        for plane in self.planes:
            first, second = (axis for axis in range(3) if axis != _ACROSS[plane])
            asked[first].append(rows)
            asked[second].append(columns)
        i, j, k = (lcm(*numbers) for numbers in asked)
        return i, j, k


def _within(plane: Plane, shape: Sequence[int]) -> tuple[int, int]:
    """Sizes of a volume of `shape` along the two axes of `plane`."""
    first, second = (shape[axis] for axis in range(3) if axis != _ACROSS[plane])
    return first, second


GeometryStep = Orient | Respace | CropOrPad
IntensityStep = Window | Percentiles
AnyStep = Annotated[GeometryStep | IntensityStep | Slices, Field(discriminator="do")]
# Steps in the order in which they come; of the later kinds there is at most one each.
_ORDER = (GeometryStep, IntensityStep, Slices)


class Recipe(BaseModel):
    """The steps from a scan to a model's input.

    Args:
        steps: geometry first, then at most one intensity step, then `Slices` where a model of images takes volumes.
        outside: physical value beyond the field of view, or 'lowest' of the scan (air, background).

    >>> recipe = Recipe(steps=[CropOrPad(shape=(4, 4, 4)), Window(low=0, high=7)])
    >>> Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[AnyStep, ...]
    outside: float | Literal["lowest"] = "lowest"

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: tuple[AnyStep, ...]) -> tuple[AnyStep, ...]:
        kinds = [next(n for n, kind in enumerate(_ORDER) if isinstance(step, kind)) for step in steps]
        if kinds != sorted(kinds) or kinds.count(1) > 1 or kinds.count(2) > 1:
            raise ValueError("geometry steps come first, then at most one of window and percentiles, then slices")
        if kinds.count(2):
            turned = [step.axcodes.upper() for step in steps if isinstance(step, Orient)]
            cropped = [step.shape for step in steps if isinstance(step, CropOrPad)]
            if not turned or turned[-1] != "RAS" or (cropped and min(cropped[-1]) < 2):
                raise ValueError(
                    "slices are cut from volumes that run RAS: orient them so, two voxels or more each way"
                )
        return steps

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """The voxels every scan ends up with, if a step fixes them."""
        fixed = [step.shape for step in self.steps if isinstance(step, CropOrPad)]
        return fixed[-1] if fixed else None

    @property
    def slices(self) -> Slices | None:
        """The step that shows volumes slice by slice, where there is one."""
        return next((step for step in self.steps if isinstance(step, Slices)), None)

    @property
    def seen(self) -> tuple[int, ...] | None:
        """Voxels along each axis that a model sees: two for images and slices, three for volumes."""
        if self.shape is None:
            return None
        if self.slices:
            return self.slices.frame(self.shape)
        return self.shape[:2] if self.shape[2] == 1 else self.shape

    def grid(self, scan: Scan) -> Grid:
        """Where the voxels of the prepared scan will be."""
        grid = scan.grid
        for step in self.steps:
            if isinstance(step, GeometryStep):
                grid = step.place(grid, scan)
        return grid

    def __call__(self, scan: Scan) -> Scan:
        """The prepared scan: float32, on `grid(scan)`, its Scale leading back to physical values.

        Raises:
            DataError: the scan is constant, so that no intensity range can be told, or nothing of it was measured.
        """
        step = next((step for step in self.steps if isinstance(step, IntensityStep)), None)
        parts = _parts(scan.physical(), scan, step)
        if not all(np.isfinite(part).any() for part in parts):
            raise DataError("No voxel of the scan was measured: all are padding or not a number. Leave it out.")
        lowest = [float(np.nanmin(part)) if self.outside == "lowest" else self.outside for part in parts]
        moved = scan.onto(self.grid(scan), outside=lowest[0] if len(lowest) == 1 else tuple(lowest))
        if step is None:
            return moved.with_voxels(moved.voxels.astype(np.float32))
        return _rescaled(moved, step, lowest)


def _parts(values: Float[np.ndarray, "c i j k"], scan: Scan, step: IntensityStep | None) -> list[np.ndarray]:
    """The values (n, i, j, k) of channels that share a range: of all, or of each by itself."""
    apart = isinstance(step, Percentiles) and step.apart and scan.header.photometric != "RGB"
    return [values[n : n + 1] for n in range(len(values))] if apart else [values]


def _rescaled(scan: Scan, step: IntensityStep, fills: Sequence[float]) -> Scan:
    """Map the physical limits of `step` to [0, 1], cut beyond, and say so in the Scale."""
    values, unit = scan.physical(), scan.scale.unit
    limits = [step.limits(part) for part in _parts(values, scan, step)]
    for n, (low, high) in enumerate(limits):
        if not high > low:
            which = f"Channel {n} of the scan" if len(limits) > 1 else "The scan"
            raise DataError(
                f"{which} is constant ({low:g} {unit}) where contrast was expected. "
                "Check that the file holds an image, or leave it out."
            )
    if isinstance(step, Percentiles) and step.apart:
        # As many as there are channels even where a picture's share one, so that all scans of a recipe look alike.
        each = tuple(limits * (scan.channels // len(limits)))
        scale = Scale(tuple(high - low for low, high in each), tuple(low for low, _ in each), unit, clip=each)
    else:
        low, high = limits[0]
        scale = Scale(high - low, low, unit, clip=(low, high))
    values = np.where(np.isnan(values), np.reshape(fills, (-1, 1, 1, 1)).astype(values.dtype), values)
    mapped = np.clip(scale.stored(values), 0, 1, dtype=np.float32)
    return scan.with_voxels(mapped, scale=scale)


def foreground_level(values: np.ndarray) -> float:
    """A physical value between background and body: a tenth of the way from the lowest to the 99th percentile."""
    known = values[np.isfinite(values)]
    low, high = float(known.min()), float(np.percentile(known, 99))
    return low + 0.1 * (high - low)


def foreground(scan: Scan) -> Bool[np.ndarray, "i j k"]:
    """Where the body is: above `foreground_level` in the first channel."""
    values = scan.physical()[0]
    return np.nan_to_num(values, nan=-np.inf) > foreground_level(values)


def foreground_box(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """First and last voxel (3,), (3,) along each axis that belong to the body, stray voxels ignored."""
    body = foreground(scan)
    first, last = [], []
    for axis in range(3):
        others = tuple(n for n in range(3) if n != axis)
        profile = body.mean(axis=others)
        inside = np.flatnonzero(profile > 0.01 * max(profile.max(), 1e-9))
        first.append(int(inside[0]) if len(inside) else 0)
        last.append(int(inside[-1]) if len(inside) else scan.grid.shape[axis] - 1)
    return np.asarray(first), np.asarray(last)


def foreground_centre(scan: Scan) -> Float[np.ndarray, "3"]:
    """World position of the middle of the body's box, mm."""
    first, last = foreground_box(scan)
    return scan.grid.world((first + last) / 2)


__all__ = [
    "CropOrPad",
    "GeometryStep",
    "Orient",
    "Percentiles",
    "Place",
    "Plane",
    "Recipe",
    "Respace",
    "Slices",
    "Step",
    "Window",
    "foreground",
    "foreground_box",
    "foreground_centre",
    "foreground_level",
]
