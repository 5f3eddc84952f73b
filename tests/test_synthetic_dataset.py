"""`medgen.SyntheticDataset`: a bundle as a dataset of torch and MONAI."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.data import Dataset as MonaiDataset
from monai.transforms import Compose, EnsureTyped, RandFlipd, RandSpatialCropSamplesd
from torch.utils.data import ConcatDataset

import medgen
from medgen.bundle import Bundle, Contract
from medgen.data.covariates import Covariate
from medgen.data.dataset import ScanDataset
from medgen.data.recipe import CropOrPad, Orient, Recipe, Slices
from medgen.errors import CapabilityError, ConfigError, DataError, PrivacyError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.log import reporting
from medgen.models import build, config_of
from medgen.scan import Scan
from medgen.tasks.intake import require_training_scans
from medgen.tasks.synthetic import MixedDataset, SyntheticDataset
from medgen.tasks.ways.sample import SampleWay

ROOT = Path(__file__).resolve().parents[1]
AFFINE = np.array([[0.0, -2.0, 0.0, 5.0], [3.0, 0.0, 0.0, -7.0], [0.0, 0.0, 4.0, 1.0], [0.0, 0.0, 0.0, 1.0]])


def made(**changes: object) -> Bundle:
    """A model of 8 x 6 pixels with weights nobody has trained; values from -100 to 100 HU."""
    values = {"kind": "vae", "shape": (8, 6), "width": 4, "latent": 2, "levels": 1} | changes
    torch.manual_seed(0)
    model = build(config_of(values)).eval()
    grid = Grid((*values["shape"], 1)[:3], AFFINE)
    contract = Contract(
        planar=True, unit="HU", spacing=(2, 3, 4), low=-100, high=100, slope=200, intercept=-100, grid=grid.to_dict()
    )
    return Bundle({"model": model}, Recipe(steps=()), contract)


@pytest.fixture(scope="module")
def two_classes() -> Bundle:
    return made(classes=("normal", "opacity"))


@pytest.fixture(scope="module")
def gaussian(xrays, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "gaussian"
    return medgen.train(xrays, folder, preset="gaussian2d", minutes=None)


class Notes:
    """A reporter that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def start(self, what: str, total: float | int | None) -> object:
        return what

    def advance(self, handle: object, amount: float | int, text: str) -> None: ...

    def stop(self, handle: object) -> None: ...


def test_an_item_depends_on_the_seed_and_its_number_alone(two_classes):
    whole = SyntheticDataset(two_classes, 70, seed=3)
    assert medgen.SyntheticDataset is SyntheticDataset
    assert len(whole) == 70
    images = torch.stack([item["image"] for item in whole])
    assert len(images) == 70
    assert len({image.sum().item() for image in images}) == 70
    fewer = SyntheticDataset(two_classes, 41, seed=3)
    for i in (40, 0, -1, 7):
        assert torch.equal(fewer[i]["image"], images[i % 41])
    assert not torch.equal(SyntheticDataset(two_classes, 5, seed=4)[0]["image"], images[0])
    with pytest.raises(IndexError, match="41 scans"):
        fewer[41]


def test_an_item_says_where_it_is_and_what_it_shows(two_classes):
    item = SyntheticDataset(two_classes, 4)[1]
    assert item.keys() == {"image", "label", "origin"}
    assert isinstance(item["image"], MetaTensor)
    assert item["image"].shape == (1, 8, 6)
    assert item["image"].dtype == torch.float32
    assert np.array_equal(item["image"].affine, AFFINE)
    assert (item["label"], item["origin"]) == (1, "synthetic")
    assert 0 <= item["image"].min() < item["image"].max() <= 1
    hu = SyntheticDataset(two_classes, 4, physical=True)[1]["image"]
    assert torch.allclose(hu, item["image"] * 200 - 100, atol=1e-4)


def test_what_is_done_to_an_item_is_done_to_no_other(two_classes):
    scans = SyntheticDataset(two_classes, 4)
    before = scans[0]["image"].clone()
    scans[0]["image"].zero_()
    scans[0]["image"].affine.zero_()
    assert torch.equal(scans[0]["image"], before)
    assert np.array_equal(scans[0]["image"].affine, AFFINE)


def test_classes_are_balanced_or_as_listed(two_classes):
    assert [item["label"] for item in SyntheticDataset(two_classes, 5)] == [0, 1, 0, 1, 0]
    listed = SyntheticDataset(two_classes, 5, labels=["opacity", "normal", "opacity"])
    assert [item["label"] for item in listed] == [1, 0, 1, 1, 0]
    assert len({float(item["image"].sum()) for item in listed}) == 5
    # A class's scans are the same, whichever others are asked for.
    balanced, one = SyntheticDataset(two_classes, 5), SyntheticDataset(two_classes, 2, labels="opacity")
    assert torch.equal(one[1]["image"], balanced[3]["image"])
    for labels in (["ill"], []):
        with pytest.raises(ConfigError, match=r"draws the classes normal, opacity; found '(ill|none)'"):
            SyntheticDataset(two_classes, labels=labels)
    assert "label" not in SyntheticDataset(made(), 2)[0]


def test_covariates_are_drawn_or_given():
    age, sex = Covariate(name="age", mean=60, sd=9), Covariate(name="sex", levels=("F", "M"))
    bundle = made(covariates=(age, sex))
    items = list(SyntheticDataset(bundle, 40))
    assert {item["sex"] for item in items} == {"F", "M"}
    assert 50 < np.mean([item["age"] for item in items]) < 70
    given = SyntheticDataset(bundle, 40, given={"age": 70})
    assert {item["age"] for item in given} == {70.0}
    assert [item["sex"] for item in given] == [item["sex"] for item in items]
    for wrong, says in (({"weight": 70}, "told no 'weight'"), ({"age": "old"}, "age is a number")):
        with pytest.raises(ConfigError, match=says):
            SyntheticDataset(bundle, given=wrong)


def test_pairs_come_with_their_label_maps():
    item = SyntheticDataset(made(channels=3, labels=(1, 4)), 3)[2]
    assert item["image"].shape == item["mask"].shape == (1, 8, 6)
    assert item["mask"].dtype == torch.int16
    assert set(item["mask"].unique().tolist()) <= {0, 1, 4}
    assert np.array_equal(item["mask"].affine, AFFINE)


def test_scans_are_drawn_for_masks_in_turn():
    architecture = {"kind": "unet"}
    bundle = made(
        kind="gan", shape=(8, 8), context=2, labels=(1, 4), architecture=architecture, start="noise", condition="none"
    )
    maps = [np.zeros((8, 8), int), np.eye(8, dtype=int) * 4]
    scans = SyntheticDataset(bundle, 5, masks=[maps[0], torch.from_numpy(maps[1])[None]])
    assert [item["mask"].max().item() for item in scans] == [0, 4, 0, 4, 0]
    assert np.array_equal(scans[1]["mask"][0], maps[1])
    there = Scan(maps[1].astype(np.int16)[None, :, :, None], Grid((8, 8, 1), AFFINE), is_label=True)
    assert torch.equal(SyntheticDataset(bundle, 5, masks=[maps[0], there])[1]["image"], scans[1]["image"])
    for masks, kind, says in (
        ((), ConfigError, "draws scans for masks"),
        ([np.zeros((8, 7), int)], DataError, "found one of"),
        ([np.full((8, 8), 0.5)], DataError, "whole numbers"),
    ):
        with pytest.raises(kind, match=says):
            SyntheticDataset(bundle, masks=masks)
    with pytest.raises(ConfigError, match="takes no masks"):
        SyntheticDataset(made(), masks=[np.zeros((8, 6), int)])


def test_what_cannot_be_drawn_is_refused(two_classes):
    with pytest.raises(ConfigError, match="n = 0"):
        SyntheticDataset(two_classes, 0)
    segmenter = build(config_of({"kind": "segmenter", "shape": (8, 6)}))
    with pytest.raises(CapabilityError, match="does not sample"):
        SyntheticDataset(Bundle({"model": segmenter}, two_classes.recipe, two_classes.contract))
    sliced = replace(two_classes, recipe=Recipe(steps=(Orient(), CropOrPad(shape=(8, 6, 4)), Slices())))
    with pytest.raises(CapabilityError, match="slice by slice"):
        SyntheticDataset(sliced)


# -- in MONAI ------------------------------------------------------------------------------------------


def test_it_serves_as_data_of_monai_and_in_workers(two_classes):
    scans = SyntheticDataset(two_classes, 12, transform=EnsureTyped("image"))
    change = Compose([RandFlipd("image", prob=0.5, spatial_axis=0)])
    for data in (scans, MonaiDataset(scans, change), CacheDataset(scans, change, progress=False)):
        batch = next(iter(DataLoader(data, batch_size=5)))
        assert batch["image"].shape == (5, 1, 8, 6)
        assert batch["label"].tolist() == [0, 1, 0, 1, 0]
        assert batch["origin"] == ["synthetic"] * 5
    assert len(ConcatDataset([scans, scans])) == 24
    here, there = (
        torch.cat([batch["image"] for batch in DataLoader(scans, batch_size=4, num_workers=workers)])
        for workers in (0, 2)
    )
    assert torch.equal(here, there)


def test_it_mixes_with_real_scans_in_a_stated_share(two_classes):
    real = [{"image": torch.full((1, 8, 6), float(i)), "label": 1, "case": str(i)} for i in range(20)]
    synthetic = SyntheticDataset(two_classes, 30)
    notes = Notes()
    with reporting(notes):
        mixed = synthetic.mixed_with(real, ratio=1.5, seed=1)
    assert isinstance(mixed, MixedDataset)
    assert notes.said == ["Only one kind of items has case: left out of the mixture, so that items collate."]
    items = [mixed[i] for i in range(len(mixed))]
    origins = [item["origin"] for item in items]
    assert (origins.count("real"), origins.count("synthetic")) == (20, 30)
    assert {"real", "synthetic"} == {*origins[:8]}
    assert sorted(float(item["image"].mean()) for item in items if item["origin"] == "real") == list(range(20))
    assert {*real[0]} == {"image", "label", "case"}
    again, other = (synthetic.mixed_with(real, 1.5, seed=seed) for seed in (1, 2))
    assert [item["origin"] for item in map(again.__getitem__, range(50))] == origins
    assert [item["origin"] for item in map(other.__getitem__, range(50))] != origins
    batch = next(iter(DataLoader(mixed, batch_size=50, num_workers=2)))
    assert batch["image"].shape == (50, 1, 8, 6)
    assert len(synthetic.mixed_with(real, 0)) == 20
    with pytest.raises(ConfigError, match="takes 40 synthetic ones; there are 30"):
        synthetic.mixed_with(real, 2)
    with pytest.raises(DataError, match="found tuple"):
        synthetic.mixed_with([(1, 2)])


def test_patches_of_transforms_mix_too(two_classes):
    crops = RandSpatialCropSamplesd("image", (4, 4), num_samples=2, random_size=False)
    real = MonaiDataset([{"image": torch.rand(1, 8, 6)} for _ in range(3)], crops)
    mixed = SyntheticDataset(two_classes, 3, transform=crops).mixed_with(real)  # whose tensors have no affine
    batch = next(iter(DataLoader(mixed, batch_size=6)))
    assert batch["image"].shape == (12, 1, 4, 4)
    assert sorted(batch["origin"]) == ["real"] * 6 + ["synthetic"] * 6


# -- copies --------------------------------------------------------------------------------------------


def test_copies_are_drawn_again_and_somebody_who_memorised_draws_none(gaussian, xrays, monkeypatch):
    bundle, notes = Bundle.load(gaussian), Notes()
    with reporting(notes):
        screened = SyntheticDataset(bundle, 6, data=xrays)
        assert not any("not screened" in said for said in notes.said)
        unscreened = SyntheticDataset(bundle, 6)
    assert any("not screened" in said for said in notes.said)
    known = require_training_scans(bundle, xrays, ReadOptions())
    train = ScanDataset(known.split("train"), bundle.recipe)
    draw = SampleWay.make

    def copying(every: bool):
        def make(way: SampleWay, label: str, first: int, count: int) -> list:
            made = draw(way, label, first, count)
            which = range(count) if every else [1] if way._seed == 0 else []
            return [replace(one, x=train[n % 5]["x"]) if n in which else one for n, one in enumerate(made)]

        return make

    monkeypatch.setattr(SampleWay, "make", copying(False))
    copied, replaced = unscreened[2], screened[2]
    assert torch.equal(copied["image"], train[1]["x"])
    assert not any(torch.equal(replaced["image"], train[n]["x"]) for n in range(len(train)))
    assert replaced["label"] == copied["label"]
    monkeypatch.setattr(SampleWay, "make", copying(True))
    with pytest.raises(PrivacyError, match="20 draws in a row"):
        SyntheticDataset(bundle, 6, data=xrays)[0]


def test_other_scans_than_those_of_training_tell_no_copies(gaussian, heads):
    with pytest.raises(PrivacyError, match="did not learn from these scans"):
        SyntheticDataset(gaussian, data=heads)


# -- what is written about it --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
def test_the_page_about_it_runs(tmp_path, monkeypatch, xrays, gaussian):
    page = (ROOT / "docs" / "data_api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert blocks
    (tmp_path / "chests").symlink_to(xrays)
    (tmp_path / "model").symlink_to(gaussian)
    monkeypatch.chdir(tmp_path)
    world: dict = {}
    for block in blocks:
        exec(compile(block, "data_api.md", "exec"), world)  # noqa: S102
