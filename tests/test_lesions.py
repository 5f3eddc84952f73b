"""Painted lesions and controls: what changed is what the mask says, and nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, gaussian_filter, label

from medgen import io
from medgen.data.controls import CONTROLS, controls
from medgen.data.lesions import (
    KINDS_A,
    KINDS_B,
    SIZES,
    STRENGTHS,
    Lesion,
    filled_body,
    mask_library,
    paint,
    place,
    random_shape,
)
from medgen.data.phantoms import chest_xray, ct_block, head
from medgen.data.recipe import Percentiles, Recipe
from medgen.data.textures import local_moments, texture
from medgen.errors import DataError
from medgen.grid import Grid
from medgen.scan import Scan

LEVELS = ("low", "middle", "high")
MNI = Grid((30, 36, 30), np.array([[6.0, 0, 0, -87], [0, 6, 0, -123], [0, 0, 6, -70], [0, 0, 0, 1]]))


def prepared(scan: Scan) -> Scan:
    return Recipe(steps=(Percentiles(),))(scan)


def colour() -> Scan:
    x = np.concatenate([chest_xray(n, size=32).voxels for n in range(3)])
    return prepared(Scan(x.astype(np.float32), Grid((32, 32, 1), np.eye(4))))


@pytest.fixture(scope="module")
def scans() -> dict[str, Scan]:
    """Volumes and images; whole numbers, numbers on [0, 1], Hounsfield units, three channels."""
    volume = head(0, shape=(30, 36, 30), spacing=6.0)[0]
    return {
        "head": volume,
        "prepared head": prepared(volume),
        "ct": ct_block(0, shape=(24, 20, 12)),
        "xray": chest_xray(0, size=48),
        "colour": colour(),
    }


def shape_in(scan: Scan, seed: int = 0, size: str = "large") -> np.ndarray:
    return random_shape(scan.grid, filled_body(scan), size, np.random.default_rng(seed))


def change(before: Scan, after: Scan) -> np.ndarray:
    return np.abs(after.physical().astype(np.float64) - before.physical())


# -- every kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS_B)
@pytest.mark.parametrize("name", ["head", "prepared head", "ct", "xray", "colour"])
def test_the_mask_is_what_changed(scans, name, kind):
    scan, shape = scans[name], shape_in(scans[name])
    was = scan.voxels.copy()
    amounts = []
    for contrast in LEVELS:
        ill, mask = paint(scan, shape, kind=kind, contrast=contrast, rng=np.random.default_rng(1))
        marked, moved = mask.voxels[0] > 0, change(scan, ill)
        span = np.ptp(scan.physical(), axis=(1, 2, 3))[:, None, None, None]
        assert mask.is_label
        assert mask.grid == ill.grid == scan.grid
        assert mask.header.synthetic
        assert ill.header.synthetic
        assert marked.any()
        assert (moved[:, ~marked] == 0).all()
        assert (moved > 0.999e-3 * span).any(0)[marked].all()
        assert not (marked & ~filled_body(scan)).any()
        assert kind == "missing-slice" or not (marked & ~shape).any()
        assert ill.voxels.dtype == scan.voxels.dtype
        assert ill.voxels.min() >= was.min()
        assert ill.voxels.max() <= was.max()
        amounts.append(moved.sum())
    assert amounts[0] < amounts[1] < amounts[2]
    assert (scan.voxels == was).all()


@pytest.mark.parametrize("kind", KINDS_B)
def test_the_seed_decides_everything(scans, kind):
    scan = scans["prepared head"]
    one, again, other = (Lesion(kind, "medium", "high", seed).painted(scan) for seed in (1, 1, 2))
    assert (one[0].voxels == again[0].voxels).all()
    assert (one[1].voxels != other[1].voxels).any()
    assert one[2] == ""


def test_kinds_that_train_and_kinds_that_test_are_apart():
    assert not set(KINDS_A) & set(KINDS_B)
    assert set(STRENGTHS) == set(KINDS_B)


# -- each kind -----------------------------------------------------------------------------------------------


def painted(scan: Scan, kind: str, contrast: str = "high", seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values before and after, and the voxels deep inside the shape, where no edge is felt."""
    shape = shape_in(scan, seed)
    ill, _ = paint(scan, shape, kind=kind, contrast=contrast, rng=np.random.default_rng(seed))
    inner = (
        binary_erosion(np.pad(shape, 4, mode="edge"), iterations=3)[4:-4, 4:-4, 4:-4] if shape.shape[2] > 1 else None
    )
    return scan.physical()[0], ill.physical()[0], shape if inner is None else inner


def test_scaled_is_the_stated_factor_above_the_lowest_value(scans):
    for name in ("prepared head", "ct"):
        for contrast, factor in zip(LEVELS, (0.8, 0.6, 0.4), strict=True):
            old, new, inner = painted(scans[name], "scaled", contrast)
            low, span = old.min(), np.ptp(old)
            if inner.any():
                assert np.allclose(new[inner], low + factor * (old[inner] - low), atol=0.02 * span)


def test_hyper_is_brighter_and_hypo_darker(scans):
    for name in ("prepared head", "xray"):
        for kind, sign in (("hyper", 1), ("hypo", -1)):
            old, new, inner = painted(scans[name], kind)
            assert sign * (new - old)[inner].mean() > 0.02 * np.ptp(old)


def test_iso_keeps_local_mean_and_spread_and_loses_the_pattern():
    rng = np.random.default_rng(100)
    field = 0.5 + 0.1 * gaussian_filter(rng.normal(size=(40, 40, 40)), 1.0) / 0.15
    scan = Scan(np.clip(field, 0.05, 0.95).astype(np.float32)[None], Grid((40, 40, 40), np.eye(4)))
    old, new, inner = painted(scan, "iso")
    assert abs(new[inner].mean() - old[inner].mean()) < 0.1 * old[inner].std()
    assert 0.75 < new[inner].std() / old[inner].std() < 1.25
    assert abs(np.corrcoef(new[inner], old[inner])[0, 1]) < 0.6
    rest = [values - local_moments(values, np.ones(values.shape, bool))[0] for values in (old, new)]
    assert abs(np.corrcoef(rest[0][inner], rest[1][inner])[0, 1]) < 0.2
    rough = [np.abs(np.diff(values, axis=0))[inner[1:]].mean() for values in (old, new)]
    assert 0.7 < rough[1] / rough[0] < 1.4


def test_textures_are_as_fine_as_the_tissue():
    rng = np.random.default_rng(0)
    body = np.ones((48, 48, 1), dtype=bool)
    for width in (0.6, 1.5):
        tissue = gaussian_filter(rng.normal(size=body.shape), (width, width, 0))
        mean, spread = local_moments(tissue, body)
        mine, drawn = (tissue - mean) / spread, texture(tissue, body, rng)
        assert np.abs(np.diff(drawn, axis=0)).mean() == pytest.approx(np.abs(np.diff(mine, axis=0)).mean(), rel=0.15)


@pytest.mark.parametrize("seed", range(4))
def test_warps_swell_or_shrink_what_is_inside_and_move_nothing_outside(seed):
    """A bright ball in the middle of the lesion: its volume grows or falls, its brightness stays."""
    at = np.linalg.norm(np.indices((31, 31, 31)) - 15, axis=0)
    values = np.where(at < 5, 1.0, 0.5).astype(np.float32)
    values[0] = 0
    scan = Scan(values[None], Grid((31, 31, 31), np.eye(4)))
    ill, _ = paint(scan, at < 12, kind="warp", contrast="high", rng=np.random.default_rng(seed))
    before, after = ((one.voxels > 0.75).sum() for one in (scan, ill))
    assert after > 1.5 * before or after < 0.6 * before
    assert ill.voxels.max() == 1
    assert (ill.voxels[0][at >= 12] == values[at >= 12]).all()


def test_warping_what_is_all_one_value_changes_nothing_and_says_so():
    values = np.full((1, 20, 20, 20), 0.5, np.float32)
    values[0, 0] = 0
    scan = Scan(values, Grid((20, 20, 20), np.eye(4)))
    shape = np.zeros((20, 20, 20), bool)
    shape[8:13, 8:13, 8:13] = True
    with pytest.raises(DataError, match="changes no voxel"):
        paint(scan, shape, kind="warp", contrast="high", rng=np.random.default_rng(0))


def test_a_missing_slice_is_missing(scans):
    scan, shape = scans["prepared head"], shape_in(scans["prepared head"], size="small")
    ill, mask = paint(scan, shape, kind="missing-slice", contrast="high", rng=np.random.default_rng(0))
    (slices,) = np.flatnonzero((mask.voxels[0] > 0).any((0, 1)))[None]
    assert len(slices) == 1
    body = filled_body(scan)
    assert (ill.voxels[0][..., slices][body[..., slices]] == scan.voxels.min()).all()


def test_transplants_are_tissue_of_the_same_body(scans):
    old, new, inner = painted(scans["head"], "transplant")
    assert inner.any()
    assert np.isin(new[inner], old).mean() > 0.9
    assert (new[inner] != old[inner]).mean() > 0.9


def test_blur_takes_detail_away(scans):
    old, new, inner = painted(scans["prepared head"], "blur")
    rough = [np.abs(np.diff(values, axis=0))[inner[1:]].mean() for values in (old, new)]
    assert rough[1] < 0.6 * rough[0]


def test_nothing_is_painted_where_nothing_was_measured(scans):
    scan = scans["xray"]
    valid = np.ones(scan.grid.shape, dtype=bool)
    valid[:, :24] = False
    shape = np.zeros_like(valid)
    shape[10:40, 15:35] = True
    _, mask = paint(replace(scan, valid=valid), shape, kind="scaled", contrast="high", rng=np.random.default_rng(0))
    assert not (mask.voxels[0].astype(bool) & ~valid).any()


# -- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_shapes_of_its_own_fill_their_part_of_the_body(scans, size):
    for name, power in (("head", 1), ("xray", 2 / 3)):
        body = filled_body(scans[name])
        shape = shape_in(scans[name], 3, size)
        share = {"small": 0.003, "medium": 0.01, "large": 0.035}[size] ** power
        assert shape.sum() == max(1, round(share * body.sum()))
        assert not (shape & ~body).any()
        named, _ = label(shape, np.ones((3, 3, 3)))
        assert np.bincount(named[shape]).max() > 0.7 * shape.sum()
        # Blobs, neither dust nor balls.
        assert (shape_in(scans[name], 4, size) != shape).any()


def write_mask(path: Path, where: tuple[slice, ...], spacing: float = 6.0) -> None:
    affine = MNI.affine.copy()
    affine[:3, :3] *= spacing / 6
    drawn = np.zeros((1, *MNI.shape), np.uint8)
    drawn[(0, *where)] = 1
    io.write(Scan(drawn, Grid(MNI.shape, affine), is_label=True), path)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Masks in the space of the heads: 13 mL, 13 mL of another place, an empty one and half a litre."""
    write_mask(tmp_path / "a_lesion.nii.gz", (slice(10, 15), slice(15, 18), slice(14, 18)))
    write_mask(tmp_path / "b_lesion.nii.gz", (slice(16, 21), slice(15, 18), slice(14, 18)))
    write_mask(tmp_path / "empty.nii.gz", (slice(0, 0),))
    write_mask(tmp_path / "huge.nii.gz", (slice(8, 22), slice(8, 22), slice(8, 22)))
    return tmp_path


def test_a_library_tells_volume_and_hash_and_leaves_out_what_is_no_lesion(library):
    found = mask_library(library)
    assert [one.name for one in found] == ["a_lesion.nii.gz", "b_lesion.nii.gz"]
    assert [one.millilitres for one in found] == pytest.approx([60 * 0.216] * 2)
    assert found[0].sha256 != found[1].sha256
    renamed = library / "renamed" / "c.nii"
    renamed.parent.mkdir()
    io.write(io.read(library / "a_lesion.nii.gz"), renamed)
    assert mask_library(renamed.parent)[0].sha256 == found[0].sha256


def test_a_folder_without_masks_is_refused(tmp_path):
    write_mask(tmp_path / "empty.nii.gz", (slice(0, 0),))
    with pytest.raises(DataError, match="none of 1 holds"):
        mask_library(tmp_path)


def test_masks_land_on_their_millimetres(library):
    """On a grid turned, flipped and finer, the mask's world box is where it was."""
    mask = io.read(library / "a_lesion.nii.gz")
    low, high = mask.grid.world([9.5, 14.5, 13.5]), mask.grid.world([14.5, 17.5, 17.5])
    for grid in (MNI.permute((2, 0, 1)).flip(1), MNI.respaced((3.0, 3.0, 3.0)), MNI.reorient("LPI")):
        found = place(mask, grid, np.ones(grid.shape, bool))
        at = grid.world(np.argwhere(found))
        assert (at > low - 1e-6).all()
        assert (at < high + 1e-6).all()
        assert found.sum() * grid.voxel_volume == pytest.approx(60 * 216, rel=0.01)
    assert not place(mask, MNI, np.zeros(MNI.shape, bool)).any()


def test_lesions_from_a_library_say_which_mask_they_are_of(library, scans):
    masks = mask_library(library)
    scan = scans["prepared head"]
    for seed in range(3):
        ill, mask, came_from = Lesion("scaled", "medium", "high", seed).painted(scan, masks)
        source = next(one for one in masks if one.sha256 == came_from)
        expected = place(io.read(source.path), scan.grid, filled_body(scan))
        assert (mask.voxels[0] > 0).sum() >= 0.95 * expected.sum()
        assert (ill.voxels != scan.voxels).any()
    with pytest.raises(DataError, match="None of 0 masks of 27 to 100 mL"):
        Lesion("scaled", "large").painted(scan, masks)


def test_wrong_lesions_are_refused(scans, unchecked_types):
    with pytest.raises(DataError, match="kind is one of hyper"):
        Lesion("cut-paste")
    with pytest.raises(DataError, match="size"):
        Lesion("hyper", "tiny")
    scan = scans["head"]
    with pytest.raises(DataError, match="inside the body"):
        paint(scan, ~filled_body(scan), kind="hyper", contrast="high", rng=np.random.default_rng(0))
    empty = scan.with_voxels(np.zeros_like(scan.voxels))
    with pytest.raises(DataError, match="no foreground"):
        Lesion("hyper").painted(empty)


def test_real_masks_are_painted_at_their_size_into_real_brains(shared_data, tmp_path):
    for path in sorted((shared_data / "lesion_masks_soop").glob("*.nii.gz"))[:40:4]:
        shutil.copy(path, tmp_path)
    masks = mask_library(tmp_path)
    scan = io.read(next((shared_data / "brain_t1_ds002748" / "mni2mm").glob("*.nii.gz")))
    for size, (low, high) in SIZES.items():
        if any(low <= one.millilitres < high for one in masks):
            _, mask, came_from = Lesion("scaled", size, "high", 0).painted(scan, masks)
            source = next(one for one in masks if one.sha256 == came_from)
            held = float(mask.voxels.sum()) * scan.grid.voxel_volume / 1000
            assert 0.45 * source.millilitres < held < 1.1 * source.millilitres


# -- controls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head", "prepared head", "xray", "colour"])
def test_controls_are_what_they_are_called(scans, name):
    scan = scans[name]
    found = dict(controls(scan, np.random.default_rng(0)))
    assert tuple(found) == CONTROLS
    body, old = filled_body(scan), scan.voxels.astype(np.float64)
    for one in found.values():
        assert one.grid == scan.grid
        assert one.voxels.dtype == scan.voxels.dtype
        assert one.header.synthetic
        assert one.voxels.min() >= scan.voxels.min()
        assert one.voxels.max() <= scan.voxels.max()
    assert 0 < np.ptp(found["constant"].voxels[0]) <= 0.011 * np.ptp(old) + 1
    assert (np.sort(found["noise"].voxels, axis=None) == np.sort(scan.voxels, axis=None)).all()
    axis = 2 if scan.is_planar else 3
    assert (np.flip(found["flipped"].voxels, axis) == scan.voxels).all()
    assert np.corrcoef(found["inverted"].voxels[0][body], old[0][body])[0, 1] < -0.95
    assert (found["inverted"].voxels[:, ~body] == scan.voxels[:, ~body]).all()
    rough = [np.abs(np.diff(values.astype(np.float64), axis=1)).mean() for values in (old, found["blurred"].voxels)]
    assert rough[1] < 0.8 * rough[0]
    again = dict(controls(scan, np.random.default_rng(0)))
    assert all((again[n].voxels == found[n].voxels).all() for n in CONTROLS)


def test_a_volume_is_flipped_along_the_axis_of_its_head(scans):
    turned = scans["head"].onto(scans["head"].grid.reorient("SAR"), outside=0)
    flipped = dict(controls(turned, np.random.default_rng(0)))["flipped"]
    assert (np.flip(flipped.voxels, 1) == turned.voxels).all()
