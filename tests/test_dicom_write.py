"""DICOM series as others see them: validators find no fault, readers find every voxel where it belongs."""

import itertools
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from validators import assert_conforms, assert_same_places, by_dcm2niix, by_simpleitk

from medgen.errors import ConfigError, DataError, GeometryError, OutputError, UnreadableScan
from medgen.grid import Grid
from medgen.io import read
from medgen.io.dicom.pixels import store
from medgen.io.dicom.write import Provenance, write_series
from medgen.scan import Header, Scale, Scan

SAMPLED = Provenance("Sampled from a model", model="vae3d", weights_sha256="ab" * 32, seed=7, content="synthetic")
COPIED = Provenance("Converted from another format", content="copy")
OBLIQUE = np.array([[0.9, 0.1, 0.2, -40.5], [-0.1, 0.95, 0.15, 12.25], [-0.2, -0.1, 0.97, 7.125], [0, 0, 0, 1.0]])
ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def oriented(
    order: tuple[int, ...], signs: tuple[int, ...], spacing: tuple[float, ...] = (0.8, 1.1, 2.7)
) -> np.ndarray:
    """An oblique affine whose voxel axes run along `order`, forwards or backwards."""
    turned, _ = np.linalg.qr(OBLIQUE[:3, :3])
    turned = turned * np.sign(np.diag(turned))
    affine = np.eye(4)
    affine[:3, :3] = turned @ (np.eye(3)[:, list(order)] * signs) * spacing
    affine[:3, 3] = OBLIQUE[:3, 3]
    return affine


def numbered(affine: np.ndarray, modality: str = "MR", shape: tuple[int, ...] = (5, 4, 3), **header: object) -> Scan:
    """A scan in which every voxel holds another number."""
    voxels = np.random.default_rng(0).permutation(np.prod(shape)).astype(np.int16).reshape(1, *shape)
    unit = "HU" if modality == "CT" else ""
    return Scan(voxels, Grid(shape, affine), Scale(unit=unit), Header(modality, "CHEST", **header))


def drawn(modality: str, unit: str = "", shape: tuple[int, ...] = (9, 7, 3), spread: float = 300.0) -> Scan:
    """A scan of random float32 values."""
    voxels = np.random.default_rng(1).normal(50, spread, (1, *shape)).astype(np.float32)
    return Scan(voxels, Grid(shape, oriented((0, 1, 2), (-1, -1, 1))), Scale(unit=unit), Header(modality, "CHEST"))


def read_back(files: list[Path]) -> np.ndarray:
    """Physical values (i, j, k) by pydicom alone, in file order: Modality LUT, else Real World Value Mapping."""
    planes = []
    for file in files:
        ds = pydicom.dcmread(file)
        slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
        if "RealWorldValueMappingSequence" in ds:
            item = ds.RealWorldValueMappingSequence[0]
            slope, intercept = item.RealWorldValueSlope, item.RealWorldValueIntercept
        planes.append(ds.pixel_array.T.astype(np.float64) * slope + intercept)
    return np.stack(planes, axis=-1)


# -- conformance -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modality", "unit", "body_part"),
    [
        ("CT", "HU", "CHEST"),
        ("CT", "", ""),
        ("MR", "", "BRAIN"),
        ("MR", "", ""),
        ("PT", "Bq/ml", "CHEST"),
        ("", "", "KNEE"),
    ],
)
def test_validators_find_no_fault(tmp_path, modality, unit, body_part):
    for spread in (300.0, 0.3):
        scan = drawn(modality, unit, spread=spread).with_header(body_part=body_part)
        assert_conforms(write_series(scan, tmp_path / str(spread), provenance=SAMPLED))


@pytest.mark.parametrize("header", [{"lossy": True}, {"synthetic": True}, {"photometric": "MONOCHROME1"}])
@pytest.mark.parametrize("modality", ["CT", "MR", "DX"])
def test_validators_find_no_fault_with_every_mark(tmp_path, modality, header):
    files = write_series(drawn(modality).with_header(**header), tmp_path / "out", provenance=COPIED)
    assert_conforms(files)


@pytest.mark.parametrize("part", ["BREAST", "KNEE", "NECK", "WHOLEBODY", "SPINE", "EYE", "HEADNECK", "not a part"])
def test_validators_accept_paired_and_single_body_parts(tmp_path, part):
    assert_conforms(write_series(drawn("MR").with_header(body_part=part), tmp_path / "out", provenance=SAMPLED))


def test_mr_has_no_modality_lut_and_says_its_scale_elsewhere(tmp_path):
    files = write_series(drawn("MR", spread=0.3), tmp_path / "out", provenance=SAMPLED)
    ds = pydicom.dcmread(files[0])
    assert "RescaleSlope" not in ds
    assert "RescaleIntercept" not in ds
    assert ds.PixelRepresentation == 0
    assert ds.pixel_array.max() <= 32767
    assert len(ds.RealWorldValueMappingSequence) == 1


def test_marks_tell_machines_and_people(tmp_path):
    ds = pydicom.dcmread(write_series(drawn("CT", "HU"), tmp_path / "out", provenance=SAMPLED)[0])
    assert ds[0x0008, 0x001C].value == "YES"
    assert ds.ContentQualification == "RESEARCH"
    assert ds.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
    assert ds.SeriesDescription.startswith("SYNTHETIC")
    assert ds.ImageComments.startswith("SYNTHETIC")
    assert "not for diagnostic use" in ds.DerivationDescription
    assert ds.SeriesNumber >= 9000
    assert ds.BurnedInAnnotation == "NO"
    assert ds.RecognizableVisualFeatures == "NO"
    made_by = ds.ContributingEquipmentSequence[0]
    assert made_by.PurposeOfReferenceCodeSequence[0].CodeValue == "109100"
    assert "ab" * 32 in made_by.ContributionDescription
    assert "seed 7" in made_by.ContributionDescription
    assert not ds.Manufacturer.upper().startswith(("ME", "GE", "SI", "PH"))
    assert ds.preamble == b"\0" * 128
    assert ds.file_meta.ImplementationClassUID.startswith("2.25.")
    assert "SourceImageSequence" not in ds


def test_a_copy_is_not_called_synthetic(tmp_path):
    ds = pydicom.dcmread(write_series(drawn("CT", "HU"), tmp_path / "a", provenance=COPIED)[0])
    assert "SyntheticData" not in ds
    assert ds.ContributingEquipmentSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    assert not ds.SeriesDescription.startswith(("SYNTHETIC", "AI"))
    again = drawn("CT", "HU").with_header(synthetic=True, lossy=True)
    ds = pydicom.dcmread(write_series(again, tmp_path / "b", provenance=COPIED)[0])
    assert ds.SyntheticData == "YES"
    assert ds.SeriesDescription.startswith("SYNTHETIC")
    assert ds.LossyImageCompression == "01"


@pytest.mark.parametrize(
    ("content", "part", "features"),
    [("copy", "BRAIN", "YES"), ("copy", "", "YES"), ("copy", "CHEST", "NO"), ("synthetic", "BRAIN", "NO")],
)
def test_faces_are_announced(tmp_path, content, part, features):
    made = Provenance("x", content=content)
    files = write_series(drawn("MR").with_header(body_part=part), tmp_path / "out", provenance=made)
    assert pydicom.dcmread(files[0]).RecognizableVisualFeatures == features


def test_decimal_strings_fit_in_sixteen_bytes(tmp_path):
    affine = oriented((0, 1, 2), (1, 1, 1), (1 / 3, 2 / 3, math.pi))
    affine[:3, 3] = [-1000 / 3, 1e-7 / 3, 2000 / 7]
    voxels = np.random.default_rng(0).normal(0, 1 / 3, (1, 4, 4, 3)).astype(np.float32)
    scan = Scan(voxels, Grid((4, 4, 3), affine), Scale(1 / 3, -1 / 7), Header("PT", "CHEST"))
    for file in write_series(scan, tmp_path / "out", provenance=SAMPLED):
        for element in pydicom.dcmread(file):
            if element.VR == "DS":
                for value in element.value if element.VM > 1 else [element.value]:
                    assert value is None or len(str(value)) <= 16, element.keyword


def test_long_and_hostile_words_stay_valid(tmp_path):
    made = Provenance("Grösse \\ " + "many words " * 200 + "\n\0", model="m" * 2000, seed=2**70)
    assert_conforms(write_series(drawn("MR"), tmp_path / "out", provenance=made, name="a\\b\n" + "c" * 90))


# -- places ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_simpleitk_finds_every_voxel_in_all_48_orientations(tmp_path, order, signs):
    affine = oriented(order, signs)
    scan = numbered(affine, "CT" if signs[0] > 0 else "MR")
    files = write_series(scan, tmp_path / "out", provenance=SAMPLED)
    assert_same_places(by_simpleitk(files), scan.voxels[0], affine)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS[::7])
@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_dcm2niix_finds_every_voxel(tmp_path, order, signs, modality):
    affine = oriented(order, signs)
    scan = numbered(affine, modality)
    files = write_series(scan, tmp_path / "out", provenance=SAMPLED)
    assert_same_places(by_dcm2niix(tmp_path / "out", tmp_path / "nii"), scan.voxels[0], affine)
    assert_same_places(by_simpleitk(files), scan.voxels[0], affine)


@settings(max_examples=40, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-math.pi, math.pi)] * 3),
    spacing=st.tuples(*[st.floats(0.05, 20)] * 3),
    origin=st.tuples(*[st.floats(-900, 900)] * 3),
)
def test_simpleitk_finds_every_voxel_of_any_oblique_grid(tmp_path_factory, angles, spacing, origin):
    affine = np.eye(4)
    for axis, angle in enumerate(angles):
        turn, (i, j) = np.eye(4), [n for n in range(3) if n != axis]
        turn[i, i], turn[i, j] = math.cos(angle), -math.sin(angle)
        turn[j, i], turn[j, j] = math.sin(angle), math.cos(angle)
        affine = turn @ affine
    affine[:3, :3] *= spacing
    affine[:3, 3] = origin
    scan = numbered(affine, "MR")
    files = write_series(scan, tmp_path_factory.mktemp("oblique") / "out", provenance=SAMPLED)
    assert_same_places(by_simpleitk(files), scan.voxels[0], affine)


def test_the_slight_tilt_readers_forgive_is_kept(tmp_path):
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[0, 2] = 0.003
    scan = numbered(affine)
    write_series(scan, tmp_path / "out", provenance=SAMPLED)
    back = read(tmp_path / "out")
    np.testing.assert_array_equal(back.onto(scan.grid, outside=-1).voxels, scan.voxels)
    np.testing.assert_allclose(np.sort(back.grid.corners(), axis=0), np.sort(scan.grid.corners(), axis=0), atol=1e-6)


def test_single_slices_keep_their_place(tmp_path):
    affine = oriented((1, 2, 0), (1, -1, 1))
    for modality in ("CT", "MR"):
        scan = numbered(affine, modality, (6, 5, 1))
        files = write_series(scan, tmp_path / modality, provenance=SAMPLED)
        assert_conforms(files)
        assert_same_places(by_simpleitk(files), scan.voxels[0], affine)
        assert_same_places(by_dcm2niix(tmp_path / modality, tmp_path / f"n{modality}"), scan.voxels[0], affine)


@pytest.mark.parametrize("modality", ["DX", "MG", ""])
def test_planar_pictures_keep_rows_columns_and_spacing(tmp_path, modality):
    grid = Grid.from_lps((6, 5, 1), np.diag([0.2, 0.15, 1.0, 1.0]))
    scan = Scan(np.arange(30, dtype=np.int16).reshape(1, 6, 5, 1), grid, Scale(), Header(modality, "CHEST"))
    files = write_series(scan, tmp_path / "out", provenance=SAMPLED)
    assert_conforms(files)
    ds = pydicom.dcmread(files[0])
    assert ds.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
    assert "ImagePositionPatient" not in ds
    np.testing.assert_array_equal(ds.pixel_array, scan.voxels[0, :, :, 0].T)
    values, affine = by_simpleitk(files)
    np.testing.assert_array_equal(values.reshape(6, 5), scan.voxels[0, :, :, 0])
    np.testing.assert_allclose(np.abs(np.diag(affine))[:2], [0.2, 0.15])


def test_customary_view_shows_the_patient_from_the_feet_and_from_the_front(tmp_path):
    for codes, rows_columns in {
        "RAS": [1, 0, 0, 0, 1, 0],
        "LPI": [1, 0, 0, 0, 1, 0],
        "ASR": [0, 1, 0, 0, 0, -1],
        "RIA": [1, 0, 0, 0, 0, -1],
    }.items():
        grid = Grid((4, 5, 6), np.diag([-1.0, -1.0, 1.0, 1.0])).reorient(codes)
        scan = Scan(np.zeros((1, *grid.shape), np.int16), grid, header=Header("MR"))
        ds = pydicom.dcmread(write_series(scan, tmp_path / codes, provenance=SAMPLED)[0])
        assert [round(float(x), 6) for x in ds.ImageOrientationPatient] == rows_columns


def test_slices_follow_the_normal(tmp_path):
    for order, signs in ORIENTATIONS:
        folder = tmp_path / f"{order}{signs}"
        files = write_series(numbered(oriented(order, signs)), folder, provenance=SAMPLED)
        heights = []
        for file in files:
            ds = pydicom.dcmread(file, stop_before_pixels=True)
            cosines = np.array(ds.ImageOrientationPatient, float)
            heights.append(np.cross(cosines[:3], cosines[3:]) @ np.array(ds.ImagePositionPatient, float))
        assert (np.diff(heights) > 0).all()


def test_sheared_grids_are_refused_with_a_way_out(tmp_path):
    for axis in (1, 2):
        affine = np.diag([1.0, 1.0, 2.0, 1.0])
        affine[0, axis] = 0.05
        with pytest.raises(GeometryError, match="onto"):
            write_series(numbered(affine), tmp_path / "out", provenance=SAMPLED)
    assert list(tmp_path.iterdir()) == []


def test_unknown_orientation_is_refused_for_volumes_of_a_body(tmp_path):
    with pytest.raises(GeometryError, match="left from right"):
        write_series(numbered(np.eye(4), "MR", space=0), tmp_path / "out", provenance=SAMPLED)
    files = write_series(numbered(np.eye(4), "", space=0), tmp_path / "out", provenance=SAMPLED)
    assert "ImagePositionPatient" not in pydicom.dcmread(files[0])
    assert_conforms(files)


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, bool])
@pytest.mark.parametrize("modality", ["CT", "MR", "DX"])
def test_whole_numbers_are_stored_as_they_are(tmp_path, dtype, modality):
    ends = (0, 1) if dtype is bool else (-32768, 32767) if np.dtype(dtype).kind != "u" else (0, 65535)
    if np.dtype(dtype).itemsize == 1 and dtype is not bool:
        ends = (np.iinfo(dtype).min, np.iinfo(dtype).max)
    voxels = np.array([*ends, 0, 1], dtype).reshape(1, 2, 2, 1)
    scan = Scan(voxels, Grid.from_lps((2, 2, 1), np.eye(4)), Scale(2.5, -7.0, "HU"), Header(modality, "CHEST"))
    files = write_series(scan, tmp_path / "out", provenance=COPIED)
    ds = pydicom.dcmread(files[0])
    np.testing.assert_array_equal(ds.pixel_array, voxels[0, :, :, 0].T.astype(np.int64))
    np.testing.assert_array_equal(read_back(files), scan.physical()[0])
    assert_conforms(files)


def test_int16_stays_signed_and_source_scale_stays(tmp_path):
    scan = numbered(np.eye(4), "CT").with_voxels(numbered(np.eye(4)).voxels, scale=Scale(0.5, -1024, "HU"))
    ds = pydicom.dcmread(write_series(scan, tmp_path / "out", provenance=COPIED)[0])
    assert (ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept) == (1, 0.5, -1024)


FLOATS = hnp.arrays(
    np.float32,
    st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    elements=st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-3000, 3000, width=32) | st.floats(0, 1, width=32),
)


@settings(max_examples=300, deadline=None)
@given(voxels=FLOATS, rule=st.sampled_from(["ct", "mr", "other"]), unit=st.sampled_from(["HU", ""]))
def test_quantising_is_never_off_by_more_than_half_a_step(voxels, rule, unit):
    scan = Scan(voxels, Grid(voxels.shape[1:], np.eye(4)), Scale(unit=unit))
    stored = store(scan, 0, rule)
    decoded = stored.values.astype(np.float64) * stored.scale.slope + stored.scale.intercept
    # Slope and intercept are written with sixteen characters, which with a sign and an exponent leaves ten digits.
    allowed = abs(stored.scale.slope) / 2 + 1e-6 * np.ptp(voxels.astype(np.float64)) + 2e-10 * np.abs(voxels).max()
    assert np.abs(decoded - voxels[0].astype(np.float64)).max() <= allowed


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(voxels=FLOATS, modality=st.sampled_from(["CT", "MR", "PT"]))
def test_files_hold_what_was_quantised(tmp_path_factory, voxels, modality):
    shape = voxels.shape[1:]
    scan = Scan(voxels, Grid.from_lps(shape, np.eye(4)), Scale(unit="HU"), Header(modality, "CHEST"))
    files = write_series(scan, tmp_path_factory.mktemp("q") / "out", provenance=SAMPLED)
    rule = {"CT": "ct", "MR": "mr"}.get(modality, "other")
    stored = store(scan, 0, rule)
    expected = stored.values.astype(np.float64) * stored.scale.slope + stored.scale.intercept
    np.testing.assert_allclose(read_back(files), expected, rtol=1e-9, atol=0)


def test_sixteen_bits_reach_half_a_step_over_their_whole_range():
    voxels = np.linspace(-4.7, 4.71, 60, dtype=np.float32).reshape(1, 5, 4, 3)
    stored = store(Scan(voxels, Grid((5, 4, 3), np.eye(4))), 0, "other")
    assert stored.scale.slope == pytest.approx(9.41 / 65534, rel=1e-4)


def test_hounsfield_units_become_whole_numbers_from_minus_1024():
    voxels = np.array([-1000.3, 0.2, 1500.4, 40.0], np.float32).reshape(1, 2, 2, 1)
    stored = store(Scan(voxels, Grid((2, 2, 1), np.eye(4)), Scale(unit="HU")), 0, "ct")
    assert (stored.scale.slope, stored.scale.intercept) == (1.0, -1024.0)
    assert stored.values.ravel().tolist() == [24, 1024, 2524, 1064]


def test_network_values_go_back_to_the_source_intensities_in_mr():
    voxels = np.array([0.0, 0.25, 0.5001, 1.0], np.float32).reshape(1, 2, 2, 1)
    stored = store(Scan(voxels, Grid((2, 2, 1), np.eye(4)), Scale(1200.0, 0.0)), 0, "mr")
    assert stored.values.dtype == np.uint16
    assert stored.values.ravel().tolist() == [0, 300, 600, 1200]
    assert (stored.scale.slope, stored.scale.intercept) == (1.0, 0.0)


@pytest.mark.parametrize("value", [0.0, 3.7, -1e-20, 1e20])
@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_constant_scans_are_written(tmp_path, value, modality):
    scan = Scan(
        np.full((1, 3, 3, 2), value, np.float32),
        Grid((3, 3, 2), np.eye(4)),
        Scale(unit="HU"),
        Header(modality, "CHEST"),
    )
    files = write_series(scan, tmp_path / "out", provenance=SAMPLED)
    assert_conforms(files)
    assert np.abs(read_back(files) - np.float64(np.float32(value))).max() <= max(0.5, 1e-7 * abs(value))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_measured_voxels_must_be_finite(tmp_path, bad):
    scan = drawn("MR")
    voxels = scan.voxels.copy()
    voxels[0, 1, 1, 2] = bad
    with pytest.raises(DataError, match="slice"):
        write_series(scan.with_voxels(voxels), tmp_path / "out", provenance=SAMPLED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("spread", [300.0, 0.3])
def test_unmeasured_voxels_become_padding(tmp_path, modality, spread):
    scan = drawn(modality, "HU", spread=spread)
    valid = np.random.default_rng(2).random(scan.grid.shape) > 0.3
    voxels = np.where(valid, scan.voxels, np.nan)
    holed = Scan(voxels, scan.grid, scan.scale, scan.header, valid=valid)
    files = write_series(holed, tmp_path / "out", provenance=SAMPLED)
    assert_conforms(files)
    for k, file in enumerate(files):
        ds = pydicom.dcmread(file)
        np.testing.assert_array_equal(ds.PixelPaddingValue == ds.pixel_array.T, ~valid[:, :, k])
    decoded = read_back(files)
    slope = float(ds.get("RescaleSlope", 0)) or (
        ds.RealWorldValueMappingSequence[0].RealWorldValueSlope if "RealWorldValueMappingSequence" in ds else 1.0
    )
    assert np.abs(decoded - voxels[0])[valid].max() <= slope / 2 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("values", "padding", "expected"),
    [
        ([-1000, 40, 3000, 7], -2000.0, -2000),
        ([0, 40, 3000, 7], 40.0, -1),
        ([0, 40, 65535, 7], None, 1),
        ([0, 40, 60000, 7], None, 60001),
        ([-32768, 40, 32767, 7], None, -32767),
        ([5, 40, 65535, 7], None, 4),
    ],
)
def test_padding_is_a_value_no_measured_voxel_has(values, padding, expected):
    dtype = np.int16 if min(values) < 0 else np.uint16
    voxels = np.array([*values, 9, 9], dtype).reshape(1, 3, 2, 1)
    valid = np.array([True] * 4 + [False] * 2).reshape(3, 2, 1)
    scan = Scan(voxels, Grid((3, 2, 1), np.eye(4)), header=Header("CT", padding=padding), valid=valid)
    stored = store(scan, 0, "ct")
    assert stored.padding == expected
    assert stored.values[valid].tolist() == values
    assert (stored.values[~valid] == expected).all()


def test_no_value_left_for_padding_is_an_error():
    voxels = np.arange(65536, dtype=np.uint16).reshape(1, 256, 256, 1).copy()
    voxels = np.concatenate([voxels, voxels[:, :1]], axis=1)
    valid = np.ones((257, 256, 1), bool)
    valid[256] = False
    with pytest.raises(DataError, match="65536"):
        store(Scan(voxels, Grid((257, 256, 1), np.eye(4)), valid=valid), 0, "ct")


def test_window_holds_the_middle_98_percent(tmp_path):
    scan = drawn("MR", spread=300.0)
    ds = pydicom.dcmread(write_series(scan, tmp_path / "mr", provenance=SAMPLED)[0])
    low, high = np.percentile(scan.voxels, [1, 99])
    assert ds.WindowCenter == pytest.approx((low + high) / 2, abs=1)
    assert ds.WindowWidth == pytest.approx(high - low, abs=1)
    ds = pydicom.dcmread(write_series(drawn("CT", "HU"), tmp_path / "ct", provenance=SAMPLED)[0])
    assert (ds.WindowCenter, ds.WindowWidth) == (40, 400)


def test_colour_pictures_stay_colour(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 256, (3, 5, 3, 1), np.uint8)
    scan = Scan(voxels, Grid.from_lps((5, 3, 1), np.eye(4)), header=Header("OP", photometric="RGB"))
    files = write_series(scan, tmp_path / "out", provenance=SAMPLED)
    assert_conforms(files)
    np.testing.assert_array_equal(pydicom.dcmread(files[0]).pixel_array, voxels[:, :, :, 0].T)


def test_each_channel_is_a_series(tmp_path):
    one = numbered(oriented((0, 1, 2), (1, 1, 1)))
    scan = Scan(np.concatenate([one.voxels, one.voxels + 100]), one.grid, one.scale, one.header)
    files = write_series(scan, tmp_path / "out", provenance=SAMPLED, series_number=9100)
    first, second = pydicom.dcmread(files[0]), pydicom.dcmread(files[3])
    assert (first.SeriesNumber, second.SeriesNumber) == (9100, 9101)
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.FrameOfReferenceUID == second.FrameOfReferenceUID
    assert "channel 2 of 2" in second.SeriesDescription
    assert_conforms(files)
    assert_same_places(by_simpleitk(files[3:]), one.voxels[0] + 100, one.grid.affine)


# -- files -------------------------------------------------------------------------------------


def test_same_scan_and_seed_give_the_same_bytes_and_others_give_other_uids(tmp_path):
    scan = drawn("MR")
    first = write_series(scan, tmp_path / "a", provenance=SAMPLED)
    second = write_series(scan, tmp_path / "b", provenance=SAMPLED)
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    voxels = scan.voxels.copy()
    voxels[0, 0, 0, 0] += 500
    other = write_series(scan.with_voxels(voxels), tmp_path / "c", provenance=SAMPLED)
    seeded = write_series(scan, tmp_path / "d", provenance=Provenance("Sampled", seed=8, content="synthetic"))
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in (*first, *other, *seeded)]
    assert len(set(uids)) == len(uids)
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in uids)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        write_series(drawn("MR"), tmp_path / "out", provenance=SAMPLED)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_full_disk_leaves_nothing(tmp_path):
    script = f"""
import resource, signal
from pathlib import Path
from medgen.errors import OutputError
from test_dicom_write import SAMPLED, drawn, write_series
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    write_series(drawn("MR", shape=(64, 64, 4)), Path({str(tmp_path / "out")!r}), provenance=SAMPLED)
except OutputError as error:
    raise SystemExit(42)
"""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    run = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(folders)}, capture_output=True)
    assert run.returncode == 42, run.stderr.decode()
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 3000


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"identity": "keep"}, ConfigError),
        ({"source": [Path(__file__)]}, ConfigError),
        ({"source": [Path(__file__)], "provenance": COPIED}, UnreadableScan),
        ({"source": [Path("absent.dcm")], "provenance": COPIED}, UnreadableScan),
    ],
)
def test_contradictory_options_are_refused(tmp_path, change, error):
    with pytest.raises(error):
        write_series(drawn("MR"), tmp_path / "out", **{"provenance": SAMPLED, **change})
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_identity_is_not_taken_for_keep(tmp_path):
    # Whoever notices first, the type checker or the function: nothing is written.
    with pytest.raises(Exception, match="identity"):
        write_series(drawn("MR"), tmp_path / "out", provenance=COPIED, identity="Pseudonym")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"description": " "}, {"weights_sha256": "abc"}])
def test_provenance_is_complete(change):
    with pytest.raises(ConfigError):
        Provenance(**{"description": "x", **change})
