"""Siemens mosaics: the slices of a volume tiled into one picture, row by row.

How many tiles there are, and to which side the next slice lies, stands in the scanner's private (CSA) header alone.
The picture is laid around the first slice's centre as if it were one slice that large, so ImagePositionPatient is
its corner, not the slice's (https://nipy.org/nibabel/dicom/dicom_mosaic.html).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from medgen import log
from medgen.errors import UnreadableScan
from medgen.io.dicom.decode import same_pixels
from medgen.io.dicom.elements import PARSE_FAULTS, quiet
from medgen.io.dicom.file import DicomFile

# Real headers have some 10 kB; parsing stops at this many bytes, not at the numbers a hostile one claims.
_MOST_BYTES = 2**20
_MOST_TILES = 1024
_PARALLEL = 1e-3
# Mosaics that agree in these are of one moment: with equal pictures they are copies.
_MOMENT = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "AcquisitionNumber", "AcquisitionTime"),
    *("ContentTime", "EchoNumbers", "EchoTime", "TemporalPositionIdentifier", "TriggerTime", "DiffusionBValue"),
    *("ImageType", "RescaleSlope", "RescaleIntercept"),
)


@dataclass(frozen=True)
class Tiling:
    """How a mosaic is cut into slices.

    `count` slices of `rows` x `columns` pixels, `across` of them side by side; slice k lies, LPS+ mm, at
    `origin` + k * `step`.
    """

    count: int
    across: int
    rows: int
    columns: int
    origin: Float[np.ndarray, "3"]
    step: Float[np.ndarray, "3"]

    def tile(self, number: int) -> tuple[slice, slice]:
        """Rows and columns of the picture that hold tile `number`."""
        down, right = divmod(number, self.across)
        row, column = down * self.rows, right * self.columns
        return slice(row, row + self.rows), slice(column, column + self.columns)

    def check(self, picture: Shaped[np.ndarray, "rows columns"], name: str) -> None:
        """Refuse a picture that holds more slices than the header tells.

        Raises:
            UnreadableScan: a tile beyond the last slice is not blank.
        """
        for number in range(self.count, self.across**2):
            tile = picture[self.tile(number)]
            if tile.min() != tile.max():
                raise _refused(name, f"tells {self.count} slices, but tile {number + 1} of the picture is not blank")


def tiling_of(file: DicomFile) -> Tiling:
    """How to cut the picture of a mosaic.

    Raises:
        UnreadableScan: the private header is missing or damaged, or contradicts the picture.
    """
    layout, elements, name = file.layout, file.elements, file.name
    if layout.frames > 1 or layout.samples > 1:
        raise _refused(name, "of several frames or colours is of a kind medgen does not know")
    tags = _private_header(file)
    count = _numbers(tags, "NumberOfImagesInMosaic", 1, name)[0]
    if count != int(count) or not 1 <= count <= _MOST_TILES:
        raise _refused(name, f"tells {count:g} slices, not from 1 to {_MOST_TILES}")
    across = math.isqrt(int(count) - 1) + 1
    if layout.rows % across or layout.columns % across:
        raise _refused(name, f"tells {count:g} slices, which do not tile {layout.rows} x {layout.columns} pixels")
    normal = np.array(_numbers(tags, "SliceNormalVector", 3, name))
    sides = elements.numbers("ImageOrientationPatient", 6)
    corner = elements.numbers("ImagePositionPatient", 3)
    spacing = elements.numbers("PixelSpacing", 2)
    between = elements.number("SpacingBetweenSlices")
    if not sides or not corner or not spacing or not between or between <= 0 or min(spacing) <= 0:
        raise _refused(name, "lacks a position, an orientation or a spacing in the standard attributes")
    row, column = np.array(sides[:3]), np.array(sides[3:])
    upwards = np.cross(row, column)
    side = float(normal @ upwards)
    if abs(abs(side) - 1) > _PARALLEL or abs(np.linalg.norm(normal) - 1) > _PARALLEL:
        raise _refused(name, "tells a slice normal that contradicts ImageOrientationPatient")
    row, column, upwards = (axis / np.linalg.norm(axis) for axis in (row, column, upwards))
    rows, columns = layout.rows // across, layout.columns // across
    origin = np.array(corner) + row * spacing[1] * (layout.columns - columns) / 2
    origin += column * spacing[0] * (layout.rows - rows) / 2
    # The direction is taken from the orientation, which has more digits; the private header tells its sign.
    return Tiling(int(count), across, rows, columns, origin, upwards * math.copysign(between, side))


def without_copies(files: Sequence[DicomFile]) -> list[DicomFile]:
    """The files, without mosaics that repeat the picture of another of the same moment."""
    moments: dict[tuple[bytes, ...], list[DicomFile]] = {}
    kept, dropped = [], []
    for file in files:
        alike = moments.setdefault(tuple(file.elements.raw(keyword) for keyword in _MOMENT), [])
        if file.is_mosaic and any(other.is_mosaic and same_pixels((file, 0), (other, 0)) for other in alike):
            dropped.append(file.name)
            continue
        alike.append(file)
        kept.append(file)
    if dropped:
        log.note(f"{len(dropped)} mosaics are identical copies of others and were left out: {', '.join(dropped[:3])}.")
    return kept


def _refused(name: str, why: str) -> UnreadableScan:
    return UnreadableScan(
        f"{name}: a Siemens mosaic (many slices tiled into one picture) must come with the scanner's private CSA "
        f"header; this one {why}. Export it again with private attributes, or convert the original with dcm2niix."
    )


def _private_header(file: DicomFile) -> dict[str, dict]:
    """The tags of the private image header, as nibabel parses them."""
    with quiet():
        from nibabel.nicom import csareader

    content = file.elements.private(0x29, "SIEMENS CSA HEADER", 0x10)
    if not content:
        raise _refused(file.name, "has none")
    try:
        return csareader.read(content[:_MOST_BYTES])["tags"]
    except (csareader.CSAError, AssertionError, NameError, *PARSE_FAULTS) as fault:
        raise _refused(file.name, "has a damaged one") from fault


def _numbers(tags: dict[str, dict], key: str, count: int, name: str) -> list[float]:
    try:
        values = [float(item) for item in tags[key]["items"]]
    except PARSE_FAULTS:
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise _refused(name, f"does not state {key}")
    return values


__all__ = ["Tiling", "tiling_of", "without_copies"]
