"""Every known way in which a CT series goes wrong: the exact volume comes out, or an error that names the file."""

import re
import struct
import time
from pathlib import Path

import dicom_factory as factory
import numpy as np
import pytest

from medgen import log
from medgen.errors import DataError, GeometryError, InconsistentSeries, UnreadableScan
from medgen.io.dicom.read import find_series, read_series, series_header
from medgen.io.source import ReadOptions, Source


class Notes:
    """A reporter that keeps what it was told."""

    def __init__(self):
        self.messages = []

    def note(self, message):
        self.messages.append(message)

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
        yield reporter.messages


def only(folder: Path, options: ReadOptions = ReadOptions()) -> Source:
    sources, _ = find_series(sorted(path for path in folder.rglob("*") if path.is_file()), options)
    assert len(sources) == 1
    return sources[0]


def read(folder: Path, **options):
    options = ReadOptions(**options)
    scan = read_series(only(folder, options), options)
    grid, channels, header = series_header(only(folder, options), options)
    assert (grid, channels, header) == (scan.grid, scan.channels, scan.header)
    return scan


def hu(scan) -> np.ndarray:
    return scan.scale.physical(scan.voxels)[0]


def agree(scan, truth) -> None:
    assert scan.scale.unit == "HU"
    assert scan.voxels.shape == (1, *truth.hu.shape)
    np.testing.assert_array_equal(hu(scan), truth.hu)
    np.testing.assert_allclose(scan.grid.lps, truth.lps, atol=1e-6)


def refused(folder: Path, error: type, *words: str, **options) -> str:
    """The message; both reading and asking for the header refuse unless only pixels can tell."""
    options = ReadOptions(**options)
    with pytest.raises(error) as caught:
        read_series(only(folder, options), options)
    message = str(caught.value)
    assert "CANARY" not in message
    for word in words:
        assert word in message, message
    return message


# -- series that are in order, however they look ------------------------------------------------------


def test_control(tmp_path):
    truth = factory.series(tmp_path)
    scan = read(tmp_path)
    agree(scan, truth)
    assert scan.voxels.dtype == np.uint16
    assert scan.valid is None


def test_names_and_numbers_do_not_decide_the_order(tmp_path):
    shuffled = np.random.default_rng(3).permutation(factory.SLICES)

    def edit(ds, k):
        ds.InstanceNumber = int(shuffled[k]) + 1

    truth = factory.series(tmp_path, name=lambda k: f"{shuffled[-k]}.dcm", edit=edit)
    agree(read(tmp_path), truth)
    assert list(only(tmp_path).files) == truth.files


def test_descending_positions_come_out_ascending(tmp_path):
    truth = factory.series(tmp_path, step=(0, 0, -factory.STEP))
    scan = read(tmp_path)
    np.testing.assert_array_equal(hu(scan), truth.hu[:, :, ::-1])
    np.testing.assert_allclose(scan.grid.lps[:3, 3], [-12, -10, 30 - 19 * factory.STEP], atol=1e-6)
    np.testing.assert_allclose(scan.grid.world([0, 0, 19])[2], 30, atol=1e-6)


def test_sagittal(tmp_path):
    truth = factory.series(tmp_path, axes=factory.SAGITTAL)
    scan = read(tmp_path)
    agree(scan, truth)
    # Columns run posterior (LPS y), rows run down (minus z), slices along y x -z = -x.
    assert scan.grid.axcodes == "PIR"


def test_garbage_above_the_stored_bits_is_ignored(tmp_path):
    def edit(ds, k):
        noise = np.random.default_rng(k).integers(0, 16, (factory.ROWS, factory.COLUMNS)) << 12
        stored = np.frombuffer(ds.PixelData, "<u2").reshape(noise.shape)
        factory.pixels(ds, stored | noise)
        ds.BitsStored, ds.HighBit = 12, 11

    truth = factory.series(tmp_path, edit=edit)
    agree(read(tmp_path), truth)


def test_signed_twelve_bits_are_sign_extended(tmp_path):
    def edit(ds, k):
        factory.pixels(ds, (factory.hounsfield()[k] + 500) & 0x0FFF)
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = 12, 11, 1, -500

    truth = factory.series(tmp_path, edit=edit)
    scan = read(tmp_path)
    agree(scan, truth)
    assert scan.voxels.dtype == np.int16


def test_junk_beside_the_series_is_skipped_with_a_reason(tmp_path):
    truth = factory.series(tmp_path)
    (tmp_path / "README").write_text("nothing to see")
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "zeros").write_bytes(bytes(5000))
    report = factory.ct_slice(truth.hu[:, :, 0].T, (0, 0, 0), 99)
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.33"
    factory.save(report, tmp_path / "report.dcm")
    sources, skipped = find_series(sorted(tmp_path.iterdir()))
    assert len(sources) == 1
    agree(read_series(sources[0]), truth)
    reasons = {Path(skip.path).name: skip.reason for skip in skipped}
    assert set(reasons) == {"README", "empty.dcm", "zeros", "report.dcm"}
    assert "SR" in reasons["report.dcm"]
    assert all(len(reason) > 10 for reason in reasons.values())


# -- gaps ----------------------------------------------------------------------------------------------


def without(*missing):
    return lambda ds, k: [] if k in missing else None


def test_missing_slice_is_named(tmp_path):
    factory.series(tmp_path, edit=without(7))
    message = refused(
        tmp_path,
        InconsistentSeries,
        "19 slices",
        "step 2.5 mm except 5 mm after slice 7 (006.dcm)",
        "One slice is missing",
        "--on-gap fill / resample",
    )
    with pytest.raises(InconsistentSeries, match=re.escape(message)):
        series_header(only(tmp_path))


def test_missing_slice_filled_stays_unmeasured(tmp_path, notes):
    truth = factory.series(tmp_path, edit=without(7, 8, 15))
    scan = read(tmp_path, on_gap="fill")
    np.testing.assert_allclose(scan.grid.lps, truth.lps, atol=1e-6)
    there = [k for k in range(20) if k not in (7, 8, 15)]
    np.testing.assert_array_equal(hu(scan)[:, :, there], truth.hu[:, :, there])
    assert not scan.valid[:, :, [7, 8, 15]].any()
    assert scan.valid[:, :, there].all()
    assert np.isnan(scan.physical()[..., 7]).all()
    assert any("3 missing slices" in note for note in notes)


def test_missing_slice_resampled_lies_between_its_neighbours(tmp_path):
    truth = factory.series(tmp_path, edit=without(7))
    scan = read(tmp_path, on_gap="resample")
    np.testing.assert_allclose(scan.grid.lps, truth.lps, atol=1e-6)
    np.testing.assert_allclose(hu(scan)[:, :, 8:], truth.hu[:, :, 8:], atol=1e-3)
    np.testing.assert_allclose(hu(scan)[:, :, 7], (truth.hu[:, :, 6] + truth.hu[:, :, 8]) / 2, atol=1e-3)


def test_uneven_spacing(tmp_path):
    truth = factory.series(tmp_path, edit=lambda ds, k: factory.shift(ds, (0, 0, 0.7 if k > 11 else 0)))
    refused(tmp_path, InconsistentSeries, "except 3.2 mm after slice 12 (011.dcm)", "uneven", "--on-gap resample")
    refused(tmp_path, InconsistentSeries, "uneven", on_gap="fill")
    scan = read(tmp_path, on_gap="resample")
    depth = np.array([30 + 2.5 * k + (0.7 if k > 11 else 0) for k in range(20)])
    there = scan.grid.world(np.stack([np.zeros(20), np.zeros(20), np.arange(20)], 1))[:, 2]
    np.testing.assert_allclose(there[[0, -1]], depth[[0, -1]], atol=1e-6)
    np.testing.assert_allclose(hu(scan)[4, 9], np.interp(there, depth, truth.hu[4, 9]), atol=1e-2)


def test_drift_within_the_limit_of_each_gap_is_refused_when_it_adds_up(tmp_path):
    drift = lambda ds, k: factory.shift(ds, (0, 0, 0.02 * min(k, 39 - k)))  # noqa: E731
    factory.series(tmp_path, hu=factory.hounsfield(40), edit=drift)
    refused(tmp_path, InconsistentSeries, "drift")


def test_jitter_of_a_hundredth_millimetre_uses_first_and_last(tmp_path):
    def edit(ds, k):
        factory.shift(ds, (0, 0, 0.012 * (-1) ** k if 0 < k < 19 else 0))

    truth = factory.series(tmp_path, edit=edit)
    agree(read(tmp_path), truth)


def test_slice_shifted_sideways(tmp_path):
    factory.series(tmp_path, edit=lambda ds, k: factory.shift(ds, (0, 1.5 if k == 9 else 0, 0)))
    refused(tmp_path, InconsistentSeries, "slice 10 (009.dcm)", "1.5 mm sideways")


# -- copies and time -----------------------------------------------------------------------------------


def twin(k_twin, change=None):
    def edit(ds, k):
        if k != k_twin:
            return None
        other = factory.ct_slice(factory.hounsfield()[k], [float(n) for n in ds.ImagePositionPatient], k)
        other.SOPInstanceUID = factory.uid("twin", k)
        if change is not None:
            factory.pixels(other, factory.hounsfield(seed=8)[k] - factory.INTERCEPT)
        return [ds, other]

    return edit


def test_identical_copy_is_dropped_and_noted(tmp_path, notes):
    truth = factory.series(tmp_path, edit=twin(5))
    agree(read(tmp_path), truth)
    assert any("identical copies" in note and "005.dcm" in note for note in notes)


def test_whole_series_twice_is_one_volume(tmp_path, notes):
    truth = factory.series(tmp_path / "one")
    factory.series(tmp_path / "two")
    agree(read(tmp_path), truth)
    assert any("20 slices are identical copies" in note for note in notes)


def test_another_slice_at_the_same_place_is_refused(tmp_path):
    factory.series(tmp_path, edit=twin(5, "other pixels"))
    refused(tmp_path, InconsistentSeries, "005.dcm", "extra-1-005.dcm", "place 6 of 20")


@pytest.mark.parametrize(
    ("keyword", "values", "names"),
    [
        ("TemporalPositionIdentifier", (1, 2), ("time 1", "time 2")),
        ("AcquisitionNumber", (3, 9), ("acquisition 3", "acquisition 9")),
        ("AcquisitionTime", ("101500.5", "101733"), ("time 1", "time 2")),
        ("TriggerTime", (0, 430.5), ("trigger 0", "trigger 430.5")),
        ("EchoNumbers", (1, 2), ("echo 1", "echo 2")),
        ("DiffusionBValue", (0.0, 1000.0), ("b 0", "b 1000")),
        ("ContentTime", ("101500.5", "101733"), ("time 1", "time 2")),
    ],
)
def test_repeated_positions_become_channels(tmp_path, keyword, values, names):
    later = factory.hounsfield(seed=8)

    def edit(ds, k):
        other = factory.ct_slice(later[k], [float(n) for n in ds.ImagePositionPatient], 100 + k)
        setattr(ds, keyword, values[0])
        setattr(other, keyword, values[1])
        return [ds, other]

    truth = factory.series(tmp_path, edit=edit)
    scan = read(tmp_path)
    assert scan.header.channels == names
    physical = scan.scale.physical(scan.voxels)
    np.testing.assert_array_equal(physical[0], truth.hu)
    np.testing.assert_array_equal(physical[1], later.transpose(2, 1, 0))
    np.testing.assert_allclose(scan.grid.lps, truth.lps, atol=1e-6)


def test_times_that_differ_from_slice_to_slice_still_make_channels(tmp_path):
    later = factory.hounsfield(seed=8)

    def edit(ds, k):
        other = factory.ct_slice(later[k], [float(n) for n in ds.ImagePositionPatient], 100 + k)
        ds.AcquisitionTime, other.AcquisitionTime = f"1010{k:02d}", f"1020{k:02d}"
        return [ds, other]

    factory.series(tmp_path, edit=edit)
    scan = read(tmp_path)
    assert scan.header.channels == ("time 1", "time 2")
    np.testing.assert_array_equal(scan.scale.physical(scan.voxels)[1], later.transpose(2, 1, 0))


def test_repeated_positions_that_nothing_tells_apart(tmp_path):
    def edit(ds, k):
        other = factory.ct_slice(factory.hounsfield(seed=8)[k], [float(n) for n in ds.ImagePositionPatient], 100 + k)
        return [ds, other]

    factory.series(tmp_path, edit=edit)
    refused(tmp_path, InconsistentSeries, "every place holds 2 slices", "000.dcm")


def test_time_point_with_a_missing_slice(tmp_path):
    def edit(ds, k):
        other = factory.ct_slice(factory.hounsfield(seed=8)[k], [float(n) for n in ds.ImagePositionPatient], 100 + k)
        ds.TemporalPositionIdentifier, other.TemporalPositionIdentifier = 1, 2
        return [ds] if k == 4 else [ds, other]

    factory.series(tmp_path, edit=edit)
    refused(tmp_path, InconsistentSeries, "from 1 to 2 slices")


# -- tilt ----------------------------------------------------------------------------------------------


def tilted(folder, degrees=15.0):
    angle = np.radians(degrees)
    return factory.series(folder, step=(0.0, factory.STEP * np.tan(angle), factory.STEP))


def tilted_by_orientation(folder, degrees=15.0):
    """The other encoding: slices are turned, positions step along z."""
    angle = np.radians(degrees)
    axes = ((1.0, 0.0, 0.0), (0.0, np.cos(angle), np.sin(angle)))
    return factory.series(folder, axes=axes, step=(0.0, 0.0, factory.STEP))


@pytest.mark.parametrize("make", [tilted, tilted_by_orientation])
def test_gantry_tilt_is_refused_and_named(tmp_path, make):
    make(tmp_path)
    refused(tmp_path, GeometryError, "15.0 degrees", "--on-tilt shear", "--on-tilt resample")


@pytest.mark.parametrize("make", [tilted, tilted_by_orientation])
def test_gantry_tilt_kept_as_shear_is_exact(tmp_path, make):
    truth = make(tmp_path)
    scan = read(tmp_path, on_tilt="shear")
    agree(scan, truth)
    assert abs(scan.grid.shear_degrees - 15) < 0.01


@pytest.mark.parametrize("make", [tilted, tilted_by_orientation])
def test_gantry_tilt_resampled_keeps_every_voxel_in_its_place(tmp_path, make):
    # A plane wave in the world tells where each voxel ended up.
    slope = np.array([3.0, 2.0, 1.0])
    truth = make(tmp_path)
    row, column, step = truth.lps[:3, 0], truth.lps[:3, 1], truth.lps[:3, 2]
    k, j, i = np.meshgrid(np.arange(20), np.arange(24), np.arange(30), indexing="ij")
    places = truth.lps[:3, 3] + i[..., None] * row + j[..., None] * column + k[..., None] * step
    wave = np.round(places @ slope).astype(int)
    angle = np.radians(15)
    for path in tmp_path.iterdir():
        path.unlink()
    if make is tilted:
        factory.series(tmp_path, hu=wave, step=(0.0, factory.STEP * np.tan(angle), factory.STEP))
    else:
        axes = ((1.0, 0.0, 0.0), (0.0, np.cos(angle), np.sin(angle)))
        factory.series(tmp_path, hu=wave, axes=axes, step=(0.0, 0.0, factory.STEP))
    scan = read(tmp_path, on_tilt="resample")
    assert scan.grid.shear_degrees < 1e-6
    inside = np.argwhere(scan.valid)
    assert len(inside) > 0.8 * wave.size
    assert scan.valid.mean() < 1
    world = scan.grid.world(inside) * [-1, -1, 1]
    # Beyond the outermost centres, up to half a voxel, there is nothing to interpolate between.
    within = np.linalg.solve(truth.lps[:3, :3], (world - truth.lps[:3, 3]).T).T
    core = ((within >= 0) & (within <= np.array(truth.hu.shape) - 1)).all(1)
    assert core.sum() > 0.8 * wave.size
    np.testing.assert_allclose(hu(scan)[tuple(inside[core].T)], world[core] @ slope, atol=0.51)
    np.testing.assert_array_equal(np.isnan(scan.physical()[0]), ~scan.valid)


def test_a_twentieth_of_a_degree_is_no_tilt(tmp_path):
    truth = tilted(tmp_path, degrees=0.05)
    agree(read(tmp_path), truth)


# -- mixtures ------------------------------------------------------------------------------------------


def test_two_series_in_a_folder_are_two_volumes(tmp_path):
    one = factory.series(tmp_path)
    other = factory.series(tmp_path, hu=factory.hounsfield(8, seed=9), series="b", name="b{:03d}.dcm".format)
    sources, skipped = find_series(sorted(tmp_path.iterdir()))
    assert not skipped
    assert sorted(len(source.files) for source in sources) == [8, 20]
    for source in sources:
        truth = one if len(source.files) == 20 else other
        agree(read_series(source), truth)
        assert re.fullmatch(re.escape(str(tmp_path)) + "#[0-9a-f]{8}", source.path)
    assert len({source.path for source in sources}) == 2


def test_localizer_inside_the_series_is_left_out_with_a_note(tmp_path, notes):
    def edit(ds, k):
        if k:
            return None
        scout = factory.ct_slice(factory.hounsfield()[0], (0, -100, 60), 50, axes=((1, 0, 0), (0, 0, -1)))
        scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        return [ds, scout]

    truth = factory.series(tmp_path, edit=edit)
    agree(read(tmp_path), truth)
    _, skipped = find_series(sorted(tmp_path.iterdir()))
    assert [Path(skip.path).name for skip in skipped] == ["extra-1-000.dcm"]
    assert "localizer" in skipped[0].reason
    assert any("localizer" in note for note in notes)
    # A source that was put together by hand does not smuggle the scout in.
    agree(read_series(Source(str(tmp_path), "dicom", tuple(sorted(tmp_path.iterdir())))), truth)


def test_stray_orientation_is_refused(tmp_path):
    def edit(ds, k):
        if k == 3:
            ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    factory.series(tmp_path, edit=edit)
    refused(tmp_path, InconsistentSeries, "several orientations", "003.dcm")


def test_one_slice_of_another_size_is_refused(tmp_path):
    def edit(ds, k):
        if k == 13:
            factory.pixels(ds, np.zeros((factory.ROWS + 2, factory.COLUMNS)))

    factory.series(tmp_path, edit=edit)
    refused(tmp_path, InconsistentSeries, "several sizes", "24 x 30", "26 x 30", "013.dcm")


def test_one_slice_of_another_pixel_spacing_is_refused(tmp_path):
    def edit(ds, k):
        if k == 13:
            ds.PixelSpacing = [0.8, 0.81]

    factory.series(tmp_path, edit=edit)
    refused(tmp_path, InconsistentSeries, "several pixel spacings", "013.dcm")


@pytest.mark.parametrize("keyword", ["PatientID", "FrameOfReferenceUID"])
def test_one_series_of_two_patients_or_frames_of_reference_is_refused(tmp_path, keyword):
    def edit(ds, k):
        if k == 13:
            setattr(ds, keyword, "1.2.3")

    factory.series(tmp_path, edit=edit)
    refused(tmp_path, InconsistentSeries, "013.dcm")


# -- values --------------------------------------------------------------------------------------------


def test_monochrome1_is_not_inverted(tmp_path):
    truth = factory.series(tmp_path, edit=lambda ds, k: setattr(ds, "PhotometricInterpretation", "MONOCHROME1"))
    scan = read(tmp_path)
    agree(scan, truth)
    assert scan.header.photometric == "MONOCHROME1"
    # Hounsfield units say what is dense whatever the display: there is nothing to normalise.
    agree(read(tmp_path, polarity="normalise"), truth)


def test_slopes_that_differ_from_slice_to_slice(tmp_path):
    def edit(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = f"{1 + k / 8:.9g}", f"{-1024 + k:.9g}"

    truth = factory.series(tmp_path, edit=edit)
    scan = read(tmp_path)
    k = np.arange(20)
    expected = (truth.hu + 1024) * (1 + k / 8) - 1024 + k
    assert scan.voxels.dtype == np.float32
    assert (scan.scale.slope, scan.scale.intercept, scan.scale.unit) == (1, 0, "HU")
    np.testing.assert_allclose(hu(scan), expected, rtol=1e-6)


def test_padding_is_not_measured(tmp_path):
    ring = np.zeros((factory.ROWS, factory.COLUMNS), bool)
    ring[:3] = ring[:, -2:] = True

    def edit(ds, k):
        stored = factory.hounsfield()[k].copy()
        stored[ring] = -2000
        factory.pixels(ds, stored, signed=True)
        ds.RescaleIntercept = 0
        ds.add_new("PixelPaddingValue", "SS", -2000)

    truth = factory.series(tmp_path, edit=edit)
    scan = read(tmp_path)
    np.testing.assert_array_equal(scan.valid, np.repeat(~ring.T[:, :, None], 20, 2))
    np.testing.assert_array_equal(scan.physical()[0][scan.valid], truth.hu[scan.valid])
    assert np.isnan(scan.physical()[0][~scan.valid]).all()
    assert (scan.voxels[0][~scan.valid] == -2000).all()
    assert scan.header.padding == -2000


def test_padding_range(tmp_path):
    def edit(ds, k):
        stored = factory.hounsfield()[k].copy()
        stored[0, :4] = [-1500, -1600, -1700, -1499]
        factory.pixels(ds, stored, signed=True)
        ds.RescaleIntercept = 0
        ds.add_new("PixelPaddingValue", "SS", -1500)
        ds.add_new("PixelPaddingRangeLimit", "SS", -1700)

    factory.series(tmp_path, edit=edit)
    scan = read(tmp_path)
    assert scan.valid[:4, 0, 0].tolist() == [False, False, False, True]
    assert int((~scan.valid).sum()) == 3 * 20


def test_padding_beyond_the_stored_bits_is_seen(tmp_path):
    """Twelve bits stored, but the padding is a negative number of sixteen."""

    def edit(ds, k):
        stored = factory.hounsfield()[k] + 1024
        stored[2, 2], stored[3, 3] = 0xF830, 0x0830
        factory.pixels(ds, stored)
        ds.BitsStored, ds.HighBit = 12, 11
        ds.add_new("PixelPaddingValue", "US", 0xF830)

    factory.series(tmp_path, edit=edit)
    scan = read(tmp_path)
    assert not scan.valid[2, 2].any()
    assert scan.valid[3, 3].all()
    assert int((~scan.valid).sum()) == 20


# -- geometry that is not there ------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
@pytest.mark.parametrize("which", [range(20), [6]], ids=["everywhere", "in one slice"])
def test_slices_without_geometry_are_refused(tmp_path, keyword, which):
    def edit(ds, k):
        if k in which:
            del ds[keyword]

    factory.series(tmp_path, edit=edit)
    refused(tmp_path, GeometryError, keyword, ".dcm")


@pytest.mark.parametrize("axes", [[1, 0, 0, 1, 0, 0], [2, 0, 0, 0, 2, 0], [0, 0, 0, 0, 0, 0]])
def test_impossible_orientations_are_refused(tmp_path, axes):
    factory.series(tmp_path, edit=lambda ds, k: setattr(ds, "ImageOrientationPatient", axes))
    refused(tmp_path, GeometryError, "perpendicular unit vectors")


def test_single_slice_uses_its_thickness(tmp_path):
    truth = factory.series(tmp_path, hu=factory.hounsfield(1))
    scan = read(tmp_path)
    np.testing.assert_array_equal(hu(scan), truth.hu)
    assert scan.is_planar
    assert scan.header.space == 1
    np.testing.assert_allclose(scan.grid.spacing, (0.8, 0.8, 7.7))
    np.testing.assert_allclose(scan.grid.lps[:3, 3], (-12, -10, 30))


# -- multi-frame ---------------------------------------------------------------------------------------


def test_enhanced_ct(tmp_path):
    truth = factory.enhanced_ct(tmp_path)
    agree(read(tmp_path), truth)


def test_enhanced_ct_is_sorted_by_position_not_frame_number(tmp_path):
    truth = factory.enhanced_ct(tmp_path, order=np.random.default_rng(0).permutation(20))
    agree(read(tmp_path), truth)


def test_groups_of_a_frame_override_shared_ones(tmp_path):
    slopes = [1 + k / 4 for k in range(20)]
    truth = factory.enhanced_ct(tmp_path, slopes=slopes)
    scan = read(tmp_path)
    np.testing.assert_allclose(hu(scan), (truth.hu + 1024) * slopes - 1024, rtol=1e-6)


def test_enhanced_ct_without_positions_is_refused(tmp_path):
    factory.enhanced_ct(tmp_path, positions=False)
    refused(tmp_path, GeometryError, "ImagePositionPatient", "enhanced.dcm frame 1")


def test_enhanced_ct_with_a_missing_frame_is_refused(tmp_path):
    factory.enhanced_ct(tmp_path, order=[k for k in range(20) if k != 12])
    refused(tmp_path, InconsistentSeries, "One slice is missing", "enhanced.dcm frame 12")


# -- damage and malice ---------------------------------------------------------------------------------


def damage(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def pixel_length_at(content: bytes) -> int:
    """Where the length of Pixel Data (explicit, little endian) stands."""
    return content.rindex(b"\xe0\x7f\x10\x00O") + 8


def test_no_preamble_needs_force(tmp_path):
    truth = factory.series(tmp_path)
    for path in truth.files:
        damage(path, lambda content: content[132:])
    sources, skipped = find_series(truth.files)
    assert not sources
    assert all("--force" in skip.reason for skip in skipped)
    agree(read(tmp_path, force=True), truth)


def test_bare_dataset_without_meta_group_needs_force(tmp_path):
    truth = factory.series(tmp_path)
    for path in truth.files:
        damage(path, lambda content: content[content.index(b"\x08\x00\x08\x00CS") :])
    assert not find_series(truth.files)[0]
    agree(read(tmp_path, force=True), truth)


def test_force_does_not_turn_junk_into_images(tmp_path):
    (tmp_path / "junk").write_bytes(np.random.default_rng(0).bytes(20_000))
    (tmp_path / "text").write_text("no picture in here" * 100)
    (tmp_path / "zeros").write_bytes(bytes(200_000))
    sources, skipped = find_series(sorted(tmp_path.iterdir()), ReadOptions(force=True))
    assert not sources
    assert len(skipped) == 3


@pytest.mark.parametrize("keep", [-1000, -1, 700, 760])
def test_truncated_file_is_named_not_dropped(tmp_path, keep):
    truth = factory.series(tmp_path)
    damage(truth.files[19], lambda content: content[:keep])
    refused(tmp_path, (UnreadableScan, DataError), "019.dcm")


def test_file_cut_within_its_first_kilobyte_is_reported(tmp_path):
    truth = factory.series(tmp_path)
    damage(truth.files[19], lambda content: content[:300])
    sources, skipped = find_series(truth.files)
    assert [Path(skip.path).name for skip in skipped] == ["019.dcm"]
    assert len(sources) == 1


@pytest.mark.parametrize("length", [0xFFFFFFF0, 0xFFFFFFFE, 0x7FFFFFFE, 10**6])
def test_pixel_data_that_claims_too_much(tmp_path, length):
    truth = factory.series(tmp_path, hu=factory.hounsfield(1))

    def lie(content):
        at = pixel_length_at(content)
        return content[:at] + struct.pack("<I", length) + content[at + 4 :]

    damage(truth.files[0], lie)
    refused(tmp_path, UnreadableScan, "000.dcm", f"claims {length} bytes")


def test_pixel_data_that_holds_too_little_or_too_much(tmp_path):
    factory.series(tmp_path, hu=factory.hounsfield(1), edit=lambda ds, k: setattr(ds, "Rows", 25))
    refused(tmp_path, UnreadableScan, "000.dcm", "25 x 30")
    factory.series(tmp_path, hu=factory.hounsfield(1), edit=lambda ds, k: setattr(ds, "PixelData", bytes(24 * 30 * 4)))
    refused(tmp_path, UnreadableScan, "one frame more")


def test_element_that_claims_four_gigabytes(tmp_path):
    truth = factory.series(tmp_path, hu=factory.hounsfield(1))
    honest, lie = b"\x08\x00\x08\x00CS\x16\x00", b"\x08\x00\x08\x00UT\0\0\xf0\xff\xff\xff"
    damage(truth.files[0], lambda content: content.replace(honest, lie))
    sources, skipped = find_series(truth.files)
    assert not sources
    assert "000.dcm" in skipped[0].path


def test_giant_rows_and_columns_allocate_nothing(tmp_path):
    def edit(ds, k):
        ds.Rows = ds.Columns = 65535

    factory.series(tmp_path, hu=factory.hounsfield(1), edit=edit)
    started = time.process_time()
    refused(tmp_path, UnreadableScan, "000.dcm", "65535 x 65535")
    refused(tmp_path, UnreadableScan, "000.dcm", "need", max_voxels=2**40)
    assert time.process_time() - started < 1


def test_more_voxels_than_allowed(tmp_path):
    factory.series(tmp_path)
    refused(tmp_path, UnreadableScan, "max_voxels", max_voxels=20 * 24 * 30 - 1)
    assert read(tmp_path, max_voxels=20 * 24 * 30).voxels.size == 20 * 24 * 30


@pytest.mark.parametrize("frames", [100_000, 2])
def test_run_length_file_that_claims_frames_it_does_not_have(tmp_path, frames):
    from pydicom.uid import RLELossless

    def edit(ds, k):
        ds.compress(RLELossless)
        ds.NumberOfFrames = frames
        ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7.3"

    factory.series(tmp_path, hu=factory.hounsfield(1), edit=edit)
    with pytest.raises(DataError, match=r"000\.dcm"):
        read_series(only(tmp_path))


def deflated(content: bytes, body: bytes | None = None) -> bytes:
    """The same file in the deflated transfer syntax; `body` replaces the compressed dataset."""
    import zlib

    start = 144 + struct.unpack("<I", content[140:144])[0]
    packer = zlib.compressobj(wbits=-15)
    body = packer.compress(content[start:]) + packer.flush() if body is None else body
    meta = content[144:start]
    old, new = b"UI\x14\x001.2.840.10008.1.2.1\0", b"UI\x16\x001.2.840.10008.1.2.1.99"
    meta = meta.replace(old, new)
    return content[:140] + struct.pack("<I", len(meta)) + meta + body


def test_deflated_series(tmp_path):
    truth = factory.series(tmp_path)
    for path in truth.files:
        damage(path, deflated)
    agree(read(tmp_path), truth)


@pytest.mark.parametrize("inside", [b"", "header"], ids=["nothing but zeros", "an image that never ends"])
def test_deflate_bomb(tmp_path, inside):
    import zlib

    def edit(ds, k):
        ds.Rows = ds.Columns = 32768

    truth = factory.series(tmp_path, hu=factory.hounsfield(1), edit=edit)
    content = truth.files[0].read_bytes()
    head = b""
    if inside:  # a header that asks for two gigabytes
        at = pixel_length_at(content)
        head = content[144 + struct.unpack("<I", content[140:144])[0] : at] + struct.pack("<I", 2**31)
    packer = zlib.compressobj(9, wbits=-15)
    body = packer.compress(head) + b"".join(packer.compress(bytes(2**24)) for _ in range(24)) + packer.flush()
    truth.files[0].write_bytes(deflated(content, body))
    import tracemalloc

    tracemalloc.start()
    started = time.process_time()
    sources, skipped = find_series(truth.files)
    assert bool(sources) == bool(inside)
    assert bool(skipped) != bool(inside)
    if sources:
        with pytest.raises(UnreadableScan, match="bomb"):
            read_series(sources[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert time.process_time() - started < 4


@pytest.mark.parametrize("depth", [300, 1000, 5000])
@pytest.mark.parametrize("stated", [True, False], ids=["stated lengths", "undefined lengths"])
def test_nested_sequences(tmp_path, depth, stated):
    truth = factory.series(tmp_path, hu=factory.hounsfield(1))
    tag = b"\x08\x00\x40\x11SQ\0\0"
    inner = b""
    if stated:
        for _ in range(depth):
            item = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(inner)) + inner
            inner = tag + struct.pack("<I", len(item)) + item
    else:
        opening = tag + b"\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
        inner = opening * depth + b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * depth

    def nest(content):
        at = content.index(b"\x10\x00\x10\x00PN")
        return content[:at] + inner + content[at:]

    damage(truth.files[0], nest)
    started = time.process_time()
    sources, skipped = find_series(truth.files)
    assert time.process_time() - started < 2
    if sources:
        np.testing.assert_array_equal(hu(read_series(sources[0])), truth.hu)
    else:
        assert "nested" in skipped[0].reason


def test_text_where_a_number_belongs_is_not_repeated(tmp_path):
    factory.series(tmp_path, edit=lambda ds, k: ds.add_new("RescaleSlope", "LO", "CANARY"))
    refused(tmp_path, UnreadableScan, "RescaleSlope", ".dcm")


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_positions_that_are_not_finite(tmp_path, value):
    truth = factory.series(tmp_path)
    damage(
        truth.files[4], lambda content: content.replace(b"-12\\-10\\40 ", f"{value}\\-10\\40".encode().ljust(11)[:11])
    )
    refused(tmp_path, UnreadableScan, "004.dcm", "ImagePositionPatient")


def test_hostile_identifiers_are_neither_followed_nor_repeated(tmp_path):
    truth = factory.series(tmp_path, hu=factory.hounsfield(1))
    honest = factory.uid("series", "a").encode()
    damage(truth.files[0], lambda content: content.replace(honest, b"../../CANARY/".ljust(len(honest), b"x")))
    source = only(tmp_path)
    assert "CANARY" not in source.path
    assert read_series(source).is_planar


def test_executable_preamble_is_noted(tmp_path, notes):
    truth = factory.series(tmp_path, hu=factory.hounsfield(1))
    damage(truth.files[0], lambda content: b"MZ" + content[2:])
    assert read(tmp_path).is_planar
    assert any("program" in note and "000.dcm" in note for note in notes)


def test_random_damage_gives_typed_errors_or_the_same_geometry(tmp_path):
    truth = factory.series(tmp_path, hu=factory.hounsfield(3))
    content = truth.files[1].read_bytes()
    rng = np.random.default_rng(5)
    header = pixel_length_at(content) + 4
    for _ in range(150):
        changed = bytearray(content)
        for at in rng.integers(0, header, 3):
            changed[at] = rng.integers(0, 256)
        truth.files[1].write_bytes(bytes(changed))
        sources, _ = find_series(truth.files)
        for source in sources:
            try:
                read_series(source)
            except DataError as error:
                assert len(str(error)) > 20  # noqa: PT017 - any message will do, only the type matters


def test_unsupported_transfer_syntax_is_named(tmp_path):
    mpeg = "1.2.840.10008.1.2.4.102"

    def edit(ds, k):
        from pydicom.encaps import encapsulate

        ds.file_meta.TransferSyntaxUID = mpeg
        ds.PixelData = encapsulate([b"\0" * 64])
        ds["PixelData"].is_undefined_length = True

    factory.series(tmp_path, hu=factory.hounsfield(1), edit=edit)
    refused(tmp_path, UnreadableScan, "000.dcm", mpeg)


# -- what would go wrong quietly -----------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["EchoNumbers", "TemporalPositionIdentifier", "DiffusionBValue"])
def test_two_sets_of_slices_do_not_interleave_into_a_finer_volume(tmp_path, keyword):
    """Two echoes half a step apart would look like one volume of half the spacing."""
    factory.series(tmp_path, edit=lambda ds, k: setattr(ds, keyword, 1 + k % 2))
    refused(tmp_path, InconsistentSeries, keyword, "000.dcm", "001.dcm")


def test_enhanced_files_of_one_frame_make_one_volume(tmp_path):
    from pydicom import dcmread

    hounsfield = factory.hounsfield()
    for k in range(20):
        path = factory.enhanced_ct(tmp_path / "x", hu=hounsfield[k : k + 1]).files[0]
        ds = dcmread(path)
        place = ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
        place.ImagePositionPatient = [-12.0, -10.0, 30.0 + k * factory.STEP]
        ds.SOPInstanceUID = factory.uid("single", k)
        factory.save(ds, tmp_path / f"{(k * 7) % 20:02d}.dcm")
        path.unlink()
    scan = read(tmp_path)
    np.testing.assert_array_equal(hu(scan), hounsfield.transpose(2, 1, 0))
    assert [path.name for path in only(tmp_path).files] == [f"{(k * 7) % 20:02d}.dcm" for k in range(20)]


def test_multiframe_files_of_one_name_in_two_folders_are_two_volumes(tmp_path):
    factory.enhanced_ct(tmp_path / "a")
    factory.enhanced_ct(tmp_path / "b", hu=factory.hounsfield(seed=9))
    sources, _ = find_series(sorted(tmp_path.rglob("*.dcm")))
    assert len(sources) == 2
    assert not np.array_equal(read_series(sources[0]).voxels, read_series(sources[1]).voxels)


def test_number_of_frames_that_is_no_number(tmp_path):
    truth = factory.series(tmp_path, edit=lambda ds, k: setattr(ds, "NumberOfFrames", "12"))
    for k, path in enumerate(truth.files):
        value = b"zz" if k < 5 else b"1 "
        damage(path, lambda content, value=value: content.replace(b"IS\x02\x0012", b"IS\x02\x00" + value))
    refused(tmp_path, UnreadableScan, "NumberOfFrames", "000.dcm")


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("PixelRepresentation", 2), ("SamplesPerPixel", 2), ("BitsAllocated", 12), ("HighBit", 11), ("BitsStored", 17)],
)
def test_contradictions_in_the_pixel_description(tmp_path, keyword, value):
    factory.series(tmp_path, edit=lambda ds, k: setattr(ds, keyword, value))
    refused(tmp_path, UnreadableScan, "000.dcm")


def test_grey_samples_that_call_themselves_colours(tmp_path):
    factory.series(tmp_path, edit=lambda ds, k: setattr(ds, "PhotometricInterpretation", "RGB"))
    refused(tmp_path, UnreadableScan, "RGB", "000.dcm")
    refused(tmp_path, UnreadableScan, "RGB", "000.dcm", colour=True)


def test_header_longer_than_the_first_gulp(tmp_path):
    """A private sequence of undefined length, 200 kB long, is cut by the first look at the file."""
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"\x11\x00\x10\x00LO\x40\x00" + b"x" * 64 + b"\xfe\xff\x0d\xe0\0\0\0\0"
    long = b"\x09\x00\x10\x00LO\x04\x00TEST" + b"\x09\x00\x01\x10SQ\0\0\xff\xff\xff\xff" + item * 2400
    long += b"\xfe\xff\xdd\xe0\0\0\0\0"

    def lengthen(content):
        at = content.index(b"\x10\x00\x10\x00PN")
        return content[:at] + long + content[at:]

    truth = factory.series(tmp_path, hu=factory.hounsfield(2))
    for path in truth.files:
        damage(path, lengthen)
    agree(read(tmp_path), truth)


def test_eight_bit_words_with_the_high_byte_first(tmp_path):
    """Bytes in big endian words are swapped in pairs, across rows of odd length."""
    from pydicom.uid import ExplicitVRBigEndian

    stored = np.random.default_rng(0).integers(0, 256, (5, 7))

    def edit(ds, k):
        factory.pixels(ds, stored, bits=8)
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds.PixelData = np.frombuffer(ds.PixelData, "u2").byteswap().tobytes()
        ds["PixelData"].VR = "OW"

    factory.radiograph(tmp_path, stored, edit=edit)
    scan = read(tmp_path)
    np.testing.assert_array_equal(scan.voxels[0, :, :, 0], stored.T)


def test_rounded_positions_of_a_few_thin_slices_are_no_tilt(tmp_path):
    def edit(ds, k):
        ds.ImagePositionPatient = [-12.0, -10.01 if k else -10.0, 30 + 1.25 * k]

    factory.series(tmp_path, hu=factory.hounsfield(3), step=(0, 0, 1.25), edit=edit)
    assert read(tmp_path).grid.shape == (30, 24, 3)


def test_filling_a_gap_of_a_kilometre_allocates_nothing(tmp_path):
    def edit(ds, k):
        if k == 19:
            ds.ImagePositionPatient = [-12, -10, 30 + 2.5 * 10**7]

    factory.series(tmp_path, edit=edit)
    for repair in ("fill", "resample"):
        with pytest.raises(DataError, match="voxels"):
            series_header(only(tmp_path), ReadOptions(on_gap=repair))


def test_a_concatenation_is_not_read_in_part(tmp_path):
    from pydicom import dcmread

    truth = factory.enhanced_ct(tmp_path)
    ds = dcmread(truth.files[0])
    ds.InConcatenationTotalNumber = 2
    ds.save_as(truth.files[0])
    refused(tmp_path, InconsistentSeries, "concatenation", "enhanced.dcm")


def test_copies_with_an_empty_acquisition_number_still_count_as_copies(tmp_path, notes):
    truth = factory.series(tmp_path, edit=lambda ds, k: ds.add_new("AcquisitionNumber", "IS", None))
    agree(read(tmp_path), truth)
    assert not notes
