"""Volumes seen by models of images: slices are cut and put back to the voxel, and one map is made of all planes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import Batch, ScanDataset, collate, framed
from medgen.data.fingerprint import auto_recipe, fingerprint
from medgen.data.manifest import index
from medgen.data.recipe import CropOrPad, Orient, Percentiles, Plane, Recipe, Slices, Window
from medgen.errors import CapabilityError, ConfigError, DataError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.models import build, config_of
from medgen.models.abilities import Reconstructs
from medgen.scan import Scan
from medgen.scores.base import Found, Healthy, Score, part
from medgen.scores.states import DensityOfStates
from medgen.tasks.detector import Detector, Questions
from medgen.tasks.intake import require_whole
from medgen.tasks.plan import Choices, plan_training
from medgen.tasks.slicewise import in_slices, slicewise

PLANES: tuple[Plane, ...] = ("sagittal", "coronal", "axial")
# Planes together with each alone: three sizes that all differ.
EACH = pytest.mark.parametrize("planes", [*[(plane,) for plane in PLANES], PLANES, ("axial", "sagittal")])
SHAPE = (6, 10, 8)


def volume(seed: int = 0, channels: int = 1, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(1, channels, *shape, generator=torch.Generator().manual_seed(seed))


def brightness(batch: Batch) -> Found:
    """Each slice's mean over what was measured, and its first channel as the map."""
    real = torch.ones_like(batch.x[:, 0], dtype=torch.bool) if batch.real is None else batch.real
    values = (batch.x[:, 0] * real).flatten(1).sum(1) / real.flatten(1).sum(1)
    return Found(values[:, None], batch.x[:, 0])


# -- where slices lie ----------------------------------------------------------------------------------


def test_planes_are_those_of_anatomy():
    """Across sagittal slices runs left to right, across coronal ones back to front, across axial ones feet to head."""
    x = volume()[0, 0]
    for axis, (plane, shape) in enumerate(zip(PLANES, ((10, 8), (6, 8), (6, 10)), strict=True)):
        slices = Slices(planes=(plane,))
        places = slices.places(SHAPE)
        assert slices.frame(SHAPE) == shape
        assert [place.name for place in places] == [f"{plane}/{n}" for n in range(SHAPE[axis])]
        for place in places:
            assert torch.equal(framed(x, place, shape), x.select(axis, place.number))


def test_a_frame_holds_every_plane_in_its_middle():
    slices = Slices(planes=PLANES)
    assert slices.frame(SHAPE) == (10, 10)
    x = volume()[0, 0]
    coronal = next(place for place in slices.places(SHAPE) if place.name == "coronal/4")
    shown = framed(x, coronal, (10, 10))
    assert torch.equal(shown[2:8, 1:9], x[:, 4])
    assert shown.sum() == pytest.approx(float(x[:, 4].sum()))


@EACH
def test_cutting_and_putting_back_is_exact(planes):
    x = volume()
    drawn = slicewise(brightness, Batch(x), Slices(planes=planes))[1]
    assert drawn is not None
    assert torch.allclose(drawn, x[0, 0], atol=1e-7)


@EACH
@pytest.mark.parametrize("stride", [1, 4, (2, 8)])
def test_strides_of_a_volume_make_those_of_its_slices(planes, stride):
    slices = Slices(planes=planes)
    shape = [3 * n for n in slices.strides(stride)]
    rows, columns = (stride, stride) if isinstance(stride, int) else stride
    assert slices.frame(shape)[0] % rows == 0
    assert slices.frame(shape)[1] % columns == 0


# -- recipes -------------------------------------------------------------------------------------------


def test_a_recipe_with_slices_prepares_the_same_volume_and_says_what_a_model_sees():
    steps = (Orient(), CropOrPad(shape=SHAPE), Window(low=0, high=1))
    whole, sliced = Recipe(steps=steps), Recipe(steps=(*steps, Slices(planes=PLANES)))
    scan = Scan(volume()[0].numpy(), Grid(SHAPE, np.diag([2.0, 2, 2, 1])))
    assert np.array_equal(whole(scan).voxels, sliced(scan).voxels)
    assert (whole.seen, sliced.seen, sliced.shape) == (SHAPE, (10, 10), SHAPE)
    assert Recipe(steps=(CropOrPad(shape=(4, 6, 1)),)).seen == (4, 6)
    assert Recipe.model_validate_json(sliced.model_dump_json()) == sliced


@pytest.mark.parametrize(
    "steps",
    [
        [{"do": "slices"}],
        [{"do": "orient", "axcodes": "LPS"}, {"do": "slices"}],
        [{"do": "orient"}, {"do": "slices"}, {"do": "percentiles"}],
        [{"do": "orient"}, {"do": "slices"}, {"do": "slices"}],
        [{"do": "orient"}, {"do": "slices", "planes": []}],
        [{"do": "orient"}, {"do": "slices", "planes": ["axial", "axial"]}],
        [{"do": "orient"}, {"do": "slices", "planes": ["oblique"]}],
        [{"do": "orient"}, {"do": "crop_or_pad", "shape": [8, 8, 1]}, {"do": "slices"}],
    ],
)
def test_slices_of_no_volume_are_refused(steps):
    with pytest.raises(ValidationError):
        Recipe.model_validate({"steps": steps})


@EACH
def test_an_automatic_recipe_bounds_a_slice_not_the_volume(heads, xrays, planes):
    scans = [io.read(path) for path in sorted(heads.iterdir())[:4]]
    found = fingerprint(scans)
    recipe = auto_recipe(found, multiple=4, max_voxels=16 * 16, planes=planes)
    assert recipe.seen is not None
    assert recipe.slices == Slices(planes=planes)
    assert len(recipe.seen) == 2
    assert all(n % 4 == 0 for n in recipe.seen)
    assert np.prod(recipe.seen) <= 16 * 16
    finer = auto_recipe(found, multiple=4, max_voxels=10**6, planes=planes)
    strides = Slices(planes=planes).strides(4)
    assert finer.steps[:-1] == auto_recipe(found, multiple=strides, max_voxels=10**6).steps
    images = fingerprint([io.read(path) for path in sorted(xrays.glob("*/*.png"))[:3]])
    with pytest.raises(ConfigError, match="Only volumes"):
        auto_recipe(images, multiple=4, max_voxels=10**6, planes=planes)


# -- datasets ------------------------------------------------------------------------------------------


@pytest.fixture
def few(heads: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sorted(heads.iterdir())[:3]:
        shutil.copy(path, folder)
    return folder


def recipe(planes: tuple[Plane, ...], shape: tuple[int, int, int] = (16, 16, 16)) -> Recipe:
    return Recipe(steps=(Orient(), CropOrPad(shape=shape), Percentiles(), Slices(planes=planes)))


@EACH
def test_a_dataset_has_the_slices_that_show_the_body(few, planes):
    data = ScanDataset(index(few), recipe(planes, (20, 20, 20)))
    volumes = data.volumes()
    assert len(volumes) == 3
    expected = 0
    for n in range(3):
        x = volumes[n]["x"][0]
        assert x.shape == (20, 20, 20)
        for axis in [PLANES.index(plane) for plane in planes]:
            body = x > 0.1 * float(np.percentile(x[2:18, 2:18, 2:18], 99))
            areas = body.sum([other for other in range(3) if other != axis])
            expected += int((areas > 0.05 * areas.max()).sum())
    assert len(data) == expected <= 3 * 16 * len(planes)


def test_a_slice_is_an_item_of_its_own_with_its_case_plane_and_number(few):
    data = ScanDataset(index(few), recipe(PLANES))
    whole = {data.volumes()[n]["case"]: data.volumes()[n]["x"] for n in range(3)}
    batch = next(data.batches(len(data)))
    assert batch.x.shape == (len(data), 1, 16, 16)
    for case, x in zip(batch.cases, batch.x, strict=True):
        name, place = case.split("#")
        plane, number = place.split("/")
        assert torch.equal(x, whole[name].select(1 + PLANES.index(plane), int(number)))


def test_a_volume_is_held_once_however_many_slices_it_has(few, monkeypatch):
    reads = []
    read = io.read
    monkeypatch.setattr("medgen.io.read", lambda *given, **told: (reads.append(1), read(*given, **told))[1])
    data = ScanDataset(index(few), recipe(PLANES))
    for n in range(len(data)):
        data[n]
    assert len(data.volumes()[0]["x"]) == 1
    assert len(reads) == 3


def test_padding_of_the_window_and_of_the_frame_is_not_real(few):
    """Heads of 16 voxels in a window of 20 x 12 x 16: frames are 20 x 16."""
    data = ScanDataset(index(few), recipe(("coronal", "axial"), (20, 12, 16)))
    shown = collate([data[n] for n in range(len(data))])
    assert shown.x.shape[2:] == (20, 16)
    assert shown.real is not None
    for case, real in zip(shown.cases, shown.real, strict=True):
        expected = torch.zeros(20, 16, dtype=torch.bool)
        expected[2:18] = True
        if "axial" in case:
            expected[:, :2] = expected[:, 14:] = False
        assert torch.equal(real, expected)


def test_masks_are_cut_with_their_scans(few, tmp_path):
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[3:6, 4, 5:9] = 1
    source = io.read(next(iter(sorted(few.iterdir()))))
    io.write(source.with_voxels(mask[None]), tmp_path / "mask.nii.gz")
    rows = "".join(f"{path.stem},{path},{tmp_path / 'mask.nii.gz'}\n" for path in sorted(few.iterdir()))
    (tmp_path / "scans.csv").write_text(f"case,path,mask\n{rows}")
    data = ScanDataset(index(tmp_path / "scans.csv"), recipe(("coronal",)), context=True)
    for n in range(len(data)):
        item = data[n]
        drawn = data.volumes()[0]["context"].select(2, int(item["case"].rpartition("/")[2]))
        assert torch.equal(item["context"], drawn)
    assert data.volumes()[0]["context"].sum() == 12


def test_images_among_slices_are_left_out_and_said(xrays):
    with pytest.raises(DataError, match="could be prepared"):
        ScanDataset(index(xrays), Recipe(steps=(Orient(), Slices())))


# -- scoring -------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("axcodes", ["RAS", "LPI", "SAR", "PIR"])
def test_a_marked_voxel_lands_in_its_place_in_the_map(planes, axcodes):
    """From a file of any orientation to a map on that file's grid, at the same millimetre."""
    grid = Grid((9, 11, 7), np.array([[2.0, 0, 0, 4], [0, 1.5, 0, 5], [0, 0, 3, 6], [0, 0, 0, 1]]))
    voxels = np.random.default_rng(0).uniform(0, 1, (1, 9, 11, 7)).astype(np.float32)
    voxels[0, 6, 3, 2] = 50
    xyz = grid.world([6, 3, 2])
    upright = Scan(voxels, grid)
    source = upright.onto(grid.reorient(axcodes), outside=0)
    steps = (Orient(), CropOrPad(shape=(12, 8, 10)), Window(low=0, high=50), Slices(planes=planes))
    ready = Recipe(steps=steps)(source)
    drawn = slicewise(brightness, Batch(torch.tensor(ready.voxels)[None]), Slices(planes=planes))[1]
    assert drawn is not None
    on_source = Scan(drawn[None].numpy(), ready.grid).onto(source.grid, outside=float("nan"))
    at = np.unravel_index(np.nan_to_num(on_source.voxels[0], nan=-1).argmax(), source.grid.shape)
    assert np.allclose(source.grid.world([int(n) for n in at]), xyz, atol=1e-9)
    assert on_source.voxels[0][at] == pytest.approx(1)


def test_what_makes_volumes_refuses_a_model_that_sees_slices():
    with pytest.raises(CapabilityError, match="sees volumes slice by slice"):
        require_whole(recipe(PLANES), "vae", "augment")
    require_whole(Recipe(steps=(Orient(),)), "vae", "augment")


@EACH
def test_slices_are_scored_as_if_one_by_one(planes, monkeypatch):
    monkeypatch.setattr("medgen.tasks.slicewise._PIXELS", 400)
    x, slices, sizes = volume(3, channels=2), Slices(planes=planes), []

    def listening(batch: Batch) -> Found:
        sizes.append(len(batch.x))
        return brightness(batch)

    values, drawn = slicewise(listening, Batch(x), slices)
    assert drawn is not None
    for value, place in zip(values[:, 0], slices.places(SHAPE), strict=True):
        assert value == pytest.approx(float(x[0, 0][place.index].mean()), abs=1e-6)
    rows, columns = slices.frame(SHAPE)
    assert max(sizes) == 400 // (rows * columns)
    assert sum(sizes) == len(slices.places(SHAPE))


def test_the_map_of_three_planes_is_their_mean():
    """Each plane's slices are said to be as unusual as their number."""

    def numbered(batch: Batch) -> Found:
        numbers = torch.tensor([float(case.rpartition("/")[2]) for case in batch.cases])
        return Found(numbers[:, None], numbers[:, None, None].expand_as(batch.x[:, 0]))

    drawn = slicewise(numbered, Batch(volume()), Slices(planes=PLANES))[1]
    i, j, k = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    assert drawn is not None
    assert np.allclose(drawn.numpy(), (i + j + k) / 3, atol=1e-6)


def test_what_no_plane_scored_is_nan_and_what_one_scored_is_not():
    x, real = volume(), torch.zeros(1, *SHAPE, dtype=torch.bool)
    real[:, 1:5, 2:9, 3:6] = True
    values, drawn = slicewise(brightness, Batch(x, real=real), Slices(planes=PLANES))
    assert drawn is not None
    assert torch.equal(drawn.isfinite(), real[0])
    assert torch.allclose(drawn[real[0]], x[:, 0][real], atol=1e-6)
    scored = values[:, 0].isfinite().split([*SHAPE])
    assert [part.nonzero().flatten().tolist() for part in scored] == [[1, 2, 3, 4], [*range(2, 9)], [3, 4, 5]]

    def axial_only(batch: Batch) -> Found:
        told = brightness(batch)
        hidden = torch.tensor(["axial" not in case for case in batch.cases])[:, None, None]
        return Found(told.values, torch.where(hidden, torch.nan, batch.x[:, 0]))

    alone = slicewise(axial_only, Batch(x), Slices(planes=("coronal", "axial")))[1]
    assert alone is not None
    assert torch.allclose(alone, x[0, 0])


def test_empty_slices_are_in_the_map_but_not_in_the_number():
    """A score may say anything of a slice that shows nothing; a slice that was lost is still seen."""
    x, slices = volume() / 2 + 0.5, Slices(planes=("axial",))
    x[..., 3] = 0

    def emptiness(batch: Batch) -> Found:
        told = brightness(batch)
        return Found(torch.where(told.values > 0, told.values, -1000), told.map)

    found, bright = in_slices(emptiness, Batch(x), slices), [n for n in range(SHAPE[2]) if n != 3]
    assert float(found.values) == pytest.approx(float(x[..., bright].mean()), abs=1e-6)
    assert found.map is not None
    assert bool((found.map[..., 3] == 0).all())
    assert in_slices(brightness, Batch(torch.zeros(1, 1, *SHAPE)), slices).values.tolist() == [[0]]


def test_volumes_are_scored_one_by_one_with_what_is_known_of_each():
    slices, seen = Slices(planes=("axial", "coronal")), []

    def told(batch: Batch) -> Found:
        assert batch.cond is not None
        assert batch.context is not None
        assert batch.real is not None or torch.equal(batch.context, 1 - batch.x)
        seen.extend(zip(batch.cases, batch.cond.tolist(), strict=True))
        return Found(torch.cat([brightness(batch).values, batch.cond[:, None]], 1), None)

    x = torch.cat([volume(1), volume(2)])
    batch = Batch(x, torch.tensor([2, 5]), 1 - x, ("one", "other"))
    found = in_slices(told, batch, slices)
    assert found.map is None
    assert found.values[:, 1].tolist() == [2, 5]
    assert found.values[:, 0].tolist() == pytest.approx(x.flatten(1).mean(1).tolist(), abs=1e-2)
    assert found.values.isfinite().all()
    assert ("one#axial/7", 2) in seen
    assert ("other#coronal/0", 5) in seen
    alone = in_slices(told, Batch(x[1:], torch.tensor([5]), 1 - x[1:], ("other",)), slices)
    assert torch.equal(found.values[1:], alone.values)


def test_a_model_of_images_learns_and_scores_volumes(few):
    """From files by way of a trained denoiser to a map: bright where a volume was painted."""
    told, slices = recipe(PLANES), Slices(planes=PLANES)
    data = ScanDataset(index(few), told)
    model = build(config_of({"kind": "autoencoder", "shape": told.seen, "width": 8, "latent": 8, "levels": 2}))
    model.initialise(next(data.batches(len(data))))
    model.eval()

    def residual(batch: Batch) -> Found:
        error = (cast(Reconstructs, model).reconstruct(batch.x) - batch.x).abs().mean(1)
        return Found(error.flatten(1).mean(1, keepdim=True), error)

    item = data.volumes()[0]
    painted = item["x"].clone()
    painted[:, 7:10, 7:10, 7:10] = 1 - painted[:, 7:10, 7:10, 7:10]
    with torch.no_grad():
        before, after = (in_slices(residual, Batch(x[None]), slices) for x in (item["x"], painted))
    assert before.map is not None
    assert after.map is not None
    grown = (after.map - before.map)[0]
    inside = torch.zeros(16, 16, 16, dtype=torch.bool)
    inside[7:10, 7:10, 7:10] = True
    assert grown[inside].mean() > 5 * grown[~inside].abs().mean()
    assert after.values[0, 0] > before.values[0, 0]


def test_a_preset_for_images_learns_and_scores_volumes_from_the_command_on(heads, ill_head, tmp_path):
    told = (
        "fit.images=256",
        "fit.batch_size=32",
        "model.width=4",
        "model.latent=6",
        "fit.precision=float32",
        "planes=[axial]",
    )
    folder = medgen.train(heads, tmp_path / "b", preset="vae2d", minutes=None, overrides=told)
    bundle = Bundle.load(folder)
    assert bundle.recipe.slices == Slices(planes=("axial",))
    assert bundle.model.config.shape == bundle.recipe.seen
    assert not bundle.contract.planar
    found = medgen.score(ill_head, folder, tmp_path / "s").scans[0]
    assert found.p == pytest.approx(0.05)
    drawn = io.read(tmp_path / "s" / "maps" / "sub-101_T1w_map.nii.gz", ReadOptions(on_nan="zero"))
    assert drawn.grid.close(io.read(ill_head).grid)
    with pytest.raises(CapabilityError, match="slice by slice"):
        medgen.augment(heads, tmp_path / "a", bundle=folder, n=1)
    whole = Recipe(steps=(Orient(), CropOrPad(shape=(16, 16, 16)))).model_dump_json()
    with pytest.raises(ConfigError, match="Volumes need a slices step"):
        plan_training(heads, Choices("vae2d", overrides=[f"recipe={whole}"]))


class Listening(Score):
    """The brightness; counts the images it was asked about."""

    heard: ClassVar[list[int]] = []

    do: Literal["listening"] = "listening"

    def __call__(self, models, batch, known):
        self.heard.append(len(batch.x))
        return brightness(batch)


def test_who_is_asked_by_two_answers_once():
    """A member of the score whose map is the detector's, too: images and slices pass through it one time."""
    frames = [Batch(torch.rand(9, 1, 6, 10, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    score = DensityOfStates(members=(Listening(),), maps=False)
    plain = Detector({}, Questions(score, Listening())).learned(Healthy(lambda: frames[:1], lambda: frames[1:]))
    for detector, batch in ((plain, frames[0]), (replace(plain, slices=Slices(planes=("axial",))), Batch(volume()))):
        Listening.heard.clear()
        values, drawn = detector.examined(batch)
        images = batch.x[:, 0] if detector.slices is None else batch.x[0, 0].movedim(2, 0)
        assert sum(Listening.heard) == len(images)
        assert np.array_equal(drawn, batch.x[:, 0].numpy())
        alone = score({}, Batch(images[:, None]), part(plain.known, "score")).values[:, 0].double()
        alone = alone if detector.slices is None else alone.mean(0, keepdim=True)
        assert values == pytest.approx(alone.numpy(), rel=1e-6)
