"""What each frame of a DICOM file says of itself: where it lies, what its numbers mean, what tells it from its twins.

Classic files say it once; in multi-frame files the groups of a frame override the groups shared by all frames.
"""

import re
from dataclasses import dataclass, field, replace

import numpy as np

from medgen.errors import GeometryError, InconsistentSeries, UnreadableScan
from medgen.io.dicom.elements import Elements
from medgen.io.dicom.file import DicomFile
from medgen.io.dicom.mosaic import Tiling, tiling_of
from medgen.io.source import ReadOptions

# Standard objects that are volumes or parts of one: without a position they are nowhere.
_VOLUMES = (
    *("CT Image", "MR Image", "Positron Emission", "PET Image", "MR Color Image", "Tomosynthesis", "3D "),
    *("Nuclear Medicine", "Ophthalmic Tomography", "Intravascular", "Volume"),
)
# What may tell repeated slices apart, in the order it is tried: keyword, the word for a channel's name, and whether
# the value itself may be told (a time of day could help to identify a person).
SPLITS = (
    ("TemporalPositionIdentifier", "time", True),
    ("TemporalPositionIndex", "time", True),
    ("AcquisitionNumber", "acquisition", True),
    ("AcquisitionTime", "time", False),
    ("TriggerTime", "trigger", True),
    ("NominalCardiacTriggerDelayTime", "trigger", True),
    ("EchoNumbers", "echo", True),
    ("EffectiveEchoTime", "echo time", True),
    ("EchoTime", "echo time", True),
    ("DiffusionBValue", "b", True),
    ("ContentTime", "time", False),
    ("ImageType", "type", True),
)
_IN_GROUPS = {
    "TemporalPositionIndex": "FrameContentSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "DiffusionBValue": "MRDiffusionSequence",
    "NominalCardiacTriggerDelayTime": "CardiacSynchronizationSequence",
}


@dataclass(frozen=True)
class Rescale:
    """From stored values to physical ones: slope and intercept, or a table that begins at stored value `first`.

    `mapped` is the range of stored values that mean anything, None where all do.
    """

    slope: float = 1.0
    intercept: float = 0.0
    unit: str = ""
    first: int = 0
    table: bytes = b""
    mapped: tuple[float, float] | None = None

    def physical(self, stored: np.ndarray) -> np.ndarray:
        """Physical values, float32, of stored ones."""
        if self.table:
            table = np.frombuffer(self.table, np.uint16)
            return table[np.clip(stored.astype(np.int64) - self.first, 0, len(table) - 1)].astype(np.float32)
        return (stored * np.float64(self.slope) + self.intercept).astype(np.float32)


@dataclass(frozen=True)
class Frame:
    """One picture in one file; `position` and `orientation` in LPS+ millimetres, empty where not stated.

    `spacing` is (between rows, between columns), empty where not stated; `keys` are the values by which repeated slices
    may be told apart. A slice of a mosaic is number `tile` of `tiling`.
    """

    file: DicomFile
    index: int
    position: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, ...]
    thickness: float | None
    rescale: Rescale
    keys: dict[str, float | str] = field(default_factory=dict)
    tiling: Tiling | None = None
    tile: int = 0

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns."""
        cut = self.tiling or self.file.layout
        return cut.rows, cut.columns

    @property
    def name(self) -> str:
        """File name, and frame number from 1 where the file has several."""
        if self.tiling:
            return f"{self.file.name} tile {self.tile + 1}"
        return self.file.name if self.file.layout.frames == 1 else f"{self.file.name} frame {self.index + 1}"


def needs_position(file: DicomFile) -> bool:
    """Whether a file of this kind is meaningless without a place in the patient."""
    return any(word in file.kind for word in _VOLUMES)


def is_planar(file: DicomFile) -> bool:
    """Whether the file is one flat picture without a place in the patient, such as a chest X-ray."""
    placed = file.elements.raw("ImagePositionPatient") and file.elements.raw("ImageOrientationPatient")
    return not placed and not needs_position(file) and not file.is_multiframe


def frames_of(file: DicomFile, options: ReadOptions) -> list[Frame]:
    """The frames of a file, in the order they are stored.

    Raises:
        UnreadableScan: an attribute is damaged.
        InconsistentSeries: the file is one part of a larger object, or describes another number of frames.
    """
    layout, elements = file.layout, file.elements
    if (elements.number("InConcatenationTotalNumber") or 1) > 1:
        raise InconsistentSeries(f"{file.name}: one part of a concatenation. Join its parts into one file first.")
    shared = next(iter(elements.items("SharedFunctionalGroupsSequence")), None)
    groups = elements.items("PerFrameFunctionalGroupsSequence")
    if not groups and layout.frames > 1:
        raise GeometryError(
            f"{file.name}: {layout.frames} frames without an ImagePositionPatient each: nobody knows where they lie. "
            "It is a film, or lost its geometry; convert it with the vendor's tool."
        )
    if not groups and file.is_mosaic:
        return _tiles(_frame(file, 0, [], options))
    if not groups:
        return [_frame(file, index, [g for g in (shared,) if g], options) for index in range(layout.frames)]
    if len(groups) != layout.frames:
        raise InconsistentSeries(f"{file.name}: {layout.frames} frames, but {len(groups)} described. It is damaged.")
    return [_frame(file, n, [g for g in (group, shared) if g], options) for n, group in enumerate(groups)]


def _tiles(frame: Frame) -> list[Frame]:
    """The slices of a mosaic."""
    tiling = tiling_of(frame.file)
    return [
        replace(frame, position=tiling.origin + number * tiling.step, tiling=tiling, tile=number)
        for number in range(tiling.count)
    ]


def _macro(groups: list[Elements], keyword: str) -> Elements | None:
    """The first item of a functional group, from the frame's own groups before the shared ones."""
    for group in groups:
        if items := group.items(keyword):
            return items[0]
    return None


def _frame(file: DicomFile, index: int, groups: list[Elements], options: ReadOptions) -> Frame:
    top = file.elements
    place = _macro(groups, "PlanePositionSequence")
    if place is None and file.layout.frames == 1:
        place = top
    plane = _macro(groups, "PlaneOrientationSequence") or top
    measures = _macro(groups, "PixelMeasuresSequence") or top
    spacing = measures.numbers("PixelSpacing", 2)
    if spacing and min(spacing) <= 0:
        raise GeometryError(f"{file.name}: pixel spacing must be positive; found {spacing[0]:g} x {spacing[1]:g} mm.")
    orientation = plane.numbers("ImageOrientationPatient", 6)
    position = place.numbers("ImagePositionPatient", 3) if place else ()
    return Frame(
        file=file,
        index=index,
        position=np.array(position),
        orientation=np.array(orientation),
        spacing=spacing,
        thickness=measures.number("SliceThickness"),
        rescale=_rescale(file, groups, options),
        keys=_keys(file, groups),
    )


def _keys(file: DicomFile, groups: list[Elements]) -> dict[str, float | str]:
    keys: dict[str, float | str] = {}
    for keyword, _, _ in SPLITS:
        group = _macro(groups, _IN_GROUPS[keyword]) if keyword in _IN_GROUPS and groups else file.elements
        if group is None:
            continue
        if keyword == "ImageType":
            kind = _macro(groups, "MRImageFrameTypeSequence")
            parts = kind.texts("FrameType") if kind else file.elements.texts("ImageType")
            keys[keyword] = "/".join(part for part in parts[2:] if part.replace("_", "").isalnum())[:32]
        elif keyword.endswith("Time") and keyword in ("AcquisitionTime", "ContentTime"):
            if (seconds := _seconds(file.elements.text(keyword))) is not None:
                keys[keyword] = seconds
        elif (value := group.number(keyword)) is not None:
            keys[keyword] = value
    return keys


def _seconds(text: str) -> float | None:
    """Seconds since midnight of HHMMSS.FFFFFF; None for anything else."""
    found = re.fullmatch(r"([0-9]{2}):?([0-9]{2}):?([0-9]{2})(\.[0-9]+)?", text)
    if not found:
        return None
    hours, minutes, seconds, fraction = found.groups()
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(fraction or 0)


def _rescale(file: DicomFile, groups: list[Elements], options: ReadOptions) -> Rescale:
    if options.real_world:
        return _real_world(file, groups)
    holder = _macro(groups, "PixelValueTransformationSequence") or file.elements
    kind = holder.code("RescaleType")
    if tables := file.elements.items("ModalityLUTSequence"):
        return _lut(file, tables[0])
    slope, intercept = holder.number("RescaleSlope"), holder.number("RescaleIntercept")
    if slope is None and intercept is None:
        return Rescale()
    if slope == 0:
        raise UnreadableScan(f"{file.name}: a rescale slope of 0 would make every voxel equal. Export it again.")
    unit = "HU" if kind == "HU" or _implies_hounsfield(file, groups, kind) else file.elements.code("Units")
    return Rescale(1.0 if slope is None else slope, intercept or 0.0, unit)


def _implies_hounsfield(file: DicomFile, groups: list[Elements], kind: str) -> bool:
    """Whether CT without a stated unit is in Hounsfield units, as PS3.3 C.8.2.1 and C.8.15.3.10 have it.

    In a CT Image, Rescale Type may only be left out where it is HU. An original picture other than a localizer shall
    be in HU, so 'unspecified' (US) beside it says nothing; a derived one that says so is of another quantity, such as
    blood flow. Acquisitions of several energies are in HU only where they say so.
    """
    if "CT Image" not in file.kind or kind not in ("", "US") or file.elements.code("MultienergyCTAcquisition") == "YES":
        return False
    own = _macro(groups, "CTImageFrameTypeSequence")
    parts = [part.upper() for part in (own.texts("FrameType") if own else file.elements.texts("ImageType"))]
    original = parts[:1] == ["ORIGINAL"] and parts[2:3] != ["LOCALIZER"]
    return original or (kind == "" and not file.is_multiframe)


def _lut(file: DicomFile, item: Elements) -> Rescale:
    """The modality lookup table: number of entries (0 means 65536), first stored value, bits an entry."""
    raw = item.raw("LUTDescriptor")
    if len(raw) != 6:
        raise UnreadableScan(f"{file.name}: the modality lookup table has no valid descriptor.")
    order = ">" if file.big_endian else "<"
    count, _, bits = (int(n) for n in np.frombuffer(raw, f"{order}u2"))
    first = int(_stored_number(file, raw[2:4]))
    count, data = count or 65536, item.raw("LUTData")
    packed = bits <= 8 and len(data) in (count, count + count % 2)
    table = np.frombuffer(data[: len(data) // 2 * 2] if not packed else data, "u1" if packed else f"{order}u2")[:count]
    if len(table) < count:
        raise UnreadableScan(f"{file.name}: the modality lookup table has {len(table)} entries of {count}.")
    unit = "HU" if item.code("ModalityLUTType") == "HU" else ""
    return Rescale(unit=unit, first=first, table=table.astype(np.uint16).tobytes())


def _real_world(file: DicomFile, groups: list[Elements]) -> Rescale:
    """The one linear Real World Value Mapping of a frame."""
    levels = [*groups, file.elements]
    items = next((found for level in levels if (found := level.items("RealWorldValueMappingSequence"))), [])
    linear = [item for item in items if item.number("RealWorldValueSlope")]
    if len(items) != 1 or len(linear) != 1:
        raise UnreadableScan(
            f"{file.name}: exactly one linear Real World Value Mapping expected; found {len(linear)} in {len(items)}. "
            "Read it without real_world."
        )
    item = linear[0]
    units = item.items("MeasurementUnitsCodeSequence")
    unit = units[0].text("CodeValue")[:16] if units else ""
    first, last = (item.raw(f"RealWorldValue{end}ValueMapped") for end in ("First", "Last"))
    both = len(first) == 2 and len(last) == 2
    mapped = (_stored_number(file, first), _stored_number(file, last)) if both else None
    slope, intercept = item.numbers("RealWorldValueSlope")[0], item.number("RealWorldValueIntercept") or 0.0
    return Rescale(slope, intercept, unit, mapped=mapped)


def _stored_number(file: DicomFile, raw: bytes) -> float:
    """A stored pixel value in a header: two bytes, with the sign and byte order of the pixels."""
    return float(np.frombuffer(raw, f"{'>' if file.big_endian else '<'}{'i' if file.layout.signed else 'u'}2")[0])


__all__ = ["SPLITS", "Frame", "Rescale", "frames_of", "is_planar", "needs_position"]
