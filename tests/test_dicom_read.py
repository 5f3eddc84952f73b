"""What reading DICOM promises when the files are in order: places, values, names, and silence about the patient."""

import re
import subprocess
import sys
from pathlib import Path

import dicom_factory as factory
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medgen import log
from medgen.errors import DataError, GeometryError, InconsistentSeries, UnreadableScan
from medgen.io import read as read_any
from medgen.io.dicom.read import find_series, read_series, series_header
from medgen.io.source import ReadOptions


class Notes(list):
    def note(self, message):
        self.append(message)

    def start(self, what, total):
        return None

    def advance(self, handle, amount, text):
        pass

    def stop(self, handle):
        pass


@pytest.fixture
def notes():
    reporter = Notes()
    with log.reporting(reporter):
        yield reporter


def found(folder: Path, **options):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return find_series(paths, ReadOptions(**options))[0]


def read(folder: Path, **options):
    (source,) = found(folder, **options)
    scan = read_series(source, ReadOptions(**options))
    grid, channels, header = series_header(source, ReadOptions(**options))
    assert (grid, channels, header) == (scan.grid, scan.channels, scan.header)
    return scan


# -- sources -------------------------------------------------------------------------------------------


def test_a_folder_with_one_series_is_its_path(tmp_path):
    truth = factory.series(tmp_path / "case 1")
    (source,) = found(tmp_path)
    assert source.path == str(tmp_path / "case 1")
    assert source.kind == "dicom"
    assert source.modality == "CT"
    assert list(source.files) == truth.files


def test_series_in_one_folder_have_paths_that_stay_and_read_back(tmp_path):
    truth = {name: factory.series(tmp_path, series=name, name=(name + "{:03d}").format) for name in "ab"}
    paths = {source.files[0].name[0]: source.path for source in found(tmp_path)}
    for name, path in paths.items():
        np.testing.assert_array_equal(read_any(path).scale.physical(read_any(path).voxels)[0], truth[name].hu)
    factory.series(tmp_path, series="c", name="c{:03d}".format)
    again = {source.files[0].name[0]: source.path for source in found(tmp_path)}
    assert {name: again[name] for name in "ab"} == paths


def test_a_series_spread_over_folders_is_one_source_at_their_common_folder(tmp_path):
    for k in range(20):
        (tmp_path / f"{k % 3}").mkdir(exist_ok=True)
    truth = factory.series(tmp_path, name=lambda k: f"{k % 3}/{k:03d}")
    (source,) = found(tmp_path)
    assert source.path == str(tmp_path)
    assert list(source.files) == truth.files


def test_single_files_are_their_own_path(tmp_path):
    factory.enhanced_ct(tmp_path)
    factory.radiograph(tmp_path, np.arange(12.0).reshape(3, 4))
    sources = found(tmp_path)
    assert [Path(source.path).name for source in sources] == ["cr.dcm", "enhanced.dcm"]
    assert [read_any(source.path).voxels.shape for source in sources] == [(1, 4, 3, 1), (1, 30, 24, 20)]


def test_pictures_of_one_x_ray_series_are_scans_of_their_own(tmp_path):
    same = lambda ds, k: setattr(ds, "SeriesInstanceUID", "1.2.3")  # noqa: E731
    factory.radiograph(tmp_path, np.zeros((3, 4)), name="pa.dcm", edit=same)
    factory.radiograph(tmp_path, np.zeros((5, 6)), name="lateral.dcm", edit=same)
    assert [Path(source.path).name for source in found(tmp_path)] == ["lateral.dcm", "pa.dcm"]


def test_a_series_of_localizers_is_one_source_for_each_direction(tmp_path):
    def edit(ds, k):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0] if k < 2 else [0, 1, 0, 0, 0, -1]
        ds.ImagePositionPatient = [0, 0, 3 * k] if k < 2 else [3 * k, 0, 0]

    factory.series(tmp_path, hu=factory.hounsfield(4), edit=edit)
    sources = found(tmp_path)
    assert [len(source.files) for source in sources] == [2, 2]
    assert {read_series(source).voxels.shape for source in sources} == {(1, 30, 24, 2)}


def test_the_patient_key_joins_files_and_tells_nobody(tmp_path):
    factory.series(tmp_path / "a")
    factory.series(tmp_path / "b", series="b")
    other = factory.series(tmp_path / "c", series="c", edit=lambda ds, k: setattr(ds, "PatientID", "CANARY-2"))
    nobody = factory.series(tmp_path / "d", series="d", edit=lambda ds, k: setattr(ds, "PatientID", ""))
    keys = {Path(source.path).name: source.patient for source in found(tmp_path)}
    assert keys["a"] == keys["b"] != keys["c"]
    assert re.fullmatch("p[0-9a-f]{10}", keys["a"])
    assert keys["d"] == ""
    assert len(other.files) == len(nobody.files)


def test_issuer_makes_another_patient(tmp_path):
    factory.series(tmp_path / "a")
    factory.series(tmp_path / "b", series="b", edit=lambda ds, k: setattr(ds, "IssuerOfPatientID", "elsewhere"))
    assert len({source.patient for source in found(tmp_path)}) == 2


def test_one_bad_series_does_not_hide_the_others(tmp_path):
    factory.series(tmp_path / "good")
    factory.series(tmp_path / "gap", series="b", edit=lambda ds, k: [] if k == 5 else None)
    good, bad = sorted(found(tmp_path), key=lambda source: -len(source.files))
    assert read_series(good).grid.shape == (30, 24, 20)
    with pytest.raises(InconsistentSeries, match=r"^gap: 19 slices"):
        read_series(bad)


def test_nothing_of_the_patient_is_in_what_is_found_or_read(tmp_path):
    factory.series(tmp_path)
    (source,) = found(tmp_path)
    scan = read_series(source)
    assert "CANARY" not in repr((source.path, source.patient, source.modality, scan.header, scan.scale))


# -- geometry ------------------------------------------------------------------------------------------


def rotation(angles) -> np.ndarray:
    a, b, c = angles
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    return about_z @ about_y @ about_x


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    first=st.tuples(*[st.floats(-500, 500)] * 3),
    spacing=st.tuples(st.floats(0.2, 4), st.floats(0.2, 4)),
    step=st.floats(0.3, 8),
    shape=st.tuples(st.integers(2, 5), st.integers(2, 9), st.integers(2, 9)),
)
def test_oblique_series_lie_where_simpleitk_puts_them(tmp_path_factory, angles, first, spacing, step, shape):
    import SimpleITK

    folder = tmp_path_factory.mktemp("oblique")
    turn = rotation(angles)
    truth = factory.series(
        folder,
        hu=factory.hounsfield(*shape),
        axes=(turn[:, 0], turn[:, 1]),
        first=first,
        step=turn[:, 2] * step,
        edit=lambda ds, k: setattr(ds, "PixelSpacing", [round(n, 6) for n in spacing]),
    )
    scan = read(folder)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    for ijk in [(0, 0, 0), tuple(n - 1 for n in scan.grid.shape), (1, 0, 1)]:
        place = image.TransformIndexToPhysicalPoint([int(n) for n in ijk])
        np.testing.assert_allclose(scan.grid.world(ijk) * [-1, -1, 1], place, atol=1e-3)
        assert hu(scan)[ijk] == image.GetPixel([int(n) for n in ijk]) == truth.hu[ijk]


def hu(scan) -> np.ndarray:
    return scan.scale.physical(scan.voxels)[0]


def test_pixel_spacing_is_row_distance_first(tmp_path):
    factory.series(tmp_path, edit=lambda ds, k: setattr(ds, "PixelSpacing", [0.5, 2.0]))
    # i runs along a row, so it steps by the distance between columns, which DICOM states second.
    np.testing.assert_allclose(read(tmp_path).grid.spacing, (2.0, 0.5, 2.5))


def test_voxels_are_a_view_of_the_files_own_order(tmp_path):
    factory.series(tmp_path)
    voxels = read(tmp_path).voxels
    assert voxels.transpose(0, 3, 2, 1).flags.c_contiguous
    assert not voxels.flags.writeable


# -- planar pictures -----------------------------------------------------------------------------------


PICTURE = np.arange(35).reshape(5, 7) * 3


@pytest.mark.parametrize(
    ("edit", "spacing", "words"),
    [
        ({"PixelSpacing": [0.2, 0.3]}, (0.3, 0.2, 1), None),
        ({"ImagerPixelSpacing": [0.14, 0.15]}, (0.15, 0.14, 1), "detector plane"),
        ({"PixelSpacing": [0.2, 0.3], "ImagerPixelSpacing": [0.14, 0.15]}, (0.3, 0.2, 1), None),
        ({"PixelAspectRatio": [2, 1]}, (1, 2, 1), "no pixel spacing"),
        ({}, (1, 1, 1), "no pixel spacing"),
    ],
)
def test_radiograph_has_a_size_but_no_place(tmp_path, notes, edit, spacing, words):
    def change(ds, k):
        for keyword, value in edit.items():
            setattr(ds, keyword, value)

    factory.radiograph(tmp_path, PICTURE, edit=change)
    scan = read(tmp_path)
    np.testing.assert_array_equal(scan.voxels[0, :, :, 0], PICTURE.T)
    np.testing.assert_allclose(scan.grid.lps, np.diag([*spacing, 1]))
    assert scan.header.space == 0
    assert scan.is_planar
    assert (not notes) if words is None else all(words in note for note in notes)


def test_radiograph_polarity(tmp_path):
    factory.radiograph(tmp_path, PICTURE, edit=lambda ds, k: setattr(ds, "PhotometricInterpretation", "MONOCHROME1"))
    stored = read(tmp_path)
    np.testing.assert_array_equal(stored.voxels[0, :, :, 0], PICTURE.T)
    assert stored.header.photometric == "MONOCHROME1"
    turned = read(tmp_path, polarity="normalise")
    np.testing.assert_array_equal(turned.voxels[0, :, :, 0], 4095 - PICTURE.T)
    assert turned.header.photometric == "MONOCHROME2"
    assert turned.voxels.dtype == np.uint16


def test_polarity_turns_padding_with_the_picture(tmp_path):
    def edit(ds, k):
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.add_new("PixelPaddingValue", "US", 0)

    factory.radiograph(tmp_path, PICTURE, edit=edit)
    scan = read(tmp_path, polarity="normalise")
    assert scan.header.padding == 4095
    assert np.argwhere(~scan.valid).tolist() == [[0, 0, 0]]
    assert scan.voxels[0, 0, 0, 0] == 4095


def test_a_film_is_no_volume(tmp_path):
    def edit(ds, k):
        ds.NumberOfFrames = 3
        factory.pixels(ds, np.zeros((3, 5, 7)))

    factory.radiograph(tmp_path, PICTURE, edit=edit)
    with pytest.raises(GeometryError, match="3 frames"):
        read(tmp_path)


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_uncompressed_encodings(tmp_path, syntax):
    truth = factory.series(tmp_path, edit=lambda ds, k: factory.recode(ds, syntax))
    scan = read(tmp_path)
    np.testing.assert_array_equal(hu(scan), truth.hu)
    assert scan.voxels.dtype.isnative


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("signed", [False, True])
def test_compressed_encodings(tmp_path, syntax, signed):
    smooth = np.cumsum(factory.hounsfield(3, 32, 40) // 60, axis=2)
    smooth = np.clip(smooth - smooth.mean(), -900, 900).astype(int)

    def edit(ds, k):
        if signed:
            factory.pixels(ds, smooth[k], signed=True)
            ds.RescaleIntercept = 0
        ds.compress(syntax)

    truth = factory.series(tmp_path, hu=smooth, edit=edit)
    scan = read(tmp_path)
    np.testing.assert_array_equal(hu(scan), truth.hu)
    assert not scan.header.lossy


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1])
def test_lossless_jpeg_needs_nothing_extra(tmp_path, signed, syntax):
    def edit(ds, k):
        stored = factory.hounsfield()[k] - (0 if signed else factory.INTERCEPT)
        factory.pixels(ds, stored, signed=signed)
        ds.RescaleIntercept = 0 if signed else factory.INTERCEPT
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate([factory.lossless_jpeg(stored)])
        ds["PixelData"].VR = "OB"

    truth = factory.series(tmp_path, hu=factory.hounsfield()[:3], edit=edit)
    scan = read(tmp_path)
    np.testing.assert_array_equal(hu(scan), truth.hu)
    assert scan.voxels.dtype == (np.int16 if signed else np.uint16)
    assert not scan.header.lossy


def test_compressed_frames_of_one_file(tmp_path):
    from pydicom import dcmread

    truth = factory.enhanced_ct(tmp_path, hu=factory.hounsfield(4), order=[2, 0, 3, 1])
    ds = dcmread(truth.files[0])
    ds.compress(RLELossless)
    ds.save_as(truth.files[0])
    np.testing.assert_array_equal(hu(read(tmp_path)), truth.hu)


def test_eight_bits(tmp_path):
    def edit(ds, k):
        factory.pixels(ds, (factory.hounsfield()[k] + 1000) // 5, bits=8)
        ds.RescaleSlope, ds.RescaleIntercept = 5, -1000

    truth = factory.series(tmp_path, edit=edit)
    scan = read(tmp_path)
    assert scan.voxels.dtype == np.uint8
    np.testing.assert_array_equal(hu(scan), (truth.hu + 1000) // 5 * 5 - 1000)


def test_a_lookup_table_takes_the_place_of_the_slope(tmp_path):
    table = (np.arange(1100) ** 2 // 40).astype("<u2")

    def edit(ds, k):
        for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
            del ds[keyword]
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [len(table), 20, 16])
        item.ModalityLUTType = "OD"
        item.add_new("LUTData", "OW", table.tobytes())
        ds.ModalityLUTSequence = Items([item])

    truth = factory.series(tmp_path, edit=edit)
    scan = read(tmp_path)
    stored = truth.hu + 1024
    np.testing.assert_array_equal(scan.voxels[0], table[np.clip(stored - 20, 0, len(table) - 1)])
    assert (scan.scale.slope, scan.scale.intercept) == (1, 0)


def mapping(slope, first, last):
    def edit(ds, k):
        item, unit = Dataset(), Dataset()
        item.RealWorldValueSlope, item.RealWorldValueIntercept = slope, 2.5
        item.add_new("RealWorldValueFirstValueMapped", "US", first)
        item.add_new("RealWorldValueLastValueMapped", "US", last)
        unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = "1/s", "UCUM", "per second"
        item.MeasurementUnitsCodeSequence = Items([unit])
        ds.RealWorldValueMappingSequence = Items([item])

    return edit


def test_real_world_values_only_when_asked_for(tmp_path):
    truth = factory.series(tmp_path, edit=mapping(0.25, 100, 4095))
    np.testing.assert_array_equal(hu(read(tmp_path)), truth.hu)
    scan = read(tmp_path, real_world=True)
    stored = truth.hu + 1024
    assert scan.scale.unit == "1/s"
    np.testing.assert_allclose(hu(scan), stored * 0.25 + 2.5)
    np.testing.assert_array_equal(scan.valid, stored >= 100)


def test_real_world_values_that_are_not_there(tmp_path):
    factory.series(tmp_path)
    with pytest.raises(UnreadableScan, match="Real World Value Mapping"):
        read(tmp_path, real_world=True)


@pytest.mark.parametrize(("slope", "error"), [("0", UnreadableScan), ("nan", UnreadableScan), ("x", UnreadableScan)])
def test_impossible_slopes(tmp_path, slope, error):
    truth = factory.series(tmp_path, edit=lambda ds, k: setattr(ds, "RescaleSlope", "999.5"))
    for path in truth.files:
        path.write_bytes(path.read_bytes().replace(b"999.5 ", slope.encode().ljust(6)))
    with pytest.raises(error, match=r"000\.dcm.*[Ss]lope"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("image_type", "rescale_type", "energies", "unit"),
    [
        ("ORIGINAL PRIMARY AXIAL", None, None, "HU"),
        ("ORIGINAL PRIMARY AXIAL", "HU", None, "HU"),
        ("ORIGINAL PRIMARY AXIAL", "US", None, "HU"),  # originals shall be in HU, whatever a writer's label says
        ("ORIGINAL PRIMARY AXIAL", "US", "NO", "HU"),
        ("ORIGINAL PRIMARY AXIAL", "US", "YES", ""),
        ("ORIGINAL PRIMARY AXIAL", "HU", "YES", "HU"),
        ("ORIGINAL PRIMARY LOCALIZER", "US", None, ""),
        ("DERIVED SECONDARY AXIAL", None, None, "HU"),
        ("DERIVED SECONDARY AXIAL", "US", None, ""),
        ("DERIVED SECONDARY AXIAL", "Z_EFF", None, ""),
    ],
)
def test_which_ct_is_in_hounsfield_units(tmp_path, image_type, rescale_type, energies, unit):
    def edit(ds, k):
        ds.ImageType = image_type.split()
        del ds.RescaleType
        if rescale_type:
            ds.RescaleType = rescale_type
        if energies:
            ds.MultienergyCTAcquisition = energies

    factory.series(tmp_path, edit=edit)
    assert read(tmp_path).scale.unit == unit


@pytest.mark.parametrize(
    ("frame_type", "rescale_type", "unit"),
    [
        ("ORIGINAL PRIMARY VOLUME NONE", "US", "HU"),
        ("ORIGINAL PRIMARY VOLUME NONE", None, "HU"),
        ("DERIVED PRIMARY PERFUSION RCBF", "HU", "HU"),
        ("DERIVED PRIMARY PERFUSION RCBF", "US", ""),
        ("DERIVED PRIMARY PERFUSION RCBF", None, ""),
    ],
)
def test_which_enhanced_ct_is_in_hounsfield_units(tmp_path, frame_type, rescale_type, unit):
    path = factory.enhanced_ct(tmp_path).files[0]
    ds = dcmread(path)
    ds.ImageType, kind = ["MIXED", "PRIMARY", "VOLUME", "NONE"], Dataset()
    kind.FrameType = frame_type.split()
    shared = ds.SharedFunctionalGroupsSequence[0]
    shared.CTImageFrameTypeSequence = Items([kind])
    del shared.PixelValueTransformationSequence[0].RescaleType
    if rescale_type:
        shared.PixelValueTransformationSequence[0].RescaleType = rescale_type
    ds.save_as(path)
    assert read(tmp_path).scale.unit == unit


def test_units_differ_inside_a_series(tmp_path):
    factory.series(tmp_path, edit=lambda ds, k: setattr(ds, "RescaleType", "HU" if k else "OD"))
    with pytest.raises(InconsistentSeries, match="unit"):
        read(tmp_path)


def test_header(tmp_path):
    def edit(ds, k):
        if k == 11:
            ds.add_new(0x0008001C, "CS", "YES")
            ds.LossyImageCompression = "01"

    factory.series(tmp_path, edit=edit)
    header = read(tmp_path).header
    assert header.modality == "CT"
    assert header.body_part == "CHEST"
    assert header.synthetic
    assert header.lossy
    assert header.space == 1
    assert header.channels == ()


def test_body_part_that_is_no_code_is_not_passed_on(tmp_path):
    factory.series(tmp_path, edit=lambda ds, k: ds.add_new("BodyPartExamined", "LO", "Knee of Mr CANARY^PHI"))
    assert read(tmp_path).header.body_part == ""


# -- colour --------------------------------------------------------------------------------------------


def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3))


def test_colour_is_refused_unless_asked_for(tmp_path):
    factory.radiograph(tmp_path, PICTURE, edit=lambda ds, k: factory.pixels(ds, colours(), bits=8))
    with pytest.raises(UnreadableScan, match=r"cr\.dcm.*RGB.*colour"):
        read(tmp_path)
    scan = read(tmp_path, colour=True)
    np.testing.assert_array_equal(scan.voxels[..., 0], colours().transpose(2, 1, 0))
    assert scan.header.channels == ("red", "green", "blue")
    assert scan.header.photometric == "RGB"


def test_colour_by_plane(tmp_path):
    def edit(ds, k):
        factory.pixels(ds, colours(), bits=8)
        ds.PlanarConfiguration = 1
        ds.PixelData = colours().transpose(2, 0, 1).astype(np.uint8).tobytes()

    factory.radiograph(tmp_path, PICTURE, edit=edit)
    np.testing.assert_array_equal(read(tmp_path, colour=True).voxels[..., 0], colours().transpose(2, 1, 0))


def test_sixteen_bits_of_colour_stay_sixteen(tmp_path):
    factory.radiograph(tmp_path, PICTURE, edit=lambda ds, k: factory.pixels(ds, colours() * 257, bits=16))
    np.testing.assert_array_equal(read(tmp_path, colour=True).voxels[..., 0], colours().transpose(2, 1, 0) * 257)


def test_luminance_and_chrominance_become_rgb(tmp_path):
    grey = np.repeat(colours()[..., :1], 3, axis=2)
    stored = grey.copy()
    stored[..., 1:] = 128

    def edit(ds, k):
        factory.pixels(ds, stored, bits=8)
        ds.PhotometricInterpretation = "YBR_FULL"

    factory.radiograph(tmp_path, PICTURE, edit=edit)
    np.testing.assert_array_equal(read(tmp_path, colour=True).voxels[..., 0], grey.transpose(2, 1, 0))


def test_palette(tmp_path):
    red, green, blue = np.arange(256), 255 - np.arange(256), np.arange(256) // 2
    index = colours()[..., 0]

    def edit(ds, k):
        factory.pixels(ds, index, bits=8, photometric="PALETTE COLOR")
        for name, table in (("Red", red), ("Green", green), ("Blue", blue)):
            ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
            ds.add_new(f"{name}PaletteColorLookupTableData", "OW", (table * 257).astype("<u2").tobytes())

    factory.radiograph(tmp_path, PICTURE, edit=edit)
    with pytest.raises(UnreadableScan, match="PALETTE COLOR"):
        read(tmp_path)
    scan = read(tmp_path, colour=True)
    np.testing.assert_array_equal(
        scan.voxels[..., 0], np.stack([red[index], green[index], blue[index]]).transpose(0, 2, 1)
    )


# -- manners -------------------------------------------------------------------------------------------


def test_a_missing_decoder_is_named_with_the_way_to_install_it(tmp_path, monkeypatch):
    factory.series(tmp_path, hu=factory.hounsfield(1), edit=lambda ds, k: ds.compress(JPEGLSLossless))

    class Without:
        available_plugins = ()

    monkeypatch.setattr("pydicom.pixels.get_decoder", lambda syntax: Without())
    with pytest.raises(UnreadableScan) as caught:
        read(tmp_path)
    for words in ("000.dcm", JPEGLSLossless, "pip install"):
        assert words in str(caught.value)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_pixels_of_another_size_than_the_header_says(tmp_path, syntax):
    def edit(ds, k):
        ds.compress(syntax)
        ds.Rows = 4000
        ds.Columns = 5000

    factory.series(tmp_path, hu=factory.hounsfield(1, 64, 80), edit=edit)
    with pytest.raises(UnreadableScan, match=r"000\.dcm"):
        read(tmp_path)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
def test_a_codestream_that_was_cut_is_not_filled_up(tmp_path, syntax):
    """Cut inside its fragment, so that only the stream itself can tell."""
    from pydicom.encaps import generate_frames

    def edit(ds, k):
        ds.compress(syntax)
        (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
        ds.PixelData = encapsulate([frame[: len(frame) * 3 // 4]])

    factory.series(tmp_path, hu=factory.hounsfield(1, 64, 80), edit=edit)
    with pytest.raises(UnreadableScan, match=r"000\.dcm.*truncated"):
        read(tmp_path)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_damaged_codestreams_give_a_typed_error_or_the_same_shape(tmp_path, syntax):
    truth = factory.series(tmp_path, hu=factory.hounsfield(1, 64, 80), edit=lambda ds, k: ds.compress(syntax))
    content = truth.files[0].read_bytes()
    start = content.rindex(b"\xe0\x7f\x10\x00O")
    rng = np.random.default_rng(1)
    for _ in range(40):
        changed = bytearray(content)
        for at in rng.integers(start, len(content), 4):
            changed[at] = rng.integers(0, 256)
        truth.files[0].write_bytes(bytes(changed))
        try:
            assert read(tmp_path).voxels.shape == (1, 80, 64, 1)
        except DataError as error:
            assert "000.dcm" in str(error)  # noqa: PT017 - either outcome is right


def test_damaged_lossless_jpeg_gives_a_typed_error_and_the_process_lives(tmp_path):
    stored = factory.hounsfield(1)[0] - factory.INTERCEPT

    def edit(ds, k):
        ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        ds.PixelData = encapsulate([factory.lossless_jpeg(stored)])
        ds["PixelData"].VR = "OB"

    truth = factory.series(tmp_path, hu=factory.hounsfield(1), edit=edit)
    content = truth.files[0].read_bytes()
    start = content.rindex(b"\xff\xd8")
    rng = np.random.default_rng(2)
    for _ in range(60):
        changed = bytearray(content)
        for at in rng.integers(start, start + 90, 2):
            changed[at] = rng.integers(0, 256)
        truth.files[0].write_bytes(bytes(changed))
        try:
            assert read(tmp_path).voxels.shape == (1, 30, 24, 1)
        except DataError as error:
            assert "000.dcm" in str(error)  # noqa: PT017 - either outcome is right


def test_pydicom_stays_as_it_was():
    code = """
import logging, sys, warnings
warnings.simplefilter("error")
from pydicom import config
state = lambda: (config.settings.reading_validation_mode, config.settings.writing_validation_mode)
before = state()
import medgen.io.dicom.read
assert state() == before
heavy = {"torch", "monai", "SimpleITK"} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
