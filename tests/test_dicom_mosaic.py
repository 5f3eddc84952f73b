"""Siemens mosaics: the right volume at the right place, or a refusal that says what contradicts what."""

import struct
import time
import warnings
from pathlib import Path

import dicom_factory as factory
import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, MRImageStorage
from validators import by_dcm2niix

from medgen import log
from medgen.errors import DataError, UnreadableScan
from medgen.io.dicom.read import find_series, read_series, series_header
from medgen.io.dicom.write import Provenance, write_series
from medgen.io.source import Source

ROWS, COLUMNS, SLICES = 6, 5, 7
AXES = ((1.0, 0.0, 0.0), (0.0, 0.8, -0.6))
SPACING, BETWEEN = (2.0, 3.0), 4.0
TAGS = {"NumberOfImagesInMosaic": ("US", [str(SLICES)]), "SliceNormalVector": ("FD", ["0.0", "0.6", "0.8"])}


def csa(tags: dict[str, tuple[str, list[str]]]) -> bytes:
    """A private header of the second kind."""
    content = b"SV10\4\3\2\1" + struct.pack("<2I", len(tags), 77)
    for name, (kind, values) in tags.items():
        content += struct.pack("<64si4s3i", name.encode(), len(values), kind.encode(), 0, len(values), 77)
        for value in values:
            text = value.encode() + b"\0"
            content += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + bytes(-len(text) % 4)
    return content


def volume(seed: int = 3) -> np.ndarray:
    """Values of SLICES slices (k, rows, columns), none 0."""
    return np.random.default_rng(seed).integers(1, 4000, (SLICES, ROWS, COLUMNS))


def tiled(slices: np.ndarray, across: int = 3) -> np.ndarray:
    picture = np.zeros((ROWS * across, COLUMNS * across), int)
    for k, plane in enumerate(slices):
        down, right = divmod(k, across)
        picture[down * ROWS : (down + 1) * ROWS, right * COLUMNS : (right + 1) * COLUMNS] = plane
    return picture


def mosaic(slices: np.ndarray, header: bytes | None, number: int = 0, series: str = "mosaic") -> Dataset:
    """A mosaic whose first slice begins at (-10, -20, 30) LPS mm."""
    row, column = (np.array(axis) for axis in AXES)
    # The picture is laid around the centre of the first slice.
    corner = np.array([-10.0, -20, 30]) - row * SPACING[1] * COLUMNS - column * SPACING[0] * ROWS
    ds = factory.ct_slice(np.zeros((2, 2)), corner, number, axes=AXES, series=series)
    ds.SOPClassUID, ds.Modality, ds.ImageType = MRImageStorage, "MR", ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    del ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType
    ds.PixelSpacing, ds.SpacingBetweenSlices, ds.SliceThickness = list(SPACING), BETWEEN, 3.3
    ds.SeriesNumber, ds.AcquisitionNumber = 4, number + 1
    if header is not None:
        block = ds.private_block(0x29, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "OB", header + bytes(len(header) % 2))
    factory.pixels(ds, tiled(slices), bits=12)
    return ds


def only(files: list[Path]) -> Source:
    sources, skipped = find_series(files)
    assert not skipped
    assert len(sources) == 1
    return sources[0]


def expected_lps(sign: int = 1) -> np.ndarray:
    """Slices along the normal of rows and columns, whatever side they were numbered from."""
    row, column, normal = np.array(AXES[0]), np.array(AXES[1]), np.array([0, 0.6, 0.8])
    lps = np.eye(4)
    lps[:3, :3] = np.column_stack([row * SPACING[1], column * SPACING[0], normal * BETWEEN])
    lps[:3, 3] = np.array([-10.0, -20, 30]) + (0 if sign > 0 else -normal * BETWEEN * (SLICES - 1))
    return lps


# -- real mosaics --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encodings(shared_data) -> list[Path]:
    return sorted((shared_data / "dicom" / "mr_siemens_transfer_syntaxes").glob("*.dcm"))


def test_nine_encodings_in_one_folder_are_nine_scans_with_one_content(encodings):
    # One series identifier, but a number each: they are told apart, and can be read one by one.
    sources, skipped = find_series(encodings)
    assert not skipped
    assert [source.path for source in sources] == [str(path) for path in encodings]
    scans = [read_series(source) for source in sources]
    for source, scan in zip(sources, scans, strict=True):
        assert scan.voxels.shape == (1, 64, 64, 35)
        assert int(scan.voxels.sum(dtype=np.int64)) == 38036663
        np.testing.assert_array_equal(scan.voxels, scans[0].voxels)
        assert (scan.grid, scan.header) == (scans[0].grid, scans[0].header)
        assert series_header(source) == (scan.grid, 1, scan.header)


def test_copies_given_as_one_series_are_read_once(encodings):
    told = []

    class Listener:
        def note(self, message: str) -> None:
            told.append(message)

        def start(self, what, total):
            return None

        def advance(self, handle, amount, text):
            pass

        def stop(self, handle):
            pass

    with log.reporting(Listener()):
        scan = read_series(Source("mosaics", "dicom", tuple(encodings)))
    assert scan.voxels.shape == (1, 64, 64, 35)
    assert told == ["8 mosaics are identical copies of others and were left out: 2.dcm, 3.dcm, 4.dcm."]


def test_place_equals_nibabels(encodings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        from nibabel.nicom.dicomwrappers import wrapper_from_data
    theirs = wrapper_from_data(dcmread(encodings[0]))
    scan = read_series(only(encodings[:1]))
    # Its array runs down columns first.
    np.testing.assert_allclose(np.asarray(theirs.affine)[:, [1, 0, 2, 3]], scan.grid.lps, atol=1e-6)
    np.testing.assert_array_equal(theirs.get_unscaled_data().transpose(1, 0, 2), scan.voxels[0])


def test_place_equals_dcm2niixs(encodings, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.dcm").write_bytes(encodings[0].read_bytes())
    values, affine = by_dcm2niix(tmp_path / "in", tmp_path / "out")
    scan = read_series(only(encodings[:1]))
    theirs = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
    mine = nibabel.as_closest_canonical(nibabel.Nifti1Image(scan.voxels[0].astype(values.dtype), scan.grid.affine))
    np.testing.assert_array_equal(np.asarray(theirs.dataobj), np.asarray(mine.dataobj))
    for corner in np.ndindex(2, 2, 2):
        ijk = [*(np.array(corner) * (np.array(mine.shape) - 1)), 1]
        np.testing.assert_allclose(theirs.affine @ ijk, mine.affine @ ijk, atol=1e-3)


def test_a_mosaic_can_be_written_as_slices(encodings, tmp_path):
    source = only(encodings[:1])
    scan = read_series(source)
    files = write_series(scan, tmp_path / "out", provenance=Provenance("a copy", content="copy"), source=source.files)
    again = read_series(only(files))
    np.testing.assert_array_equal(again.voxels, scan.voxels)
    np.testing.assert_allclose(again.grid.affine, scan.grid.affine, atol=1e-5)


# -- made mosaics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_slice_lies_where_the_scanner_put_it(tmp_path, syntax, sign):
    normal = [str(sign * n) for n in (0, 0.6, 0.8)]
    ds = mosaic(volume(), csa(TAGS | {"SliceNormalVector": ("FD", normal)}))
    if syntax:
        factory.recode(ds, syntax)
    scan = read_series(only([factory.save(ds, tmp_path / "m.dcm")]))
    np.testing.assert_allclose(scan.grid.lps, expected_lps(sign), atol=1e-6)
    np.testing.assert_array_equal(scan.voxels[0].transpose(2, 1, 0), volume()[::sign])


def test_mosaics_of_one_series_are_its_times(tmp_path):
    files = [factory.save(mosaic(volume(n), csa(TAGS), n), tmp_path / f"{9 - n}.dcm") for n in range(3)]
    files.append(tmp_path / "copy.dcm")
    files[-1].write_bytes(files[1].read_bytes())
    scan = read_series(only(files))
    assert scan.header.channels == ("acquisition 1", "acquisition 2", "acquisition 3")
    for n in range(3):
        np.testing.assert_array_equal(scan.voxels[n].transpose(2, 1, 0), volume(n))


def test_the_tile_count_tells_a_mosaic_whose_image_type_was_changed(tmp_path):
    ds = mosaic(volume(), csa(TAGS))
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.private_block(0x19, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", SLICES)
    assert read_series(only([factory.save(ds, tmp_path / "m.dcm")])).voxels.shape == (1, COLUMNS, ROWS, SLICES)


def refused(tmp_path: Path, ds: Dataset, *words: str) -> None:
    source = only([factory.save(ds, tmp_path / "m.dcm")])
    with pytest.raises(UnreadableScan) as caught:
        read_series(source)
    assert all(word in str(caught.value) for word in ("m.dcm", "mosaic", "dcm2niix", *words)), str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"NumberOfImagesInMosaic": ("US", ["0"])}, "0 slices"),
        ({"NumberOfImagesInMosaic": ("US", ["-4"])}, "-4 slices"),
        ({"NumberOfImagesInMosaic": ("US", ["999999999"])}, "from 1 to 1024"),
        ({"NumberOfImagesInMosaic": ("US", ["26"])}, "do not tile 18 x 15 pixels"),
        ({"NumberOfImagesInMosaic": ("US", ["5"])}, "tile 6 of the picture is not blank"),
        ({"NumberOfImagesInMosaic": ("US", [])}, "does not state NumberOfImagesInMosaic"),
        ({"SliceNormalVector": ("FD", ["0", "1", "0"])}, "contradicts ImageOrientationPatient"),
        ({"SliceNormalVector": ("FD", ["0", "0.6", "nan"])}, "does not state SliceNormalVector"),
        ({"SliceNormalVector": ("FD", ["0", "0.6"])}, "does not state SliceNormalVector"),
        ({"SliceNormalVector": ("LO", ["a", "b", "c"])}, "does not state SliceNormalVector"),
    ],
)
def test_a_header_that_contradicts_the_picture_is_refused(tmp_path, change, words):
    refused(tmp_path, mosaic(volume(), csa(TAGS | change)), words)


def test_a_mosaic_without_its_private_header_is_refused(tmp_path):
    refused(tmp_path, mosaic(volume(), None), "has none")


def test_a_mosaic_without_distance_between_slices_is_refused(tmp_path):
    ds = mosaic(volume(), csa(TAGS))
    del ds.SpacingBetweenSlices
    refused(tmp_path, ds, "lacks a position, an orientation or a spacing")


def hostile() -> dict[str, bytes]:
    tag = struct.pack("<64si4s3i", b"NumberOfImagesInMosaic", 1, b"US", 0, 1000, 77)
    return {
        "empty of tags": b"SV10\4\3\2\1" + struct.pack("<2I", 0, 77),
        "four billion tags": b"SV10\4\3\2\1" + struct.pack("<2I", 2**32 - 1, 77) + bytes(500),
        "a thousand tags of a thousand items": b"SV10\4\3\2\1"
        + struct.pack("<2I", 1000, 77)
        + (tag + bytes(16000)) * 60,
        "two billion items": b"SV10\4\3\2\1" + struct.pack("<2I", 1, 77) + tag[:76] + struct.pack("<2i", 2**31 - 1, 77),
        "an item longer than the header": b"SV10\4\3\2\1"
        + struct.pack("<2I", 1, 77)
        + tag
        + struct.pack("<4i", 9, 2**31 - 1, 77, 9),
        "an item of negative length": b"SV10\4\3\2\1"
        + struct.pack("<2I", 1, 77)
        + tag
        + struct.pack("<4i", 9, -9, 77, 9),
        "the older kind, beginning with items": struct.pack("<2I", 1, 77) + tag + bytes(400),
        "noise": bytes(range(256)) * 40,
        "text": b"SV10",
    }


@pytest.mark.parametrize("kind", hostile())
def test_hostile_private_headers_are_refused_quickly(tmp_path, kind):
    started = time.process_time()
    refused(tmp_path, mosaic(volume(), hostile()[kind]), "CSA")
    assert time.process_time() - started < 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6), st.integers(20, 500))
def test_damaged_private_headers_give_a_volume_or_a_typed_error(tmp_path_factory, damage, length):
    header = bytearray(csa(TAGS)[:length])
    for at, value in damage:
        if at < len(header):
            header[at] = value
    path = factory.save(mosaic(volume(), bytes(header)), tmp_path_factory.mktemp("damaged") / "m.dcm")
    try:
        affine = read_series(only([path])).grid.affine
    except DataError as error:
        told = str(error)
    else:
        told = "m.dcm" if np.isfinite(affine).all() else ""
    assert "m.dcm" in told
