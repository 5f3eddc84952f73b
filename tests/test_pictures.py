"""Pictures: the right way up, true to millimetres, and with colours that mean the same everywhere."""

import numpy as np
import pytest
from PIL import Image

from medgen import io
from medgen.grid import Grid
from medgen.report.labels import colour_of, laid_over, legend, most_marked
from medgen.report.pictures import NOTICE, Z_SHOWN, contact_sheet, overlay, planes, views
from medgen.scan import Header, Scale, Scan


def marked(axcodes: str = "RAS", spacing=(2.0, 2.0, 2.0)) -> Scan:
    """Grey, with one bright corner: the most right, anterior and superior voxels of the patient."""
    voxels = np.full((1, 12, 16, 10), 20.0, np.float32)
    voxels[0, -3:, -3:, -3:] = 100
    voxels[0, 0, 0, 0] = 0
    scan = Scan(voxels, Grid((12, 16, 10), np.diag([*spacing, 1.0])), Scale(), Header("MR"))
    return scan.onto(scan.grid.reorient(axcodes), outside=0)


def brightest(plane: np.ndarray) -> tuple[str, str]:
    """In which corner of a picture most light is."""
    rows, columns = np.nonzero(plane > 0.9 * plane.max())
    vertical = "top" if rows.mean() < plane.shape[0] / 2 else "bottom"
    return vertical, "left" if columns.mean() < plane.shape[1] / 2 else "right"


# -- which way up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "LPI", "SAR", "IPL", "ASL"])
def test_radiologists_see_right_on_the_left_front_and_head_on_top(axcodes):
    at = [10, 14, 8]
    axial, coronal, sagittal = views(marked(axcodes), at)
    assert axial.shape == (16, 12)
    assert coronal.shape == (10, 12)
    assert sagittal.shape == (10, 16)
    assert brightest(axial) == ("top", "left")  # anterior on top, right on the left
    assert brightest(coronal) == ("top", "left")  # superior on top, right on the left
    assert brightest(sagittal) == ("top", "left")  # superior on top, anterior on the left


def test_a_picture_is_shown_as_it_is():
    pixels = np.zeros((1, 6, 4, 1), np.uint8)
    pixels[0, 5, 0] = 200  # the last column of the first row
    scan = Scan(pixels, Grid((6, 4, 1), np.diag([-1.0, -1.0, 1.0, 1.0])), Scale(), Header("DX"))
    (shown,) = views(scan)
    assert shown.shape == (4, 6)
    assert np.unravel_index(shown.argmax(), shown.shape) == (0, 5)


def test_one_grey_window_for_all_and_unmeasured_is_black():
    scan = marked()
    voxels = scan.voxels.copy()
    voxels[0, 5, :, :] = np.nan
    holes = scan.with_voxels(voxels)
    axial = views(holes, [6, 8, 5], window=(0.0, 40.0))[0]
    assert axial[:, ::-1][0, 5] == 0
    assert axial[3, 3] == pytest.approx(0.5)
    assert float(views(scan, [11, 15, 9], window=(0.0, 40.0))[0].max()) == 1.0


def test_planes_of_any_array_are_cut_where_asked():
    values = np.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    axial, coronal, sagittal = planes(values, [1, 2, 3], planar=False)
    assert np.array_equal(axial, values[:, :, 3].T[::-1, ::-1])
    assert np.array_equal(coronal, values[:, 2, :].T[::-1, ::-1])
    assert np.array_equal(sagittal, values[1].T[::-1, ::-1])
    middle = planes(values, planar=False)[0]
    assert np.array_equal(middle, values[:, :, 2].T[::-1, ::-1])


# -- overlays -----------------------------------------------------------------------------------------------


def coloured(picture: np.ndarray) -> np.ndarray:
    """Pixels that are not grey."""
    return np.ptp(picture.astype(int), axis=-1) > 12


def z_map(scan: Scan, value: float, where=(slice(-3, None),) * 3) -> Scan:
    z = np.zeros(scan.voxels.shape, np.float32)
    z[(0, *where)] = value
    return Scan(z, scan.grid, Scale(unit="z"), scan.header)


def drawn(tmp_path, scan: Scan, z: Scan, name: str = "a") -> np.ndarray:
    with Image.open(overlay(scan, z, tmp_path / f"{name}.png", title="case")) as picture:
        return np.asarray(picture.convert("RGB"))


def legend_free(picture: np.ndarray) -> np.ndarray:
    """The picture without its colour bar and captions at the bottom."""
    return picture[: picture.shape[0] - 80]


def test_colour_appears_only_where_z_is_high(tmp_path):
    scan = marked()
    low = legend_free(drawn(tmp_path, scan, z_map(scan, Z_SHOWN[0] - 0.1), "low"))
    high = legend_free(drawn(tmp_path, scan, z_map(scan, Z_SHOWN[1]), "high"))
    assert not coloured(low).any()
    assert coloured(high).any()
    # Left half of the two axial tiles only: the lesion is on the patient's right.
    rows, columns = np.nonzero(coloured(high))
    assert rows.min() > 150  # the plain tiles above stay grey
    assert columns.min() < 60


def test_the_same_z_has_the_same_colour_in_every_picture(tmp_path):
    scan = marked()
    reddest = {}
    for name, other in (("alone", 0.0), ("beside a huge one", 500.0)):
        z = z_map(scan, 6.0)
        voxels = z.voxels.copy()
        voxels[0, 0:2, 0:2, -3:] = other
        picture = legend_free(drawn(tmp_path, scan, z.with_voxels(voxels), name)).astype(int)
        # Tint between yellow and red at z = 6: red minus green where it is not saturated.
        tint = picture[..., 0] - picture[..., 1]
        reddest[name] = int(tint.max())
    assert reddest["alone"] < reddest["beside a huge one"]  # 500 is as red as it gets
    tints = []
    for name, z in (("ten", Z_SHOWN[1]), ("more", 500.0)):
        picture = legend_free(drawn(tmp_path, scan, z_map(scan, z), name)).astype(int)
        tints.append(int((picture[..., 0] - picture[..., 1]).max()))
    assert tints[0] == tints[1] > 200


def test_what_was_not_scored_is_not_coloured_and_an_empty_map_is_drawn(tmp_path):
    scan = marked()
    z = z_map(scan, 8.0)
    voxels = z.voxels.copy()
    voxels[0, :6] = np.nan
    assert coloured(legend_free(drawn(tmp_path, scan, z.with_voxels(voxels), "holes"))).any()
    nothing = z.with_voxels(np.full_like(z.voxels, np.nan))
    assert not coloured(legend_free(drawn(tmp_path, scan, nothing, "nothing"))).any()


def test_the_planes_go_through_the_highest_voxel(tmp_path):
    """A lesion of one voxel near the feet is in all three planes."""
    scan = marked()
    picture = legend_free(drawn(tmp_path, scan, z_map(scan, 10.0, (slice(2, 3), slice(3, 4), slice(1, 2))), "small"))
    found = coloured(picture)
    thirds = np.nonzero(found.any(0))[0]
    assert thirds.min() < 160
    assert thirds.max() > 250


def test_volumes_are_true_to_millimetres(tmp_path):
    """Voxels twice as tall make the picture twice as tall as its anatomy is wide."""
    for spacing, ratio in (((2.0, 2.0, 2.0), 10 / 12), ((2.0, 2.0, 4.0), 20 / 12)):
        scan = marked(spacing=spacing)
        path = contact_sheet([scan], tmp_path / f"{ratio:.1f}.png", title="t")
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L")).astype(int)
        # The coronal tile is the second of three: as tall as 10 voxels, as wide as 12.
        columns = np.nonzero((pixels[4:10] != 16).all(0))[0]
        widths = np.diff(np.nonzero(np.diff(np.concatenate([[-9], columns, [10**6]])) > 1)[0])
        assert len(widths) >= 1
        tall = 160
        assert pixels.shape[0] >= tall
        wide = 160 / max(16 * 2, 10 * spacing[2]) * 24
        assert any(abs(width - wide) <= 3 for width in widths), (widths, wide, ratio)


# -- contact sheets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_scan_is_on_the_sheet(tmp_path, count):
    volumes = [marked() for _ in range(count)]
    pictures = [Scan(np.full((1, 8, 8, 1), 50 + n, np.uint8), Grid((8, 8, 1), np.eye(4))) for n in range(count)]
    for n, scans in enumerate((volumes, pictures)):
        path = contact_sheet(scans, tmp_path / f"{n}.png", title="SYNTHETIC")
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            assert picture.size[1] >= 160 * -(-count // (2 if n == 0 else 6))


def test_scans_of_unequal_size_share_a_sheet(tmp_path):
    small = Scan(np.arange(24, dtype=np.uint8).reshape(1, 6, 4, 1), Grid((6, 4, 1), np.eye(4)))
    wide = Scan(np.arange(60, dtype=np.uint8).reshape(1, 20, 3, 1), Grid((20, 3, 1), np.eye(4)))
    assert contact_sheet([small, wide], tmp_path / "a.png", title="t").is_file()


def test_a_constant_scan_is_no_division_by_zero(tmp_path):
    flat = Scan(np.full((1, 6, 6, 6), 7.0, np.float32), Grid((6, 6, 6), np.eye(4)))
    assert contact_sheet([flat], tmp_path / "a.png", title="t").is_file()
    assert overlay(flat, z_map(flat, 0.0), tmp_path / "b.png", title="t").is_file()


def test_a_picture_is_the_same_bytes_again_and_says_only_what_it_shows(tmp_path):
    scan = marked()
    for name in ("a", "b"):
        contact_sheet([scan, scan], tmp_path / f"{name}.png", title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert not picture.info
    other = contact_sheet([scan, scan], tmp_path / "c.png", title="another title")
    assert other.read_bytes() != (tmp_path / "a.png").read_bytes()
    assert "not a medical device" in NOTICE


def test_samples_can_be_drawn(heads, xrays, tmp_path):
    volumes = [io.read(path) for path in sorted(heads.iterdir())[:3]]
    pictures = [io.read(path) for path in sorted((xrays / "normal").iterdir())[:7]]
    for n, scans in enumerate((volumes, pictures)):
        with Image.open(contact_sheet(scans, tmp_path / f"{n}.png", title="t")) as picture:
            assert np.asarray(picture).std() > 20


def test_colour_pictures_are_shown_in_colour_and_the_first_of_several_channels_otherwise(tmp_path):
    red = np.zeros((3, 8, 8, 1), np.uint8)
    red[0] = 200
    red[:, 0] = 0
    colour = Scan(red, Grid((8, 8, 1), np.eye(4)), Scale(), Header("XC"))
    assert coloured(opened(contact_sheet([colour], tmp_path / "a.png", title="t"))).sum() > 10_000
    named = Scan(red, colour.grid, Scale(), Header("MR", channels=("T1w", "T2w", "FLAIR")))
    sheet = opened(contact_sheet([named], tmp_path / "b.png", title="t"))
    assert not coloured(sheet).any()
    # One line more says which channel is shown.
    assert sheet.shape[0] == opened(tmp_path / "a.png").shape[0] + 18


def test_scans_of_unlike_brightness_each_have_a_window(tmp_path):
    """Of no unit, one is a thousand times brighter: neither is black nor white all over."""
    voxels = marked().voxels.copy()
    voxels[0, 6:] = 100
    scan = marked().with_voxels(voxels)
    bright = scan.with_voxels(scan.voxels * 1000)
    for n, scans in enumerate(([scan, scan], [scan, scan, bright])):
        sheet = opened(contact_sheet(scans, tmp_path / f"{n}.png", title="t"))[:160].astype(int)
        assert {51, 255} <= set(np.unique(sheet).tolist()), n  # 20 of 100, and 100
    # And it is said, in one line more.
    rows = [opened(tmp_path / f"{n}.png").shape[0] for n in (0, 1)]
    assert rows[1] - rows[0] == 164 + 18


# -- pairs ----------------------------------------------------------------------------------------------------


def opened(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def labelled(scan: Scan, *places: tuple[int, tuple[slice, ...]]) -> Scan:
    """A label map on a scan's grid."""
    drawn = np.zeros(scan.voxels.shape, np.uint8)
    for label, where in places:
        drawn[(0, *where)] = label
    return Scan(drawn, scan.grid, is_label=True)


CORNER = (slice(-3, None),) * 3


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.asarray(colour, np.uint8)).all(-1)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAR"])
def test_labels_lie_on_what_they_mark_however_the_axes_run(tmp_path, axcodes):
    """The bright corner is marked: colour is there, below the plain scan, and nowhere else."""
    scan, mask = marked(), labelled(marked(), (1, CORNER))
    scan = scan.onto(scan.grid.reorient(axcodes), outside=0)
    sheet = opened(contact_sheet([scan], tmp_path / "a.png", title="t", masks=[mask]))
    body = sheet[: 2 * 164]
    tall = np.nonzero(coloured(body).any(1))[0]
    assert tall.min() >= 164  # the plain planes above stay grey
    wide = np.nonzero(coloured(body).any(0))[0]
    assert wide.min() == 0  # right is on the left
    # Through the planes that hold most of it: all three show it, in their upper left corner.
    plain, under = body[:164].astype(int), body[164:].astype(int)
    bright = plain[..., 0] > 200
    assert coloured(under)[bright].mean() > 0.9
    assert coloured(under)[~bright].mean() < 0.02
    assert has(under, colour_of(1)).any()


def test_a_label_has_the_same_colour_in_every_picture(tmp_path):
    scan = marked()
    other = (slice(0, 4), slice(-3, None), slice(-3, None))
    both, alone = labelled(scan, (1, CORNER), (2, other)), labelled(scan, (2, other))
    for n, mask in enumerate((both, alone)):
        sheet = opened(contact_sheet([scan], tmp_path / f"{n}.png", title="t", masks=[mask]))[: 2 * 164]
        assert has(sheet, colour_of(2)).any()
        assert has(sheet, colour_of(1)).any() == (n == 0)
    every = [colour_of(n) for n in range(1, 118)]
    assert len(set(every)) == len(every)


def test_a_scan_without_a_mask_is_no_scan_with_an_empty_one(tmp_path):
    scan = marked()
    empty = labelled(scan)
    marks = labelled(scan, (1, CORNER))
    sheet = opened(contact_sheet([scan, scan, scan], tmp_path / "a.png", title="t", masks=[marks, empty, None]))
    rows = [sheet[164 * n : 164 * n + 160].astype(int) for n in range(4)]
    half = sheet.shape[1] // 2
    assert coloured(rows[1][:, :half]).any()
    assert not coloured(rows[1][:, half:]).any()
    assert np.array_equal(rows[1][:, half:], rows[0][:, half:])  # empty: nothing is marked
    assert rows[3].max() == 16  # none: nothing is shown
    plain = contact_sheet([scan, scan], tmp_path / "b.png", title="t", masks=[None, None]).read_bytes()
    assert plain == contact_sheet([scan, scan], tmp_path / "c.png", title="t").read_bytes()


def test_images_are_shown_beside_themselves_under_their_labels(tmp_path):
    pixels = np.full((1, 20, 20, 1), 90, np.uint8)
    pixels[0, :4] = 10
    scan = Scan(pixels, Grid((20, 20, 1), np.eye(4)))
    mask = labelled(scan, (3, (slice(10, 14), slice(10, 14), slice(None))))
    sheet = opened(contact_sheet([scan] * 4, tmp_path / "a.png", title="t", masks=[mask] * 4))
    assert sheet.shape[1] == pytest.approx(6 * 164, abs=40)  # three pairs in a row
    found = coloured(sheet[:160])
    assert not found[:, :160].any()
    rows, columns = np.nonzero(found[:, 164:324])
    assert (rows.min(), rows.max()) == pytest.approx((80, 111), abs=6)
    assert (columns.min(), columns.max()) == pytest.approx((80, 111), abs=6)


def test_a_mark_smaller_than_a_pixel_is_seen():
    tile = np.full((160, 160, 3), 100, np.uint8)
    for at in range(40, 60):
        drawn = np.zeros((700, 900), np.int32)
        drawn[at * 7, at * 9] = 2
        assert has(laid_over(tile, drawn), colour_of(2)).any(), at
    assert np.array_equal(laid_over(tile, np.zeros((10, 10), np.int32)), tile)


def test_the_legend_names_as_many_labels_as_fit():
    few, many = legend([1, 2, 5], 320), legend(list(range(1, 118)), 320)
    assert few.shape == many.shape == (20, 320, 3)
    assert all(has(few, colour_of(n)).any() for n in (1, 2, 5))
    assert not has(many, colour_of(60)).any()
    assert has(legend(list(range(1, 118)), 6000), colour_of(117)).any()


def test_masks_come_one_a_scan(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        contact_sheet([marked(), marked()], tmp_path / "a.png", title="t", masks=[labelled(marked())])
    assert most_marked(np.zeros((2, 3, 4), np.int32)) is None
    drawn = np.zeros((4, 5, 6), np.int32)
    drawn[3, 1:3, 5], drawn[0, 1, 0] = 7, 7
    assert most_marked(drawn) == [3, 1, 5]
    # A large label does not hide a small one: the plane that shows both is shown.
    drawn = np.zeros((9, 9, 9), np.int32)
    drawn[1:8, 1:8, 2], drawn[2:6, 2:6, 6], drawn[7, 7, 6] = 1, 1, 2
    assert most_marked(drawn) == [7, 7, 6]
