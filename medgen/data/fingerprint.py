"""What a set of scans has in common, and the recipe that follows from it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

import numpy as np

from medgen.data.recipe import CropOrPad, Orient, Percentiles, Plane, Recipe, Respace, Slices, Window, foreground_box
from medgen.errors import ConfigError, DataError
from medgen.grid import Grid
from medgen.log import note
from medgen.scan import Scan

_AIR = -1024.0


@dataclass(frozen=True)
class Fingerprint:
    """Facts about a set of scans.

    Args:
        count: scans looked at.
        planar: images rather than volumes.
        channels: values per voxel.
        modality: the commonest DICOM code, '' where unknown.
        unit: the commonest unit of the physical values, such as 'HU'.
        spacing: median mm between voxels along R, A, S (along i, j, k for images).
        body: mm that hold the body of every scan along the same axes.
        middle: world position of the middle of the bodies, if all scans share one grid; else None.
        lattice: the grid all scans share, if they do.
        stored: lowest and highest stored value met, if all scans store integers; else None.
        physical: 0.5th and 99.5th percentile of physical values, medians over scans.
        space: the NIfTI xform code all scans share, else 1.
        body_part: the commonest, '' where unknown.
    """

    count: int
    planar: bool
    channels: int
    modality: str
    unit: str
    spacing: tuple[float, float, float]
    body: tuple[float, float, float]
    middle: tuple[float, float, float] | None
    lattice: Grid | None
    stored: tuple[float, float] | None
    physical: tuple[float, float]
    space: int
    body_part: str


def fingerprint(scans: Iterable[Scan]) -> Fingerprint:
    """Look at every scan once.

    Raises:
        DataError: there is none, or images are mixed with volumes, or channel counts differ.
    """
    grids, boxes, ranges, stored, facts = [], [], [], [], []
    for scan in scans:
        upright = scan if scan.is_planar else scan.onto(scan.grid.reorient("RAS"), outside=0)
        first, last = foreground_box(upright)
        grids.append(upright.grid)
        boxes.append((first, last))
        values = upright.physical()
        ranges.append(np.nanpercentile(values, [0.5, 99.5]))
        if np.issubdtype(scan.voxels.dtype, np.integer):
            stored.append((int(scan.voxels.min()), int(scan.voxels.max())))
        head = scan.header
        facts.append((scan.is_planar, scan.channels, head.modality, scan.scale.unit, head.space, head.body_part))
    if not grids:
        raise DataError("No readable scan is left to learn from. Check the messages above for what was skipped.")
    for position, what in ((0, "images (one slice) and volumes"), (1, "channel counts")):
        if len({fact[position] for fact in facts}) > 1:
            raise DataError(f"The scans mix {what}. Give medgen one kind at a time.")
    shared = grids[0] if all(grid.close(grids[0]) for grid in grids) else None
    low = np.min([first for first, _ in boxes], axis=0)
    high = np.max([last for _, last in boxes], axis=0)
    if shared:
        body = (high - low + 1) * np.asarray(shared.spacing)
        middle = tuple(shared.world((low + high) / 2).tolist())
    else:
        extents = [(b - a + 1) * np.asarray(g.spacing) for (a, b), g in zip(boxes, grids, strict=True)]
        body, middle = np.percentile(extents, 98, axis=0), None
    return Fingerprint(
        count=len(grids),
        planar=facts[0][0],
        channels=facts[0][1],
        modality=_commonest([fact[2] for fact in facts]),
        unit=_commonest([fact[3] for fact in facts]),
        spacing=tuple(np.median([grid.spacing for grid in grids], axis=0).tolist()),
        body=tuple(body.tolist()),
        middle=middle,
        lattice=shared,
        stored=_range(stored) if len(stored) == len(grids) else None,
        physical=(float(np.median([r[0] for r in ranges])), float(np.median([r[1] for r in ranges]))),
        space=facts[0][4] if len({fact[4] for fact in facts}) == 1 else 1,
        body_part=_commonest([fact[5] for fact in facts]),
    )


def auto_recipe(
    found: Fingerprint, *, multiple: int | Sequence[int], max_voxels: int, planes: Sequence[Plane] = ()
) -> Recipe:
    """A recipe for these scans: one lattice, a window that holds every body, intensity in [0, 1].

    Args:
        found: the scans' fingerprint.
        multiple: every axis of the result is a multiple of it (the model's stride), or of its own one; whatever
            size a scan has, it is padded up to that. Only the single slice of an image never is.
        max_voxels: the result has at most about this many; coarser spacing makes it fit.
        planes: of volumes that a model of images sees slice by slice; `multiple` and `max_voxels` are then a slice's.

    Raises:
        ConfigError: images have no such planes.
    """
    if not planes:
        multiples = (multiple,) * 3 if isinstance(multiple, int) else tuple(multiple)
        steps = (*_geometry(found, multiples, max_voxels, prod), _intensity(found))
        return Recipe(steps=steps, outside=_outside(found))
    if found.planar:
        raise ConfigError(f"Only volumes have {', '.join(planes)} slices; these scans are images.")
    slices = Slices(planes=tuple(planes))
    steps = _geometry(found, slices.strides(multiple), max_voxels, lambda shape: prod(slices.frame(shape)))
    return Recipe(steps=(*steps, _intensity(found), slices), outside=_outside(found))


def _geometry(
    found: Fingerprint, multiples: Sequence[int], max_voxels: int, seen: Callable[[list[int]], int]
) -> list[Orient | Respace | CropOrPad]:
    """Steps to one lattice and one shape, of which a model sees so many voxels."""
    if found.planar:
        extent = np.asarray(found.lattice.shape if found.lattice else _pixels(found))
        factor = max(1.0, (prod(extent) / max_voxels) ** 0.5)
        rows, columns = (_up(n / factor, m) for n, m in zip(extent[:2].tolist(), multiples, strict=False))
        respace = (
            [] if found.lattice and factor == 1 else [Respace(spacing=_rounded([s * factor for s in found.spacing], 4))]
        )
        return [*respace, CropOrPad(shape=(rows, columns, 1))]
    spacing = np.asarray(found.spacing)
    body = np.asarray(found.body)
    while seen([*map(_up, body / spacing, multiples)]) > max_voxels and spacing.max() < body.max():
        spacing = np.where(spacing <= spacing.min() * 1.01, spacing * 1.05, spacing)
    coarser = not np.allclose(spacing, found.spacing)
    if coarser:
        note(f"Scans are respaced to {', '.join(f'{s:.3g}' for s in spacing)} mm to fit {max_voxels:,} voxels.")
    respace = [Respace(spacing=_rounded(spacing.tolist(), 4))] if coarser or not found.lattice else []
    i, j, k = map(_up, np.round(body / spacing, 3).tolist(), multiples)
    about = _rounded(found.middle, 3) if found.middle else "foreground"
    return [Orient(axcodes="RAS"), *respace, CropOrPad(shape=(i, j, k), about=about)]


def _intensity(found: Fingerprint) -> Window | Percentiles:
    if found.unit == "HU" or found.modality == "CT":
        low, high = found.physical
        return Window(low=max(_AIR, round(low)), high=round(max(high, low + 100)))
    if found.stored and found.planar and found.stored[0] >= 0:
        # Pictures share one scale: full range of the bit depth that holds the brightest of them.
        return Window(low=0, high=float(2 ** max(8, int(found.stored[1]).bit_length()) - 1))
    return Percentiles(apart=found.channels > 1)


def _outside(found: Fingerprint) -> float | Literal["lowest"]:
    return _AIR if found.unit == "HU" else "lowest"


def _pixels(found: Fingerprint) -> list[int]:
    return [max(1, round(b / s)) for b, s in zip(found.body, found.spacing, strict=True)]


def _rounded(three: Sequence[float], digits: int) -> tuple[float, float, float]:
    x, y, z = (round(float(n), digits) for n in three)
    return x, y, z


def _up(n: float, multiple: int) -> int:
    return max(1, ceil(n / multiple - 1e-6)) * multiple


def _commonest(values: list[str]) -> str:
    known = [value for value in values if value]
    return max(sorted(set(known)), key=known.count) if known else ""


def _range(pairs: list[tuple[int, int]]) -> tuple[float, float]:
    return float(min(low for low, _ in pairs)), float(max(high for _, high in pairs))


__all__ = ["Fingerprint", "auto_recipe", "fingerprint"]
