"""DICOM series with a known truth, written with pydicom alone, and every way in which such a series goes wrong."""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

ROWS, COLUMNS, SLICES = 24, 30, 20
SPACING, STEP = (0.8, 0.8), 2.5
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
INTERCEPT = -1024
# An edit changes the dataset of slice k, or returns what to write instead of it (nothing, or several).
Edit = Callable[[Dataset, int], Iterable[Dataset] | None]


@dataclass(frozen=True)
class Truth:
    """What a correct reader returns: Hounsfield units (i, j, k), the LPS affine, and the files along the normal."""

    hu: np.ndarray
    lps: np.ndarray
    files: list[Path]
    folder: Path


def hounsfield(slices: int = SLICES, rows: int = ROWS, columns: int = COLUMNS, seed: int = 7) -> np.ndarray:
    """Random integers from -1000 to 49 (k, rows, columns)."""
    return np.random.default_rng(seed).integers(-1000, 50, (slices, rows, columns))


def uid(*words: object) -> str:
    return generate_uid(entropy_srcs=[str(word) for word in ("medgen-tests", *words)])


def ct_slice(hu: np.ndarray, position: Sequence[float], number: int, *, axes=AXIAL, series: str = "a") -> Dataset:
    """One classic CT slice."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, uid(series, number)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Modality, ds.PatientID, ds.PatientName = "CT", "CANARY-ID", "CANARY^PHI"
    ds.BodyPartExamined = "CHEST"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid("study"), uid("series", series)
    ds.FrameOfReferenceUID = uid("frame of reference", series)
    ds.InstanceNumber = number + 1
    ds.SliceThickness, ds.SpacingBetweenSlices, ds.SliceLocation = 7.7, 9.9, -float(number)
    ds.ImagePositionPatient = [f"{n:.9g}" for n in position]
    ds.ImageOrientationPatient = [f"{n:.9g}" for axis in axes for n in axis]
    ds.PixelSpacing = list(SPACING)
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, INTERCEPT, "HU"
    pixels(ds, hu - INTERCEPT)
    return ds


def pixels(ds: Dataset, stored: np.ndarray, *, bits: int = 16, signed: bool = False, photometric="MONOCHROME2") -> None:
    """Put stored values (rows, columns), (frames, rows, columns) or with 3 samples last into a dataset."""
    allocated = 8 if bits <= 8 else 16
    colour = stored.shape[-1] == 3 and stored.ndim > 2
    shape = stored.shape[:-1] if colour else stored.shape
    ds.Rows, ds.Columns = shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, photometric)
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = allocated, bits, bits - 1, int(signed)
    order = ">" if ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
    data = stored.astype(f"{order}{'i' if signed else 'u'}{allocated // 8}").tobytes()
    ds.PixelData = data + bytes(len(data) % 2)
    ds["PixelData"].VR = "OW" if allocated > 8 else "OB"


def save(ds: Dataset, path: Path) -> Path:
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.save_as(path, enforce_file_format=True)
    return path


def series(
    folder: Path,
    *,
    hu: np.ndarray | None = None,
    axes=AXIAL,
    first: Sequence[float] = (-12.0, -10.0, 30.0),
    step: Sequence[float] | None = None,
    edit: Edit | None = None,
    name: Callable[[int], str] = "{:03d}.dcm".format,
    series: str = "a",
) -> Truth:
    """Write a CT series, `edit`ed slice by slice, and tell what it was before the edits.

    `step` is the way from slice to slice in LPS millimetres, 2.5 mm along the normal unless given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hu = hounsfield() if hu is None else hu
    row, column = (np.array(axis) for axis in axes)
    step = np.cross(row, column) * STEP if step is None else np.array(step)
    files = []
    for k, plane in enumerate(hu):
        ds = ct_slice(plane, np.array(first) + k * step, k, axes=axes, series=series)
        written = edit(ds, k) if edit else None
        for n, one in enumerate([ds] if written is None else written):
            files.append(save(one, folder / (name(k) if n == 0 else f"extra-{n}-{name(k)}")))
    lps = np.eye(4)
    lps[:3, :3] = np.column_stack([row * SPACING[1], column * SPACING[0], step])
    lps[:3, 3] = first
    return Truth(hu.transpose(2, 1, 0), lps, files, folder)


def shift(ds: Dataset, millimetres: Sequence[float]) -> None:
    """Move a slice."""
    ds.ImagePositionPatient = [float(a) + b for a, b in zip(ds.ImagePositionPatient, millimetres, strict=True)]


def enhanced_ct(
    folder: Path,
    hu: np.ndarray | None = None,
    *,
    order: Sequence[int] | None = None,
    positions: bool = True,
    slopes: Sequence[float] | None = None,
) -> Truth:
    """One Enhanced CT file; frames stored in `order` of slices; a slope in each frame overrides the shared one."""
    folder.mkdir(parents=True, exist_ok=True)
    hu = hounsfield() if hu is None else hu
    order = list(range(len(hu))) if order is None else list(order)
    template = ct_slice(hu[0], (0, 0, 0), 0)
    ds = template
    ds.SOPClassUID = EnhancedCTImageStorage
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        del ds[keyword]
    del ds.RescaleIntercept, ds.RescaleType, ds.SliceThickness
    plane, measures, values, shared = Dataset(), Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = [n for axis in AXIAL for n in axis]
    measures.PixelSpacing, measures.SliceThickness = list(SPACING), 7.7
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, INTERCEPT, "HU"
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([plane]), Items([measures])
    shared.PixelValueTransformationSequence = Items([values])
    groups = []
    for k in order:
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = [-12.0, -10.0, 30.0 + k * STEP]
        if positions:
            group.PlanePositionSequence = Items([place])
        if slopes is not None:
            own = Dataset()
            own.RescaleSlope, own.RescaleIntercept, own.RescaleType = slopes[k], INTERCEPT, "HU"
            group.PixelValueTransformationSequence = Items([own])
        groups.append(group)
    ds.SharedFunctionalGroupsSequence = Items([shared])
    ds.PerFrameFunctionalGroupsSequence = Items(groups)
    ds.NumberOfFrames = len(order)
    pixels(ds, hu[order] - INTERCEPT)
    path = save(ds, folder / "enhanced.dcm")
    lps = np.diag([SPACING[1], SPACING[0], STEP, 1.0])
    lps[:3, 3] = [-12.0, -10.0, 30.0]
    return Truth(hu.transpose(2, 1, 0), lps, [path], folder)


def radiograph(folder: Path, stored: np.ndarray, *, name: str = "cr.dcm", edit: Edit | None = None) -> Path:
    """A computed radiograph: one flat picture without a place in the patient."""
    folder.mkdir(parents=True, exist_ok=True)
    ds = ct_slice(np.zeros((2, 2)), (0, 0, 0), 0, series=name)
    ds.SOPClassUID, ds.Modality = ComputedRadiographyImageStorage, "CR"
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"):
        del ds[keyword]
    del ds.RescaleType, ds.PixelSpacing, ds.SliceThickness, ds.FrameOfReferenceUID
    pixels(ds, stored, bits=12)
    if edit:
        edit(ds, 0)
    return save(ds, folder / name)


def lossless_jpeg(stored: np.ndarray, bits: int = 16) -> bytes:
    """One picture as JPEG Lossless, first-order prediction (ITU-T T.81, process 14, selection value 1)."""
    values = stored.astype(np.int64) & 0xFFFF
    left = np.empty_like(values)
    left[:, 1:], left[1:, 0], left[0, 0] = values[:, :-1], values[:-1, 0], 1 << (bits - 1)
    differences = ((values - left + 0x8000) & 0xFFFF) - 0x8000
    code = []
    for difference in differences.ravel().tolist():
        size = abs(difference).bit_length()
        # Seventeen categories, each a code of five bits in order.
        code.append(f"{size:05b}")
        if 0 < size < 16:
            code.append(f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}")
    text = "".join(code)
    text += "1" * (-len(text) % 8)
    data = bytes(int(text[n : n + 8], 2) for n in range(0, len(text), 8)).replace(b"\xff", b"\xff\x00")
    rows, columns = stored.shape
    frame = b"\xff\xc3\x00\x0b" + bytes([bits]) + struct.pack(">HH", rows, columns) + b"\x01\x01\x11\x00"
    table = b"\xff\xc4" + struct.pack(">H", 2 + 17 + 17) + b"\x00" + bytes([0] * 4 + [17] + [0] * 11) + bytes(range(17))
    return b"\xff\xd8" + frame + table + b"\xff\xda\x00\x08\x01\x01\x00\x01\x00\x00" + data + b"\xff\xd9"


def recode(ds: Dataset, syntax: str) -> None:
    """Change how a dataset will be written, uncompressed."""
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()


__all__ = [
    "AXIAL",
    "COLUMNS",
    "INTERCEPT",
    "ROWS",
    "SAGITTAL",
    "SLICES",
    "SPACING",
    "STEP",
    "ImplicitVRLittleEndian",
    "Truth",
    "ct_slice",
    "enhanced_ct",
    "hounsfield",
    "lossless_jpeg",
    "pixels",
    "radiograph",
    "recode",
    "save",
    "series",
    "shift",
    "uid",
]
