"""From the values of a scan to the 16-bit integers of a DICOM file, and what they mean there.

Integers that fit are stored as they are. Everything else is quantised so that reading it back is
never further off than half a step.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Integer, Shaped
from pydicom.valuerep import format_number_as_ds

from medgen.errors import DataError
from medgen.scan import Scale, Scan

Rule = Literal["ct", "mr", "other"]
# Fewer levels than this lose what an 8-bit screen could show: such scans get finer steps.
_ENOUGH_LEVELS = 256


@dataclass(frozen=True)
class Stored:
    """One channel ready for PixelData: physical = scale.slope * values + scale.intercept.

    Args:
        values: int16 or uint16 (i, j, k).
        scale: exactly what a reader will parse: slope and intercept are already rounded to DICOM's
            decimal strings where they are written as such.
        padding: the stored value of voxels nobody measured, None where all were.
        window: centre and width of the middle 98 % of the measured values, in stored units.
    """

    values: Integer[np.ndarray, "i j k"]
    scale: Scale
    padding: int | None
    window: tuple[float, float]


@dataclass(frozen=True)
class _Span:
    """What one pass over the measured values of a channel tells."""

    low: float
    high: float
    whole: bool


def store(scan: Scan, channel: int, rule: Rule) -> Stored:
    """The integers that hold one channel of `scan`.

    Integers within 16 bits stay as they are, with the scan's own scale. Other values are quantised:
    'ct' to whole Hounsfield units, 'mr' to whole numbers of the source's own intensity scale (0 to
    32767, so that readers that take them for signed agree), anything with too few levels for that,
    and 'other', to as many steps as 16 bits hold.

    Args:
        scan: voxels (c, i, j, k).
        channel: which of the c channels.
        rule: which kind of object will hold it.

    Raises:
        DataError: a measured voxel is NaN or infinite, or no stored value is left to mark padding.
    """
    scan = scan.channel(channel)
    voxels = scan.voxels[0]
    valid = None if scan.valid is None or scan.valid.all() else scan.valid
    span = _span(voxels, valid)
    exact = span.whole and span.low >= -(2**15) and span.high < (2**15 if span.low < 0 else 2**16)
    if exact:
        scale, low, high = scan.scale, int(span.low), int(span.high)
    else:
        ends = scan.scale.physical(np.array([span.low, span.high]))
        scale = _step(float(ends.min()), float(ends.max()), scan.scale.unit, rule)
        low, high = sorted(round(float(scale.stored(end))) for end in ends)
    padding = None if valid is None else _padding(voxels[valid], scan.header.padding if exact else None, (low, high))
    lowest = low if padding is None else min(low, padding)
    highest = high if padding is None else max(high, padding)
    signed = lowest < 0 or (voxels.dtype == np.int16 and highest < 2**15)
    convert = None if exact else (scan.scale, scale)
    values = _fill(voxels, valid, convert, np.dtype(np.int16 if signed else np.uint16), padding)
    return Stored(values, scale, padding, _window(values, valid))


def _span(voxels: Shaped[np.ndarray, "i j k"], valid: Bool[np.ndarray, "i j k"] | None) -> _Span:
    low, high, whole = math.inf, -math.inf, True
    for k in range(voxels.shape[2]):
        measured = voxels[:, :, k] if valid is None else voxels[:, :, k][valid[:, :, k]]
        if measured.size == 0:
            continue
        if not np.isfinite(measured).all():
            raise DataError(
                f"Every measured voxel must be a finite number; slice {k} holds NaN or infinity. "
                "Mark such voxels as not measured (Scan.valid), or replace them before writing."
            )
        low, high = min(low, float(measured.min())), max(high, float(measured.max()))
        if whole and np.issubdtype(measured.dtype, np.floating):
            whole = bool((measured == np.rint(measured)).all())
    if low > high:
        raise DataError("No voxel of the scan was measured: there is nothing to write.")
    return _Span(low, high, whole)


def _step(low: float, high: float, unit: str, rule: Rule) -> Scale:
    """The scale that stores physical values from `low` to `high`."""
    extent = high - low
    if rule == "ct" and unit == "HU":
        intercept = float(min(-1024, math.floor(low)))
        if high - intercept < 65534:
            return Scale(1.0, intercept, unit)
    if rule == "mr":
        if extent >= _ENOUGH_LEVELS and low > -(2**15) and high < 2**15 - 1:
            return Scale(1.0, 0.0, unit)
        slope = extent / 32766
        return Scale(slope, low, unit) if slope > 0 else Scale(1.0, low, unit)
    # These travel as decimal strings of 16 characters: round first, then quantise with what will be read.
    intercept = _decimal(low)
    if intercept > low:
        intercept = _decimal(low - 2 * (intercept - low))
    slope = _decimal((high - intercept) / 65534)
    return Scale(slope, intercept, unit) if slope > 0 else Scale(1.0, intercept, unit)


def _decimal(value: float) -> float:
    return float(format_number_as_ds(float(value)))


def _padding(measured: np.ndarray, wanted: float | None, ends: tuple[int, int]) -> int:
    """A stored value no measured voxel has: the source's own if it is free, else one below or above."""
    low, high = ends
    if wanted is not None and wanted == round(wanted):
        room = range(-(2**15), 2**15) if min(low, wanted) < 0 else range(2**16)
        if int(wanted) in room and high in room and not (measured == wanted).any():
            return int(wanted)
    if low > -(2**15) and (low > 0 or high < 2**15):
        return low - 1
    if high < (2**15 if low < 0 else 2**16) - 1:
        return high + 1
    # Quantising never uses all values: only integers stored as they are come here.
    free = np.setdiff1d(np.arange(low, high + 1), measured)
    if free.size == 0:
        raise DataError("All 65536 stored values are in use: none is left to mark voxels nobody measured.")
    return int(free[0])


def _fill(
    voxels: np.ndarray,
    valid: np.ndarray | None,
    convert: tuple[Scale, Scale] | None,
    dtype: np.dtype,
    padding: int | None,
) -> Integer[np.ndarray, "i j k"]:
    """The stored integers, converted from one scale to another, slice by slice to stay small."""
    limits = np.iinfo(dtype)
    # Slices are contiguous, columns fastest, as files need them.
    values = np.empty(voxels.shape[::-1], dtype).T
    for k in range(voxels.shape[2]):
        plane = voxels[:, :, k]
        if valid is not None:
            plane = np.where(valid[:, :, k], plane, plane.dtype.type(0))
        if convert:
            old, new = convert
            physical = old.physical(plane.astype(np.float64))
            plane = np.clip(np.rint(new.stored(physical)), limits.min, limits.max)
        values[:, :, k] = plane
        if valid is not None:
            values[:, :, k][~valid[:, :, k]] = padding
    return values


def _window(values: np.ndarray, valid: np.ndarray | None) -> tuple[float, float]:
    """Centre and width of the first to 99th percentile; a million voxels tell them well enough."""
    stride = max(1, math.ceil((values.size / 2**20) ** (1 / 3)))
    cut = (slice(None, None, stride),) * 3
    sample = values[cut] if valid is None else values[cut][valid[cut]]
    if sample.size == 0:
        sample = values[valid]
    low, high = (float(edge) for edge in np.percentile(sample, [1, 99]))
    return (low + high) / 2, max(1.0, high - low)


__all__ = ["Rule", "Stored", "store"]
