"""The values of a stack of frames: loaded into one array, repaired where that was asked for, and what they mean."""

from dataclasses import replace

import numpy as np

from medgen.errors import InconsistentSeries
from medgen.grid import Grid
from medgen.io.dicom.decode import Padding, PixelReader, tidy
from medgen.io.dicom.file import DicomFile, Layout
from medgen.io.dicom.frames import Frame, Rescale
from medgen.io.dicom.series import Stack
from medgen.io.source import ReadOptions
from medgen.scan import Header, Scale, Scan

_AIR = -1024.0


def is_colour(file: DicomFile) -> bool:
    """Whether pixels are colours rather than intensities."""
    return file.layout.samples == 3 or file.layout.photometric == "PALETTE COLOR"


def colour_type(layout: Layout) -> np.dtype:
    """The type of red, green and blue; palettes give eight bits."""
    return np.dtype(np.uint8) if layout.photometric == "PALETTE COLOR" else layout.dtype


def _rescales(stacked: Stack) -> set[Rescale]:
    return {frame.rescale for channel in stacked.slices for frame in channel if frame is not None}


def unit_of(stacked: Stack) -> str:
    """The unit of all slices.

    Raises:
        InconsistentSeries: there are several.
    """
    units = {rescale.unit for rescale in _rescales(stacked)}
    if len(units) > 1:
        name = stacked.slices[0][0].name if stacked.slices[0][0] else "series"
        raise InconsistentSeries(f"{name}: one series must have one unit; found {', '.join(map(repr, sorted(units)))}.")
    return units.pop()


def common_scale(stacked: Stack) -> Scale | None:
    """The Scale all slices share; None where they differ, or a table takes its place."""
    rescales = _rescales(stacked)
    unit_of(stacked)
    if len(rescales) > 1 or any(rescale.table for rescale in rescales):
        return None
    rescale = next(iter(rescales))
    return Scale(rescale.slope, rescale.intercept, rescale.unit)


def load(stacked: Stack, scale: Scale | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Values (c, k, rows, columns, colours where asked for) and where they are padding (k, rows, columns)."""
    first = next(frame for frame in stacked.slices[0] if frame is not None)
    layout, colour = first.file.layout, is_colour(first.file)
    stored = np.result_type(*{frame.file.layout.dtype for channel in stacked.slices for frame in channel if frame})
    kind = colour_type(layout) if colour else (stored if scale is not None else np.dtype(np.float32))
    plane = (*first.plane, 3) if colour else first.plane
    # The first file is opened before anything is allocated: what it claims to hold is checked against its bytes.
    reader = PixelReader(first.file, colour=colour)
    values = np.empty((len(stacked.slices), len(stacked.slices[0]), *plane), kind)
    padded: np.ndarray | None = None
    gaps = []
    for c, channel in enumerate(stacked.slices):
        for k, frame in enumerate(channel):
            if frame is None:
                gaps.append((c, k))
                continue
            if reader.file is not frame.file:
                reader = PixelReader(frame.file, colour=colour)
            found = _read_one(reader, frame, values[c, k], scale)
            if found is not None:
                padded = np.zeros(values.shape[1:4], bool) if padded is None else padded
                padded[k] |= found
    if gaps:
        padded = np.zeros(values.shape[1:4], bool) if padded is None else padded
        fill = _gap_value(first.file, values[0, 0])
        for c, k in gaps:
            values[c, k], padded[k] = fill, True
    return values, padded


def _gap_value(file: DicomFile, example: np.ndarray) -> float:
    """What stands, unmeasured, where a slice is missing: the series' own padding, else the least of a slice."""
    padding = Padding.of(file)
    return padding.value if padding and example.dtype == file.layout.dtype else float(example.min())


def _read_one(reader: PixelReader, frame: Frame, out: np.ndarray, scale: Scale | None) -> np.ndarray | None:
    """Read a frame into `out`, physical where the series has no common scale; returns where it is padding."""
    layout = frame.file.layout
    if reader.colour:
        reader.read(frame.index, out)
        return None
    direct = scale is not None and out.dtype == layout.dtype
    stored = out if direct else np.empty(out.shape, layout.dtype)
    if frame.tiling:
        picture = reader.picture(frame.index)
        if frame.tile == 0:
            frame.tiling.check(picture, frame.file.name)
        stored[...] = picture[frame.tiling.tile(frame.tile)]
    else:
        reader.read(frame.index, stored)
    padded = tidy(stored, layout, Padding.of(frame.file))
    if mapped := frame.rescale.mapped:
        beyond = (stored < min(mapped)) | (stored > max(mapped))
        padded = (beyond if padded is None else padded | beyond) if beyond.any() else padded
    if not direct:
        out[...] = stored if scale is not None else frame.rescale.physical(stored)
    return padded


def interpolated(
    values: np.ndarray, padded: np.ndarray | None, at: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Linear interpolation between slices at fractional slice numbers; float32."""
    shape = (values.shape[0], len(at), *values.shape[2:])
    out = np.empty(shape, np.float32)
    unknown = None if padded is None else np.empty((len(at), *padded.shape[1:]), bool)
    for k, place in enumerate(np.round(at, 6)):
        low = min(int(place), values.shape[1] - 1)
        high, part = min(low + 1, values.shape[1] - 1), np.float32(place - low)
        out[:, k] = values[:, low] * (1 - part) + values[:, high] * part
        if padded is not None and unknown is not None:
            unknown[k] = (padded[low] & (part < 1)) | (padded[high] & (part > 0))
    return out, unknown


# -- polarity and tilt -------------------------------------------------------------------------------


def is_flipped(file: DicomFile, scale: Scale | None, options: ReadOptions) -> bool:
    """Whether small stored values are shown bright and shall be turned; Hounsfield units mean the same either way."""
    wanted = options.polarity == "normalise" and file.layout.photometric == "MONOCHROME1"
    return wanted and scale is not None and scale.unit != "HU"


def _mirror(file: DicomFile) -> int:
    """The sum of a stored value and its mirror image in the range of the stored bits."""
    return -1 if file.layout.signed else (1 << file.layout.stored) - 1


def flipped(values: np.ndarray, file: DicomFile) -> np.ndarray:
    """Values mirrored in the range of the stored bits."""
    if np.issubdtype(values.dtype, np.floating):
        return _mirror(file) - values
    # In the wider type the subtraction cannot overflow; the result is in range again.
    return (_mirror(file) - values.astype(np.int64)).astype(values.dtype)


def turned(header: Header, file: DicomFile) -> Header:
    """The header after values were mirrored."""
    padding = None if header.padding is None else _mirror(file) - header.padding
    return replace(header, photometric="MONOCHROME2", padding=padding)


def straightened(scan: Scan, grid: Grid) -> Scan:
    """A sheared scan on a rectangular grid; what lies outside the slices is not measured."""
    outside = _AIR if scan.scale.unit == "HU" else float(scan.scale.physical(scan.voxels.min(keepdims=True)).min())
    ones = Scan(np.ones((1, *scan.grid.shape), np.float32), scan.grid)
    inside = ones.onto(grid, outside=0).voxels[0] > 0.5
    moved = scan.onto(grid, outside=outside)
    return replace(moved, valid=inside if moved.valid is None else inside & moved.valid)


__all__ = [
    "colour_type",
    "common_scale",
    "flipped",
    "interpolated",
    "is_colour",
    "is_flipped",
    "load",
    "straightened",
    "turned",
    "unit_of",
]
