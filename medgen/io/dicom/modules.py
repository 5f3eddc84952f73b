"""The attribute groups of the DICOM objects medgen writes, one function a module of the standard.

Each function adds to a dataset what its module asks for (DICOM PS3.3, the section named in its
docstring) and nothing that was not handed to it.
"""

from dataclasses import dataclass, field

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
)

from medgen.io.dicom.origin import Origin
from medgen.io.dicom.pixels import Rule, Stored
from medgen.io.dicom.provenance import software_version
from medgen.io.dicom.values import code, decimal, text
from medgen.io.privacy import new_uid

_SOP_CLASS = {"ct": CTImageStorage, "mr": MRImageStorage, "other": SecondaryCaptureImageStorage}
# A body part is free text in many files: only these standard terms are passed on.
_SINGLE = "ABDOMEN ABDOMENPELVIS AORTA BLADDER CHEST CHESTABDOMEN CHESTABDPELVIS CSPINE HEART LIVER LSPINE PANCREAS "
_SINGLE += "PELVIS PROSTATE SPINE SSPINE TSPINE TLSPINE UTERUS WHOLEBODY HEAD BRAIN SKULL FACE HEADNECK JAW NECK"
_PAIRED = "ANKLE ARM BREAST CAROTID EAR ELBOW EXTREMITY EYE FEMUR FINGER FOOT HAND HIP HUMERUS KIDNEY KNEE LEG LUNG "
_PAIRED += "ORBIT SHOULDER TOE WRIST"
_SHOWS_A_FACE = "HEAD BRAIN SKULL FACE HEADNECK JAW NECK ORBIT EAR EYE"
_MODALITIES = "CR CT DX ES GM IO MG MR NM OP OPT OT PT PX RF RG SM US XA XC"


@dataclass(frozen=True)
class Subject:
    """Whose study an object belongs to, after identities were kept, replaced or made up.

    Args:
        identity: Patient and Study attributes by keyword.
        study, frame: UIDs; frame is '' where there is no place in a patient.
        deidentified: a real patient's identity was replaced.
    """

    identity: dict[str, object] = field(repr=False)
    study: str
    frame: str
    deidentified: bool = False


def new_object(sop_class: str) -> Dataset:
    """An empty object of a SOP class, with file meta information and a preamble of zeros."""
    ds = Dataset()
    ds.preamble = b"\0" * 128
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = UID(sop_class)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = UID(new_uid("implementation", "medgen"))
    ds.file_meta.ImplementationVersionName = text(f"MEDGEN_{software_version()}", 16)
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = sop_class
    return ds


def sop_class_of(rule: Rule) -> str:
    """The storage class of CT, MR and all other images."""
    return _SOP_CLASS[rule]


def patient_and_study(ds: Dataset, subject: Subject) -> None:
    """Patient, General Study and Patient Study modules (C.7.1.1, C.7.2.1, C.7.2.2)."""
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex"):
        setattr(ds, keyword, "")
    for keyword in ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"):
        setattr(ds, keyword, "")
    for keyword, value in subject.identity.items():
        setattr(ds, keyword, value)
    ds.StudyInstanceUID = subject.study
    if "PatientIdentityRemoved" in ds and "DeidentificationMethod" not in ds:
        ds.DeidentificationMethod = "As in the source series"
    if subject.deidentified:
        ds.PatientIdentityRemoved = "YES"
        ds.DeidentificationMethod = "New header of allowed attributes only; identifiers replaced"
        ds.DeidentificationMethodCodeSequence = code("113100", "DCM", "Basic Application Confidentiality Profile")
        ds.LongitudinalTemporalInformationModified = "REMOVED"


def series(ds: Dataset, modality: str, body_part: str, number: int, origin: Origin | None) -> None:
    """General Series module (C.7.3.1), without its UID and description."""
    ds.Modality = modality if modality in _MODALITIES.split() else "OT"
    ds.SeriesNumber = number
    part = body_part.upper().replace(" ", "")
    single, paired = part in _SINGLE.split(), part in _PAIRED.split()
    if single or paired:
        ds.BodyPartExamined = part
    technical = origin.technical if origin else {}
    if not single:
        # Empty says that the side is not known; left out, it would say that there are no sides.
        ds.Laterality = technical.get("Laterality", "")
    if ds.Modality in ("CT", "MR"):
        ds.PatientPosition = technical.get("PatientPosition", "")


def image_marks(ds: Dataset, content: str, lossy: bool, origin: Origin | None) -> None:
    """What General Image (C.7.6.1) says of burned-in text, recognisable faces and lossy compression."""
    burned = origin.burned_in if origin else ""
    if content == "synthetic" or (not burned and ds.Modality in ("CT", "MR")):
        burned = "NO"
    if burned:
        ds.BurnedInAnnotation = burned
    # An unknown body part may be a head: better warn once too often.
    head = ds.get("BodyPartExamined", "HEAD") in _SHOWS_A_FACE.split()
    ds.RecognizableVisualFeatures = "YES" if head and content != "synthetic" else "NO"
    if lossy:
        ds.LossyImageCompression = "01"
        for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if origin and keyword in origin.technical:
                setattr(ds, keyword, origin.technical[keyword])


def acquisition(ds: Dataset, rule: Rule, origin: Origin | None, content: str) -> None:
    """CT Image, MR Image or SC Equipment attributes (C.8.2.1, C.8.3.1, C.8.6.1); empty where not known."""
    technical = origin.technical if origin else {}
    ds.AcquisitionNumber = None
    if rule == "ct":
        ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
        ds.KVP = technical.get("KVP")
        return
    if rule == "other":
        ds.ImageType = ["DERIVED", "SECONDARY"]
        ds.ConversionType = "SYN" if content == "synthetic" else "WSD"
        return
    ds.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    ds.ScanningSequence = technical.get("ScanningSequence", "RM")
    ds.SequenceVariant = technical.get("SequenceVariant", "NONE")
    ds.ScanOptions = ""
    for keyword in ("MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength"):
        setattr(ds, keyword, technical.get(keyword))
    for keyword in ("InversionTime", "FlipAngle", "MagneticFieldStrength", "ImagingFrequency", "NumberOfAverages"):
        wanted = keyword != "InversionTime" or "IR" in str(ds.ScanningSequence)
        if keyword in technical and wanted:
            setattr(ds, keyword, technical[keyword])


def pixels(ds: Dataset, stored: Stored, rule: Rule, photometric: str) -> None:
    """Image Pixel, VOI LUT, and Modality LUT or Real World Value Mapping, without the pixels themselves."""
    signed = stored.values.dtype.kind == "i"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.Columns, ds.Rows = stored.values.shape[:2]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, int(signed)
    if stored.padding is not None:
        ds.add_new("PixelPaddingValue", "SS" if signed else "US", stored.padding)
    centre, width = stored.window
    (slope, intercept), unit = stored.scale.numbers, stored.scale.unit
    if rule == "mr":
        # MR images have no Modality LUT: viewers window the stored values.
        if (slope, intercept) != (1.0, 0.0):
            ds.RealWorldValueMappingSequence = _real_world(stored)
    else:
        ds.RescaleSlope, ds.RescaleIntercept = decimal(slope), decimal(intercept)
        ds.RescaleType = "HU" if unit == "HU" else "US"
        centre, width = centre * slope + intercept, width * abs(slope)
        if rule == "ct" and unit == "HU":
            centre, width = 40.0, 400.0
    ds.WindowCenter, ds.WindowWidth = decimal(centre), decimal(width)
    if width < 1:
        ds.VOILUTFunction = "LINEAR_EXACT"


def colour_pixels(ds: Dataset, rows: int, columns: int) -> None:
    """Image Pixel module of 8-bit RGB, colours beside each other."""
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.Rows, ds.Columns = rows, columns
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0


def _real_world(stored: Stored) -> DicomSequence:
    """Real World Value Mapping (C.7.6.16.2.11) over all stored values."""
    item, limits = Dataset(), np.iinfo(stored.values.dtype)
    vr = "SS" if limits.min < 0 else "US"
    item.add_new("RealWorldValueFirstValueMapped", vr, int(limits.min))
    item.add_new("RealWorldValueLastValueMapped", vr, int(limits.max))
    item.RealWorldValueSlope, item.RealWorldValueIntercept = map(float, stored.scale.numbers)
    item.LUTExplanation, item.LUTLabel = "Values before storing as integers", "MEDGEN"
    item.MeasurementUnitsCodeSequence = code("1", "UCUM", "no units")
    return DicomSequence([item])


__all__ = [
    "Subject",
    "acquisition",
    "colour_pixels",
    "image_marks",
    "new_object",
    "patient_and_study",
    "pixels",
    "series",
    "sop_class_of",
]
