"""Nobody's name gets out: canaries in every text attribute of a source, searched in every byte written."""

import os
import re
import stat
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from validators import assert_conforms, assert_one_study, by_dcm2niix, read_by_simpleitk

from medgen.errors import InconsistentSeries, OutputError, PrivacyError, UnreadableScan
from medgen.grid import Grid
from medgen.io import find, read
from medgen.io.dicom.origin import PATIENT_AND_STUDY
from medgen.io.dicom.write import Provenance, write_series
from medgen.io.privacy import Pseudonyms, new_uid
from medgen.scan import Header, Scale, Scan

KEY = b"a key for the tests, 24+"
DERIVED = Provenance("Restored to its nearest healthy twin", model="vae3d", weights_sha256="cd" * 32, seed=1)
COPIED = Provenance("Converted", content="copy")
SAMPLED = Provenance("Sampled from a model", model="vae3d", seed=1, content="synthetic")

# One canary a kind of value, each recognisable in raw bytes.
TEXT, DATE, TIME, UID, NUMBER, AGE = "CANARY^PHI", "19471108", "031427", "1.2.3.271828182845", "61.2345", "077Y"
CANARIES = [b"canary", DATE.encode(), TIME.encode(), b"271828182845", NUMBER.encode(), AGE.encode()]
_PLANTED = {
    **dict.fromkeys(("LO", "SH", "PN", "ST", "LT", "UT", "UC", "UR"), TEXT),
    **{"CS": "CANARY_PHI", "AE": "CANARY_PHI", "DA": DATE, "TM": TIME, "DT": DATE + TIME, "UI": UID},
    **{"DS": NUMBER, "AS": AGE},
}
# Numbers of the acquisition identify nobody and may be passed on.
_ACQUISITION = {
    "SliceThickness",
    "KVP",
    "RepetitionTime",
    "EchoTime",
    "InversionTime",
    "FlipAngle",
    "MagneticFieldStrength",
    "ImagingFrequency",
    "NumberOfAverages",
    "LossyImageCompressionRatio",
}
_STRUCTURE = {
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "PhotometricInterpretation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "RescaleSlope",
    "RescaleIntercept",
    "BurnedInAnnotation",
    "SyntheticData",
}


def plant(ds: Dataset) -> None:
    """Put a canary into every attribute of the data dictionary that holds text, dates, UIDs or decimals."""
    for tag, (vr, multiplicity, _, _, keyword) in DicomDictionary.items():
        if tag >> 16 < 8 or keyword in _STRUCTURE or vr not in _PLANTED or not keyword:
            continue
        count = int(multiplicity) if multiplicity.isdigit() else 1
        value = f"{UID}.{tag}" if vr == "UI" else "2.5" if keyword in _ACQUISITION else _PLANTED[vr]
        ds.add_new(tag, vr, [value] * count if count > 1 else value)


def hostile_slice(n: int, modality: str) -> Dataset:
    """One slice of a series whose header tells a canary everywhere it can."""
    ds = Dataset()
    plant(ds)
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID = MRImageStorage if modality == "MR" else CTImageStorage
    ds.SOPInstanceUID = f"{UID}.{n + 1}"
    ds.Modality, ds.InstanceNumber = modality, n + 1
    ds.PatientSex, ds.PatientIdentityRemoved, ds.BurnedInAnnotation = "F", "NO", "NO"
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-9, 4, 2.5 * n], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept = [0.7, 0.8], 1, -1024 if modality == "CT" else 0
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 6, 8, 16, 16, 15, 0
    ds.add_new("PixelData", "OW", np.random.default_rng(n).integers(0, 4000, 48, np.uint16).tobytes())
    nested = Dataset()
    nested.PatientName, nested.PatientID = TEXT, TEXT
    inner = Dataset()
    inner.InstitutionName = TEXT
    nested.ReferencedStudySequence = DicomSequence([inner])
    for keyword in ("OtherPatientIDsSequence", "RequestAttributesSequence", "SourceImageSequence", "IconImageSequence"):
        setattr(ds, keyword, DicomSequence([nested]))
    ds.add_new(0x60000010, "US", 6)
    ds.add_new(0x60000022, "LO", TEXT)
    ds.add_new(0x60003000, "OW", (TEXT.encode() * 2)[:12])
    block = ds.private_block(0x0029, "CANARY VENDOR", create=True)
    block.add_new(0x01, "LO", TEXT)
    block.add_new(0x02, "OB", TEXT.encode())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.ImplementationVersionName = "CANARY"
    ds.file_meta.SourceApplicationEntityTitle = "CANARY"
    ds.preamble = b"MZ CANARY" + b"\0" * 119
    return ds


@pytest.fixture(scope="module", params=["CT", "MR"])
def hostile(request, tmp_path_factory) -> tuple[Scan, list[Path]]:
    """A scan and the files it was read from."""
    folder = tmp_path_factory.mktemp("CANARY")
    files, planes = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(3):
            ds = hostile_slice(n, request.param)
            files.append(folder / f"CANARY{n}.dcm")
            pydicom.dcmwrite(files[-1], ds)
            planes.append(np.frombuffer(ds.PixelData, np.uint16).reshape(6, 8).T)
    scale = Scale(1.0, -1024.0, "HU") if request.param == "CT" else Scale()
    affine = np.array([[0.8, 0, 0, -9], [0, 0.7, 0, 4], [0, 0, 2.5, 0], [0, 0, 0, 1]])
    grid = Grid.from_lps((8, 6, 3), affine)
    return Scan(np.stack(planes, -1)[None], grid, scale, Header(request.param, "CANARY_PHI")), files


def hits(folder: Path) -> list[tuple[str, bytes]]:
    """Every canary found in any byte or name below a folder."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes().lower() if path.is_file() else b""
        content += str(path.relative_to(folder)).lower().encode()
        found += [(path.name, canary) for canary in CANARIES if canary.lower() in content]
    return found


def elements(ds: Dataset) -> Iterator[pydicom.DataElement]:
    """Every element of a dataset, those in sequences too."""
    for element in [*ds.file_meta, *ds] if hasattr(ds, "file_meta") else ds:
        if element.VR == "SQ":
            for item in element.value:
                yield from elements(item)
        else:
            yield element


# -- canaries ----------------------------------------------------------------------------------


def test_the_source_is_full_of_canaries(hostile):
    content = hostile[1][0].read_bytes().lower()
    assert content.count(b"canary") > 1000
    assert all(canary.lower() in content for canary in CANARIES)


@pytest.mark.parametrize("made", [DERIVED, COPIED])
def test_a_pseudonymous_series_tells_nothing(tmp_path, hostile, made):
    scan, source = hostile
    table = tmp_path / "names" / "table.csv"
    table.parent.mkdir()
    names = Pseudonyms(table, KEY)
    files = write_series(scan, tmp_path / "out", provenance=made, source=source, pseudonyms=names)
    names.save()
    assert hits(tmp_path / "out") == []
    assert_conforms(files)
    ds = pydicom.dcmread(files[0])
    assert re.fullmatch(r"MG-[A-Z2-7]{8}", ds.PatientID)
    assert ds.PatientName == f"{ds.PatientID}^"
    assert ds.PatientIdentityRemoved == "YES"
    assert ds.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    assert (ds.StudyDate, ds.PatientBirthDate, ds.PatientSex, ds.AccessionNumber) == ("", "", "", "")
    assert "InstitutionName" not in ds
    assert "PatientAge" not in ds
    assert not [element for element in elements(ds) if element.tag.is_private or element.tag.group == 0x6000]


def test_a_synthetic_series_tells_nothing(tmp_path, hostile):
    scan, _ = hostile
    files = write_series(scan, tmp_path / "out", provenance=SAMPLED, name="SYN-0042")
    assert hits(tmp_path / "out") == []
    ds = pydicom.dcmread(files[0])
    assert (ds.PatientID, ds.PatientName) == ("SYN-0042", "SYN-0042^")
    assert (ds.StudyDate, ds.StudyTime, ds.PatientBirthDate) == ("", "", "")
    assert "PatientIdentityRemoved" not in ds
    assert ds.SyntheticData == "YES"


def test_a_kept_identity_is_in_the_listed_attributes_alone(tmp_path, hostile):
    scan, source = hostile
    files = write_series(scan, tmp_path / "out", provenance=DERIVED, source=source, identity="keep")
    assert_conforms(files, warnings=False)
    linked = {"StudyInstanceUID", "FrameOfReferenceUID", "ReferencedSOPInstanceUID"}
    for file in files:
        ds = pydicom.dcmread(file)
        told = 0
        for element in elements(ds):
            text = str(element.value).lower().encode()
            if any(canary.lower() in text for canary in CANARIES):
                assert element.keyword in {*PATIENT_AND_STUDY, *linked}, element.keyword
                told += text.count(b"canary")
        # Nothing hides between the elements.
        assert file.read_bytes().lower().count(b"canary") == told
        assert ds.PatientName == TEXT
        assert ds.preamble == b"\0" * 128
    original = pydicom.dcmread(source[0])
    assert ds.StudyInstanceUID == original.StudyInstanceUID
    assert ds.FrameOfReferenceUID == original.FrameOfReferenceUID
    assert ds.SeriesInstanceUID.startswith("2.25.")
    assert [item.ReferencedSOPInstanceUID for item in ds.SourceImageSequence] == [f"{UID}.3"]
    assert ds.SourceImageSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue == "121322"


def test_errors_do_not_quote_the_header(tmp_path, hostile):
    scan, source = hostile
    broken = pydicom.dcmread(source[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken.PatientID = "CANARY" * 20
        pydicom.dcmwrite(tmp_path / "one.dcm", broken)
        broken.PatientID, broken.SOPInstanceUID = "other", "../../CANARY"
        pydicom.dcmwrite(tmp_path / "two.dcm", broken)
        broken.SOPInstanceUID = UID + ".7"
        pydicom.dcmwrite(tmp_path / "three.dcm", broken)
    for files, kind in [
        ([tmp_path / "one.dcm"], UnreadableScan),
        ([tmp_path / "two.dcm"], UnreadableScan),
        ([source[1], tmp_path / "three.dcm"], InconsistentSeries),
    ]:
        with pytest.raises(kind) as caught:
            write_series(scan, tmp_path / "out", provenance=DERIVED, source=files, identity="keep")
        assert "CANARY" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_text_in_the_pixels_cannot_become_a_pseudonym(tmp_path, hostile):
    scan, source = hostile
    ds = pydicom.dcmread(source[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.BurnedInAnnotation = "YES"
        pydicom.dcmwrite(tmp_path / "burned.dcm", ds)
    with pytest.raises(PrivacyError, match="burned"):
        write_series(scan, tmp_path / "out", provenance=DERIVED, source=[tmp_path / "burned.dcm"])
    made = write_series(scan, tmp_path / "b", provenance=DERIVED, source=[tmp_path / "burned.dcm"], identity="keep")
    assert pydicom.dcmread(made[0]).BurnedInAnnotation == "YES"


# -- consistency -------------------------------------------------------------------------------


def test_two_series_of_one_patient_stay_together_under_one_pseudonym(tmp_path, hostile):
    scan, source = hostile
    names = Pseudonyms(key=KEY)
    first = write_series(scan, tmp_path / "a", provenance=DERIVED, source=source, pseudonyms=names)
    second = write_series(
        scan, tmp_path / "b", provenance=COPIED, source=source, pseudonyms=Pseudonyms(key=KEY), series_number=9002
    )
    assert_one_study([*first, *second])
    one, two = pydicom.dcmread(first[0]), pydicom.dcmread(second[0])
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert one[keyword].value == two[keyword].value
    assert one.SeriesInstanceUID != two.SeriesInstanceUID
    referenced = one.SourceImageSequence[0].ReferencedSOPInstanceUID
    assert referenced == names.uid(f"{UID}.1") == two.SourceImageSequence[0].ReferencedSOPInstanceUID
    again = write_series(scan, tmp_path / "c", provenance=DERIVED, source=source, pseudonyms=Pseudonyms(key=KEY))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
    other = write_series(scan, tmp_path / "d", provenance=DERIVED, source=source)
    assert pydicom.dcmread(other[0]).PatientID != one.PatientID


def test_other_coordinates_are_another_frame_of_reference(tmp_path, hostile):
    scan, source = hostile
    frames = set()
    for space in (1, 4):
        folder = tmp_path / str(space)
        files = write_series(scan.with_header(space=space), folder, provenance=DERIVED, source=source, identity="keep")
        frames.add(pydicom.dcmread(files[0]).FrameOfReferenceUID)
    assert len(frames) == 2


def test_slices_between_source_slices_refer_to_the_nearest(tmp_path, hostile):
    scan, source = hostile
    finer = scan.onto(scan.grid.respaced((0.8, 0.7, 1.25)), outside=0)
    files = write_series(finer, tmp_path / "out", provenance=DERIVED, source=source, identity="keep")
    referred = [[i.ReferencedSOPInstanceUID[-1] for i in pydicom.dcmread(f).SourceImageSequence] for f in files]
    assert referred == [["1"], ["1"], ["2"], ["2"], ["3"], ["3"]]
    assert pydicom.dcmread(files[0]).SliceThickness == 1.25
    turned = scan.onto(scan.grid.permute((2, 0, 1)), outside=0)
    files = write_series(turned, tmp_path / "turned", provenance=DERIVED, source=source, identity="keep")
    assert len(pydicom.dcmread(files[0]).SourceImageSequence) == 3


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jürgen"),
        ("ISO_IR 192", "Ωmega^Ñandú"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
    ],
)
def test_kept_names_survive_the_change_of_character_set(tmp_path, hostile, charset, name):
    scan, source = hostile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(source[0])
        # Only a fresh dataset encodes all its text anew.
        plain = Dataset()
        plain.file_meta = ds.file_meta
        for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "PixelData"):
            plain[keyword] = ds[keyword]
        plain.SpecificCharacterSet, plain.PatientName, plain.PatientID = charset, name, "1"
        pydicom.dcmwrite(tmp_path / "one.dcm", plain, enforce_file_format=True)
    made = write_series(scan, tmp_path / "out", provenance=DERIVED, source=[tmp_path / "one.dcm"], identity="keep")
    assert str(pydicom.dcmread(made[0]).PatientName) == name
    assert_conforms(made)


def radiograph(file: Path) -> Path:
    """A digital X-ray: no place in a patient, spacing of the detector, MONOCHROME1."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = pydicom.uid.DigitalXRayImageStorageForPresentation, UID + ".1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = UID + ".2", UID + ".3", "DX"
    ds.PatientName, ds.PatientID, ds.BodyPartExamined, ds.ImagerPixelSpacing = TEXT, TEXT, "CHEST", [0.15, 0.2]
    ds.BurnedInAnnotation, ds.LossyImageCompression, ds.LossyImageCompressionRatio = "NO", "01", 8
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME1", 6, 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(0).integers(0, 4096, 48, np.uint16).tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file


@pytest.mark.parametrize("identity", ["keep", "pseudonym"])
def test_radiographs_come_out_as_they_went_in(tmp_path, identity):
    source = radiograph(tmp_path / "in.dcm")
    scan = read(source)
    made = write_series(scan, tmp_path / "out", provenance=COPIED, source=[source], identity=identity)
    assert_conforms(made)
    ds, back = pydicom.dcmread(made[0]), read(tmp_path / "out")
    assert (ds.PhotometricInterpretation, ds.LossyImageCompression, ds.LossyImageCompressionRatio) == (
        "MONOCHROME1",
        "01",
        8,
    )
    assert ds.PixelSpacing == [0.15, 0.2]
    assert "FrameOfReferenceUID" not in ds
    np.testing.assert_array_equal(back.voxels, scan.voxels)
    assert back.grid.close(scan.grid)
    assert (hits(tmp_path / "out") == []) == (identity == "pseudonym")


# -- pseudonyms --------------------------------------------------------------------------------


@given(original=st.text(max_size=80), other=st.text(max_size=80))
def test_replacements_are_consistent_valid_and_different(original, other):
    names, same, foreign = Pseudonyms(key=KEY), Pseudonyms(key=KEY), Pseudonyms()
    assert names.patient(original) == same.patient(original) != foreign.patient(original)
    assert names.uid(original) == same.uid(original) != foreign.uid(original)
    assert re.fullmatch(r"MG-[A-Z2-7]{8}", names.patient(original))
    uid = names.uid(original)
    assert re.fullmatch(r"2\.25\.[1-9][0-9]*", uid)
    assert len(uid) <= 64
    if other != original:
        assert names.patient(other) != names.patient(original)


def test_patients_never_share_a_pseudonym(monkeypatch):
    names = Pseudonyms(key=KEY)
    monkeypatch.setattr(names, "_hash", lambda kind, original, attempt: bytes([attempt] * 32))
    assert len({names.patient(str(n)) for n in range(20)}) == 20


def test_a_saved_table_gives_the_same_pseudonyms_and_is_private(tmp_path):
    path = tmp_path / "names.csv"
    first = Pseudonyms(path)
    originals = ["1234", 'a,"b"\n', "Ärzte^Möbius", ""]
    patients, uid = [first.patient(o) for o in originals], first.uid("1.2.3")
    first.save()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["names.csv"]
    second = Pseudonyms(path)
    assert [second.patient(o) for o in originals] == patients
    assert second.uid("1.2.3") == uid
    assert second.patient("new") == first.patient("new")
    second.save()
    first.patient("newer")
    first.save()
    assert {"new", "newer"} <= {line.split(",")[1] for line in path.read_text().splitlines() if "," in line}


def test_bad_tables_are_refused(tmp_path):
    path = tmp_path / "names.csv"
    for content in ["", "kind,original,replacement\n", "a,b,c\nkey,,00\n", "kind,original,replacement\nkey,,xyz\n"]:
        path.write_text(content)
        with pytest.raises(PrivacyError, match=r"names\.csv"):
            Pseudonyms(path)
    path.unlink()
    Pseudonyms(path, KEY).save()
    with pytest.raises(PrivacyError, match="another key"):
        Pseudonyms(path, KEY + b"!")
    with pytest.raises(PrivacyError, match="16 bytes"):
        Pseudonyms(key=b"short")
    with pytest.raises(PrivacyError, match="no table"):
        Pseudonyms().save()
    with pytest.raises(OutputError):
        Pseudonyms(tmp_path / "absent" / "names.csv").save()


def test_the_table_may_not_lie_among_the_outputs(tmp_path, hostile):
    scan, source = hostile
    names = Pseudonyms(tmp_path / "out" / "names.csv", KEY)
    with pytest.raises(PrivacyError, match="outside"):
        write_series(scan, tmp_path / "out", provenance=DERIVED, source=source, pseudonyms=names)
    with pytest.raises(PrivacyError, match="outside"):
        names.guard(tmp_path)
    assert not (tmp_path / "out").exists()
    names.guard(tmp_path / "elsewhere")


def test_uids_depend_on_every_word():
    words = [("a",), ("a", ""), ("", "a"), ("a", "b"), ("ab",), ("b", "a")]
    assert len({new_uid(*entropy) for entropy in words}) == len(words)


# -- real scanners -----------------------------------------------------------------------------

REAL = [
    "mr_gbm_pgbm003_siemens",
    "ct_ge_small17",
    "dicom2nifti/ge",
    "dicom2nifti/hitachi",
    "dicom2nifti/philips_enhanced",
    "dicom2nifti/siemens_multiframe",
    "dicom2nifti/hyperfine",
    "dicom2nifti/generic/compressed_rle",
]


@pytest.mark.parametrize("identity", ["keep", "pseudonym"])
@pytest.mark.parametrize("name", REAL)
def test_real_series_come_out_as_they_went_in(tmp_path, shared_data, name, identity):
    sources = find(shared_data / "dicom" / name).sources
    assert sources
    for n, source in enumerate(sources):
        scan, folder = read(source), tmp_path / str(n)
        files = write_series(scan, folder, provenance=COPIED, source=source.files, identity=identity)
        # A kept name may be written in an old form: that is the source's business.
        assert_conforms(files, warnings=identity == "pseudonym")
        back = read(folder)
        assert back.grid.close(scan.grid)
        assert back.voxels.dtype == scan.voxels.dtype
        np.testing.assert_array_equal(back.voxels, scan.voxels)
        expected = scan.voxels if scan.header.modality == "MR" else scan.physical()
        for values, affine in (read_by_simpleitk(files), by_dcm2niix(folder, tmp_path / f"{n}n")):
            seen = Scan(values[None], Grid(values.shape, affine)).onto(scan.grid, outside=-9999)
            np.testing.assert_array_equal(seen.voxels, expected)
        kept = pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID
        assert (kept == study_of(source.files[0])) == (identity == "keep")


def study_of(file: Path) -> str:
    return str(pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["StudyInstanceUID"]).StudyInstanceUID)


def test_simpleitk_finds_real_voxels_where_it_found_them_in_the_source(tmp_path, shared_data):
    for name in ("mr_gbm_pgbm003_siemens", "ct_ge_small17", "dicom2nifti/ge", "dicom2nifti/siemens_multiframe"):
        for source in find(shared_data / "dicom" / name).sources:
            values, affine = read_by_simpleitk(source.files)
            folder = tmp_path / source.path.replace("/", "_")
            files = write_series(read(source), folder, provenance=COPIED, source=source.files)
            again, again_affine = read_by_simpleitk(files)
            grid = Grid(values.shape, affine)
            moved = Scan(again[None], Grid(again.shape, again_affine)).onto(grid, outside=-9999)
            np.testing.assert_array_equal(moved.voxels[0], values)


@pytest.mark.parametrize("name", ["mr_gbm_pgbm003_siemens", "ct_ge_small17", "dicom2nifti/ge", "dicom2nifti/hitachi"])
def test_a_kept_series_joins_the_study_of_its_source(tmp_path, shared_data, name):
    for n, source in enumerate(find(shared_data / "dicom" / name).sources):
        made = write_series(read(source), tmp_path / str(n), provenance=DERIVED, source=source.files, identity="keep")
        assert_one_study([*source.files, *made])


# -- other encodings of the source -------------------------------------------------------------


def encoded(source: Path, folder: Path, how: str) -> Path:
    """The same slice without preamble, deflated, or deflated with 64 MiB of zeros behind its pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(source)
        if how != "bare":
            ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        if how == "bomb":
            ds.add_new(0xFFFCFFFC, "OB", bytes(2**26))
        pydicom.dcmwrite(folder / "one.dcm", ds, enforce_file_format=True)
    if how == "bare":
        content = (folder / "one.dcm").read_bytes()
        (folder / "one.dcm").write_bytes(content[144 + int.from_bytes(content[140:144], "little") :])
    return folder / "one.dcm"


@pytest.mark.parametrize("how", ["bare", "deflated", "bomb"])
def test_sources_in_odd_encodings_are_read_within_bounds(tmp_path, hostile, how):
    scan, source = hostile
    file = encoded(source[0], tmp_path, how)
    tracemalloc.start()
    try:
        made = write_series(scan, tmp_path / "out", provenance=DERIVED, source=[file], identity="keep")
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    ds = pydicom.dcmread(made[0])
    assert ds.PatientName == TEXT
    assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == f"{UID}.1"
