"""Recipes: geometry once, numbers that stay physical, the same object as JSON, and a recipe found from the scans."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from medgen import io
from medgen.data.fingerprint import auto_recipe, fingerprint
from medgen.data.phantoms import ct_block
from medgen.data.recipe import (
    CropOrPad,
    Orient,
    Percentiles,
    Recipe,
    Respace,
    Window,
    foreground,
    foreground_box,
    foreground_centre,
)
from medgen.errors import DataError
from medgen.grid import Grid
from medgen.scan import Header, Scale, Scan


def made(shape=(6, 8, 5), spacing=(2.0, 3.0, 4.0), *, scale=Scale(), dtype=np.float32, seed=0, **header) -> Scan:
    """White noise in 0..1000 on an axis-aligned RAS grid that begins at (-5, 7, 11) mm."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-5, 7, 11]
    voxels = np.random.default_rng(seed).uniform(0, 1000, (1, *shape)).astype(dtype)
    return Scan(voxels, Grid(shape, affine), scale, Header(**header))


def box(value=100.0, at=(slice(3, 7), slice(2, 6), slice(4, 9))) -> Scan:
    """Zero but for one bright box, on 12 x 10 x 14 voxels of 2 mm."""
    voxels = np.zeros((1, 12, 10, 14), np.float32)
    voxels[(0, *at)] = value
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [-10, -20, 30]
    return Scan(voxels, Grid((12, 10, 14), affine))


# -- geometry --------------------------------------------------------------------------------------


def test_orient_is_an_exact_copy_to_the_other_orientation():
    scan = made()
    turned = scan.onto(scan.grid.reorient("PIL"), outside=0)
    back = Recipe(steps=(Orient(axcodes="RAS"),))(turned)
    assert back.grid.axcodes == "RAS"
    assert back.grid.close(scan.grid)
    assert np.array_equal(back.voxels, scan.voxels)


def test_a_marked_voxel_lands_on_its_millimetre_through_a_whole_recipe():
    """Crop, pad, turn and window: the brightest point of the patient stays where it is."""
    for axcodes in ("RAS", "LPS", "SAR", "IPR"):
        voxels = np.zeros((1, 9, 11, 7), np.float32)
        voxels[0, 6, 3, 2] = 50
        affine = np.diag([2.0, 1.5, 3.0, 1.0])
        affine[:3, 3] = [4, 5, 6]
        scan = Scan(voxels, Grid((9, 11, 7), affine))
        xyz = scan.grid.world([6, 3, 2])
        turned = scan.onto(scan.grid.reorient(axcodes), outside=0)
        recipe = Recipe(steps=(Orient(), CropOrPad(shape=(13, 8, 7)), Window(low=0, high=50)))
        prepared = recipe(turned)
        at = np.array(np.unravel_index(prepared.voxels[0].argmax(), prepared.grid.shape))
        assert np.allclose(prepared.grid.world(at), xyz, atol=1e-9)


def test_many_geometry_steps_move_the_scan_once(monkeypatch):
    moves = []
    onto = Scan.onto
    monkeypatch.setattr(
        Scan, "onto", lambda self, grid, outside: (moves.append(1), onto(self, grid, outside=outside))[1]
    )
    recipe = Recipe(
        steps=(
            Orient(axcodes="LPI"),
            Respace(spacing=(3, 3, 3)),
            CropOrPad(shape=(4, 8, 8)),
            CropOrPad(shape=(4, 4, 4)),
        )
    )
    assert recipe(made()).grid.shape == (4, 4, 4)
    assert len(moves) == 1


def test_respacing_keeps_the_field_of_view_and_ignores_a_per_cent():
    scan = made(spacing=(2.0, 2.0, 2.0))
    assert Recipe(steps=(Respace(spacing=(2.01, 1.99, 2.0)),))(scan).grid == scan.grid
    coarser = Recipe(steps=(Respace(spacing=(4.0, 4.0, 2.0)),)).grid(scan)
    assert coarser.shape == (3, 4, 5)
    assert np.allclose(coarser.centre, scan.grid.centre)


@pytest.mark.parametrize(
    ("about", "start"),
    [
        ("centre", (4, 3, 5)),
        ("foreground", (3, 2, 4)),
        ((-10.0 + 2 * 5.5, -20.0 + 2 * 3.5, 30.0 + 2 * 6.5), (4, 2, 5)),
    ],
)
def test_a_window_is_placed_about_the_middle_the_body_or_a_point(about, start):
    scan = box()
    grid = Recipe(steps=(CropOrPad(shape=(4, 4, 4), about=about),)).grid(scan)
    assert np.allclose(scan.grid.index(grid.origin), start)
    assert grid.shape == (4, 4, 4)


def test_scans_of_one_space_share_a_window_whatever_their_own_grid():
    step = CropOrPad(shape=(4, 4, 4), about=(0.0, 10.0, 20.0))
    one, other = made(spacing=(2, 2, 2)), made(shape=(12, 12, 12), spacing=(2, 2, 2), seed=1)
    assert Recipe(steps=(step,)).grid(one).close(Recipe(steps=(step,)).grid(other))


def test_padding_is_the_lowest_value_or_the_one_stated():
    scan = made(scale=Scale(2.0, -500.0, "HU"))
    for outside, expected in (("lowest", float(scan.physical().min())), (-1024.0, -1024.0)):
        padded = Recipe(steps=(CropOrPad(shape=(10, 8, 5)),), outside=outside)(scan)
        assert np.allclose(padded.physical()[0, :2], expected)
        assert np.allclose(padded.physical()[0, 2:-2], scan.physical()[0])


# -- intensity -------------------------------------------------------------------------------------


def test_window_cuts_maps_to_one_and_remembers_physical_values():
    scan = made(scale=Scale(2.0, -1000.0, "HU"))
    prepared = Recipe(steps=(Window(low=-500, high=500),))(scan)
    assert prepared.voxels.dtype == np.float32
    assert prepared.voxels.min() == 0
    assert prepared.voxels.max() == 1
    assert prepared.scale.unit == "HU"
    assert prepared.scale.clip == (-500, 500)
    assert np.allclose(prepared.physical(), np.clip(scan.physical(), -500, 500), atol=1e-3)


def test_percentiles_follow_the_scan_and_remember_physical_values():
    scan = made(scale=Scale(3.0, 7.0))
    prepared = Recipe(steps=(Percentiles(low=0, high=90),))(scan)
    values = scan.physical()
    level = values.min() + 0.1 * (np.percentile(values, 99) - values.min())
    high = np.percentile(values[values > level], 90)
    assert prepared.scale.clip == pytest.approx((values.min(), high))
    assert np.allclose(prepared.physical(), np.minimum(values, high), atol=1e-3 * high)
    # Another gain of the scanner changes nothing.
    again = Recipe(steps=(Percentiles(low=0, high=90),))(scan.with_voxels(scan.voxels * 1.7))
    assert np.allclose(again.voxels, prepared.voxels, atol=2e-3)


def test_unmeasured_voxels_are_air_and_do_not_set_the_range():
    scan = made(scale=Scale(1.0, -1000.0, "HU"))
    valid = np.ones(scan.grid.shape, bool)
    valid[0] = False
    voxels = scan.voxels.copy()
    voxels[0, 0] = 30_000
    scan = replace(scan, voxels=voxels, valid=valid)
    prepared = Recipe(steps=(Window(low=-1000, high=0),), outside=-1024.0)(scan)
    assert np.all(prepared.voxels[0, 0] == 0)
    assert np.all(Recipe(steps=(Percentiles(),))(scan).physical()[0, 1:] <= 0)


def test_a_constant_scan_is_refused_in_a_sentence():
    flat = made().with_voxels(np.full((1, 6, 8, 5), 3.0, np.float32))
    with pytest.raises(DataError, match="constant"):
        Recipe(steps=(Percentiles(),))(flat)
    # A window needs nothing of the scan.
    assert float(Recipe(steps=(Window(low=0, high=6),))(flat).voxels.mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("step", [Percentiles(), Window(low=0, high=1), CropOrPad(shape=(4, 4, 4), about="foreground")])
def test_a_scan_without_any_measured_voxel_is_refused_in_a_sentence(step):
    scan = replace(made(), valid=np.zeros((6, 8, 5), bool))
    with pytest.raises(DataError, match="measured"):
        Recipe(steps=(step,))(scan)


def test_a_recipe_leaves_its_input_alone_and_repeats():
    scan = made(dtype=np.int16)
    before = scan.voxels.tobytes()
    recipe = Recipe(steps=(Orient(axcodes="LPS"), CropOrPad(shape=(4, 4, 4)), Percentiles()))
    first, second = recipe(scan), recipe(scan)
    assert scan.voxels.tobytes() == before
    assert first.voxels.tobytes() == second.voxels.tobytes()
    assert (first.grid, first.scale) == (second.grid, second.scale)
    assert first.header == scan.header


def test_every_channel_has_the_same_range():
    scan = made()
    two = Scan(np.concatenate([scan.voxels, scan.voxels / 4]), scan.grid)
    prepared = Recipe(steps=(Percentiles(),))(two)
    assert np.allclose(prepared.voxels[1], np.clip(scan.voxels[0] / prepared.scale.slope / 4, 0, 1), atol=0.01)


def unlike() -> Scan:
    """Two modalities: the second five times as bright, and nowhere below 40."""
    one, two = made(), made(seed=1)
    return Scan(np.concatenate([one.voxels, 5 * two.voxels + 40]), one.grid)


def test_modalities_have_a_range_each_as_if_they_were_alone():
    scan, recipe = unlike(), Recipe(steps=(CropOrPad(shape=(8, 8, 5)), Percentiles(apart=True)))
    prepared = recipe(scan)
    for n in range(2):
        alone = recipe(scan.channel(n))
        assert np.array_equal(prepared.voxels[n], alone.voxels[0])
        assert np.array_equal(prepared.physical()[n], alone.physical()[0])
        values = scan.physical()[n]
        high = np.percentile(values[values > values.min() + 0.1 * (np.percentile(values, 99) - values.min())], 99.5)
        assert prepared.scale.channel(n).stored(float(high)) == pytest.approx(1, rel=0.01)
        assert np.allclose(prepared.physical()[n, 1:-1], np.minimum(values, prepared.scale.clip[n][1]), rtol=1e-6)
        assert np.allclose(prepared.physical()[n, 0], values.min())
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_colours_keep_one_range():
    scan = unlike().with_header(photometric="RGB")
    prepared, together = Recipe(steps=(Percentiles(apart=True),))(scan), Recipe(steps=(Percentiles(),))(scan)
    assert np.array_equal(prepared.voxels, together.voxels)
    assert prepared.scale == Scale(
        (together.scale.slope,) * 2, (together.scale.intercept,) * 2, clip=prepared.scale.clip
    )


def test_a_constant_or_unmeasured_modality_is_refused():
    scan, recipe = unlike(), Recipe(steps=(Percentiles(apart=True),))
    with pytest.raises(DataError, match="Channel 1 of the scan is constant"):
        recipe(scan.with_voxels(np.stack([scan.voxels[0], np.full_like(scan.voxels[0], 3)])))
    with pytest.raises(DataError, match="measured"):
        recipe(scan.with_voxels(np.stack([scan.voxels[0], np.full_like(scan.voxels[0], np.nan)])))


def test_the_recipe_of_several_modalities_gives_each_a_range():
    assert auto_recipe(fingerprint([unlike()]), multiple=1, max_voxels=1000).steps[-1] == Percentiles(apart=True)
    assert auto_recipe(fingerprint([made()]), multiple=1, max_voxels=1000).steps[-1] == Percentiles()


# -- as values -------------------------------------------------------------------------------------


def test_a_recipe_is_the_same_after_json():
    recipe = Recipe(
        steps=(
            Orient(axcodes="LPS"),
            Respace(spacing=(1.5, 1.5, 3)),
            CropOrPad(shape=(8, 8, 4), about="foreground"),
            CropOrPad(shape=(4, 4, 4), about=(1.0, -2.5, 3.0)),
            Window(low=-1000, high=400),
        ),
        outside=-1024,
    )
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe
    assert again.shape == (4, 4, 4)
    scan = made(shape=(12, 12, 12))
    assert np.array_equal(again(scan).voxels, recipe(scan).voxels)


@pytest.mark.parametrize(
    "steps",
    [
        [{"do": "window", "low": 0, "high": 1}, {"do": "orient"}],
        [{"do": "window", "low": 0, "high": 1}, {"do": "percentiles"}],
        [{"do": "window", "low": 1, "high": 1}],
        [{"do": "percentiles", "high": 101}],
        [{"do": "dance"}],
        [{"do": "orient", "axes": "RAS"}],
        [{"do": "crop_or_pad", "shape": [4, 4]}],
        [{"do": "crop_or_pad", "shape": [4, 4, 4], "about": "nose"}],
    ],
)
def test_steps_that_make_no_sense_are_refused(steps):
    with pytest.raises(ValidationError):
        Recipe.model_validate({"steps": steps})


# -- where the body is -----------------------------------------------------------------------------


def test_the_body_is_the_bright_box():
    scan = box()
    assert int(foreground(scan).sum()) == 4 * 4 * 5
    first, last = foreground_box(scan)
    assert (first.tolist(), last.tolist()) == ([3, 2, 4], [6, 5, 8])
    assert np.allclose(foreground_centre(scan), scan.grid.world([4.5, 3.5, 6]))


def test_the_body_of_a_negative_scale_is_where_physical_values_are_high():
    scan = box()
    inverted = Scan(100 - scan.voxels, scan.grid, Scale(-1.0, 100.0))
    assert np.array_equal(foreground(inverted), foreground(scan))


def test_a_stray_voxel_does_not_stretch_the_body():
    scan = box(at=(slice(2, 9), slice(1, 9), slice(1, 12)))
    voxels = scan.voxels.copy()
    voxels[0, 11, 9, 13] = 100
    first, last = foreground_box(scan.with_voxels(voxels))
    assert last.tolist() == [8, 8, 11] or last.tolist() == [11, 9, 13]
    assert first.tolist() == [2, 1, 1]


# -- found from the scans --------------------------------------------------------------------------


def test_ct_gets_a_window_in_hounsfield_units_and_air_outside():
    scans = [ct_block(seed, shape=(24, 20, 12)) for seed in range(2)]
    found = fingerprint(scans)
    recipe = auto_recipe(found, multiple=8, max_voxels=10**6)
    window = recipe.steps[-1]
    assert isinstance(window, Window)
    low, high = np.median([np.percentile(scan.physical(), [0.5, 99.5]) for scan in scans], axis=0)
    assert (window.low, window.high) == (max(-1024, round(low)), round(high))
    assert window.low < -500
    assert window.high > 100
    assert recipe.outside == -1024
    assert (found.unit, found.modality, found.planar) == ("HU", "CT", False)
    prepared = recipe(scans[0])
    assert prepared.grid.axcodes == "RAS"
    assert all(n % 8 == 0 for n in prepared.grid.shape)
    assert np.allclose(prepared.physical().min(), window.low, atol=0.1)


def test_mr_gets_its_own_percentiles_and_a_window_that_holds_every_body(heads):
    scans = [io.read(path) for path in sorted(heads.iterdir())[:6]]
    found = fingerprint(scans)
    recipe = auto_recipe(found, multiple=4, max_voxels=10**6)
    assert isinstance(recipe.steps[-1], Percentiles)
    assert found.lattice is not None
    # Heads share one space, so the window is a place in it.
    crop = next(step for step in recipe.steps if isinstance(step, CropOrPad))
    assert isinstance(crop.about, tuple)
    for scan in scans:
        prepared = recipe(scan)
        assert prepared.voxels.min() == 0
        assert prepared.voxels.max() == 1
        assert int(foreground(prepared).sum()) > 0.98 * int(foreground(scan).sum())


def test_eight_bit_pictures_keep_their_scale(xrays):
    scans = [io.read(path) for path in sorted(xrays.glob("*/*.png"))[:6]]
    recipe = auto_recipe(fingerprint(scans), multiple=4, max_voxels=10**6)
    assert recipe.steps[-1] == Window(low=0, high=255)
    assert recipe.shape == (16, 16, 1)
    assert np.allclose(recipe(scans[0]).voxels * 255, scans[0].voxels, atol=1e-4)


def test_twelve_bit_pictures_get_twelve_bits():
    pictures = [
        Scan(np.random.default_rng(n).integers(0, 3500, (1, 8, 8, 1)).astype(np.uint16), Grid((8, 8, 1), np.eye(4)))
        for n in range(3)
    ]
    assert auto_recipe(fingerprint(pictures), multiple=4, max_voxels=10**6).steps[-1] == Window(low=0, high=4095)


@pytest.mark.parametrize("most", [300, 1000, 4000])
def test_a_recipe_keeps_to_the_voxels_it_may_use(heads, xrays, most):
    for scans in ([io.read(path) for path in sorted(heads.iterdir())[:2]], [ct_block(0, (24, 20, 12))]):
        recipe = auto_recipe(fingerprint(scans), multiple=4, max_voxels=most)
        assert np.prod(recipe.shape) <= most
    pictures = [io.read(path) for path in sorted(xrays.glob("*/*.png"))[:3]]
    assert np.prod(auto_recipe(fingerprint(pictures), multiple=4, max_voxels=100).shape) <= 144


def test_scans_without_a_shared_space_are_centred_on_their_bodies():
    one, other = box(), box(at=(slice(5, 9), slice(4, 8), slice(2, 7)))
    other = Scan(other.voxels, other.grid.patch((3, 1, 0), other.grid.shape))
    found = fingerprint([one, other])
    recipe = auto_recipe(found, multiple=4, max_voxels=10**6)
    assert found.middle is None
    assert next(step for step in recipe.steps if isinstance(step, CropOrPad)).about == "foreground"
    assert np.array_equal(recipe(one).voxels, recipe(other).voxels)


def test_images_mixed_with_volumes_or_no_scan_at_all_are_refused():
    image = Scan(np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1), Grid((8, 8, 1), np.eye(4)))
    with pytest.raises(DataError, match="images"):
        fingerprint([image, made()])
    with pytest.raises(DataError, match="channel"):
        fingerprint([made(), Scan(np.repeat(made().voxels, 2, 0), made().grid)])
    with pytest.raises(DataError, match="No readable scan"):
        fingerprint([])
