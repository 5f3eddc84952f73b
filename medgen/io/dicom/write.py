"""Scans as DICOM: CT and MR Image series, anything else as Secondary Capture, one file a slice.

Objects are built from a list of allowed attributes, never by copying a source header. A derived
series either joins its patient's study (`identity='keep'`) or leaves it under consistent pseudonyms;
a series without source files is nobody's study. The same scan, provenance and pseudonyms give the
same bytes: no date and no random number goes in.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import UID

from medgen.errors import ConfigError, GeometryError, PrivacyError
from medgen.io.atomic import replacing
from medgen.io.dicom import modules, place
from medgen.io.dicom.modules import Subject
from medgen.io.dicom.origin import Origin, read_origin
from medgen.io.dicom.pixels import Rule, store
from medgen.io.dicom.provenance import Provenance, equipment, provenance_marks
from medgen.io.dicom.values import text
from medgen.io.privacy import Pseudonyms, new_uid
from medgen.log import track
from medgen.scan import Scan

Identity = Literal["pseudonym", "keep"]


def write_series(
    scan: Scan,
    folder: Path,
    *,
    provenance: Provenance,
    source: Sequence[Path] = (),
    identity: Identity = "pseudonym",
    pseudonyms: Pseudonyms | None = None,
    name: str = "SYN-0001",
    series_number: int = 9001,
) -> list[Path]:
    """Write `scan` as one DICOM series a channel; the folder appears when all of it is complete.

    Slices are the planes along k. Where the source has the same rows and columns, or none is needed,
    the voxel axes stay; else axes are flipped and swapped (exactly) to the customary view.

    Args:
        scan: integers within 16 bits are stored as they are, other values quantised to half a step.
        folder: must not exist yet; files are 0001.dcm and so on, in folders channel-1 and
            so on where there are several channels.
        provenance: where the pixels come from.
        source: the DICOM files the scan was made from; empty: a new study of nobody.
        identity: with source files, whose study it is: 'keep' the patient's, or under a 'pseudonym'.
        pseudonyms: replacements shared by the outputs of a run; None: new ones, that nobody can repeat.
        name: patient number and name where there is no source.
        series_number: number of the first channel's series.

    Returns:
        The files, in slice order, channel by channel.

    Raises:
        ConfigError: the options contradict each other.
        DataError: a measured voxel is NaN or infinite.
        GeometryError: the grid is sheared, or its orientation is unknown.
        PrivacyError: the pseudonym table lies in `folder`, or the source has text burned into its pixels.
        OutputError: `folder` exists, or the disk is full; nothing is left under its name.
        UnreadableScan, InconsistentSeries: the source files do not make one readable series.
    """
    folder = Path(folder)
    _check(scan, provenance, source, identity)
    names = pseudonyms or Pseudonyms()
    names.guard(folder)
    origin = read_origin(source) if source else None
    if origin and identity == "pseudonym" and origin.burned_in == "YES" and provenance.content != "synthetic":
        raise PrivacyError(
            "The source images have text burned into their pixels, which may name the patient. "
            "Cover it first, or write with identity='keep'."
        )
    place.right_angled(scan.grid)
    scan = place.laid_out(scan, origin)
    rule = _rule(scan)
    digest = _digest(scan)
    if origin:
        subject = _patient(scan, origin, names if identity == "pseudonym" else None, digest)
    else:
        subject = _nobody(text(name, 60), provenance, digest)
    rename = names.uid if subject.deidentified else str
    objects = _objects(scan, rule, provenance, subject, (origin, rename), (series_number, digest))
    return _publish(objects, folder, scan.grid.shape[2] * _series_count(scan))


def _check(scan: Scan, provenance: Provenance, source: Sequence[Path], identity: str) -> None:
    if identity not in ("pseudonym", "keep"):
        raise ConfigError(f"identity must be 'pseudonym' or 'keep'; found {identity!r}.")
    if identity == "keep" and not source:
        raise ConfigError("identity='keep' needs the source files whose patient is kept; found none.")
    if provenance.content == "synthetic" and source:
        raise ConfigError("A synthetic scan is nobody's: it has no source files. Leave them out, or call it derived.")
    if scan.header.modality in ("CT", "MR") and scan.header.space == 0:
        raise GeometryError(
            f"A {scan.header.modality} series needs to know left from right; the orientation of this scan is unknown. "
            "If you know its affine to be right, write scan.with_header(space=1)."
        )


def _rule(scan: Scan) -> Rule:
    if _is_colour(scan):
        return "other"
    rules: dict[str, Rule] = {"CT": "ct", "MR": "mr"}
    return rules.get(scan.header.modality, "other")


def _has_place(scan: Scan, rule: Rule) -> bool:
    """Whether slices lie somewhere in a patient; a projection or photograph does not."""
    return rule != "other" or (scan.header.space > 0 and not scan.is_planar)


def _is_colour(scan: Scan) -> bool:
    voxels = scan.voxels
    return (
        scan.header.photometric == "RGB"
        and scan.channels == 3
        and bool(((voxels >= 0) & (voxels <= 255) & (voxels == np.rint(voxels))).all())
    )


def _series_count(scan: Scan) -> int:
    return 1 if _is_colour(scan) else scan.channels


# -- identity ----------------------------------------------------------------------------------


def _nobody(name: str, provenance: Provenance, digest: str) -> Subject:
    study = new_uid("study", name, digest, *provenance.entropy)
    return Subject({"PatientID": name, "PatientName": f"{name}^"}, study, new_uid("frame", study))


def _patient(scan: Scan, origin: Origin, names: Pseudonyms | None, digest: str) -> Subject:
    """The patient of the source files, under a pseudonym if `names` are given."""
    rename = names.uid if names else str
    study = rename(origin.study)
    if scan.header.space != 1:
        # Only scanner coordinates are the source's own: an atlas is another frame of reference.
        frame = new_uid("frame", study, digest)
    else:
        frame = rename(origin.frame) if origin.frame else new_uid("frame", study, rename(origin.series))
    if names is None:
        return Subject(origin.identity, study, frame)
    # Files without a patient number must not all become one patient.
    label = names.patient(str(origin.identity.get("PatientID") or origin.study))
    return Subject({"PatientID": label, "PatientName": f"{label}^"}, study, frame, deidentified=True)


def _digest(scan: Scan) -> str:
    """A hash of the values, where they are and what they mean."""
    line = np.asarray([scan.scale.slope, scan.scale.intercept], np.float64).tolist()
    scale = (*line, scan.scale.unit)
    hasher = hashlib.sha256(repr((scale, scan.header, scan.voxels.dtype.str, scan.voxels.shape)).encode())
    hasher.update(scan.grid.affine.tobytes())
    for channel in scan.voxels:
        for k in range(channel.shape[2]):
            hasher.update(np.ascontiguousarray(channel[:, :, k].T).data)
    if scan.valid is not None:
        hasher.update(np.packbits(scan.valid).tobytes())
    return hasher.hexdigest()


# -- objects -----------------------------------------------------------------------------------


def _objects(
    scan: Scan,
    rule: Rule,
    provenance: Provenance,
    subject: Subject,
    source: tuple[Origin | None, Callable[[str], str]],
    numbering: tuple[int, str],
) -> Iterator[tuple[str, Dataset]]:
    """The datasets of all slices of all series, each with the path of its file."""
    (origin, rename), (first, digest) = source, numbering
    count = _series_count(scan)
    matched, in_place = place.nearest_images(origin, scan.grid) if origin else ([], False)
    references = place.source_images(origin, matched, rename) if origin else []
    thickness = origin.technical.get("SliceThickness") if origin and in_place else None
    for n in range(count):
        base = _common(scan, rule, provenance, origin, first + n)
        extra = f"(channel {n + 1} of {count})" if count > 1 else ""
        modules.patient_and_study(base, subject)
        provenance_marks(base, provenance, _synthetic(scan, provenance, origin), extra)
        if _has_place(scan, rule):
            place.plane(base, scan.grid, subject.frame, float(str(thickness)) if thickness else None)
        elif scan.header.space > 0 or scan.grid.spacing[:2] != (1.0, 1.0):
            # Pictures without any spacing are read as 1 mm: that is no measurement.
            place.pixel_spacing(base, scan.grid)
        if rule == "other":
            base.PatientOrientation = ""
        frames = _frames(scan, n, rule, base)
        entropy = (subject.study, subject.frame, *provenance.entropy, str(first + n), digest)
        base.SeriesInstanceUID = new_uid("series", *entropy)
        folder = f"channel-{n + 1}/" if count > 1 else ""
        for k, frame in enumerate(frames):
            ds = copy.copy(base)
            _place_slice(ds, scan, rule, k)
            if origin:
                ds.SourceImageSequence = references[k]
            ds.add_new("PixelData", "OW" if base.BitsAllocated == 16 else "OB", frame)
            yield f"{folder}{k + 1:04d}.dcm", ds


def _common(scan: Scan, rule: Rule, provenance: Provenance, origin: Origin | None, number: int) -> Dataset:
    header = scan.header
    ds = modules.new_object(modules.sop_class_of(rule))
    modules.series(ds, header.modality, header.body_part, number, origin)
    equipment(ds, provenance)
    modules.acquisition(ds, rule, origin, provenance.content)
    modules.image_marks(ds, provenance.content, header.lossy or bool(origin and origin.lossy), origin)
    return ds


def _synthetic(scan: Scan, provenance: Provenance, origin: Origin | None) -> str:
    said = origin.synthetic if origin else ""
    return "YES" if provenance.synthetic_data or scan.header.synthetic or said == "YES" else said


def _frames(scan: Scan, channel: int, rule: Rule, base: Dataset) -> Iterator[bytes]:
    """The pixel bytes of each slice; adds the matching description to `base`."""
    columns, rows, slices = scan.grid.shape
    if _is_colour(scan):
        modules.colour_pixels(base, rows, columns)
        planes = (scan.voxels[:, :, :, k].T.astype(np.uint8).tobytes() for k in range(slices))
        return (plane + b"\0" * (len(plane) % 2) for plane in planes)
    stored = store(scan, channel, rule)
    inverted = scan.header.photometric == "MONOCHROME1"
    modules.pixels(base, stored, rule, "MONOCHROME1" if inverted else "MONOCHROME2")
    return (stored.values[:, :, k].T.astype(stored.values.dtype.newbyteorder("<")).tobytes() for k in range(slices))


def _place_slice(ds: Dataset, scan: Scan, rule: Rule, k: int) -> None:
    ds.file_meta = copy.copy(ds.file_meta)
    ds.SOPInstanceUID = new_uid("instance", ds.SeriesInstanceUID, str(k))
    ds.file_meta.MediaStorageSOPInstanceUID = UID(ds.SOPInstanceUID)
    ds.InstanceNumber = k + 1
    if _has_place(scan, rule):
        place.position(ds, scan.grid, k)


# -- files -------------------------------------------------------------------------------------


def _publish(objects: Iterator[tuple[str, Dataset]], folder: Path, total: int) -> list[Path]:
    """Write all files under another name beside `folder` and rename them when the last is there."""
    written = []
    with replacing(folder) as part:
        part.mkdir()
        for path, ds in track(objects, "writing DICOM", total):
            (part / path).parent.mkdir(exist_ok=True)
            dcmwrite(part / path, ds, enforce_file_format=True)
            written.append(folder / path)
    return written


__all__ = ["Identity", "Provenance", "write_series"]
