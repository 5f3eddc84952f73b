"""NIfTI in and out: what is right is kept to the last bit, what is wrong is refused with a sentence."""

import contextlib
import gzip
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medgen import log
from medgen.errors import ConfigError, DataError, GeometryError, MedgenError, OutputError, UnreadableScan
from medgen.grid import Grid
from medgen.io.nifti import nifti_header, read_nifti, write_nifti
from medgen.io.source import ReadOptions
from medgen.scan import Header, Scale, Scan

AFFINE = np.array([[-1.5, 0, 0, 40], [0, 2, 0, -30], [0, 0, 2.5, 10], [0, 0, 0, 1.0]])
SHAPE = (6, 5, 4)


def values(shape: tuple = SHAPE, dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 100, shape).astype(dtype)


def image_of(voxels: np.ndarray, header: type = nib.Nifti1Header) -> nib.Nifti1Image:
    image = {nib.Nifti1Header: nib.Nifti1Image, nib.Nifti2Header: nib.Nifti2Image}[header](
        voxels, AFFINE, dtype=voxels.dtype
    )
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    image.header.set_xyzt_units("mm", "sec")
    return image


def saved(path: Path, change: Callable[[np.ndarray], None] = lambda header: None, **more) -> Path:
    """A good file, or one whose header fields `change` has spoiled, byte for byte."""
    raw = bytearray(image_of(**({"voxels": values()} | more)).to_bytes())
    dtype = nib.Nifti1Header.template_dtype
    header = np.frombuffer(raw, dtype=dtype, count=1).copy()
    change(header[0])
    raw[: dtype.itemsize] = header.tobytes()
    path.write_bytes(gzip.compress(bytes(raw), 1) if path.suffix == ".gz" else bytes(raw))
    return path


def field(name: str, value: object, at: int | None = None) -> Callable[[np.ndarray], None]:
    def change(header: np.ndarray) -> None:
        if at is None:
            header[name] = value
        else:
            header[name][at] = value

    return change


class Listener(log.Reporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def notes() -> list[str]:
    listener = Listener()
    with log.reporting(listener):
        yield listener.notes


# -- what is right ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_every_number_type_is_kept(kind: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    nib.save(image_of(values(dtype=np.dtype(kind))), path)
    scan = read_nifti(path)
    assert scan.voxels.dtype == np.dtype(kind)
    np.testing.assert_array_equal(scan.voxels[0], values())
    np.testing.assert_array_equal(scan.grid.affine, AFFINE)
    assert scan.scale == Scale()
    assert scan.header == Header(space=1)
    grid, channels, dtype, header = nifti_header(path)
    assert (grid, channels, dtype, header) == (scan.grid, 1, scan.voxels.dtype, scan.header)


def test_big_endian_becomes_native(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    image = nib.Nifti1Image(values(dtype=np.float32), AFFINE, header)
    image.set_sform(AFFINE, 1)
    nib.save(image, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == b"\x00\x00\x01\x5c"
    scan = read_nifti(tmp_path / "a.nii")
    assert scan.voxels.dtype == np.float32
    assert scan.voxels.dtype.isnative
    np.testing.assert_array_equal(scan.voxels[0], values())


def test_nifti_2_is_read(tmp_path: Path) -> None:
    nib.save(image_of(values(), nib.Nifti2Header), tmp_path / "a.nii.gz")
    scan = read_nifti(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(scan.voxels[0], values())
    np.testing.assert_array_equal(scan.grid.affine, AFFINE)


def test_content_and_not_the_name_says_what_is_compressed(tmp_path: Path) -> None:
    saved(tmp_path / "a.nii.gz").rename(tmp_path / "b.nii")
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii").voxels[0], values())


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((6,), (1, 6, 1, 1)),
        ((6, 5), (1, 6, 5, 1)),
        ((6, 5, 4, 1), (1, 6, 5, 4)),
        ((6, 5, 4, 3), (3, 6, 5, 4)),
        ((6, 5, 4, 1, 2), (2, 6, 5, 4)),
        ((6, 5, 1, 7), (7, 6, 5, 1)),
        ((6, 5, 4, 1, 1, 1, 1), (1, 6, 5, 4)),
        ((1, 1, 1), (1, 1, 1, 1)),
    ],
)
def test_dimensions_become_channels_and_space(stored: tuple, expected: tuple, tmp_path: Path) -> None:
    voxels = values(stored)
    raw = bytearray(image_of(voxels).to_bytes())
    (tmp_path / "a.nii").write_bytes(raw)
    # Trailing ones may be dropped by nibabel's writer: state all dimensions as the case wants them.
    header = np.frombuffer(raw, dtype=nib.Nifti1Header.template_dtype, count=1).copy()
    header["dim"][0] = [len(stored), *stored, *[1] * (7 - len(stored))]
    (tmp_path / "a.nii").write_bytes(header.tobytes() + raw[348:])
    scan = read_nifti(tmp_path / "a.nii")
    assert scan.voxels.shape == expected
    assert nifti_header(tmp_path / "a.nii")[1] == expected[0]
    for channel in range(expected[0]):
        one = voxels.reshape(*expected[1:], expected[0])[..., channel]
        np.testing.assert_array_equal(scan.voxels[channel], one)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_voxels_may_begin_anywhere(ending: str, tmp_path: Path) -> None:
    raw = image_of(values(dtype=np.float32)).to_bytes()
    header = np.frombuffer(raw, dtype=nib.Nifti1Header.template_dtype, count=1).copy()
    header["vox_offset"] = 357
    data = header.tobytes() + raw[348:352] + bytes(5) + raw[352:]
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(data) if ending == ".nii.gz" else data)
    scan = read_nifti(path)
    np.testing.assert_array_equal(scan.voxels[0], values())
    # Not every library takes numbers that lie across the machine's words.
    assert scan.voxels.flags.aligned


def test_an_uncompressed_file_is_mapped_not_read(tmp_path: Path) -> None:
    scan = read_nifti(saved(tmp_path / "a.nii"))
    base = scan.voxels
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert not isinstance(base, np.ndarray)


@pytest.mark.parametrize(
    ("slope", "inter", "expected"),
    [
        (2.0, -1024.0, Scale(2.0, -1024.0)),
        (0, 7, Scale()),
        (np.nan, 7, Scale()),
        (np.inf, 0, Scale()),
        (-0.5, 0, Scale(-0.5)),
    ],
)
def test_scaling_counts_only_with_a_true_slope(slope: float, inter: float, expected: Scale, tmp_path: Path) -> None:
    def change(header: np.ndarray) -> None:
        header["scl_slope"], header["scl_inter"] = slope, inter

    scan = read_nifti(saved(tmp_path / "a.nii", change))
    assert scan.scale == expected
    assert scan.voxels.dtype == np.int16
    np.testing.assert_allclose(scan.physical()[0], values() * expected.slope + expected.intercept)


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000), (2, 1), (3, 0.001)])
def test_units_become_millimetres(unit: int, factor: float, tmp_path: Path) -> None:
    grid = read_nifti(saved(tmp_path / "a.nii", field("xyzt_units", unit | 8))).grid
    np.testing.assert_allclose(grid.affine[:3], AFFINE[:3] * factor)


def test_no_unit_means_millimetres_and_is_said(notes: list[str], tmp_path: Path) -> None:
    assert read_nifti(saved(tmp_path / "a.nii", field("xyzt_units", 0))).grid.spacing == (1.5, 2.0, 2.5)
    assert len(notes) == 1
    assert "a.nii" in notes[0]


def test_a_label_intent_is_a_label(tmp_path: Path) -> None:
    assert read_nifti(saved(tmp_path / "a.nii", field("intent_code", 1002))).is_label
    assert not read_nifti(saved(tmp_path / "a.nii")).is_label


def test_the_code_of_the_form_is_kept(tmp_path: Path) -> None:
    def change(header: np.ndarray) -> None:
        header["sform_code"], header["qform_code"] = 4, 2

    path = saved(tmp_path / "a.nii", change)
    assert read_nifti(path).header.space == 4
    assert read_nifti(path, ReadOptions(xform="qform")).header.space == 2


def test_a_missing_handedness_is_right(tmp_path: Path) -> None:
    right = np.diag([1.0, 1, 1, 1])

    def change(header: np.ndarray) -> None:
        header["pixdim"][:4] = [0, 1, 1, 1]
        header["sform_code"] = 0
        for part in "bcd":
            header[f"quatern_{part}"] = 0
        for axis in "xyz":
            header[f"qoffset_{axis}"] = 0

    np.testing.assert_allclose(read_nifti(saved(tmp_path / "a.nii", change)).grid.affine, right)


# -- two forms -------------------------------------------------------------------------------------


def test_forms_that_disagree_must_be_chosen_between(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", field("qoffset_x", 129))
    with pytest.raises(GeometryError, match=r"a\.nii.*89 mm apart.*xform"):
        read_nifti(path)
    with pytest.raises(GeometryError):
        nifti_header(path)
    assert read_nifti(path, ReadOptions(xform="sform")).grid.origin[0] == 40
    assert read_nifti(path, ReadOptions(xform="qform")).grid.origin[0] == 129


def test_forms_are_compared_at_the_far_end_of_the_grid(tmp_path: Path) -> None:
    def shift(by: float) -> Callable[[np.ndarray], None]:
        def change(header: np.ndarray) -> None:
            header["srow_z"][2] = 2.5 + by

        return change

    read_nifti(saved(tmp_path / "a.nii", shift(0.002)))
    with pytest.raises(GeometryError, match="apart"):
        read_nifti(saved(tmp_path / "a.nii", shift(0.003)))


def test_a_planar_image_with_forms_that_look_from_opposite_sides_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", field("srow_z", [0, 0, -2.5, 10]), voxels=values((6, 5, 1)))
    with pytest.raises(GeometryError, match="apart"):
        read_nifti(path)


def test_rounding_of_a_quaternion_near_half_a_turn_is_no_disagreement(tmp_path: Path) -> None:
    from scipy.spatial.transform import Rotation

    for degrees in (179.9, 179.99, 180.0):
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_rotvec([0.01, 0.02, degrees], degrees=True).as_matrix() * 0.9
        image = nib.Nifti1Image(np.zeros((200, 200, 150), dtype=np.uint8), affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        nib.save(image, tmp_path / "a.nii")
        np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").grid.affine, affine, atol=1e-6)


def test_a_sheared_grid_is_kept(tmp_path: Path) -> None:
    affine = AFFINE.copy()
    affine[1, 2] = 0.8
    image = nib.Nifti1Image(values(), affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").grid.affine, affine, rtol=1e-7)


# -- what is wrong ---------------------------------------------------------------------------------


def no_forms(header: np.ndarray) -> None:
    header["sform_code"] = header["qform_code"] = 0


def no_affine(header: np.ndarray) -> None:
    header["qform_code"] = 0
    for row in "xyz":
        header[f"srow_{row}"] = 0


def nan_affine(header: np.ndarray) -> None:
    header["qform_code"] = 0
    header["srow_x"][0] = np.nan


def singular_affine(header: np.ndarray) -> None:
    header["qform_code"] = 0
    header["srow_x"], header["srow_y"] = [1, 1, 0, 0], [2, 2, 0, 0]


def huge(header: np.ndarray) -> None:
    header["dim"][1:4] = 30000


def broken_qform(header: np.ndarray) -> None:
    header["sform_code"] = 0
    header["quatern_b"] = 3


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (field("dim", 0, at=0), UnreadableScan, "1 to 7 dimensions"),
        (field("dim", 8, at=0), UnreadableScan, "NIfTI|1 to 7"),
        (field("dim", -3, at=1), UnreadableScan, "at least 1"),
        (field("dim", 0, at=2), UnreadableScan, "at least 1"),
        (field("dim", 5, at=3), UnreadableScan, "cut short"),
        (field("dim", 3, at=3), UnreadableScan, "holds more"),
        (field("dim", [5, 2, 2, 2, 3, 5, 1, 1]), DataError, "Split it first"),
        (field("dim", [6, 2, 2, 2, 1, 1, 15, 1]), DataError, "Split it first"),
        (huge, DataError, "30000 x 30000"),
        (field("datatype", 1234), UnreadableScan, "1234"),
        (field("datatype", 32), UnreadableScan, "complex"),
        (field("datatype", 1536), UnreadableScan, "128 bit"),
        (field("datatype", 2304), UnreadableScan, "RGBA"),
        (field("datatype", 128), DataError, "colour=True"),
        (field("vox_offset", 1e9), UnreadableScan, "cut short|can hold"),
        (field("vox_offset", 0), UnreadableScan, "byte 352"),
        (field("vox_offset", np.nan), UnreadableScan, "byte 352"),
        (field("scl_inter", np.nan), UnreadableScan, "scl_inter"),
        (field("xyzt_units", 5), GeometryError, "unit"),
        (field("magic", b"ni1"), UnreadableScan, "pair"),
        (field("magic", b"xxx"), UnreadableScan, "NIfTI"),
        (no_forms, GeometryError, "which side is left"),
        (no_affine, GeometryError, "spacing"),
        (nan_affine, GeometryError, "finite"),
        (singular_affine, GeometryError, "singular"),
        (broken_qform, GeometryError, "no rotation"),
    ],
)
def test_a_spoiled_header_is_refused(change: Callable, error: type, says: str, ending: str, tmp_path: Path) -> None:
    def with_slope(header: np.ndarray) -> None:
        header["scl_slope"] = 1
        header["scl_inter"] = 0
        change(header)

    path = saved(tmp_path / f"case{ending}", with_slope)
    with pytest.raises(error, match=says) as caught:
        read_nifti(path)
    assert path.name in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_planar_image_without_orientation_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match="set_sform"):
        read_nifti(saved(tmp_path / "a.nii", no_forms, voxels=values((6, 5))))


def test_colour_is_read_on_request(tmp_path: Path) -> None:
    colours = values((6, 5, 4, 3), np.uint8)
    packed = np.ascontiguousarray(colours).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nib.save(image_of(packed), tmp_path / "a.nii.gz")
    scan = read_nifti(tmp_path / "a.nii.gz", ReadOptions(colour=True))
    np.testing.assert_array_equal(scan.voxels, np.moveaxis(colours, -1, 0))
    assert scan.header.photometric == "RGB"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_what_is_not_finite_is_refused_or_zero(bad: float, kind: type, tmp_path: Path) -> None:
    voxels = values(dtype=kind)
    voxels[1, 2, 3] = bad
    nib.save(image_of(voxels), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=r"1 NaN or infinite.*\(0, 1, 2, 3\).*on_nan"):
        read_nifti(tmp_path / "a.nii.gz")
    scan = read_nifti(tmp_path / "a.nii.gz", ReadOptions(on_nan="zero"))
    voxels[1, 2, 3] = 0
    np.testing.assert_array_equal(scan.voxels[0], voxels)
    assert scan.voxels.dtype == kind


def test_the_cap_is_an_option(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii.gz")
    read_nifti(path, ReadOptions(max_voxels=120))
    with pytest.raises(DataError, match="at most 119 voxels"):
        read_nifti(path, ReadOptions(max_voxels=119))
    with pytest.raises(DataError, match="at most 119 voxels"):
        nifti_header(path, ReadOptions(max_voxels=119))


# -- damaged bytes ---------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> bytes:
    noise = np.random.default_rng(2).integers(0, 2000, (40, 40, 20)).astype(np.int16)
    return saved(tmp_path / "good.nii.gz", voxels=noise).read_bytes()


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    spoiled = bytearray(data)
    spoiled[at] ^= 1 << bit
    return bytes(spoiled)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[:-9],
        lambda data: data[: len(data) // 2],
        lambda data: data[:30],
        lambda data: flipped(data, -1),
        lambda data: flipped(data, -5),
        lambda data: flipped(data, -8),
        lambda data: data + b"garbage",
        lambda data: data + gzip.compress(b"more"),
        lambda data: gzip.compress(gzip.decompress(data)[:-1]),
        lambda data: gzip.compress(gzip.decompress(data)[:352]),
        lambda data: gzip.compress(gzip.decompress(data)[:100]),
        lambda data: gzip.compress(b""),
        lambda data: gzip.decompress(data)[:-1],
        lambda data: gzip.decompress(data)[:352],
        lambda data: gzip.decompress(data)[:200],
        lambda data: gzip.decompress(data) + b"x",
        lambda data: b"",
        lambda data: b"\x1f\x8b",
        lambda data: b"\x89PNG\r\n\x1a\n" * 100,
    ],
)
def test_damaged_bytes_are_refused(spoil: Callable, packed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.nii.gz"
    path.write_bytes(spoil(packed))
    with pytest.raises(UnreadableScan, match=r"bad\.nii\.gz"):
        read_nifti(path)


@pytest.mark.parametrize("where", np.linspace(0.02, 0.98, 25))
def test_every_flipped_bit_is_noticed(where: float, packed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.nii.gz"
    path.write_bytes(flipped(packed, int(where * len(packed)), bit=int(where * 1000) % 8))
    with pytest.raises(MedgenError):
        read_nifti(path)


def test_members_one_after_the_other_are_one_stream(packed: bytes, tmp_path: Path) -> None:
    raw = gzip.decompress(packed)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))
    read_nifti(tmp_path / "a.nii.gz")


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    # The header announces little, the stream goes on: it is inflated no further than announced.
    import time

    started = time.perf_counter()
    raw = image_of(values()).to_bytes()
    with gzip.open(tmp_path / "a.nii.gz", "wb", 1) as stream:
        stream.write(raw)
        for _ in range(64):
            stream.write(bytes(1 << 20))
    with pytest.raises(UnreadableScan, match="holds more"):
        read_nifti(tmp_path / "a.nii.gz")
    # The header announces a lot, the stream cannot hold it: nothing is allocated.
    path = saved(tmp_path / "b.nii.gz", field("dim", [3, 1000, 1000, 2000, 1, 1, 1, 1]))
    with pytest.raises(UnreadableScan, match="can hold"):
        read_nifti(path)
    assert time.perf_counter() - started < 4


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnreadableScan, match="no such file"):
        read_nifti(tmp_path / "a.nii")
    with pytest.raises(UnreadableScan, match="cannot be read"):
        read_nifti(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 347), st.integers(0, 255)), min_size=1, max_size=6))
def test_no_header_breaks_the_reader(tmp_path: Path, changes: list) -> None:
    raw = bytearray(image_of(values()).to_bytes())
    for at, value in changes:
        raw[at] = value
    path = tmp_path / "a.nii"
    path.write_bytes(raw)
    with contextlib.suppress(MedgenError):
        assert read_nifti(path, ReadOptions(on_nan="zero")).channels > 0


# -- writing ---------------------------------------------------------------------------------------


def scan_of(voxels: np.ndarray | None = None, affine: np.ndarray = AFFINE, **more) -> Scan:
    voxels = values()[None] if voxels is None else voxels
    return Scan(voxels, Grid(voxels.shape[1:], affine), **more)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_what_is_written_says_the_same_to_everybody(ending: str, tmp_path: Path) -> None:
    scan = scan_of(scale=Scale(2.0, -1024.0, "HU"), header=Header(space=4))
    path = write_nifti(scan, tmp_path / f"a{ending}")
    image = nib.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), values() * 2.0 - 1024)
    assert image.get_data_dtype() == np.int16
    for form in (image.get_sform(coded=True), image.get_qform(coded=True)):
        np.testing.assert_allclose(form[0], AFFINE, atol=1e-5)
        assert form[1] == 4
    assert image.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T, values() * 2.0 - 1024)
    again = read_nifti(path)
    np.testing.assert_array_equal(again.voxels, scan.voxels)
    assert (again.grid, again.header) == (scan.grid, scan.header)
    assert (again.scale.slope, again.scale.intercept) == (2.0, -1024.0)


def test_an_unknown_space_is_written_as_scanner(tmp_path: Path) -> None:
    path = write_nifti(scan_of(header=Header(space=0)), tmp_path / "a.nii")
    assert int(nib.load(path).header["sform_code"]) == int(nib.load(path).header["qform_code"]) == 1


def test_nibabel_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    block = write_nifti(scan_of(), tmp_path / "a.nii").read_bytes()[:348]
    assert nib.Nifti1Header.diagnose_binaryblock(block) == ""


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (bool, np.uint8),
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.int64, np.int32),
        (np.uint64, np.int32),
        (np.uint16, np.uint16),
        (np.int8, np.int8),
        (np.uint32, np.uint32),
        (">i2", np.int16),
    ],
)
def test_types_that_everybody_reads(dtype: object, stored: type, tmp_path: Path) -> None:
    voxels = (values() % 2).astype(dtype)[None]
    path = write_nifti(scan_of(voxels), tmp_path / "a.nii")
    assert nib.load(path).get_data_dtype() == stored
    np.testing.assert_array_equal(read_nifti(path).voxels, voxels)


@pytest.mark.parametrize(
    ("voxels", "says"),
    [
        (np.full((1, 2, 2, 2), 2**31, dtype=np.int64), "32 bits"),
        (np.full((1, 2, 2, 2), 2**40, dtype=np.uint64), "32 bits"),
        (np.full((1, 2, 2, 2), 1e300), "float32"),
        (np.full((1, 2, 2, 2), 1j), "complex"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(voxels: np.ndarray, says: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=says):
        write_nifti(scan_of(voxels), tmp_path / "a.nii")
    assert list(tmp_path.iterdir()) == []


def test_a_scale_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="float32"):
        write_nifti(scan_of(scale=Scale(1e-60)), tmp_path / "a.nii")


def test_nan_is_written_in_floats(tmp_path: Path) -> None:
    voxels = values(dtype=np.float64)[None]
    voxels[0, 1, 1, 1] = np.nan
    path = write_nifti(scan_of(voxels), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), voxels[0])


def test_channels_become_a_fourth_dimension(tmp_path: Path) -> None:
    voxels = values((3, *SHAPE))
    path = write_nifti(scan_of(voxels), tmp_path / "a.nii.gz")
    assert nib.load(path).shape == (*SHAPE, 3)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), np.moveaxis(voxels, 0, -1))
    np.testing.assert_array_equal(read_nifti(path).voxels, voxels)


def test_a_planar_scan_and_a_label_come_back(tmp_path: Path) -> None:
    scan = scan_of(values((1, 6, 5, 1)), is_label=True)
    again = read_nifti(write_nifti(scan, tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(again.voxels, scan.voxels)
    assert again.grid == scan.grid
    assert again.is_label


def test_unmeasured_voxels_are_marked(tmp_path: Path, notes: list[str]) -> None:
    valid = np.ones(SHAPE, dtype=bool)
    valid[0] = False
    padded = write_nifti(scan_of(valid=valid, header=Header(padding=-2000.0)), tmp_path / "a.nii")
    assert (np.asarray(nib.load(padded).dataobj)[0] == -2000).all()
    floats = write_nifti(scan_of(values(dtype=np.float32)[None], valid=valid), tmp_path / "b.nii")
    assert np.isnan(np.asarray(nib.load(floats).dataobj)[0]).all()
    assert not notes
    plain = write_nifti(scan_of(valid=valid), tmp_path / "c.nii")
    np.testing.assert_array_equal(np.asarray(nib.load(plain).dataobj), values())
    assert len(notes) == 1


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_the_same_scan_gives_the_same_bytes_under_any_name(ending: str, tmp_path: Path) -> None:
    strided = Scan(np.ascontiguousarray(values()[None]), Grid(SHAPE, AFFINE))
    packed = Scan(np.asfortranarray(values()[None]), Grid(SHAPE, AFFINE))
    one = write_nifti(strided, tmp_path / f"CANARY{ending}").read_bytes()
    other = write_nifti(packed, tmp_path / f"b{ending}").read_bytes()
    assert one == other
    assert b"CANARY" not in one
    if ending == ".nii.gz":
        assert one[4:8] == bytes(4)


def test_nothing_of_a_sources_words_is_copied(tmp_path: Path) -> None:
    image = image_of(values())
    for name in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[name] = b"CANARY"
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"CANARY^PHI"))
    nib.save(image, tmp_path / "a.nii")
    assert b"CANARY" in (tmp_path / "a.nii").read_bytes()
    scan = read_nifti(tmp_path / "a.nii")
    np.testing.assert_array_equal(scan.voxels[0], values())
    assert b"CANARY" not in write_nifti(scan, tmp_path / "b.nii").read_bytes()


def test_a_description_is_written_if_it_fits(tmp_path: Path) -> None:
    path = write_nifti(scan_of(), tmp_path / "a.nii", description="made by a model")
    assert nib.load(path).header["descrip"].item() == b"made by a model"
    for wrong in ("x" * 80, "ü"):
        with pytest.raises(ConfigError, match="80"):
            write_nifti(scan_of(), tmp_path / "b.nii", description=wrong)


def test_a_sheared_grid_has_an_sform_only(tmp_path: Path, notes: list[str]) -> None:
    affine = AFFINE.copy()
    affine[1, 2] = 0.8
    scan = scan_of(affine=affine)
    path = write_nifti(scan, tmp_path / "a.nii")
    assert len(notes) == 1
    assert nib.load(path).get_qform(coded=True) == (None, 0)
    assert read_nifti(path).grid.close(scan.grid, millimetres=1e-5)


def test_nifti_2_only_where_nifti_1_cannot(tmp_path: Path) -> None:
    largest = write_nifti(scan_of(np.zeros((1, 32767, 1, 1), np.uint8)), tmp_path / "a.nii")
    larger = scan_of(np.ones((1, 32768, 1, 1), np.uint8))
    assert isinstance(nib.load(largest), nib.Nifti1Image)
    image = nib.load(write_nifti(larger, tmp_path / "b.nii.gz"))
    assert isinstance(image, nib.Nifti2Image)
    np.testing.assert_array_equal(np.asarray(image.dataobj), larger.voxels[0])
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii.gz").voxels, larger.voxels)


def test_a_name_must_say_nifti(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.nii"):
        write_nifti(scan_of(), tmp_path / "a.nrrd")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_full_disk_leaves_nothing_and_what_stood_there_stays(ending: str, tmp_path: Path) -> None:
    path = write_nifti(scan_of(), tmp_path / f"a{ending}")
    before = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 2**15, (1, 60, 60, 60)).astype(np.int16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=r"a\.nii"):
            write_nifti(scan_of(noise), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_writing_over_the_file_that_was_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii")
    scan = read_nifti(path)
    write_nifti(scan.onto(scan.grid.flip(0), outside=0.0), path)
    np.testing.assert_array_equal(read_nifti(path).voxels[0], values()[::-1])
    np.testing.assert_array_equal(scan.voxels[0], values())


# -- real scans ------------------------------------------------------------------------------------


def test_real_scans_equal_what_nibabel_reads(shared_data: Path, tmp_path: Path) -> None:
    paths = [
        shared_data / "brain_t1_ds002748" / "native" / "sub-01_T1w.nii.gz",
        *sorted((shared_data / "ct_totalseg").glob("*.nii.gz")),
        *sorted((shared_data / "hippocampus_msd").rglob("*.nii.gz"))[::20],
        *sorted((shared_data / "lesion_ms").rglob("*.nii.gz"))[:2],
    ]
    kinds = set()
    for path in paths:
        scan, image = read_nifti(path), nib.load(path)
        kinds.add(scan.voxels.dtype)
        np.testing.assert_array_equal(scan.voxels[0], np.asarray(image.dataobj))
        np.testing.assert_allclose(scan.grid.affine, image.affine, atol=1e-6)
        again = read_nifti(write_nifti(scan, tmp_path / "again.nii.gz"))
        np.testing.assert_array_equal(again.voxels, scan.voxels)
        assert again.grid.close(scan.grid)
    assert {np.dtype(kind) for kind in ("u1", "i2", "f4")} <= kinds
