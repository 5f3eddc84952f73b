"""A patient called CANARY^PHI goes through every command; nothing of him may come out."""

import gzip
import io as bytes_io
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import UID
from worlds import QUICK_2D, QUICK_3D, SAMPLES, quick

import medgen
from medgen import io

ROOT = "1.2.826.0.1.3680043.271828"
PERSON = {
    "PatientName": "CANARY^PHI",
    "PatientID": "CANARYID",
    "PatientBirthDate": "19471108",
    "PatientAddress": "CANARY STREET 1",
    "PatientComments": "CANARY comment",
    "InstitutionName": "CANARY HOSPITAL",
    "InstitutionAddress": "CANARY CITY",
    "StationName": "CANARYSTATION",
    "ReferringPhysicianName": "CANARY^DOCTOR",
    "OperatorsName": "CANARY^OPERATOR",
    "PerformingPhysicianName": "CANARY^SURGEON",
    "AccessionNumber": "CANARYACC",
    "StudyID": "CANARYSTUDY",
    "StudyDescription": "CANARY study",
    "SeriesDescription": "CANARY series",
    "ProtocolName": "CANARY protocol",
    "DeviceSerialNumber": "CANARY271828",
    "ImageComments": "CANARY image",
}
# What would tell who it was: his texts, his day of birth, his numbers, and the root of all his UIDs.
NEEDLES = ("CANARY", "19471108", "271828")


def disguised(source: Path, target: Path, number: int, **changes: str) -> None:
    """A sample file as if it were a scan of patient `number`, with his identity wherever there is room."""
    ds = pydicom.dcmread(source)
    for name, value in PERSON.items():
        setattr(ds, name, value)
    ds.PatientID = f"CANARYID{number}"
    for name in [keyword for keyword in ("SyntheticData", "ContributingEquipmentSequence") if keyword in ds]:
        delattr(ds, name)
    study, series = f"{ROOT}.{number}.1", f"{ROOT}.{number}.2"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = UID(study), UID(series), UID(f"{series}.9")
    instance = UID(f"{series}.{int(ds.get('InstanceNumber') or 1)}")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = instance
    ds.private_block(0x0029, "CANARY VENDOR", create=True).add_new(0x10, "LO", "CANARY private")
    for name, value in changes.items():
        setattr(ds, name, value)
    target.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(target)


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """24 radiographs of two classes and one CT series, all of patients who must stay unknown."""
    folder = tmp_path_factory.mktemp("patients")
    for label in ("normal", "opacity"):
        for n, path in enumerate(sorted((SAMPLES / "xray" / label).iterdir())[:12]):
            number = n + (100 if label == "opacity" else 0)
            disguised(path, folder / "xray" / label / f"{number:03d}.dcm", number)
    for path in sorted((SAMPLES / "ct_oblique").iterdir()):
        disguised(path, folder / "ct" / path.name, 500)
    content = b"".join(path.read_bytes() for path in folder.rglob("*.dcm"))
    assert all(needle.encode() in content for needle in NEEDLES)
    return folder


def readable(path: Path) -> list[bytes]:
    """The bytes of a file as they are, and as whatever they are packed in gives them."""
    raw = path.read_bytes()
    found = [raw]
    if raw.startswith(b"\x1f\x8b"):
        found.append(gzip.decompress(raw))
    if raw.startswith(b"\x89PNG"):
        with Image.open(bytes_io.BytesIO(raw)) as picture:
            found.append(repr(picture.info).encode())
    if raw.startswith(b"PK"):
        with np.load(path) as arrays:
            found += [arrays[name].tobytes() for name in arrays]
    for stream in raw.split(b"zTXt")[1:]:
        try:
            found.append(zlib.decompress(stream[stream.index(b"\0") + 2 :]))
        except (zlib.error, ValueError):
            continue
    return found


def traces(folder: Path) -> list[str]:
    """Where something of the patients is: in file names, and in any byte, in three spellings."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found += [f"name {name}" for needle in NEEDLES if needle.lower() in name.lower()]
        if not path.is_file():
            continue
        for content in readable(path):
            lower = content.lower()
            for needle in NEEDLES:
                spellings = (needle.lower().encode(), needle.lower().encode("utf-16-le"))
                found += [f"{needle} in {name}" for spelling in spellings if spelling in lower]
    return found


QUICK = (*QUICK_2D, "fit.images=64")


@pytest.fixture(scope="module")
def learned(patients, tmp_path_factory) -> Path:
    """A bundle trained on the radiographs."""
    out = tmp_path_factory.mktemp("out") / "bundle"
    return medgen.train(patients / "xray", out, minutes=None, overrides=QUICK)


def test_the_search_finds_what_is_there(patients, tmp_path):
    assert traces(patients)
    for name, content in (
        ("a.txt", b"xx canary yy"),
        ("b.gz", gzip.compress(b"born 19471108")),
        ("c.txt", "Canary".encode("utf-16-le")),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        assert traces(folder)
    (tmp_path / "d" / "Canary").mkdir(parents=True)
    assert traces(tmp_path / "d")


def test_nobody_is_in_a_bundle(learned):
    assert traces(learned) == []


@pytest.mark.slow
def test_nobody_is_in_synthetic_scans_of_any_format(patients, learned, tmp_path):
    for chosen in ("auto", "nifti", "png", "npz"):
        medgen.augment(patients / "xray", tmp_path / chosen, bundle=learned, per_class=1, format=chosen)
    medgen.augment(patients / "xray", tmp_path / "learned", per_class=1, minutes=None, overrides=QUICK)
    assert len(list(tmp_path.rglob("*.dcm"))) == 4
    assert traces(tmp_path) == []


def test_nobody_is_in_a_volume_s_synthetic_twins(patients, tmp_path):
    """Several CT patients, as series."""
    for number in range(6):
        for path in sorted((patients / "ct").iterdir())[::2]:
            disguised(path, tmp_path / "in" / f"s{number}" / path.name, 600 + number)
            if number:
                ds = pydicom.dcmread(tmp_path / "in" / f"s{number}" / path.name)
                noise = np.random.default_rng(number).integers(-60, 60, ds.pixel_array.shape)
                ds.PixelData = (ds.pixel_array + noise).astype(ds.pixel_array.dtype).tobytes()
                ds.save_as(tmp_path / "in" / f"s{number}" / path.name)
    overrides = (*QUICK_3D, "fit.images=8", "max_voxels=4096")
    bundle = medgen.train(tmp_path / "in", tmp_path / "out" / "bundle", minutes=None, overrides=overrides)
    scores = medgen.score(tmp_path / "in", bundle, tmp_path / "out" / "scores")
    assert scores.failed == 0
    assert traces(tmp_path / "out") == []


def test_nobody_is_in_scores_maps_and_pictures(patients, learned, tmp_path):
    scores = medgen.score(patients / "xray", learned, tmp_path / "scores")
    assert len(scores.scans) == 24
    assert scores.failed == 0
    assert traces(tmp_path) == []


def test_nobody_is_in_what_goes_wrong(patients, learned, tmp_path, command):
    """Damaged files, another modality, contradicting slices: what is said of them names nobody."""
    folder = tmp_path / "in"
    shutil.copytree(patients / "xray" / "normal", folder)
    first, second, third, *_ = sorted(folder.iterdir())
    first.write_bytes(first.read_bytes()[:-500])
    ds = pydicom.dcmread(second)
    ds.Modality, ds.RescaleSlope, ds.RescaleIntercept = "CT", "abc"[:0] or "1", "0"
    ds.Rows = int(ds.Rows) + 7
    ds.save_as(second)
    third.write_bytes(third.read_bytes()[:700])
    shutil.copytree(patients / "ct", folder / "ct")
    (sorted((folder / "ct").iterdir())[4]).unlink()
    said = []
    for arguments in (
        ("info", folder),
        ("info", folder, "--json"),
        ("score", folder, "-m", learned, "-o", tmp_path / "out" / "scores"),
        ("convert", folder, "-o", tmp_path / "out" / "nifti"),
        ("convert", folder, "-o", tmp_path / "out" / "dicom", "--format", "dicom"),
        ("train", folder, "-o", tmp_path / "out" / "bundle", *quick(QUICK)),
    ):
        code, out, err = command(*arguments)
        said.append(out + err)
        assert "Traceback" not in out + err
        assert code in (0, 3)
    text = "\n".join(said).lower()
    assert not [needle for needle in NEEDLES if needle.lower() in text]
    assert traces(tmp_path / "out") == []


@pytest.mark.parametrize("chosen", ["nifti", "dicom", "png"])
def test_nobody_is_in_converted_files_under_a_pseudonym(patients, tmp_path, chosen):
    medgen.tasks.convert.convert(patients / "xray", tmp_path / "xray", format=chosen)
    if chosen != "png":
        medgen.tasks.convert.convert(patients / "ct", tmp_path / "ct", format=chosen)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) > 24
    assert traces(tmp_path) == []


def test_only_the_table_knows_who_is_who(patients, tmp_path):
    table = tmp_path / "elsewhere" / "names.csv"
    table.parent.mkdir()
    medgen.tasks.convert.convert(patients / "xray", tmp_path / "out", format="dicom", table=table)
    assert traces(tmp_path / "out") == []
    assert "CANARYID0" in table.read_text()
    assert (table.stat().st_mode & 0o077) == 0
    # One patient has one pseudonym, in this and the next conversion.
    medgen.tasks.convert.convert(patients / "xray", tmp_path / "again", format="dicom", table=table)
    ids = [
        {pydicom.dcmread(source.files[0]).PatientID for source in io.find(tmp_path / name).sources}
        for name in ("out", "again")
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 24


def test_an_interrupted_conversion_leaves_nobody_behind_and_one_pseudonym_each(patients, tmp_path, monkeypatch):
    from medgen.tasks import convert

    original, count = convert._write, [0]

    def interrupted(*arguments):
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(convert, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(patients / "xray", tmp_path / "out", format="dicom")
    assert (tmp_path / "out.part" / "journal.json").exists()
    assert traces(tmp_path) == []
    convert.convert(patients / "xray", tmp_path / "out", format="dicom")
    headers = [pydicom.dcmread(source.files[0]) for source in io.find(tmp_path / "out").sources]
    assert len({ds.PatientID for ds in headers}) == 24
    assert traces(tmp_path) == []


def test_an_interrupted_training_leaves_nobody_behind(patients, tmp_path, monkeypatch):
    from medgen.training import fit

    step, count = fit._Run._step, [0]

    def interrupted(self, batch):
        count[0] += 1
        if count[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(fit._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        medgen.train(patients / "xray", tmp_path / "out", minutes=None, overrides=(*QUICK, "fit.images=640"))
    assert (tmp_path / "out.part" / "training" / "state" / "progress.json").exists()
    assert traces(tmp_path) == []


def test_identity_is_kept_only_where_it_was_asked_for(patients, tmp_path):
    medgen.tasks.convert.convert(patients / "ct", tmp_path / "out", format="dicom", identity="keep")
    (source,) = io.find(tmp_path / "out").sources
    ds = pydicom.dcmread(source.files[0])
    assert str(ds.PatientName) == "CANARY^PHI"
    assert ds.StudyInstanceUID == f"{ROOT}.500.1"
    # Not what belongs to neither the patient nor the study.
    for keyword in ("InstitutionName", "OperatorsName", "PatientAddress", "StationName", "DeviceSerialNumber"):
        assert "CANARY" not in str(ds.get(keyword, ""))
    assert not [element for element in ds if element.tag.is_private]
