"""A grid answers where voxels are, whatever is done to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation

from medgen.errors import GeometryError
from medgen.grid import Grid

AXCODES = ["RAS", "LPS", "LAI", "PIR", "ASL", "SPR", "IRP"]


@st.composite
def grids(draw: st.DrawFn, largest: int = 7) -> Grid:
    """Oblique, anisotropic, left- or right-handed, sometimes sheared, sometimes planar."""
    shape = draw(st.tuples(*[st.integers(1, largest)] * 3))
    turn = Rotation.from_euler("xyz", draw(st.tuples(*[st.floats(-180, 180)] * 3)), degrees=True).as_matrix()
    spacing = np.array(draw(st.tuples(*[st.floats(0.3, 6)] * 3))) * draw(st.sampled_from([1, -1]))
    shear = np.eye(3)
    shear[0, 2] = draw(st.sampled_from([0.0, 0.0, 0.3]))
    affine = np.eye(4)
    affine[:3, :3] = turn @ shear * spacing
    affine[:3, 3] = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    return Grid(shape, affine)


@st.composite
def steps(draw: st.DrawFn) -> tuple:
    kind = draw(st.sampled_from(["crop", "pad", "flip", "permute", "reorient", "patch", "centred"]))
    three = st.tuples(*[st.integers(0, 4)] * 3)
    match kind:
        case "crop" | "pad":
            return kind, draw(three), draw(three)
        case "patch":
            return kind, draw(st.tuples(*[st.integers(-4, 6)] * 3)), draw(st.tuples(*[st.integers(1, 6)] * 3))
        case "centred":
            return kind, draw(st.tuples(*[st.integers(1, 9)] * 3))
        case "flip":
            return kind, draw(st.integers(0, 2))
        case "permute":
            return kind, tuple(draw(st.permutations([0, 1, 2])))
        case _:
            return kind, draw(st.sampled_from(AXCODES))


def window(names: np.ndarray, start: tuple, shape: tuple) -> np.ndarray:
    """The part of an array of voxel names, -1 outside, spelled out voxel by voxel."""
    out = np.full(shape, -1)
    for place in np.ndindex(*shape):
        old = tuple(a + n for a, n in zip(start, place, strict=True))
        if all(0 <= n < size for n, size in zip(old, names.shape, strict=True)):
            out[place] = names[old]
    return out


def carried_out(grid: Grid, names: np.ndarray, step: tuple) -> tuple[Grid, np.ndarray]:
    """One step on a grid, and the same on an array that holds a name for every voxel."""
    kind, *arguments = step
    match kind:
        case "crop":
            start = tuple(min(a, n - 1) for a, n in zip(arguments[0], grid.shape, strict=True))
            shape = tuple(min(max(1, m), n - a) for m, n, a in zip(arguments[1], grid.shape, start, strict=True))
            return grid.crop(start, shape), names[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        case "pad":
            widths = list(zip(*arguments, strict=True))
            return grid.pad(*arguments), np.pad(names, widths, constant_values=-1)
        case "patch":
            return grid.patch(*arguments), window(names, *arguments)
        case "centred":
            shape = arguments[0]
            start = tuple((m - n) // 2 for m, n in zip(grid.shape, shape, strict=True))
            return grid.centred(shape), window(names, start, shape)
        case "flip":
            return grid.flip(arguments[0]), np.flip(names, arguments[0])
        case "permute":
            return grid.permute(arguments[0]), names.transpose(arguments[0])
        case _:
            moves = ornt_transform(io_orientation(grid.affine), axcodes2ornt(arguments[0]))
            return grid.reorient(arguments[0]), apply_orientation(names, moves)


@settings(deadline=None)
@given(grids(), st.lists(steps(), min_size=1, max_size=6))
def test_no_chain_of_steps_moves_a_voxel(grid: Grid, chain: list) -> None:
    current, names = grid, np.arange(np.prod(grid.shape)).reshape(grid.shape)
    for step in chain:
        current, names = carried_out(current, names, step)
    assert current.shape == names.shape
    kept = np.argwhere(names >= 0)
    before = np.stack(np.unravel_index(names[tuple(kept.T)], grid.shape), axis=-1)
    np.testing.assert_allclose(current.world(kept), grid.world(before), atol=1e-8)


@given(grids(), st.sampled_from(AXCODES))
def test_reorient_runs_as_asked(grid: Grid, axcodes: str) -> None:
    assert grid.reorient(axcodes).axcodes == axcodes
    assert grid.reorient(axcodes).reorient(grid.axcodes).close(grid, millimetres=1e-8)


@given(grids(), st.tuples(*[st.floats(0.5, 4)] * 3))
def test_respaced_keeps_centre_direction_and_field_of_view(grid: Grid, spacing: tuple) -> None:
    other = grid.respaced(spacing)
    np.testing.assert_allclose(other.spacing, spacing)
    np.testing.assert_allclose(other.direction, grid.direction, atol=1e-12)
    np.testing.assert_allclose(other.centre, grid.centre, atol=1e-8)
    field_before = np.multiply(grid.shape, grid.spacing)
    field_after = np.multiply(other.shape, other.spacing)
    # At most half a new voxel is lost or won on either axis; never less than one voxel is left.
    assert (
        np.abs(field_after - field_before) <= 1e-4 + np.maximum(np.array(spacing) / 2, spacing - field_before)
    ).all()


@given(grids())
def test_respaced_to_its_own_spacing_is_itself(grid: Grid) -> None:
    assert grid.respaced(grid.spacing).close(grid, millimetres=1e-8)


@given(grids(), st.tuples(*[st.floats(-20, 20)] * 3))
def test_world_and_index_undo_each_other(grid: Grid, place: tuple) -> None:
    np.testing.assert_allclose(grid.index(grid.world(place)), place, atol=1e-6)
    by_hand = grid.affine @ [*place, 1]
    np.testing.assert_allclose(grid.world(place), by_hand[:3], atol=1e-9)
    np.testing.assert_allclose(grid.world(np.array([place, place])), [by_hand[:3]] * 2, atol=1e-9)


@given(grids())
def test_lps_is_ras_with_x_and_y_negated(grid: Grid) -> None:
    assert (grid.lps == np.diag([-1, -1, 1, 1]) @ grid.affine).all()
    assert Grid.from_lps(grid.shape, grid.lps) == grid


@given(grids())
def test_plain_data_gives_the_same_grid(grid: Grid) -> None:
    assert Grid.from_dict(grid.to_dict()) == grid


@given(grids(), st.data())
def test_every_field_alone_breaks_equality(grid: Grid, data: st.DataObject) -> None:
    twin = Grid(grid.shape, grid.affine.copy())
    assert twin == grid
    assert hash(twin) == hash(grid)
    axis = data.draw(st.integers(0, 2))
    longer = tuple(n + (axis == a) for a, n in enumerate(grid.shape))
    assert Grid(longer, grid.affine) != grid
    assert not Grid(longer, grid.affine).close(grid)
    affine = grid.affine.copy()
    affine[data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))] += 1e-7
    assert Grid(grid.shape, affine) != grid


def test_equal_grids_have_equal_hashes_even_with_minus_zero() -> None:
    plus, minus = np.diag([2.0, 2, 3, 1]), np.diag([2.0, 2, 3, 1])
    minus[0, 1] = -0.0
    assert Grid((2, 2, 2), plus) == Grid((2, 2, 2), minus)
    assert hash(Grid((2, 2, 2), plus)) == hash(Grid((2, 2, 2), minus))


@given(grids(), st.integers(0, 2), st.floats(0.01, 1))
def test_close_measures_the_furthest_voxel_in_millimetres(grid: Grid, row: int, millimetres: float) -> None:
    affine = grid.affine.copy()
    affine[row, 3] += millimetres
    moved = Grid(grid.shape, affine)
    assert grid.close(moved, millimetres=millimetres * 1.001)
    assert not grid.close(moved, millimetres=millimetres * 0.999)


def test_close_sees_the_direction_of_a_singleton_axis() -> None:
    grid = Grid((5, 5, 1), np.eye(4))
    assert not grid.close(Grid((5, 5, 1), np.diag([1.0, 1, -1, 1])))
    assert not grid.close(Grid((5, 5, 1), np.diag([1.0, 1, 2, 1])))
    assert grid.close(Grid((5, 5, 1), np.diag([1.0, 1, 1.0001, 1])))


def test_close_sees_a_small_turn_of_a_large_grid() -> None:
    affine = np.eye(4)
    affine[1, 0] = 2e-5
    assert not Grid((200, 2, 2), np.eye(4)).close(Grid((200, 2, 2), affine))


def test_answers() -> None:
    affine = np.array([[0, 0, 3.0, 10], [-2, 0, 0, 20], [0, 4, 0, 30], [0, 0, 0, 1]])
    grid = Grid((3, 5, 2), affine)
    assert grid.spacing == (2.0, 4.0, 3.0)
    assert grid.axcodes == "PSR"
    assert grid.origin.tolist() == [10, 20, 30]
    assert grid.centre.tolist() == [11.5, 18, 38]
    assert grid.voxel_volume == pytest.approx(24)
    assert grid.shear_degrees == pytest.approx(0)
    assert grid.corners().min(axis=0).tolist() == [10, 16, 30]
    assert grid.corners().max(axis=0).tolist() == [13, 20, 46]
    sheared = affine.copy()
    sheared[0, 0] = 2 * np.tan(np.radians(18.5))
    sheared[:3, 0] *= 2 / np.linalg.norm(sheared[:3, 0])
    assert Grid((3, 5, 2), sheared).shear_degrees == pytest.approx(18.5)


def test_a_built_grid_cannot_change() -> None:
    affine = np.eye(4)
    grid = Grid((2, 2, 2), affine)
    affine[0, 3] = 99
    assert grid.origin[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 3] = 1


SINGULAR = np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("shape", "affine", "says"),
    [
        ((2, 2), np.eye(4), "three axes"),
        ((2, 0, 2), np.eye(4), "at least one"),
        ((2, 2.5, 2), np.eye(4), "whole voxel"),
        ((2, 2, 2), np.eye(3), "4x4"),
        ((2, 2, 2), np.diag([1, np.nan, 1, 1]), "finite"),
        ((2, 2, 2), np.zeros((4, 4)), "last row"),
        ((2, 2, 2), np.diag([0.0, 1, 1, 1]), "spacing"),
        ((2, 2, 2), np.diag([2e4, 1, 1, 1]), "spacing"),
        ((2, 2, 2), SINGULAR, "singular"),
    ],
)
def test_impossible_grids_cannot_be_built(shape: tuple, affine: np.ndarray, says: str) -> None:
    with pytest.raises(GeometryError, match=says):
        Grid(shape, affine)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda grid: grid.crop((0, 0, 2), (2, 2, 2)), "leaves the grid"),
        (lambda grid: grid.crop((-1, 0, 0), (2, 2, 2)), "leaves the grid"),
        (lambda grid: grid.flip(3), "0, 1 or 2"),
        (lambda grid: grid.flip(-1), "0, 1 or 2"),
        (lambda grid: grid.permute((0, 0, 1)), "permutation"),
        (lambda grid: grid.reorient("RAR"), "once each"),
        (lambda grid: grid.reorient("RA"), "once each"),
        (lambda grid: grid.respaced((1, 1)), "three positive"),
        (lambda grid: grid.respaced((1, -1, 1)), "three positive"),
    ],
)
def test_impossible_steps_are_refused(wrong: object, says: str) -> None:
    with pytest.raises(GeometryError, match=says):
        wrong(Grid((3, 3, 3), np.eye(4)))
