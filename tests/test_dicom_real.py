"""Scans from real machines: voxels and places equal SimpleITK's, or a refusal that says why."""

import re
from pathlib import Path

import numpy as np
import pytest

from medgen.errors import DataError, GeometryError, InconsistentSeries
from medgen.io.dicom.read import find_series, read_series, series_header
from medgen.io.source import ReadOptions

SimpleITK = pytest.importorskip("SimpleITK")

READABLE = {
    "mr_gbm_pgbm003_siemens/11-T1post-18670": (280, 320, 22),
    "mr_gbm_pgbm003_siemens/36468-FLAIRreg-58706": (280, 320, 22),
    "ct_ge_small17": (88, 128, 17),
    "dicom2nifti/ge": (256, 256, 4),
    "dicom2nifti/hitachi": (64, 64, 4),
    "dicom2nifti/generic/compressed_rle": (256, 256, 4),
    "dicom2nifti/generic/compressed_jpegls": (256, 256, 4),
    "dicom2nifti/generic/compressed_j2k": (256, 256, 4),
    "dicom2nifti/philips_enhanced": (256, 256, 8),
    "dicom2nifti/siemens_multiframe": (256, 256, 8),
    "dicom2nifti/hyperfine": (112, 138, 8),
    "pydicom_data/eCT_Supplemental.dcm": (512, 512, 2),
}


def files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(path for path in place.rglob("*.dcm"))


def only(place: Path):
    sources, skipped = find_series(files(place))
    assert not skipped
    assert len(sources) == 1
    return sources[0]


def by_simpleitk(paths) -> tuple[np.ndarray, np.ndarray]:
    """Physical values (i, j, k) and LPS affine, as SimpleITK has them."""
    names = [str(path) for path in paths]
    image = SimpleITK.ReadImage(names if len(names) > 1 else names[0])
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), affine


@pytest.mark.parametrize("name", READABLE)
def test_equals_simpleitk(shared_data, name):
    source = only(shared_data / "dicom" / name)
    scan = read_series(source)
    assert scan.voxels.shape == (1, *READABLE[name])
    grid, channels, header = series_header(source)
    assert (grid, channels, header) == (scan.grid, 1, scan.header)
    values, affine = by_simpleitk(source.files)
    if affine[:3, 2] @ scan.grid.lps[:3, 2] < 0:
        # SimpleITK keeps multi-frame files in frame order; here slices run along their normal.
        affine[:3, 3] = (affine @ [0, 0, values.shape[2] - 1, 1])[:3]
        affine[:3, 2] *= -1
        values = values[:, :, ::-1]
    np.testing.assert_allclose(scan.grid.lps, affine, atol=1e-3)
    np.testing.assert_allclose(scan.scale.physical(scan.voxels)[0], values, rtol=1e-6, atol=1e-4)
    # The far corner too: an error in a step would grow along the volume.
    last = np.array(scan.grid.shape) - 1
    np.testing.assert_allclose(scan.grid.world(last) * [-1, -1, 1], (affine @ [*last, 1])[:3], atol=1e-3)


def test_units_and_modality(shared_data):
    ct = read_series(only(shared_data / "dicom" / "ct_ge_small17"))
    assert (ct.header.modality, ct.scale.unit) == ("CT", "HU")
    mr = read_series(only(shared_data / "dicom" / "mr_gbm_pgbm003_siemens" / "11-T1post-18670"))
    assert (mr.header.modality, mr.header.body_part, mr.scale.unit) == ("MR", "BRAIN", "")
    # A map of blood flow is CT by modality, but not in Hounsfield units.
    flow = read_series(only(shared_data / "dicom" / "pydicom_data" / "eCT_Supplemental.dcm"))
    assert (flow.header.modality, flow.scale.unit) == ("CT", "")


def test_one_patient_has_one_key(shared_data):
    sources, _ = find_series(files(shared_data / "dicom" / "mr_gbm_pgbm003_siemens"))
    assert len(sources) == 2
    assert len({source.patient for source in sources}) == 1
    assert re.fullmatch("p[0-9a-f]{10}", sources[0].patient)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("ct_ge_gantrytilt_varspacing", InconsistentSeries, ["28 slices", "14.dcm", "--on-gap resample"]),
        ("dicom2nifti/failing/gantrytilting", GeometryError, ["14.0 degrees", "--on-tilt"]),
        ("pydicom_data/emri_small.dcm", GeometryError, ["emri_small.dcm", "ImagePositionPatient"]),
        ("pydicom_data/emri_small_RLE.dcm", GeometryError, ["emri_small_RLE.dcm", "ImagePositionPatient"]),
    ],
)
def test_refused_by_name(shared_data, name, error, words):
    source = only(shared_data / "dicom" / name)
    for ask in (read_series, series_header):
        with pytest.raises(error) as caught:
            ask(source)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_tilted_head_can_be_kept_or_straightened(shared_data):
    source = only(shared_data / "dicom" / "dicom2nifti" / "failing" / "gantrytilting")
    sheared = read_series(source, ReadOptions(on_tilt="shear"))
    assert 13.9 < sheared.grid.shear_degrees < 14.1
    straight = read_series(source, ReadOptions(on_tilt="resample"))
    assert straight.grid.shear_degrees < 1e-6
    assert 0.9 < straight.valid.mean() < 1
    # One place in the head has one value in both.
    ijk = np.array([256, 256, 2])
    there = np.round(straight.grid.index(sheared.grid.world(ijk))).astype(int)
    near = straight.physical()[0][(*(slice(n - 1, n + 2) for n in there[:2]), there[2])]
    assert np.nanmin(near) - 30 <= sheared.physical()[0][tuple(ijk)] <= np.nanmax(near) + 30


def test_tilted_and_uneven_head_needs_both_repairs(shared_data):
    source = only(shared_data / "dicom" / "ct_ge_gantrytilt_varspacing")
    with pytest.raises(GeometryError, match="degrees"):
        read_series(source, ReadOptions(on_gap="resample"))
    grid, _, _ = series_header(source, ReadOptions(on_gap="resample", on_tilt="shear"))
    assert 18 < grid.shear_degrees < 19


def test_parametric_map_is_skipped_with_a_reason(shared_data):
    sources, skipped = find_series([shared_data / "dicom" / "pydicom_data" / "parametric_map_float.dcm"])
    assert not sources
    assert skipped[0].reason.startswith("Parametric Map Storage")


def test_every_file_is_a_source_or_skipped_and_never_a_traceback(shared_data):
    paths = sorted(path for path in (shared_data / "dicom").rglob("*") if path.is_file())
    sources, skipped = find_series(paths)
    seen = [str(path) for source in sources for path in source.files] + [skip.path for skip in skipped]
    assert sorted(seen) == sorted(str(path) for path in paths)
    for source in sources:
        try:
            scan = read_series(source)
        except DataError:
            continue
        assert np.isfinite(scan.grid.affine).all()
