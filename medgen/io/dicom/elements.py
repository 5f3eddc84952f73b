"""The DICOM elements medgen looks at, as raw bytes until asked for; everything else is never parsed.

A value that should be a number and is not is an error that names file and element; no message repeats a value.
"""

import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.tag import BaseTag

from medgen.errors import UnreadableScan

_KEYWORDS = (
    "ImageType",
    "SOPClassUID",
    "AcquisitionTime",
    "ContentTime",
    "Modality",
    "PatientID",
    "IssuerOfPatientID",
    "BodyPartExamined",
    "SyntheticData",
    "SliceThickness",
    "EchoTime",
    "EchoNumbers",
    "TriggerTime",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "DiffusionBValue",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SpacingBetweenSlices",
    "AcquisitionNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "FrameOfReferenceUID",
    "TemporalPositionIdentifier",
    "InConcatenationTotalNumber",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "PixelAspectRatio",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "ModalityLUTSequence",
    "MultienergyCTAcquisition",
    "LossyImageCompression",
    "RealWorldValueMappingSequence",
    "Units",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
)
# Private elements, (group, creator, element), and the blocks of a group their creator may have taken.
_PRIVATE = ((0x19, "SIEMENS MR HEADER", 0x0A), (0x29, "SIEMENS CSA HEADER", 0x10))
_BLOCKS = range(0x10, 0x14)
WANTED: list[BaseTag | int] = [BaseTag(tag_for_keyword(keyword) or 0) for keyword in _KEYWORDS]
WANTED += [BaseTag(group << 16 | block) for group, _, _ in _PRIVATE for block in _BLOCKS]
WANTED += [BaseTag(group << 16 | block << 8 | element) for group, _, element in _PRIVATE for block in _BLOCKS]
_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
# What pydicom raises on hostile or damaged bytes, as found by feeding it such.
PARSE_FAULTS = (
    *(InvalidDicomError, OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(struct.error, OverflowError, RecursionError, NotImplementedError, zlib.error),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what pydicom warns of to ourselves: what matters of it is checked here and is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def printable_uid(uid: str) -> str:
    """The identifier where it is a valid one; anything else is not repeated in messages."""
    return uid if re.fullmatch(r"[0-9.]{1,64}", uid) else "a malformed identifier"


@cache
def _tag(keyword: str) -> int:
    return int(tag_for_keyword(keyword) or 0)


class Elements:
    """The wanted elements of a dataset or of a sequence item, converted on demand.

    Args:
        dataset: pydicom's, with raw values.
        name: the file's name, for messages.
    """

    def __init__(self, dataset: Dataset, name: str) -> None:
        self._dataset, self._name = dataset, name
        # pydicom's own look-up makes a Tag each time; a plain dictionary is several times faster.
        self._raws = {int(tag): element for tag, element in dataset.items()}

    @property
    def dataset(self) -> Dataset:
        """What pydicom parsed; only for handing to pydicom."""
        return self._dataset

    def __contains__(self, keyword: str) -> bool:
        return _tag(keyword) in self._raws

    def _raw(self, keyword: str) -> tuple[bytes, str, str]:
        """The bytes of an element, its value representation, and '<' or '>'."""
        tag = _tag(keyword)
        if tag not in self._raws:
            return b"", "", "<"
        element = self._raws[tag]
        if not isinstance(element, RawDataElement):
            if element.is_empty:
                return b"", element.VR, "<"
            # pydicom converts a few elements by itself (PixelRepresentation, when a sequence is opened).
            if (kind := _BINARY.get(element.VR)) and isinstance(element.value, int):
                return struct.pack(f"<{kind}", element.value), element.VR, "<"
            raise UnreadableScan(f"{self._name}: {keyword} is not stored as a plain value. The header is damaged.")
        stated = element.VR if element.VR not in (None, "UN") else dictionary_VR(tag)
        return element.value or b"", stated, "<" if element.is_little_endian else ">"

    def raw(self, keyword: str) -> bytes:
        """The bytes of an element, b'' where absent."""
        return self._raw(keyword)[0]

    def private(self, group: int, creator: str, element: int) -> bytes:
        """The bytes of a private element, b'' where absent; `creator` names whose element it is."""
        for block in _BLOCKS:
            owner, held = (self._raws.get(group << 16 | tag) for tag in (block, block << 8 | element))
            if isinstance(owner, RawDataElement) and (owner.value or b"").strip(b" \0") == creator.encode():
                return (held.value or b"") if isinstance(held, RawDataElement) else b""
        return b""

    def texts(self, keyword: str) -> list[str]:
        """The values of a text element, without padding; empty where absent."""
        value = self._raw(keyword)[0].decode("latin-1").strip(" \0")
        return [part.strip(" \0") for part in value.split("\\")] if value else []

    def text(self, keyword: str) -> str:
        """The first value of a text element, '' where absent."""
        return next(iter(self.texts(keyword)), "")

    def code(self, keyword: str) -> str:
        """A code string, '' where it is absent or no valid code (which might be anything, even a name)."""
        value = self.text(keyword).upper()
        return value if re.fullmatch(r"[A-Z0-9 _]{1,16}", value) else ""

    def numbers(self, keyword: str, count: int | None = None) -> tuple[float, ...]:
        """The values of a numeric element as floats; empty where absent or empty.

        Raises:
            UnreadableScan: a value is no finite number, or there are not `count` of them.
        """
        value, representation, endian = self._raw(keyword)
        try:
            if kind := _BINARY.get(representation):
                size = struct.calcsize(kind)
                values = struct.unpack(f"{endian}{len(value) // size}{kind}", value[: len(value) // size * size])
            else:
                text = value.decode("ascii").strip(" \0")
                values = tuple(float(part) for part in text.split("\\")) if text else ()
        except (ValueError, struct.error) as fault:
            raise UnreadableScan(
                f"{self._name}: {keyword} must be numbers and is not. Export the file again."
            ) from fault
        if values and (not all(map(math.isfinite, values)) or (count is not None and len(values) != count)):
            expected = f"{count} finite numbers" if count else "finite numbers"
            raise UnreadableScan(f"{self._name}: {keyword} must hold {expected}; found {len(values)} values.")
        return tuple(float(v) for v in values)

    def number(self, keyword: str) -> float | None:
        """The first value of a numeric element, None where absent."""
        return next(iter(self.numbers(keyword)), None)

    def whole(self, keyword: str, default: int | None = None) -> int:
        """A required whole number that is not negative (`default` where absent).

        Raises:
            UnreadableScan: it is absent without a default, negative or fractional.
        """
        value = self.number(keyword)
        if value is None and default is not None:
            return default
        if value is None or value < 0 or value != int(value):
            found = "none" if value is None else f"{value:g}"
            raise UnreadableScan(f"{self._name}: {keyword} must be a whole number from 0; found {found}.")
        return int(value)

    def items(self, keyword: str) -> list["Elements"]:
        """The items of a sequence, empty where absent."""
        tag = _tag(keyword)
        if tag not in self._raws:
            return []
        try:
            with quiet():
                value = self._dataset[tag].value
            return [Elements(item, self._name) for item in value or ()]
        except PARSE_FAULTS as fault:
            raise UnreadableScan(f"{self._name}: the sequence {keyword} is damaged.") from fault


__all__ = ["PARSE_FAULTS", "WANTED", "Elements", "printable_uid", "quiet"]
