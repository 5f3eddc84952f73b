"""NRRD and MetaImage: what SimpleITK decodes is right only if the file says everything and is whole."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from medgen.errors import DataError, GeometryError, MedgenError, UnreadableScan
from medgen.grid import Grid
from medgen.io.itk import read_itk
from medgen.io.source import ReadOptions

SHAPE = (9, 8, 7)
ENDINGS = [".nrrd", ".nhdr", ".mha", ".mhd"]
LPS = np.array([[0.8, 0, 0, 5], [0, -1.2, 0, 6], [0, 0, 2.5, -7], [0, 0, 0, 1]])


def values(shape: tuple = SHAPE, dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 100, shape).astype(dtype)


def image_of(voxels: np.ndarray, *, vector: bool = False, lps: np.ndarray = LPS) -> SimpleITK.Image:
    """The voxels (i, j[, k[, t]]) or, with `vector`, (i, j, k, c) as SimpleITK holds them."""
    axes = (2, 1, 0, 3) if vector else tuple(range(voxels.ndim))[::-1]
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.transpose(axes)), isVector=vector)
    n = min(image.GetDimension(), 3)
    spacing = np.linalg.norm(lps[:n, :n], axis=0)
    full = np.eye(image.GetDimension())
    full[:n, :n] = lps[:n, :n] / spacing
    rest = image.GetDimension() - n
    image.SetSpacing([*spacing.tolist(), *[1.0] * rest])
    image.SetDirection(full.ravel().tolist())
    image.SetOrigin([*lps[:n, 3].tolist(), *[0.0] * rest])
    return image


def saved(folder: Path, ending: str = ".mha", compress: bool = False, voxels: np.ndarray | None = None, **more) -> Path:
    path = folder / f"a{ending}"
    SimpleITK.WriteImage(image_of(values() if voxels is None else voxels, **more), str(path), useCompression=compress)
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
def test_numbers_and_place_are_kept(kind: str, ending: str, compress: bool, tmp_path: Path) -> None:
    scan = read_itk(saved(tmp_path, ending, compress, values(dtype=np.dtype(kind))))
    assert scan.voxels.dtype == np.dtype(kind)
    np.testing.assert_array_equal(scan.voxels[0], values())
    np.testing.assert_allclose(scan.grid.affine, np.diag([-1, -1, 1, 1]) @ LPS, atol=1e-12)
    assert scan.header.space == 1


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_vectors_and_time_become_channels(ending: str, tmp_path: Path) -> None:
    voxels = values((*SHAPE, 3), np.float32)
    vector = read_itk(saved(tmp_path, ending, voxels=voxels, vector=True))
    np.testing.assert_array_equal(vector.voxels, np.moveaxis(voxels, -1, 0))
    np.testing.assert_allclose(vector.grid.lps, LPS, atol=1e-12)
    if ending == ".mha":
        series = read_itk(saved(tmp_path, ending, voxels=voxels))
        np.testing.assert_array_equal(series.voxels, np.moveaxis(voxels, -1, 0))
        np.testing.assert_allclose(series.grid.lps, LPS, atol=1e-12)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_a_planar_image_is_one_slice_of_unknown_space(ending: str, tmp_path: Path) -> None:
    scan = read_itk(saved(tmp_path, ending, voxels=values((9, 8))))
    assert scan.is_planar
    np.testing.assert_array_equal(scan.voxels[0, ..., 0], values((9, 8)))
    assert scan.grid.spacing == pytest.approx((0.8, 1.2, 1.0))
    assert scan.header.space == 0


def nrrd(path: Path, lines: list[str], data: bytes) -> Path:
    path.write_bytes("\n".join(["NRRD0005", *lines, "", ""]).encode() + data)
    return path


PLAIN = ["type: short", "dimension: 3", "sizes: 9 8 7", "endian: little", "encoding: raw"]
PLACE = ["space directions: (0.8,0,0) (0,-1.2,0) (0,0,2.5)", "space origin: (5,6,-7)"]
DATA = values().T.tobytes()


@pytest.mark.parametrize(
    ("space", "signs"),
    [("left-posterior-superior", [-1, -1, 1]), ("RAS", [1, 1, 1]), ("left-anterior-superior", [-1, 1, 1])],
)
def test_every_named_space_ends_in_ras(space: str, signs: list, tmp_path: Path) -> None:
    scan = read_itk(nrrd(tmp_path / "a.nrrd", [*PLAIN, f"space: {space}", *PLACE], DATA))
    truth = np.diag([*signs, 1]) @ LPS
    assert scan.grid.close(Grid(SHAPE, truth), millimetres=1e-9)
    np.testing.assert_array_equal(scan.voxels[0], values())


def test_a_sheared_nrrd_stays_sheared(tmp_path: Path) -> None:
    sheared = ["space: RAS", "space directions: (1,0,0) (0.3,2,0) (0,0,3)", "space origin: (0,0,0)"]
    scan = read_itk(nrrd(tmp_path / "a.nrrd", [*PLAIN, *sheared], DATA))
    np.testing.assert_allclose(scan.grid.affine[:3, :3], [[1, 0.3, 0], [0, 2, 0], [0, 0, 3]], atol=1e-12)


@pytest.mark.parametrize("kinds", [("list", 0), ("vector", 0), ("list", 3)])
def test_a_channel_axis_may_come_first_or_last(kinds: tuple, tmp_path: Path) -> None:
    kind, at = kinds
    words = ["domain"] * 3
    words.insert(at, kind)
    directions = ["(0.8,0,0)", "(0,-1.2,0)", "(0,0,2.5)"]
    directions.insert(at, "none")
    sizes = [9, 8, 7]
    sizes.insert(at, 2)
    voxels = values((9, 8, 7, 2), np.float32)
    stored = np.moveaxis(voxels, -1, at)
    lines = ["type: float", "dimension: 4", f"sizes: {' '.join(map(str, sizes))}", f"kinds: {' '.join(words)}"]
    lines += ["endian: little", "encoding: raw", "space: LPS", f"space directions: {' '.join(directions)}"]
    scan = read_itk(nrrd(tmp_path / "a.nrrd", [*lines, "space origin: (5,6,-7)"], stored.T.tobytes()))
    np.testing.assert_array_equal(scan.voxels, np.moveaxis(voxels, -1, 0))
    np.testing.assert_allclose(scan.grid.lps, LPS, atol=1e-12)


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "error", "says"),
    [
        (PLAIN, GeometryError, "which side is left"),
        ([*PLAIN, "spacings: 1 2 3"], GeometryError, "which side is left"),
        ([*PLAIN, "space dimension: 3", *PLACE], GeometryError, "which side is left"),
        ([*PLAIN, "space: scanner-xyz", *PLACE], GeometryError, "which side is left"),
        ([*PLAIN, "space: RAS"], GeometryError, "which side is left"),
        ([*PLAIN, "space: RAS", *PLACE, 'space units: "m" "m" "m"'], GeometryError, "mm"),
        ([*PLAIN, "space: RAS", PLACE[0].replace("0.8", "0"), PLACE[1]], MedgenError, "a.nrrd"),
        ([*PLAIN[:4], "encoding: ascii", "space: RAS", *PLACE], UnreadableScan, "raw or gzip"),
        ([*PLAIN, "byte skip: 10", "space: RAS", *PLACE], UnreadableScan, "skipped"),
        ([*PLAIN[:2], "sizes: 9 8 6", *PLAIN[3:], "space: RAS", *PLACE], UnreadableScan, "more"),
        ([*PLAIN[:2], "sizes: 9 8 8", *PLAIN[3:], "space: RAS", *PLACE], UnreadableScan, "fewer"),
        ([*PLAIN[:2], "sizes: 30000 30000 30000", *PLAIN[3:], "space: RAS", *PLACE], DataError, "at most"),
        ([*PLAIN[:2], "sizes: 9 8 0", *PLAIN[3:], "space: RAS", *PLACE], MedgenError, "a.nrrd"),
        (["type: block", *PLAIN[1:], "space: RAS", *PLACE], UnreadableScan, "a.nrrd"),
        ([*PLAIN, "space: RAS", *PLACE, "data file: ../elsewhere.raw"], UnreadableScan, "outside"),
        ([*PLAIN, "space: RAS", *PLACE, "data file: /etc/passwd"], UnreadableScan, "outside"),
        ([*PLAIN, "space: RAS", *PLACE, "data file: missing.raw"], UnreadableScan, "not there"),
        ([*PLAIN, "space: RAS", *PLACE, "data file: LIST"], UnreadableScan, "one data file"),
        ([*PLAIN, "space: RAS", *PLACE, "data file: a%03d.raw 1 7 1"], UnreadableScan, "one data file"),
    ],
)
def test_an_nrrd_that_leaves_things_out_is_refused(lines: list, error: type, says: str, tmp_path: Path) -> None:
    (tmp_path.parent / "elsewhere.raw").write_bytes(DATA)
    with pytest.raises(error, match=says) as caught:
        read_itk(nrrd(tmp_path / "a.nrrd", lines, DATA))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "error", "says"),
    [
        ("ElementSpacing = ", "Comment = ", GeometryError, "ElementSpacing"),
        ("TransformMatrix = ", "Comment = ", GeometryError, "TransformMatrix"),
        ("Offset = ", "Comment = ", GeometryError, "Offset"),
        ("CompressedData = False", "CompressedData = True", UnreadableScan, "damaged"),
        ("BinaryData = True", "BinaryData = False", UnreadableScan, "binary"),
        ("NDims = 3", "NDims = 3\nHeaderSize = -1", UnreadableScan, "header of their own"),
        ("NDims = 3", "NDims = 3\nDistanceUnits = m", GeometryError, "mm"),
        ("DimSize = 9 8 7", "DimSize = 9 8 6", UnreadableScan, "more"),
        ("DimSize = 9 8 7", "DimSize = 9 8 9", UnreadableScan, "fewer"),
        ("DimSize = 9 8 7", "DimSize = 9 8 -7", MedgenError, "a.mha"),
        ("MET_SHORT", "MET_FLOAT", UnreadableScan, "fewer"),
        ("MET_SHORT", "MET_NONE", MedgenError, "a.mha"),
        ("ElementDataFile = LOCAL", "ElementDataFile = ../elsewhere.raw", UnreadableScan, "outside"),
        ("ElementDataFile = LOCAL", "ElementDataFile = LIST", UnreadableScan, "one data file"),
        ("ElementDataFile = LOCAL", "", UnreadableScan, "a.mha"),
        ("ObjectType = Image", "PNG", MedgenError, "a.mha"),
    ],
)
def test_a_metaimage_that_leaves_things_out_is_refused(
    old: str, new: str, error: type, says: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path.parent / "elsewhere.raw").write_bytes(DATA)
    path = saved(tmp_path)
    assert old.encode() in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode(), 1))
    with pytest.raises(error, match=says):
        read_itk(path)


def split(path: Path) -> tuple[Path, int]:
    """The file with the voxels' bytes, and where they begin."""
    for other in path.parent.iterdir():
        if other != path:
            return other, 0
    data = path.read_bytes()
    marks = {".mha": b"ElementDataFile = LOCAL\n", ".nrrd": b"\n\n"}
    return path, data.index(marks[path.suffix]) + len(marks[path.suffix])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data + b"garbage",
    ],
)
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_truncated_and_surplus_bytes_are_refused(ending: str, compress: bool, spoil: Callable, tmp_path: Path) -> None:
    path = saved(tmp_path, ending, compress)
    place, start = split(path)
    data = place.read_bytes()
    place.write_bytes(data[:start] + spoil(data[start:]))
    with pytest.raises(UnreadableScan, match=path.name):
        read_itk(path)


@pytest.mark.parametrize("where", np.linspace(0.02, 0.98, 9))
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_flipped_bit_in_compressed_voxels_is_noticed(ending: str, where: float, tmp_path: Path) -> None:
    path = saved(tmp_path, ending, compress=True)
    place, start = split(path)
    data = bytearray(place.read_bytes())
    data[start + int(where * (len(data) - start))] ^= 1 << int(where * 1000) % 8
    place.write_bytes(data)
    with pytest.raises(UnreadableScan, match=path.name):
        read_itk(path)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_bomb_is_inflated_no_further_than_announced(pack: Callable, tmp_path: Path) -> None:
    ending = ".nrrd" if pack is gzip.compress else ".mha"
    path = saved(tmp_path, ending, compress=True)
    place, start = split(path)
    place.write_bytes(place.read_bytes()[:start] + pack(bytes(1 << 26)))
    with pytest.raises(UnreadableScan, match="more"):
        read_itk(path)


def test_numbers_that_are_not_finite_are_refused_or_zero(tmp_path: Path) -> None:
    voxels = values(dtype=np.float32)
    voxels[0, 0, 0] = np.nan
    path = saved(tmp_path, ".nrrd", voxels=voxels)
    with pytest.raises(DataError, match="NaN"):
        read_itk(path)
    assert read_itk(path, ReadOptions(on_nan="zero")).voxels[0, 0, 0, 0] == 0


@pytest.mark.parametrize("content", [b"", b"NRRD0004\n", b"\x89PNG" * 100, b"ObjectType = Image\n"])
def test_what_is_neither_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes(content)
    with pytest.raises(UnreadableScan, match=r"a\.nrrd"):
        read_itk(tmp_path / "a.nrrd")
    with pytest.raises(UnreadableScan, match="No such file"):
        read_itk(tmp_path / "b.nrrd")


def test_real_scans_lie_where_simpleitk_puts_them(shared_data: Path) -> None:
    for path in sorted((shared_data / "lesion_pyradiomics").glob("*.nrrd")):
        scan, image = read_itk(path), SimpleITK.ReadImage(str(path))
        np.testing.assert_array_equal(scan.voxels[0], SimpleITK.GetArrayFromImage(image).T)
        for corner in ((0, 0, 0), tuple(n - 1 for n in scan.grid.shape), (3, 10, 7)):
            x, y, z = image.TransformIndexToPhysicalPoint(corner)
            np.testing.assert_allclose(scan.grid.world(corner), [-x, -y, z], atol=1e-9)
