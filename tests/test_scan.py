"""A scan keeps place and meaning of its numbers, wherever it is put."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from test_grid import grids

from medgen.errors import DataError
from medgen.grid import Grid
from medgen.scan import Header, Scale, Scan

RNG = np.random.default_rng(7)


def scan_of(
    shape: tuple, *, affine: np.ndarray | None = None, dtype: type = np.int16, channels: int = 1, **more
) -> Scan:
    voxels = np.random.default_rng(1).integers(1, 100, (channels, *shape)).astype(dtype)
    return Scan(voxels, Grid(shape, np.eye(4) if affine is None else affine), **more)


def lattice_move(data: st.DataObject, grid: Grid) -> Grid:
    """Any grid on the same lattice: axes permuted and flipped, window anywhere, even far outside."""
    start = data.draw(st.tuples(*[st.integers(-9, 9)] * 3))
    moved = grid.patch(start, data.draw(st.tuples(*[st.integers(1, 8)] * 3)))
    for axis in range(3):
        moved = moved.flip(axis) if data.draw(st.booleans()) else moved
    return moved.permute(data.draw(st.permutations([0, 1, 2])))


def looked_up(scan: Scan, grid: Grid, outside: float) -> np.ndarray:
    """Every voxel of `grid` found in the scan by its millimetres, one by one."""
    out = np.full((scan.channels, *grid.shape), outside, dtype=np.float64)
    for place in np.ndindex(*grid.shape):
        old = scan.grid.index(grid.world(place))
        nearest = np.round(old).astype(int)
        assert np.abs(old - nearest).max() < 1e-3
        if (nearest >= 0).all() and (nearest < scan.grid.shape).all():
            out[(slice(None), *place)] = scan.voxels[(slice(None), *nearest)]
    return out


@settings(deadline=None)
@given(st.data())
def test_moves_on_one_lattice_copy_exactly(data: st.DataObject) -> None:
    grid = data.draw(grids(5))
    scan = Scan(RNG.integers(-500, 500, (2, *grid.shape)).astype(np.int16), grid)
    other = lattice_move(data, grid)
    moved = scan.onto(other, outside=-7.0)
    assert moved.grid == other
    assert moved.voxels.dtype == np.int16
    np.testing.assert_array_equal(moved.voxels, looked_up(scan, other, -7))


@settings(deadline=None)
@given(st.data())
def test_there_and_back_is_exact(data: st.DataObject) -> None:
    grid = data.draw(grids(5))
    scan = Scan(RNG.random((1, *grid.shape)).astype(np.float32), grid)
    wide = grid.pad([data.draw(st.integers(0, 3)) for _ in range(3)], [data.draw(st.integers(0, 3)) for _ in range(3)])
    turned = wide.permute(data.draw(st.permutations([0, 1, 2]))).flip(data.draw(st.integers(0, 2)))
    back = scan.onto(turned, outside=np.nan).onto(grid, outside=np.nan)
    np.testing.assert_array_equal(back.voxels, scan.voxels)


def test_a_copy_that_needs_nothing_from_outside_keeps_its_type() -> None:
    scan = scan_of((4, 5, 6))
    cropped = scan.onto(scan.grid.crop((1, 1, 1), (2, 3, 4)), outside=np.nan)
    np.testing.assert_array_equal(cropped.voxels, scan.voxels[:, 1:3, 1:4, 1:5])
    assert cropped.voxels.dtype == np.int16


def test_outside_is_a_physical_value() -> None:
    scan = scan_of((3, 3, 3), dtype=np.uint16, scale=Scale(0.5, -1024.0, "HU"))
    padded = scan.onto(scan.grid.pad((1, 0, 0), (0, 0, 0)), outside=-1000.0)
    assert padded.voxels.dtype == np.uint16
    assert (padded.voxels[0, 0] == 48).all()
    assert (padded.physical()[0, 0] == -1000).all()


@pytest.mark.parametrize("outside", [np.nan, -1.0, 0.5, 1e9])
def test_outside_that_integers_cannot_hold_is_kept_as_a_float(outside: float) -> None:
    scan = scan_of((3, 3, 3), dtype=np.uint8)
    padded = scan.onto(scan.grid.pad((0, 0, 0), (0, 0, 2)), outside=outside)
    np.testing.assert_array_equal(padded.voxels[..., 3:], np.float32(outside))
    np.testing.assert_array_equal(padded.voxels[..., :3], scan.voxels)


def test_large_labels_survive_an_unholdable_outside() -> None:
    scan = Scan(np.full((1, 2, 2, 2), 2**24 + 1, dtype=np.int32), Grid((2, 2, 2), np.eye(4)), is_label=True)
    padded = scan.onto(scan.grid.pad((1, 0, 0), (0, 0, 0)), outside=np.nan)
    assert (padded.voxels[0, 1:] == 2**24 + 1).all()


def test_rounding_of_the_scale_does_not_change_the_type() -> None:
    scan = scan_of((2, 2, 2), scale=Scale(0.1, -1000.3, "HU"))
    assert scan.onto(scan.grid.pad((1, 1, 1), (1, 1, 1)), outside=0.0).voxels.dtype == np.int16


# -- interpolation ---------------------------------------------------------------------------------


def oblique(shape: tuple, spacing: tuple, degrees: tuple = (10, -20, 30), origin: tuple = (-20, 5, 12)) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * spacing
    affine[:3, 3] = origin
    return Grid(shape, affine)


def ramp(grid: Grid) -> np.ndarray:
    """A linear function of the millimetres at every voxel."""
    places = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), axis=-1)
    return grid.world(places) @ [0.7, -1.3, 0.4] + 11


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_linear_ramp_stays_exact(dtype: type) -> None:
    source = oblique((30, 28, 26), (1.0, 1.2, 1.5))
    scan = Scan(ramp(source)[None].astype(dtype), source)
    # The same middle, turned another way, finer than the source: nothing to smooth.
    target = oblique((12, 12, 12), (0.9, 0.9, 0.9), degrees=(-15, 5, 70))
    target = target.patch(target.index(source.centre) - 5.5, target.shape)
    moved = scan.onto(target, outside=0.0)
    assert moved.voxels.dtype == dtype
    np.testing.assert_allclose(moved.voxels[0], ramp(target), rtol=0, atol=1e-4 if dtype == np.float32 else 1e-9)


def test_half_a_voxel_is_the_mean_of_two() -> None:
    scan = Scan(np.array([0.0, 10, 40], dtype=np.float32).reshape(1, 3, 1, 1), Grid((3, 1, 1), np.eye(4)))
    between = scan.onto(scan.grid.patch((0.5, 0, 0), (2, 1, 1)), outside=0.0)
    np.testing.assert_allclose(between.voxels.ravel(), [5, 25])


def test_integers_are_interpolated_without_rounding() -> None:
    scan = Scan(np.array([0, 1], dtype=np.uint8).reshape(1, 2, 1, 1), Grid((2, 1, 1), np.eye(4)))
    assert scan.onto(scan.grid.patch((0.25, 0, 0), (1, 1, 1)), outside=0.0).voxels.item() == pytest.approx(0.25)


def test_beyond_the_field_of_view_is_outside() -> None:
    scan = scan_of((6, 6, 6), dtype=np.float32, scale=Scale(2.0, -1000.0, "HU"))
    moved = scan.onto(scan.grid.patch((4.3, 0, 0), (5, 6, 6)), outside=-1024.0)
    np.testing.assert_allclose(moved.physical()[0, 2:], -1024)
    assert (moved.physical()[0, 0] > -1000).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_pattern_too_fine_for_the_new_grid_vanishes(axis: int) -> None:
    stripes = np.cos(np.pi / 2 * np.arange(64) + 0.3)
    shape = [4, 4, 4]
    shape[axis] = 64
    voxels = np.moveaxis(np.broadcast_to(stripes, (4, 4, 64)), -1, axis)[None].astype(np.float32)
    scan = Scan(voxels, Grid(tuple(shape), np.eye(4)))
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = 4.0
    coarse = scan.onto(scan.grid.respaced(spacing), outside=0.0).voxels[0]
    # Taking every fourth sample would give a constant of amplitude about 1 out of a pattern of mean 0.
    inner = coarse.take(range(2, coarse.shape[axis] - 2), axis=axis)
    assert np.abs(inner).max() < 0.06
    fine = scan.onto(scan.grid.respaced([s / 2 for s in (1.0, 1.0, 1.0)]), outside=0.0).voxels[0]
    assert np.abs(fine).max() > 0.6


def test_smoothing_follows_the_axis_that_gets_coarser_wherever_it_ends_up() -> None:
    scan = Scan(RNG.random((1, 24, 9, 7)).astype(np.float32), Grid((24, 9, 7), np.eye(4)))
    coarse = scan.grid.respaced((4.0, 1.0, 1.0))
    straight = scan.onto(coarse, outside=0.0).voxels
    turned = scan.onto(coarse.permute((2, 0, 1)).flip(1), outside=0.0).voxels
    np.testing.assert_allclose(turned, np.flip(straight.transpose(0, 3, 1, 2), 2), atol=1e-6)


def test_one_thicker_slice_is_an_average_not_a_copy() -> None:
    voxels = np.zeros((1, 4, 4, 9), dtype=np.float32)
    voxels[..., 4] = 1
    scan = Scan(voxels, Grid((4, 4, 9), np.eye(4)))
    slice_grid = scan.grid.patch((0, 0, 4), (4, 4, 1))
    thicker = Grid(slice_grid.shape, slice_grid.affine @ np.diag([1, 1, 1.4, 1]))
    assert (scan.onto(slice_grid, outside=0.0).voxels == 1).all()
    assert (scan.onto(thicker, outside=0.0).voxels < 0.95).all()


def test_smoothing_keeps_the_mean_and_leaves_other_axes_alone() -> None:
    scan = Scan(RNG.random((1, 40, 40, 40)).astype(np.float32), Grid((40, 40, 40), np.eye(4)))
    coarse = scan.onto(scan.grid.respaced((4, 4, 4)), outside=0.0)
    assert coarse.voxels.mean() == pytest.approx(scan.voxels.mean(), abs=0.01)
    flat = np.broadcast_to(RNG.random((1, 1, 8, 8)), (1, 40, 8, 8)).astype(np.float32)
    along = Scan(flat, Grid((40, 8, 8), np.eye(4)))
    np.testing.assert_allclose(along.onto(along.grid.respaced((4, 1, 1)), outside=0.0).voxels, flat[:, :10], atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_labels_stay_in_their_set(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([np.uint8, np.int16, np.int32, np.int64, np.float32, bool]))
    names = [0, 1] if kind is bool else [0, 3, 117]
    source = data.draw(grids(6))
    scan = Scan(RNG.choice(names, (1, *source.shape)).astype(kind), source, is_label=True)
    target = data.draw(grids(6))
    target = Grid(target.shape, np.vstack([np.c_[target.affine[:3, :3], source.centre], [0, 0, 0, 1]]))
    moved = scan.onto(target, outside=0.0)
    assert moved.voxels.dtype == kind
    assert set(np.unique(moved.voxels)) <= set(names)


def test_labels_take_the_nearest() -> None:
    scan = Scan(np.array([1, 2], dtype=np.uint8).reshape(1, 2, 1, 1), Grid((2, 1, 1), np.eye(4)), is_label=True)
    near = scan.onto(
        Grid((4, 1, 1), scan.grid.patch((-0.4, 0, 0), (4, 1, 1)).affine @ np.diag([0.5, 1, 1, 1])), outside=9
    )
    assert near.voxels.ravel().tolist() == [1, 1, 2, 2]


# -- what was not measured -------------------------------------------------------------------------


def test_unmeasured_voxels_move_with_their_mark() -> None:
    valid = np.ones((4, 4, 4), dtype=bool)
    valid[0] = False
    scan = scan_of((4, 4, 4), valid=valid)
    assert np.isnan(scan.physical()[:, 0]).all()
    assert np.isfinite(scan.physical()[:, 1:]).all()
    flipped = scan.onto(scan.grid.flip(0).pad((0, 0, 0), (0, 0, 1)), outside=0.0)
    assert not flipped.valid[3, :, :4].any()
    assert flipped.valid[:3].all()
    assert (flipped.physical()[..., 4] == 0).all()


@pytest.mark.parametrize("marked", [True, False])
def test_unmeasured_voxels_have_no_say_in_interpolation(marked: bool) -> None:
    voxels = np.full((1, 12, 12, 12), 50.0, dtype=np.float32)
    voxels[:, :4] = 3e4 if marked else np.nan
    valid = np.broadcast_to((np.arange(12) >= 4)[:, None, None], (12, 12, 12)).copy() if marked else None
    header = Header(padding=-2000.0) if marked else Header()
    scan = Scan(voxels, Grid((12, 12, 12), np.eye(4)), valid=valid, header=header)
    moved = scan.onto(scan.grid.patch((0.3, 0.3, 0.3), (12, 12, 12)), outside=-1.0)
    values = moved.physical()[0, :11, :11, :11]
    np.testing.assert_allclose(values[4:], 50, rtol=1e-5)
    assert np.isnan(values[:3]).all()
    assert set(np.unique(values[np.isfinite(values)]).round(3)) == {50.0}
    if marked:
        assert (moved.voxels[0, :3, :11, :11] == -2000).all()
        assert not moved.valid[:3, :11, :11].any()
    else:
        assert moved.valid is None
    far = moved.onto(moved.grid.patch((20.5, 0, 0), (2, 2, 2)), outside=-1.0)
    assert (far.physical() == -1).all()


def test_labels_keep_the_mark_of_unmeasured_voxels() -> None:
    valid = np.zeros((4, 4, 4), dtype=bool)
    valid[2:] = True
    scan = scan_of((4, 4, 4), valid=valid, is_label=True)
    moved = scan.onto(scan.grid.patch((0.2, 0, 0), (4, 4, 4)), outside=0.0)
    np.testing.assert_array_equal(moved.valid, valid)


# -- scale and construction ------------------------------------------------------------------------


@given(st.floats(-5, 5).filter(lambda slope: abs(slope) > 1e-3), st.floats(-2000, 2000))
def test_scale_there_and_back(slope: float, intercept: float) -> None:
    scale = Scale(slope, intercept, "HU")
    stored = np.arange(-50.0, 50)
    np.testing.assert_allclose(scale.stored(scale.physical(stored)), stored, atol=1e-6)


def test_normalising_keeps_the_physical_values() -> None:
    scan = scan_of((3, 3, 3), scale=Scale(2.0, -1024.0, "HU"))
    low, high = 10.0, 90.0
    normal = scan.with_voxels((scan.voxels - low) / (high - low), scale=scan.scale.normalised(low, high))
    np.testing.assert_allclose(normal.physical(), scan.physical(), atol=1e-3)
    assert normal.scale.unit == "HU"


@pytest.mark.parametrize(("slope", "intercept"), [(0, 0), (np.nan, 0), (1, np.inf)])
def test_impossible_scales_cannot_be_built(slope: float, intercept: float) -> None:
    with pytest.raises(DataError, match="finite slope"):
        Scale(slope, intercept)


def two_scales(**more) -> Scan:
    """A scan of two channels with a line each; the first runs downwards."""
    return scan_of((3, 4, 5), channels=2, scale=Scale((-2.0, 0.5), (10.0, -7.0), "ml"), **more)


def test_each_channel_may_have_its_own_line() -> None:
    scan = two_scales(header=Header(channels=("T1w", "T2w")))
    np.testing.assert_array_equal(scan.physical()[0], 10 - 2 * scan.voxels[0].astype(np.float32))
    np.testing.assert_array_equal(scan.physical()[1], scan.voxels[1].astype(np.float32) / 2 - 7)
    np.testing.assert_array_equal(scan.scale.stored(scan.physical()), scan.voxels)
    for n, name in enumerate(("T1w", "T2w")):
        alone = scan.channel(n)
        assert (alone.channels, alone.header.channels, np.shape(alone.scale.slope)) == (1, (name,), ())
        np.testing.assert_array_equal(alone.physical()[0], scan.physical()[n])
    one = scan.in_one_scale()
    assert one.scale == Scale(unit="ml")
    np.testing.assert_array_equal(one.voxels, scan.physical())
    assert scan.channel(0).in_one_scale().scale.numbers == (-2.0, 10.0)
    with pytest.raises(DataError, match="one scale for all channels"):
        _ = scan.scale.numbers


@pytest.mark.parametrize("shift", [1.0, 0.4])
def test_beyond_the_field_of_view_every_channel_has_the_physical_value_asked_for(shift: float) -> None:
    scan = two_scales()
    moved = scan.onto(scan.grid.patch((shift, 0, 0), (5, 4, 5)), outside=(4.0, -3.0))
    assert moved.voxels.dtype == (np.int16 if shift == 1 else np.float32)
    np.testing.assert_array_equal(moved.physical()[0, 3:], 4)
    np.testing.assert_array_equal(moved.physical()[1, 3:], -3)
    same = scan.onto(scan.grid.patch((shift, 0, 0), (5, 4, 5)), outside=4.0)
    np.testing.assert_array_equal(same.physical()[:, 3:], 4)
    with pytest.raises(DataError, match="one a channel; found 3"):
        scan.onto(scan.grid.flip(0), outside=(1.0, 2.0, 3.0))


def test_a_scale_between_two_is_linear_in_each_channel() -> None:
    found = Scale((2.0, 4.0), (0.0, 8.0), "ml").between(Scale((4.0, 4.0), (4.0, 0.0), "ml"), 0.25)
    assert found == Scale((2.5, 4.0), (1.0, 6.0), "ml")
    assert Scale(2.0, 1.0).between(Scale(4.0, 3.0), 0.5) == Scale(3.0, 2.0)
    low, high = 2.0, 6.0
    stored = np.full((2, 1, 1, 1), 3.0)
    normal = Scale((2.0, 5.0), (1.0, -1.0)).normalised(low, high)
    np.testing.assert_allclose(normal.physical((stored - low) / (high - low)).ravel(), [7, 14])


@pytest.mark.parametrize(
    ("slope", "intercept"), [((1.0, 0.0), (0.0, 0.0)), ((1.0, 2.0), (0.0,)), ((1.0,), 0.0), ((), ())]
)
def test_lines_that_do_not_go_together_cannot_be_built(slope: tuple, intercept: tuple | float) -> None:
    with pytest.raises(DataError, match="A scale needs"):
        Scale(slope, intercept)


def test_a_scale_of_other_channels_than_the_scan_has_is_refused() -> None:
    with pytest.raises(DataError, match="A scale of 2 channels does not fit a scan of 3"):
        scan_of((2, 2, 2), channels=3, scale=Scale((1.0, 2.0), (0.0, 0.0)))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("shape", "valid"), [((2, 2, 2), None), ((1, 2, 2, 3), None), ((0, 2, 2, 2), None), ((1, 2, 2, 2), (2, 2, 1))]
)
def test_shapes_that_contradict_each_other_are_refused(shape: tuple, valid: tuple | None) -> None:
    mask = None if valid is None else np.ones(valid, dtype=bool)
    with pytest.raises(DataError, match=r"grid"):
        Scan(np.zeros(shape), Grid((2, 2, 2), np.eye(4)), valid=mask)


def test_a_built_scan_cannot_change_but_its_source_stays_free() -> None:
    voxels = np.zeros((1, 2, 2, 2))
    scan = Scan(voxels, Grid((2, 2, 2), np.eye(4)))
    with pytest.raises(ValueError, match="read-only"):
        scan.voxels[0, 0, 0, 0] = 1
    voxels[0, 0, 0, 0] = 1


def test_onto_its_own_grid_is_itself() -> None:
    scan = scan_of((2, 3, 4), channels=2)
    assert scan.onto(Grid(scan.grid.shape, scan.grid.affine.copy()), outside=0.0) is scan
    assert scan.channels == 2
    assert not scan.is_planar
    assert scan.with_header(modality="MR").header.modality == "MR"
