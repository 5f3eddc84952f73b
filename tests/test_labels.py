"""Label maps as channels: exact both ways, on their scan's grid, moved with it, learned with it."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import Draws, ScanDataset
from medgen.data.labels import REACH, label_channels, label_map, label_values, labels_on, one_hot, read_labels
from medgen.data.manifest import index
from medgen.data.motion import Affine, Flip, Gamma, Noise
from medgen.data.recipe import CropOrPad, Orient, Percentiles, Recipe, Respace
from medgen.errors import CapabilityError, ConfigError, DataError, GeometryError
from medgen.grid import Grid
from medgen.log import reporting
from medgen.models import family
from medgen.models.abilities import Samples
from medgen.scan import Scan
from medgen.tasks.cases import bundle_is_told_masks
from medgen.tasks.conditions import masks_of, told_of
from medgen.tasks.plan import Choices, plan_training

RECIPE = Recipe(steps=(Orient(), CropOrPad(shape=(12, 12, 12)), Percentiles()))
LABELS = (1, 2)


class Notes:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        """Keep it."""
        self.said.append(message)

    def start(self, what: str, total: float | None) -> object:
        """Draw nothing."""

    def advance(self, handle: object, amount: float, text: str) -> None:
        """Draw nothing."""

    def stop(self, handle: object) -> None:
        """Draw nothing."""


def world(folder: Path, shape: tuple[int, int, int], n: int = 16, bare: tuple[int, ...] = (), values=LABELS) -> Path:
    """Discs or balls with a core, and maps of both, in images/ and labels/; those of `bare` have no map."""
    rng = np.random.default_rng(5)
    ending = ".png" if shape[2] == 1 else ".nii.gz"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(n):
        centre = [size / 2 + rng.normal(0, 0.6) if size > 1 else 0 for size in shape]
        apart = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(shape), centre, strict=True)))
        drawn = (apart < 3).astype(np.uint8) + (apart < 1.6).astype(np.uint8)
        scan = (50 + 60 * drawn + rng.normal(0, 3, shape)).clip(0, 255).astype(np.uint8)
        io.write(Scan(scan[None], Grid(shape, np.eye(4))), folder / "images" / f"p{i:02d}{ending}")
        if i not in bare:
            told = np.choose(drawn, (0, *values)).astype(np.uint8)
            io.write(Scan(told[None], Grid(shape, np.eye(4)), is_label=True), folder / "labels" / f"p{i:02d}{ending}")
    return folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes with label maps, all of them."""
    return world(tmp_path_factory.mktemp("labels") / "volumes", (12, 12, 8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with label maps, all of them."""
    return world(tmp_path_factory.mktemp("labels") / "pictures", (16, 16, 1))


# -- channels ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(arrays(np.int32, array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=9), elements=st.integers(0, 4)))
def test_channels_give_every_label_map_back(drawn):
    channels = label_channels(drawn, (1, 2, 3, 4))
    assert channels.shape == (4, *drawn.shape)
    assert channels.dtype == np.float32
    assert 0 <= channels.min() <= channels.max() <= 1
    assert np.array_equal(label_map(channels, (1, 2, 3, 4)), drawn)
    assert np.array_equal(label_map(one_hot(drawn, (1, 2, 3, 4)), (1, 2, 3, 4)), drawn)
    # What is not among the labels is background.
    assert np.array_equal(label_map(label_channels(drawn, (2, 4)), (2, 4)), np.where(drawn % 2, 0, drawn))


def test_a_ramp_is_linear_in_the_distance_from_the_boundary_and_ends_at_its_reach():
    line = np.zeros((1, 21), dtype=np.int32)
    line[0, 10:] = 7
    ramp = label_channels(line, (7,))[0, 0]
    distance = np.arange(21) - 9.5
    assert np.allclose(ramp, np.clip(0.5 + distance / (2 * REACH), 0, 1), atol=1e-6)


def test_a_line_one_voxel_thin_survives_half_a_voxel_of_blur():
    thin = np.zeros((9, 9, 9), dtype=np.int32)
    thin[4, 4, :] = 1
    channels = label_channels(thin, (1,))
    assert np.array_equal(label_map(channels * 0.9, (1,)), thin)


def test_of_two_labels_the_higher_channel_wins_and_half_is_background():
    channels = np.array([[0.5, 0.51, 0.7], [0.1, 0.6, 0.7]])[:, :, None]
    assert label_map(channels, (3, 9)).ravel().tolist() == [0, 9, 3]


# -- files ---------------------------------------------------------------------------------------------


def test_masks_that_are_no_label_maps_are_refused(tmp_path):
    grid = Grid((4, 4, 4), np.eye(4))
    for name, values in (("soft", np.full((1, 4, 4, 4), 0.3)), ("below", np.full((1, 4, 4, 4), -1.0))):
        io.write(Scan(values.astype(np.float32), grid), tmp_path / f"{name}.nii.gz")
        with pytest.raises(DataError, match="whole numbers"):
            read_labels(str(tmp_path / f"{name}.nii.gz"))
    io.write(Scan(np.ones((2, 4, 4, 4), np.uint8), grid), tmp_path / "two.nii.gz")
    with pytest.raises(DataError, match="found 2 channels"):
        read_labels(str(tmp_path / "two.nii.gz"))


def test_values_are_found_and_too_many_refused(volumes, tmp_path):
    assert label_values(index(volumes)) == LABELS
    findings = world(tmp_path / "findings", (8, 8, 1), n=4, values=(255, 255))
    assert label_values(index(findings)) == (255,)
    rng = np.random.default_rng(0)
    for path in sorted((findings / "labels").iterdir())[:2]:
        path.unlink()
        drawn = rng.integers(0, 40, (1, 8, 8, 1)).astype(np.uint8)
        io.write(Scan(drawn, Grid((8, 8, 1), np.eye(4)), is_label=True), path)
    with pytest.raises(DataError, match="more than 16 labels"):
        label_values(index(findings))


def moved(place: Path, change: Callable[[np.ndarray], None]) -> str:
    """A mask on a grid of its own."""
    affine = np.eye(4)
    change(affine)
    io.write(Scan(np.ones((1, 6, 6, 6), np.uint8), Grid((6, 6, 6), affine), is_label=True), place)
    return str(place)


@pytest.mark.parametrize(
    ("row", "column", "by"), [(0, 3, 1.0), (0, 0, 0.5), (0, 1, 0.2)], ids=["origin", "spacing", "direction"]
)
def test_a_mask_on_another_grid_is_named_with_both_grids(tmp_path, row, column, by):
    def change(affine: np.ndarray) -> None:
        affine[row, column] += by

    scan = Grid((6, 6, 6), np.eye(4))
    with pytest.raises(GeometryError, match=r"mask of 6 x 6 x 6 .* for a scan of 6 x 6 x 6 voxels of 1 x 1 x 1 mm"):
        labels_on(moved(tmp_path / "m.nii.gz", change), scan, scan)


def test_rounding_of_an_affine_is_no_other_grid(tmp_path):
    def change(affine: np.ndarray) -> None:
        affine[:3, 3] += 1e-5

    scan = Grid((6, 6, 6), np.eye(4))
    assert labels_on(moved(tmp_path / "m.nii.gz", change), scan, scan.crop((1, 1, 1), (2, 2, 2))).shape == (2, 2, 2)


# -- data sets -----------------------------------------------------------------------------------------


def test_label_channels_follow_the_scans_own_and_lie_where_the_mask_lies(volumes):
    manifest = index(volumes)
    plain = ScanDataset(manifest, RECIPE)
    both = ScanDataset(manifest, RECIPE, labels=LABELS)
    beside = ScanDataset(manifest, RECIPE, labels=LABELS, context=True)
    for n, row in enumerate(manifest.rows):
        drawn = io.read(manifest.locate(row.mask))
        ready = RECIPE(io.read(manifest.locate(row.path))).grid
        expected = drawn.onto(ready, outside=0).voxels[0]
        assert torch.equal(both[n]["x"][:1], plain[n]["x"])
        assert both[n]["labels"] == 2
        assert np.array_equal(label_map(both[n]["x"][1:].numpy(), LABELS), expected)
        assert torch.equal(beside[n]["x"], plain[n]["x"])
        assert np.array_equal(beside[n]["context"].numpy(), one_hot(expected.astype(np.int32), LABELS))


def test_a_mask_moves_by_nearest_neighbour_where_the_lattices_differ(volumes):
    recipe = Recipe(steps=(Orient(), Respace(spacing=(1.7, 1.7, 1.7)), CropOrPad(shape=(8, 8, 8)), Percentiles()))
    manifest = index(volumes)
    data = ScanDataset(manifest, recipe, labels=LABELS)
    row = manifest.rows[0]
    ready = recipe(io.read(manifest.locate(row.path))).grid
    drawn = io.read(manifest.locate(row.mask))
    expected = Scan(drawn.voxels, drawn.grid, is_label=True).onto(ready, outside=0).voxels[0]
    assert np.array_equal(label_map(data[0]["x"][1:].numpy(), LABELS), expected)


def test_scans_without_a_mask_or_with_another_grid_are_left_out_and_named(tmp_path):
    folder = world(tmp_path / "w", (8, 8, 8), n=6, bare=(2,))
    other = Scan(np.ones((1, 4, 4, 4), np.uint8), Grid((4, 4, 4), np.diag([2.0, 2, 2, 1])), is_label=True)
    (folder / "labels" / "p04.nii.gz").unlink()
    io.write(other, folder / "labels" / "p04.nii.gz")
    data = ScanDataset(index(folder), RECIPE, labels=LABELS)
    assert len(data) == 4
    told = {skip.path: skip.reason for skip in data.skipped}
    assert sorted(told) == ["p02", "p04"]
    assert "not the same as an empty one" in told["p02"]
    assert "mask of 4 x 4 x 4 voxels of 2 x 2 x 2 mm" in told["p04"]
    assert "Resample" in told["p04"]
    # What is only given may be missing: nothing is marked there.
    given_ = ScanDataset(index(folder), RECIPE, labels=LABELS, context=True)
    assert [skip.path for skip in given_.skipped] == ["p04"]
    assert not given_[2]["context"].any()


def test_a_joint_data_set_without_any_mask_is_an_error(tmp_path):
    folder = world(tmp_path / "w", (8, 8, 8), n=3, bare=(0, 1, 2))
    with pytest.raises(DataError, match="None of the 3 scans"):
        ScanDataset(index(folder), RECIPE, labels=LABELS)


def test_noise_and_contrast_leave_label_channels_alone_and_motion_moves_them_with_the_scan(volumes):
    data = ScanDataset(index(volumes), RECIPE, labels=LABELS)
    loud = Draws(data, [Noise(prob=1, std=0.3), Gamma(prob=1, low=2, high=3)], seed=1)
    plain = Draws(data, [], seed=1)
    for n in range(4):
        assert torch.equal(loud[n]["x"][1:], plain[n]["x"][1:])
        assert not torch.equal(loud[n]["x"][:1], plain[n]["x"][:1])
    turned = Draws(data, [Flip(prob=1), Affine(prob=1, rotate=0.3, shift=2)], seed=1)
    for n in range(4):
        x = turned[n]["x"]
        drawn = label_map(x[1:].numpy(), LABELS)
        assert x.shape == plain[n]["x"].shape
        assert not np.array_equal(drawn, label_map(plain[n]["x"][1:].numpy(), LABELS))
        # The core is brighter than the rim, and both than what is around them.
        means = [float(x[0][torch.tensor(drawn == label)].mean()) for label in (0, 1, 2)]
        assert means == sorted(means)


# -- models --------------------------------------------------------------------------------------------

TINY = ("fit.images=48", "fit.batch_size=8", "model.width=4", "model.latent=4", "fit.precision=float32")


@pytest.mark.parametrize("preset", ["gmm", "vae"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_model_learns_and_draws_scans_with_their_masks(volumes, pictures, tmp_path, preset, dims):
    data = volumes if dims == 3 else pictures
    made = medgen.train(
        data, tmp_path / "b", preset=preset, masks="joint", minutes=None, overrides=TINY if preset == "vae" else ()
    )
    bundle = Bundle.load(made)
    config = bundle.model.config
    assert (config.labels, config.channels, config.images, config.joint) == (LABELS, 3, 1, True)
    assert bundle.contract.channels == 1
    assert "questions" not in bundle.calibration
    assert bundle_is_told_masks(bundle)
    drawn = cast(Samples, bundle.model).sample(2, seed=0)
    assert drawn.shape == (2, 3, *config.shape)
    if preset == "gmm":
        found = label_map(drawn[0, 1:].numpy(), LABELS)
        assert set(np.unique(found)) == {0, 1, 2}
        assert drawn[0, 0][torch.tensor(found == 2)].mean() > drawn[0, 0][torch.tensor(found == 0)].mean()
    for task in (medgen.score, medgen.embed):
        with pytest.raises(CapabilityError, match=r"learned scans together with their masks.*--masks none"):
            task(data, made, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    told = medgen.evaluate(data, made)
    assert told["scans"] >= 1
    assert "detection" not in told


def test_joint_is_for_models_that_draw_and_masks_that_are_there(volumes, pictures, tmp_path):
    with pytest.raises(ConfigError, match="does not draw scans"):
        plan_training(volumes, Choices("segmenter", masks="joint"))
    with pytest.raises(ConfigError, match="slice by slice"):
        plan_training(volumes, Choices("vae2d", masks="joint"))
    with pytest.raises(ConfigError, match="learns no pairs"):
        plan_training(volumes, Choices("spade", masks="joint"))
    bare = world(tmp_path / "bare", (8, 8, 8), n=8, bare=tuple(range(8)))
    with pytest.raises(DataError, match="no training scan has one"):
        plan_training(bare, Choices("gmm", masks="joint"))
    with pytest.raises(ConfigError, match="several models"):
        plan_training(pictures, Choices("detector", masks="joint"))


def test_auto_takes_masks_where_nearly_all_scans_have_one_and_the_model_draws(volumes, tmp_path):
    def learned(data: Path, preset: str) -> tuple[int, ...]:
        return plan_training(data, Choices(preset, masks="auto")).model.labels

    assert learned(volumes, "gmm") == LABELS
    assert learned(volumes, "segmenter") == learned(volumes, "vae2d") == learned(volumes, "detector") == ()
    assert plan_training(volumes, Choices("gmm")).model.labels == ()
    some = world(tmp_path / "some", (8, 8, 8), n=12, bare=tuple(range(0, 12, 2)))
    assert learned(some, "gmm") == ()
    for path in (some / "labels").iterdir():
        path.unlink()
    assert learned(some, "gmm") == ()


def test_auto_says_why_it_leaves_masks_alone(tmp_path):
    folder = world(tmp_path / "w", (8, 8, 8), n=8)
    for path in (folder / "labels").iterdir():
        scan = io.read(path)
        path.unlink()
        io.write(Scan(scan.voxels * np.float32(0.3), scan.grid), path)
    notes = Notes()
    with reporting(notes):
        assert plan_training(folder, Choices("gmm", masks="auto")).model.labels == ()
    assert any("whole numbers" in said and "without their masks" in said for said in notes.said)


def test_a_preset_that_is_given_an_image_is_given_every_label_of_the_mask(volumes):
    for masks in ("none", "auto", "given"):
        config = plan_training(volumes, Choices("spade", masks=masks)).model
        assert told_of(config) == {"classes": (), "covariates": (), "context": True, "labels": LABELS}
        assert getattr(config, "context", 0) == 2
        assert (config.channels, config.joint) == (1, False)
    given_ = masks_of(index(volumes), RECIPE, io.ReadOptions(), LABELS)
    assert {tuple(mask.shape) for mask in given_} == {(2, 12, 12, 12)}
    assert all(set(mask.unique().tolist()) == {0.0, 1.0} for mask in given_)


@pytest.mark.parametrize("labels", [(0, 1), (2, 1), (1, 1)])
def test_labels_of_a_config_are_positive_and_in_order(labels):
    with pytest.raises(ValueError, match="ascending order"):
        family("vae").Config(kind="vae", shape=(16, 16), channels=4, labels=labels)


def test_a_scan_needs_a_channel_beside_its_labels():
    with pytest.raises(ValueError, match="no room for a scan"):
        family("vae").Config(kind="vae", shape=(16, 16), channels=1, labels=(1,))
