"""What a derived DICOM object takes over from the files it was made from: a short list, nothing else.

Copying a whole header and deleting what looks private always forgets something. Here only listed
attributes are read at all, and only values that are valid for their kind are kept.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import config as pydicom_config
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import DeflatedExplicitVRLittleEndian
from pydicom.valuerep import validate_value

from medgen.errors import InconsistentSeries, UnreadableScan
from medgen.io.dicom.elements import PARSE_FAULTS, quiet
from medgen.io.dicom.file import deflated_body, inflate, open_file

# The Patient and Study attributes a derived object shares with its source when identity is kept.
PATIENT_AND_STUDY = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "OtherPatientIDs",
    "EthnicGroup",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyDescription",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
)
# Numbers and codes of the acquisition. Free text could hold anything, so none is taken.
_NUMBERS = (
    "SliceThickness",
    "KVP",
    "RepetitionTime",
    "EchoTime",
    "InversionTime",
    "EchoTrainLength",
    "FlipAngle",
    "MagneticFieldStrength",
    "ImagingFrequency",
    "NumberOfAverages",
    "LossyImageCompressionRatio",
)
_CODES = {
    "PatientSex": {"M", "F", "O"},
    "PatientIdentityRemoved": {"YES", "NO"},
    "ScanningSequence": {"SE", "IR", "GR", "EP", "RM"},
    "SequenceVariant": {"SK", "MTC", "SS", "TRSS", "SP", "MP", "OSP", "NONE"},
    "MRAcquisitionType": {"2D", "3D"},
    "PatientPosition": {
        f"{way}{lie}" for way in ("HF", "FF", "LF", "RF", "AF", "PF") for lie in ("P", "S", "DR", "DL")
    },
    "Laterality": {"L", "R"},
    "LossyImageCompression": {"00", "01"},
    "LossyImageCompressionMethod": {"ISO_10918_1", "ISO_14495_1", "ISO_15444_1", "ISO_15444_15", "ISO_13818_2"},
    "BurnedInAnnotation": {"YES", "NO"},
    "SyntheticData": {"YES", "NO"},
}
_PLACE = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
)
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


@dataclass(frozen=True)
class SourceImage:
    """One file of the source series: what a reference to it needs, and where its slice lies (LPS+ mm)."""

    sop_class: str
    sop_instance: str
    position: tuple[float, ...] | None


@dataclass(frozen=True)
class Origin:
    """What is known of the source series.

    Args:
        identity: Patient and Study attributes by keyword, as valid values; identifies a person.
        technical: acquisition numbers and codes on which all files agree.
        study, series, frame: UIDs; frame is '' where the source has none.
        images: one entry a file.
        rows_columns: direction cosines of rows and columns (LPS+), None where the source has none.
        synthetic, burned_in: 'YES', 'NO', or '' where the source does not tell.
        lossy: some file has been through lossy compression.
    """

    identity: dict[str, object]
    technical: dict[str, object]
    study: str
    series: str
    frame: str
    images: tuple[SourceImage, ...]
    rows_columns: tuple[float, ...] | None
    synthetic: str
    burned_in: str
    lossy: bool


def read_origin(files: Sequence[Path]) -> Origin:
    """Read the listed attributes of the files of one series, without their pixels.

    Raises:
        UnreadableScan: a file is no DICOM image, or its patient number or UIDs are not valid DICOM.
        InconsistentSeries: the files belong to several patients, studies or frames of reference.
    """
    # Real headers bend the rules in many small ways; what matters is checked below.
    with quiet():
        headers = [_read(Path(file)) for file in files]
        first = headers[0]
        for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
            if len({str(header.get(keyword, "") or "") for header in headers}) > 1:
                raise InconsistentSeries(
                    f"The {len(headers)} source files must agree on {keyword}; they do not. Write one series at a time."
                )
        return Origin(
            identity=_identity(first, Path(files[0]).name),
            technical=_technical(headers),
            study=str(first.StudyInstanceUID),
            series=str(first.SeriesInstanceUID),
            frame=str(first.get("FrameOfReferenceUID", "") or ""),
            images=tuple(_image(header) for header in headers),
            rows_columns=_cosines(headers),
            synthetic=_any(headers, "SyntheticData"),
            burned_in=_any(headers, "BurnedInAnnotation"),
            lossy=any(header.get("LossyImageCompression") == "01" for header in headers),
        )


def _read(file: Path) -> Dataset:
    tags = [*PATIENT_AND_STUDY, *_NUMBERS, *_CODES, *_PLACE]
    # Refuses damaged and hostile files before anything else parses them.
    opened = open_file(file, force=True)
    try:
        stream: Path | io.BytesIO = file
        if opened.syntax == DeflatedExplicitVRLittleEndian and opened.pixels:
            # Left to itself pydicom inflates everything, however large.
            head = inflate(deflated_body(file), opened.pixels.offset, file.name)
            stream = io.BytesIO(bytes(128) + b"DICM" + head)
        header = dcmread(stream, stop_before_pixels=True, specific_tags=tags, force=True)
        uids = [str(header.get(keyword, "") or "") for keyword in _PLACE[:5]]
    except PARSE_FAULTS as error:
        raise UnreadableScan(f"{file.name}: cannot be read as DICOM. Give the files the scan was read from.") from error
    if not all(uids[:4]) or not all(_UID.fullmatch(uid) and len(uid) <= 64 for uid in uids if uid):
        raise UnreadableScan(
            f"{file.name}: a source file needs valid SOP Class, SOP Instance, Study and Series UIDs; "
            "at least one is missing or malformed. Repair the file, or write without it as a source."
        )
    return header


def _identity(header: Dataset, name: str) -> dict[str, object]:
    kept = {}
    for keyword in PATIENT_AND_STUDY:
        value = _valid(keyword, header.get(keyword))
        if value is not None:
            kept[keyword] = value
        elif keyword in ("PatientID", "PatientName") and header.get(keyword):
            raise UnreadableScan(
                f"{name}: its {keyword} is not a valid DICOM value, so it cannot be kept. "
                "Repair the file, or write with identity='pseudonym'."
            )
    return kept


def _valid(keyword: str, value: object) -> object | None:
    """A plain copy of `value` if the attribute may hold it, else None."""
    if value is None or value == "":
        return None
    vr = dictionary_VR(keyword)
    parts = list(value) if isinstance(value, MultiValue) else [value]
    plain = [str(part) for part in parts]
    try:
        for part in plain:
            validate_value(vr, part, pydicom_config.RAISE)
            if part not in _CODES.get(keyword, {part}):
                return None
            if vr in ("DS", "IS") and not np.isfinite(float(part)):
                return None
    except ValueError:
        return None
    if any(not part.isprintable() or "\\" in part for part in plain):
        return None
    return plain if isinstance(value, MultiValue) else plain[0]


def _technical(headers: list[Dataset]) -> dict[str, object]:
    agreed = {}
    for keyword in (*_NUMBERS, *_CODES):
        values = [_valid(keyword, header.get(keyword)) for header in headers]
        if keyword not in PATIENT_AND_STUDY and values[0] is not None and all(value == values[0] for value in values):
            agreed[keyword] = values[0]
    return agreed


def _image(header: Dataset) -> SourceImage:
    position = _floats(header, "ImagePositionPatient", 3)
    return SourceImage(str(header.SOPClassUID), str(header.SOPInstanceUID), position)


def _floats(header: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        values = tuple(float(value) for value in header.get(keyword) or ())
    except (TypeError, ValueError):
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def _cosines(headers: list[Dataset]) -> tuple[float, ...] | None:
    found = [_floats(header, "ImageOrientationPatient", 6) for header in headers]
    if found[0] is None or any(one is None or not np.allclose(one, found[0], atol=1e-3) for one in found):
        return None
    return found[0]


def _any(headers: list[Dataset], keyword: str) -> str:
    """'YES' if any file says so, 'NO' if all do, else ''."""
    said = [str(header.get(keyword, "") or "") for header in headers]
    return "YES" if "YES" in said else "NO" if all(one == "NO" for one in said) else ""


__all__ = ["PATIENT_AND_STUDY", "Origin", "SourceImage", "read_origin"]
