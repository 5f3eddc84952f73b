"""From files to batches: MONAI sees what medgen reads, the cache knows what changed, the order is a function."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import LoadImage
from pydantic import TypeAdapter, ValidationError

from medgen import io
from medgen.data.covariates import Covariate
from medgen.data.dataset import (
    Batch,
    Draws,
    Prepare,
    ScanDataset,
    ScanReader,
    collate,
    condition,
    loader,
    model_view,
)
from medgen.data.manifest import Manifest, index
from medgen.data.motion import Affine, Augment, Flip, Gamma, Noise
from medgen.data.recipe import CropOrPad, Orient, Percentiles, Recipe, Window
from medgen.errors import DataError
from medgen.io.source import ReadOptions
from medgen.log import reporting
from medgen.scan import Scan

RECIPE = Recipe(steps=(Orient(), CropOrPad(shape=(8, 8, 8)), Percentiles()))
FLAT = Recipe(steps=(CropOrPad(shape=(16, 16, 1)), Window(low=0, high=255)))


class Listener:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, message: str) -> None:
        self.heard.append(message)

    def start(self, what: str, total: float | int | None) -> object:
        return what

    def advance(self, handle: object, amount: float | int, text: str) -> None:
        pass

    def stop(self, handle: object) -> None:
        pass


@pytest.fixture
def few_heads(heads: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sorted(heads.iterdir())[:5]:
        shutil.copy(path, folder)
    return folder


# -- MONAI's loader ----------------------------------------------------------------------------------


# MONAI registers all readers it knows, and one of them misses a decoder that medgen does not use.
quiet = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")


@quiet
@pytest.mark.parametrize("sample", ["heads/sub-001_T1w.nii.gz", "ct_oblique", "xray/normal/001.dcm"])
def test_monai_loads_physical_values_and_the_ras_affine(sample):
    from worlds import SAMPLES

    scan = io.read(SAMPLES / sample)
    loaded = LoadImage(reader=ScanReader(), image_only=True)(str(SAMPLES / sample))
    assert loaded.shape == scan.voxels.shape
    assert np.array_equal(loaded.numpy(), scan.physical())
    assert np.allclose(loaded.affine.numpy(), scan.grid.affine, atol=1e-12)
    assert loaded.meta["space"] == "RAS"


@quiet
def test_monai_stacks_several_files_as_channels_of_one_grid(heads):
    paths = [str(path) for path in sorted(heads.iterdir())[:2]]
    loaded = LoadImage(reader=ScanReader(), image_only=True)(paths)
    assert loaded.shape == (2, 16, 16, 16)
    assert np.array_equal(loaded.numpy()[1], io.read(paths[1]).physical()[0])


def test_monai_is_refused_channels_on_different_grids(heads, ill_head):
    reader = ScanReader()
    with pytest.raises(DataError, match="grid"):
        reader.get_data(reader.read([str(next(heads.iterdir())), str(ill_head)]))


def test_monai_is_refused_what_medgen_refuses(tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8bnothing of the kind")
    with pytest.raises(DataError):
        ScanReader(ReadOptions()).read(tmp_path / "broken.nii.gz")


# -- datasets ----------------------------------------------------------------------------------------


def test_a_dataset_holds_the_prepared_scans_in_order(few_heads):
    manifest = index(few_heads)
    data = ScanDataset(manifest, RECIPE)
    assert len(data) == 5
    for row, item in zip(manifest.rows, [data[n] for n in range(5)], strict=True):
        prepared = RECIPE(io.read(manifest.locate(row.path)))
        assert item["case"] == row.case
        assert np.array_equal(item["x"].numpy(), prepared.voxels)
        assert item["scale"].tolist() == pytest.approx([prepared.scale.slope, prepared.scale.intercept])


def test_items_are_tensors_and_text_only(few_heads):
    item = ScanDataset(index(few_heads), RECIPE)[0]
    assert all(isinstance(value, torch.Tensor | str | int) for value in item.values())


def test_images_lose_their_single_axis_and_classes_become_numbers(xrays):
    manifest = index(xrays)
    data = ScanDataset(manifest, FLAT, classes=manifest.labels)
    assert manifest.labels == ("normal", "opacity")
    assert data[0]["x"].shape == (1, 16, 16)
    for n, row in enumerate(manifest.rows):
        assert data[n]["cond"] == manifest.labels.index(row.label)
    batches = list(data.batches(10))
    assert [len(batch.x) for batch in batches] == [10, 10, 10, 6]
    assert torch.cat([batch.cond for batch in batches]).tolist() == [
        manifest.labels.index(row.label) for row in manifest.rows
    ]
    assert tuple(name for batch in batches for name in batch.cases) == tuple(row.case for row in manifest.rows)


def test_without_classes_there_is_no_condition(xrays):
    assert next(ScanDataset(index(xrays), FLAT).batches(4)).cond is None


def test_the_model_sees_two_axes_of_an_image_and_three_of_a_volume(heads, xrays):
    assert model_view(FLAT(io.read(next(xrays.glob("*/*.png"))))).shape == (1, 16, 16)
    assert model_view(RECIPE(io.read(next(heads.iterdir())))).shape == (1, 8, 8, 8)


def test_one_corrupt_scan_among_many_is_left_out_and_named(few_heads):
    path = sorted(few_heads.iterdir())[2]
    path.write_bytes(path.read_bytes()[:200])
    listener = Listener()
    with reporting(listener):
        data = ScanDataset(index(few_heads), RECIPE)
    assert len(data) == 4
    (skipped,) = data.skipped
    assert skipped.path == index(few_heads).rows[2].case
    assert any(skipped.path in message and "Skipped" in message for message in listener.heard)
    assert all("x" in data[n] for n in range(4))


def test_only_corrupt_scans_are_refused(few_heads):
    for path in few_heads.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="None of the 5"):
        ScanDataset(index(few_heads), RECIPE)


# -- the cache ---------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The cases that were prepared anew, in order."""
    prepared: list[str] = []
    original = Prepare.__call__

    def counting(self, row):
        prepared.append(row["case"])
        return original(self, row)

    monkeypatch.setattr(Prepare, "__call__", counting)
    return prepared


def test_the_cache_is_used_while_neither_recipe_nor_file_changes(few_heads, tmp_path, counted):
    manifest, cache = index(few_heads), tmp_path / "cache"
    first = ScanDataset(manifest, RECIPE, cache=cache)
    expected = [first[n]["x"].clone() for n in range(5)]
    assert len(counted) == 5
    second = ScanDataset(manifest, RECIPE, cache=cache)
    assert all(torch.equal(second[n]["x"], expected[n]) for n in range(5))
    assert len(counted) == 5


def test_the_cache_misses_when_the_recipe_changes(few_heads, tmp_path, counted):
    manifest, cache = index(few_heads), tmp_path / "cache"
    ScanDataset(manifest, RECIPE, cache=cache)
    other = Recipe(steps=(Orient(), CropOrPad(shape=(4, 4, 4)), Percentiles()))
    data = ScanDataset(manifest, other, cache=cache)
    assert len(counted) == 10
    assert data[0]["x"].shape == (1, 4, 4, 4)


def test_the_cache_misses_when_one_file_changes(few_heads, tmp_path, counted):
    manifest, cache = index(few_heads), tmp_path / "cache"
    old = ScanDataset(manifest, RECIPE, cache=cache)[1]["x"].clone()
    path = Path(manifest.locate(manifest.rows[1].path))
    scan = io.read(path)
    path.unlink()
    io.write(scan.with_voxels(scan.voxels[:, ::-1].copy()), path)
    counted.clear()
    data = ScanDataset(manifest, RECIPE, cache=cache)
    assert counted == [manifest.rows[1].case]
    assert not torch.equal(data[1]["x"], old)


def test_the_cache_misses_when_reading_is_asked_for_something_else(tmp_path, counted):
    """Polarity changes the numbers, so it belongs to what the cache is keyed by."""
    from worlds import SAMPLES

    manifest, cache = index(SAMPLES / "xray"), tmp_path / "cache"
    few = type(manifest)(manifest.rows[:2], (), manifest.root)
    recipe = Recipe(steps=(CropOrPad(shape=(16, 16, 1)), Window(low=0, high=4095)))
    ScanDataset(few, recipe, cache=cache)
    ScanDataset(few, recipe, cache=cache, options=ReadOptions(polarity="normalise"))
    assert len(counted) == 4


def test_the_cache_survives_a_moved_clock_but_not_a_changed_slice(tmp_path, counted):
    """A DICOM series is a folder: a slice that changes inside it counts."""
    from worlds import SAMPLES

    shutil.copytree(SAMPLES / "ct_oblique", tmp_path / "ct")
    manifest, cache = index(tmp_path / "ct"), tmp_path / "cache"
    recipe = Recipe(steps=(CropOrPad(shape=(8, 8, 8)), Window(low=-1000, high=400)))
    ScanDataset(manifest, recipe, cache=cache)
    ScanDataset(manifest, recipe, cache=cache)
    assert len(counted) == 1
    slice_ = sorted((tmp_path / "ct").iterdir())[3]
    content = bytearray(slice_.read_bytes())
    content[-1] ^= 1
    slice_.write_bytes(content)
    later = slice_.stat().st_mtime_ns + 10**9
    os.utime(slice_, ns=(later, later))
    ScanDataset(manifest, recipe, cache=cache)
    assert len(counted) == 2


def with_masks(folder: Path) -> Manifest:
    """A table of heads with a mask of the bright half of each, the age of each, and one without either."""
    lines = ["path,mask,age"]
    for n, path in enumerate(sorted(folder.glob("*.nii.gz"))):
        scan, name = io.read(path), f"{path.name.split('.')[0]}_mask.nii.gz"
        if n:
            drawn = (scan.voxels > np.median(scan.voxels)).astype(np.uint8)
            io.write(Scan(drawn, scan.grid, is_label=True), folder / name)
        lines.append(f"{path.name},{name if n else ''},{40 + n if n else ''}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return index(folder / "table.csv")


AGE = (Covariate(name="age", mean=40.0, sd=2.0),)


def test_a_condition_is_a_row_of_classes_and_covariates(few_heads):
    data = ScanDataset(with_masks(few_heads), RECIPE, covariates=AGE)
    assert [data[n]["cond"].tolist() for n in range(5)] == [[0.0], [0.5], [1.0], [1.5], [2.0]]
    assert next(data.batches(3)).cond.tolist() == [[0.0], [0.5], [1.0]]
    sex = Covariate(name="sex", levels=("F", "M"))
    row = condition("b", {"age": "44", "sex": "M"}, ("a", "b"), (*AGE, sex))
    assert row.tolist() == [0.0, 1.0, 2.0, 0.0, 1.0]
    assert condition("", {}, ("a", "b"), (*AGE, sex)).tolist() == [0.0] * 5
    assert (condition("b", {}, ("a", "b"), ()), condition("b", {}, (), ())) == (1, -1)


def test_a_mask_comes_with_its_scan_on_the_same_voxels(few_heads):
    manifest = with_masks(few_heads)
    data = ScanDataset(manifest, RECIPE, context=True)
    assert torch.equal(data[0]["context"], torch.zeros(1, 8, 8, 8))
    assert data[1]["context"].shape == data[1]["x"].shape
    assert data[1]["context"].unique().tolist() == [0.0, 1.0]
    inside = data[1]["context"] > 0
    assert data[1]["x"][inside].min() > data[1]["x"][~inside].max() - 0.05
    assert next(data.batches(2)).context.shape == (2, 1, 8, 8, 8)
    assert next(ScanDataset(manifest, RECIPE).batches(2)).context is None


def test_a_scan_whose_mask_cannot_be_read_is_named(few_heads):
    manifest = with_masks(few_heads)
    place = Path(manifest.locate(manifest.rows[2].mask))
    place.write_bytes(place.read_bytes()[:100])
    data = ScanDataset(manifest, RECIPE, context=True)
    assert [skipped.path for skipped in data.skipped] == [manifest.rows[2].case]


def test_the_cache_misses_when_a_mask_or_a_covariate_changes(few_heads, tmp_path, counted):
    manifest, cache = with_masks(few_heads), tmp_path / "cache"
    ScanDataset(manifest, RECIPE, covariates=AGE, context=True, cache=cache)
    place = Path(manifest.locate(manifest.rows[2].mask))
    mask = io.read(place)
    place.unlink()
    io.write(Scan(1 - mask.voxels, mask.grid, is_label=True), place)
    counted.clear()
    ScanDataset(manifest, RECIPE, covariates=AGE, context=True, cache=cache)
    assert counted == [manifest.rows[2].case]
    table = few_heads / "table.csv"
    table.write_text(table.read_text().replace(",43", ",77"))
    counted.clear()
    ScanDataset(index(table), RECIPE, covariates=AGE, context=True, cache=cache)
    assert counted == [manifest.rows[3].case]


def test_what_is_padded_is_not_real(few_heads):
    manifest = index(few_heads)
    assert "real" not in ScanDataset(manifest, RECIPE)[0]
    assert next(ScanDataset(manifest, RECIPE).batches(2)).real is None
    padded = Recipe(steps=(CropOrPad(shape=(20, 16, 18)), Percentiles()))
    path = Path(manifest.locate(manifest.rows[1].path))
    wide = io.read(path).onto(io.read(path).grid.centred((20, 16, 18)), outside=0)
    path.unlink()
    io.write(wide, path)
    batch = next(ScanDataset(manifest, padded).batches(2))
    assert batch.real.shape == (2, 20, 16, 18)
    assert batch.real.flatten(1).sum(1).tolist() == [16**3, 20 * 16 * 18]
    assert bool(batch.real[0, 2:18, :, 1:17].all())


# -- training order ----------------------------------------------------------------------------------


def test_every_pass_shows_every_scan_once_in_an_order_of_its_own(few_heads):
    draws = Draws(ScanDataset(index(few_heads), RECIPE), (), seed=3)
    passes = [[draws[5 * turn + n]["case"] for n in range(5)] for turn in range(6)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


AUGMENT = (Flip(prob=0.5), Affine(prob=0.9), Noise(prob=0.9, std=0.1), Gamma(prob=0.5))


def test_a_draw_depends_on_the_seed_and_its_number_alone(few_heads):
    data = ScanDataset(index(few_heads), RECIPE)
    before = [data[n]["x"].clone() for n in range(5)]
    one, other = Draws(data, AUGMENT, seed=1), Draws(data, AUGMENT, seed=1)
    forward = [one[n]["x"].clone() for n in range(12)]
    np.random.seed(99)
    torch.manual_seed(99)
    backward = [other[n]["x"].clone() for n in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not all(torch.equal(Draws(data, AUGMENT, seed=2)[n]["x"], forward[n]) for n in range(12))
    # Two draws of one scan differ, and the scan itself stays as it was.
    assert len({one[n]["x"].numpy().tobytes() for n in range(25)}) > 20
    assert all(torch.equal(data[n]["x"], before[n]) for n in range(5))


def test_workers_change_nothing(few_heads):
    data = ScanDataset(index(few_heads), RECIPE)
    draws = Draws(data, AUGMENT, seed=1)
    alone = [batch.x for batch in loader(draws, range(3, 11), 4)]
    helped = [batch.x for batch in loader(draws, range(3, 11), 4, workers=1)]
    assert [x.shape for x in alone] == [(4, 1, 8, 8, 8)] * 2
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("step", [Flip(prob=1), Affine(prob=1), Noise(prob=1), Gamma(prob=1)], ids=lambda s: s.do)
@pytest.mark.parametrize("flat", [True, False])
def test_augmentation_keeps_shape_and_type_and_changes_the_scan(few_heads, xrays, step, flat):
    data = ScanDataset(index(xrays), FLAT) if flat else ScanDataset(index(few_heads), RECIPE)
    draws, plain = Draws(data, (step,), seed=0), Draws(data, (), seed=0)
    item = draws[1]["x"]
    assert type(item) is torch.Tensor
    assert item.shape == plain[1]["x"].shape
    assert item.dtype == torch.float32
    assert not torch.equal(item, plain[1]["x"])
    assert bool(torch.isfinite(item).all())


def test_a_flip_mirrors_the_axis_it_names(few_heads):
    data = ScanDataset(index(few_heads), RECIPE)
    for axis in range(3):
        mirrored, plain = Draws(data, (Flip(prob=1, axis=axis),), seed=0)[0]["x"], Draws(data, (), seed=0)[0]["x"]
        assert torch.equal(mirrored, plain.flip(1 + axis))


@pytest.mark.parametrize("step", [Flip(prob=1, axis=1), Affine(prob=1, rotate=0.3, shift=1.0)], ids=lambda s: s.do)
def test_a_mask_and_what_is_real_move_with_the_scan(few_heads, step):
    """A scan that is its own mask stays it; noise on the scan leaves the mask alone."""
    data = ScanDataset(with_masks(few_heads), RECIPE, context=True)
    for n in range(5):
        item = data[n]
        item["x"] = (item["x"] > 0.4).float()
        item["context"], item["real"] = item["x"].clone(), item["x"][0] > 0
    for draw in range(6):
        item = Draws(data, (step, Noise(prob=1, std=0.01)), seed=5)[draw]
        assert torch.equal(item["context"][0] > 0, item["real"])
        assert item["real"].dtype == torch.bool
        assert set(item["context"].unique().tolist()) <= {0.0, 1.0}
        near = (item["x"] > 0.5) == item["real"]
        assert near.float().mean() > 0.98


def test_augmentation_is_named_and_checked():
    check = TypeAdapter(Augment).validate_python
    assert check({"do": "flip", "axis": 1}) == Flip(axis=1)
    for wrong in ({"do": "spin"}, {"do": "flip", "axis": 3}, {"do": "noise", "prob": 0}, {"do": "noise", "sigma": 1}):
        with pytest.raises(ValidationError):
            check(wrong)


def test_a_batch_moves_with_everything_it_holds():
    batch = Batch(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), None, ("a", "b"))
    moved = batch.to("meta")
    assert moved.x.device.type == moved.cond.device.type == "meta"
    assert moved.cases == ("a", "b")
    assert collate([{"x": torch.zeros(1, 4, 4), "cond": -1, "case": "a"}]).cond is None
