"""Pictures and .npz collections: every number kept, nothing invented, damage refused."""

import contextlib
import io
import os
import resource
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from medgen.errors import DataError, MedgenError, OutputError, UnreadableScan
from medgen.grid import Grid
from medgen.io.raster import npz_items, read_npz, read_raster, write_npz, write_raster
from medgen.io.source import ReadOptions
from medgen.scan import Scale, Scan

COLOUR = ReadOptions(colour=True)


def pixels(shape: tuple = (30, 50), dtype: type = np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(6).integers(0, high, shape).astype(dtype)


def saved(path: Path, values: np.ndarray | Image.Image, **more) -> Path:
    picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
    picture.save(path, **more)
    return path


def planar(values: np.ndarray, **more) -> Scan:
    """A scan of one channel from (h, w)."""
    voxels = values.T[None, ..., None]
    return Scan(voxels, Grid.from_lps(voxels.shape[1:], np.eye(4)), **more)


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "high"),
    [
        ("a.png", np.uint8, 256),
        ("a.png", np.uint16, 65536),
        ("a.tif", np.uint8, 256),
        ("a.tif", np.uint16, 65536),
        ("a.tiff", np.int32, 10**6),
        ("a.tif", np.float32, 1000),
    ],
)
def test_every_pixel_is_kept(name: str, dtype: type, high: int, tmp_path: Path) -> None:
    values = pixels(dtype=dtype, high=high)
    scan = read_raster(saved(tmp_path / name, values))
    assert scan.voxels.dtype == dtype
    assert scan.voxels.dtype.isnative
    np.testing.assert_array_equal(scan.voxels[0, ..., 0].T, values)
    assert not scan.header.lossy


def test_it_lies_like_a_dicom_image(tmp_path: Path) -> None:
    values = np.zeros((30, 50), dtype=np.uint8)
    values[4, 7] = 200  # row 4, column 7
    scan = read_raster(saved(tmp_path / "a.png", values, dpi=(300, 300)))
    assert scan.voxels[0, 7, 4, 0] == 200
    # Orientation (1, 0, 0, 0, 1, 0) at the origin: column 7 is x = 7, row 4 is y = 4 in LPS+ millimetres.
    np.testing.assert_array_equal(scan.grid.world([7, 4, 0]), [-7, -4, 0])
    assert scan.grid.spacing == (1.0, 1.0, 1.0)
    assert scan.header.space == 0
    assert scan.is_planar


def test_jpeg_is_lossy_and_stands_upright(tmp_path: Path) -> None:
    values = np.zeros((40, 64), dtype=np.uint8)
    values[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    path = saved(tmp_path / "a.jpg", values, quality=100, exif=exif)
    scan = read_raster(path)
    assert scan.header.lossy
    with Image.open(path) as picture:
        shown = np.asarray(ImageOps.exif_transpose(picture))
    assert scan.grid.shape == (40, 64, 1)
    np.testing.assert_array_equal(scan.voxels[0, ..., 0].T, shown)
    assert scan.voxels[0, -1, 0, 0] == 255


def test_colour_is_three_channels_on_request(tmp_path: Path) -> None:
    values = pixels((30, 50, 3))
    path = saved(tmp_path / "a.png", values)
    with pytest.raises(DataError, match=r"a\.png.*colour=True"):
        read_raster(path)
    scan = read_raster(path, COLOUR)
    assert scan.voxels.shape == (3, 50, 30, 1)
    np.testing.assert_array_equal(scan.voxels[:, 7, 4, 0], values[4, 7])
    assert scan.header.photometric == "RGB"


def with_alpha(values: np.ndarray, alpha: int) -> Image.Image:
    full = np.full(values.shape[:2], 255, dtype=np.uint8)
    full[0, 0] = alpha
    picture = Image.fromarray(values)
    picture.putalpha(Image.fromarray(full))
    return picture


@pytest.mark.parametrize("shape", [(30, 50), (30, 50, 3)])
def test_alpha_is_dropped_only_where_all_is_opaque(shape: tuple, tmp_path: Path) -> None:
    values = pixels(shape)
    scan = read_raster(saved(tmp_path / "a.png", with_alpha(values, 255)), COLOUR)
    expected = values.T[..., None] if len(shape) == 3 else values.T[None, ..., None]
    np.testing.assert_array_equal(scan.voxels, expected)
    with pytest.raises(DataError, match="transparent"):
        read_raster(saved(tmp_path / "b.png", with_alpha(values, 254)), COLOUR)


def test_a_transparent_grey_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="transparent"):
        read_raster(saved(tmp_path / "a.png", pixels(), transparency=7))
    with pytest.raises(DataError, match="transparent"):
        read_raster(saved(tmp_path / "b.png", pixels(dtype=np.uint16, high=9), transparency=7))


def test_a_palette_is_the_colours_it_stands_for(tmp_path: Path) -> None:
    numbers = pixels(high=4)
    picture = Image.fromarray(numbers).convert("P")
    picture.putpalette([255, 255, 255, 100, 100, 100, 50, 50, 50, 0, 0, 0])
    scan = read_raster(saved(tmp_path / "a.png", picture))
    np.testing.assert_array_equal(scan.voxels[0, ..., 0].T, np.array([255, 100, 50, 0])[numbers])
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    path = saved(tmp_path / "b.png", picture)
    with pytest.raises(DataError, match="RGB"):
        read_raster(path)
    assert read_raster(path, COLOUR).voxels[:, 0, 0, 0].tolist() in ([255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9])


def test_two_valued_pictures_are_0_and_1(tmp_path: Path) -> None:
    values = pixels(high=2).astype(bool)
    scan = read_raster(saved(tmp_path / "a.png", values))
    assert scan.voxels.dtype == np.uint8
    np.testing.assert_array_equal(scan.voxels[0, ..., 0].T, values)


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG spelled out, for kinds that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_is_refused_not_halved(colour: int, samples: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3, 2, 16, colour, (b"\0" + b"\x12\x34" * samples * 3) * 2))
    with pytest.raises(DataError, match="16"):
        read_raster(tmp_path / "a.png", COLOUR)


@pytest.mark.parametrize("kind", ["int8", "uint32", "float64"])
def test_tiff_numbers_that_would_change_are_refused(kind: str, tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", pixels().astype(kind))
    with pytest.raises(UnreadableScan, match=r"a\.tif"):
        read_raster(tmp_path / "a.tif")


def test_signed_tiff_keeps_its_sign(tmp_path: Path) -> None:
    import tifffile

    values = pixels(dtype=np.int16, high=2000) - np.int16(1000)
    tifffile.imwrite(tmp_path / "a.tif", values)
    np.testing.assert_array_equal(read_raster(tmp_path / "a.tif").voxels[0, ..., 0].T, values)


def test_white_is_zero_is_told(tmp_path: Path) -> None:
    import tifffile

    values = pixels(dtype=np.uint16, high=2000)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    scan = read_raster(tmp_path / "a.tif")
    np.testing.assert_array_equal(scan.voxels[0, ..., 0].T, values)
    assert scan.header.photometric == "MONOCHROME1"


def test_several_pages_are_refused(tmp_path: Path) -> None:
    pages = [Image.fromarray(pixels()) for _ in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="3 pages"):
        read_raster(tmp_path / "a.tif")


def test_cmyk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="CMYK"):
        read_raster(saved(tmp_path / "a.jpg", Image.fromarray(pixels((30, 50, 3))).convert("CMYK")), COLOUR)


def test_nan_in_a_float_picture(tmp_path: Path) -> None:
    values = pixels(dtype=np.float32)
    values[3, 3] = np.nan
    path = saved(tmp_path / "a.tif", values)
    with pytest.raises(DataError, match="NaN"):
        read_raster(path)
    assert read_raster(path, ReadOptions(on_nan="zero")).voxels[0, 3, 3, 0] == 0


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", "u1"), ("a.png", "u2"), ("a.jpg", "u1"), ("a.tif", "u1"), ("a.tif", "u2")]
)
def test_a_truncated_picture_is_refused(name: str, dtype: str, part: float, tmp_path: Path) -> None:
    path = saved(tmp_path / name, pixels((60, 70), dtype, 200))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(UnreadableScan, match=name):
        read_raster(path)


@pytest.mark.parametrize("where", np.linspace(0.05, 0.98, 12))
def test_a_flipped_bit_in_a_png_is_noticed(where: float, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", pixels((60, 70), np.uint16, 65536))
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(UnreadableScan):
        read_raster(path)


@pytest.mark.parametrize("content", [b"", b"no picture", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableScan, match=r"a\.png") as caught:
        read_raster(tmp_path / "a.png")
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(UnreadableScan, match=r"b\.png"):
        read_raster(tmp_path / "b.png")


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    for side in (12_000, 60_000):
        (tmp_path / "a.png").write_bytes(png(side, side, 8, 0, b""))
        with pytest.raises(DataError, match=r"too many|at most"):
            read_raster(tmp_path / "a.png")
    path = saved(tmp_path / "b.png", pixels())
    with pytest.raises(DataError, match="at most 1499"):
        read_raster(path, ReadOptions(max_voxels=1499))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["PNG", "JPEG", "TIFF"]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_no_spoiled_picture_breaks_the_reader(tmp_path: Path, kind: str, changes: list) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels((16, 20))).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for at, value in changes:
        data[at % len(data)] = value
    path = tmp_path / "a.x"
    path.write_bytes(data)
    with contextlib.suppress(MedgenError):
        assert read_raster(path, COLOUR).is_planar


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "high"), [(np.uint8, 256), (np.uint16, 65536), (np.uint16, 100)])
def test_what_is_written_reads_back_identically(dtype: type, high: int, tmp_path: Path) -> None:
    scan = planar(pixels(dtype=dtype, high=high))
    again = read_raster(write_raster(scan, tmp_path / "a.png"))
    np.testing.assert_array_equal(again.voxels, scan.voxels)
    assert again.voxels.dtype == dtype
    assert again.grid == scan.grid
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), scan.voxels[0, ..., 0].T)


def test_colour_reads_back_identically(tmp_path: Path) -> None:
    scan = read_raster(saved(tmp_path / "a.png", pixels((30, 50, 3))), COLOUR)
    again = read_raster(write_raster(scan, tmp_path / "b.png"), COLOUR)
    np.testing.assert_array_equal(again.voxels, scan.voxels)


def test_floats_are_rounded_to_the_nearest_physical_value(tmp_path: Path) -> None:
    unit = planar(np.array([[0.0, 0.4999, 0.501, 1.0]], dtype=np.float32), scale=Scale(255.0))
    stored = read_raster(write_raster(unit, tmp_path / "a.png"))
    assert stored.voxels.ravel().tolist() == [0, 127, 128, 255]
    assert stored.voxels.dtype == np.uint8
    wide = read_raster(write_raster(planar(np.array([[0.0, 300.4]])), tmp_path / "b.png"))
    assert wide.voxels.ravel().tolist() == [0, 300]
    assert wide.voxels.dtype == np.uint16


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([[-1.0, 5]], "0 to 65535"),
        ([[0, 65536.0]], "0 to 65535"),
        ([[np.nan, 1]], "0 to 65535"),
        ([[np.inf, 1]], "0 to"),
    ],
)
def test_values_outside_are_refused(values: list, says: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=says):
        write_raster(planar(np.array(values)), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_volumes_other_names_and_unmeasured_pixels_are_refused(tmp_path: Path) -> None:
    volume = Scan(np.zeros((1, 3, 3, 2), np.uint8), Grid((3, 3, 2), np.eye(4)))
    with pytest.raises(OutputError, match="planar"):
        write_raster(volume, tmp_path / "a.png")
    with pytest.raises(OutputError, match=r"\.png"):
        write_raster(planar(pixels()), tmp_path / "a.jpg")
    holes = planar(pixels(), valid=np.zeros((50, 30, 1), dtype=bool))
    with pytest.raises(OutputError):
        write_raster(holes, tmp_path / "a.png")


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    one = write_raster(planar(pixels()), tmp_path / "a.png").read_bytes()
    assert one == write_raster(planar(pixels()), tmp_path / "b.png").read_bytes()
    assert [chunk for chunk in (b"tEXt", b"tIME", b"iTXt", b"eXIf") if chunk in one] == []


# -- .npz ------------------------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    images = {"train": pixels((5, 8, 6)), "val": pixels((2, 8, 6)), "test": pixels((3, 8, 6))}
    labels = {
        "train": np.array([0, 1, 2, 1, 0]),
        "val": np.array([[1], [0]]),
        "test": np.array([[0, 1], [1, 1], [0, 0]]),
    }
    return write_npz(tmp_path / "a.npz", images, labels)


def test_items_have_names_splits_and_labels(collection: Path) -> None:
    items = npz_items(collection)
    assert items[:3] == [("train/0", "train", "0"), ("train/1", "train", "1"), ("train/2", "train", "2")]
    assert items[5:] == [
        ("val/0", "val", "1"),
        ("val/1", "val", "0"),
        ("test/0", "test", "0 1"),
        ("test/1", "test", "1 1"),
        ("test/2", "test", "0 0"),
    ]


def test_items_are_what_was_written(collection: Path) -> None:
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        stored = np.load(collection)[f"{split}_images"]
        for n in range(count):
            scan = read_npz(collection, f"{split}/{n}")
            np.testing.assert_array_equal(scan.voxels[0, ..., 0].T, stored[n])
            assert scan.grid == Grid.from_lps((6, 8, 1), np.eye(4))
            assert scan.header.space == 0


def test_volumes_read_like_a_stack_of_slices(tmp_path: Path) -> None:
    images = pixels((2, 4, 8, 6))
    path = write_npz(tmp_path / "a.npz", {"train": images}, {"train": np.zeros(2, int)})
    scan = read_npz(path, "train/1")
    assert scan.voxels.shape == (1, 6, 8, 4)
    assert scan.voxels[0, 5, 2, 3] == images[1, 3, 2, 5]


def test_colour_items(tmp_path: Path) -> None:
    images = pixels((2, 8, 6, 3))
    path = write_npz(tmp_path / "a.npz", {"test": images}, {"test": np.zeros(2, int)})
    with pytest.raises(DataError, match="colour=True"):
        read_npz(path, "test/0")
    np.testing.assert_array_equal(read_npz(path, "test/0", COLOUR).voxels[..., 0], images[0].T)


def test_a_changed_file_is_read_anew(collection: Path) -> None:
    before = read_npz(collection, "train/0").voxels.copy()
    write_npz(collection, {"train": 255 - np.load(collection)["train_images"]}, {"train": np.zeros(5, int)})
    os.utime(collection, ns=(1, 1))
    np.testing.assert_array_equal(read_npz(collection, "train/0").voxels, 255 - before)
    assert len(npz_items(collection)) == 5


def test_images_without_labels_are_items_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=pixels((2, 8, 6)))
    assert npz_items(tmp_path / "a.npz") == [("train/0", "train", ""), ("train/1", "train", "")]


@pytest.mark.parametrize("fragment", ["train/5", "train/-1", "train/x", "train", "", "other/0", "train/0/1", "train/²"])
def test_items_that_are_not_there(fragment: str, collection: Path) -> None:
    with pytest.raises(UnreadableScan, match="no such item"):
        read_npz(collection, fragment)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "gone off"),)

    things = np.empty((2, 2, 2), dtype=object)
    things[:] = Bomb()
    np.savez(tmp_path / "a.npz", train_images=things, train_labels=np.zeros(2))
    for read in (npz_items, lambda path: read_npz(path, "train/0")):
        with pytest.raises(UnreadableScan):
            read(tmp_path / "a.npz")
    assert not (tmp_path / "gone off").exists()
    np.savez(tmp_path / "b.npz", train_images=pixels((2, 8, 6)), train_labels=things[:, 0])
    with pytest.raises(UnreadableScan):
        npz_items(tmp_path / "b.npz")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"PK\3\4" + bytes(40),
        lambda data: data[:-30],
    ],
)
def test_a_damaged_collection_is_refused(spoil: Callable, collection: Path) -> None:
    collection.write_bytes(spoil(collection.read_bytes()))
    with pytest.raises(UnreadableScan, match=r"a\.npz"):
        npz_items(collection)
    with pytest.raises(UnreadableScan, match=r"a\.npz"):
        read_npz(collection, "train/0")


def test_a_flipped_bit_in_a_collection_is_noticed(collection: Path) -> None:
    data = bytearray(collection.read_bytes())
    data[data.index(b"train_images.npy") + 150] ^= 4
    collection.write_bytes(data)
    with pytest.raises(UnreadableScan):
        read_npz(collection, "train/0")


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": np.zeros((2, 3, 3))},
        {"train_images": np.zeros((2, 3))},
        {"train_images": np.zeros((2, 3, 3)), "train_labels": np.zeros(3)},
        {"train_images": np.zeros((2, 3, 3), dtype="S3")},
    ],
)
def test_other_layouts_are_refused(arrays: dict, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UnreadableScan, match=r"a\.npz"):
        npz_items(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ({}, {}),
        ({"all": np.zeros((2, 3, 3))}, {"all": np.zeros(2)}),
        ({"train": np.zeros((2, 3, 3))}, {}),
        ({"train": np.zeros((2, 3, 3))}, {"train": np.zeros(3)}),
        ({"train": np.zeros((2, 3))}, {"train": np.zeros(2)}),
        ({"train": np.zeros((2, 3, 3), dtype=object)}, {"train": np.zeros(2)}),
    ],
)
def test_what_does_not_fit_is_not_written(images: dict, labels: dict, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a\.npz"):
        write_npz(tmp_path / "a.npz", images, labels)
    assert list(tmp_path.iterdir()) == []


def test_the_same_collection_gives_the_same_bytes(collection: Path, tmp_path: Path) -> None:
    arrays = np.load(collection)
    splits = ("train", "val", "test")
    again = write_npz(
        tmp_path / "b.npz", {s: arrays[f"{s}_images"] for s in splits}, {s: arrays[f"{s}_labels"] for s in splits}
    )
    assert again.read_bytes() == collection.read_bytes()


@pytest.mark.parametrize("name", ["a.png", "a.npz"])
def test_a_full_disk_leaves_nothing(name: str, tmp_path: Path) -> None:
    noise, path = pixels((700, 700)), tmp_path / name
    write = {
        "a.png": lambda: write_raster(planar(noise), path),
        "a.npz": lambda: write_npz(path, {"train": noise[None]}, {"train": np.zeros(1)}),
    }[name]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=name):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.iterdir()) == []


def test_real_collections(shared_data: Path) -> None:
    path = shared_data / "medmnist" / "pneumoniamnist.npz"
    items = npz_items(path)
    stored = np.load(path)
    assert [sum(split == name for _, split, _ in items) for name in ("train", "val", "test")] == [4708, 524, 624]
    for fragment, split, label in items[::97]:
        n = int(fragment.split("/")[1])
        assert label == str(stored[f"{split}_labels"][n, 0])
        if n % 5 == 0:
            np.testing.assert_array_equal(read_npz(path, fragment).voxels[0, ..., 0].T, stored[f"{split}_images"][n])
