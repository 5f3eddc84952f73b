"""Ways to make scans of training scans: what moves moves together, what stays stays, and nobody is named."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from scipy.ndimage import binary_dilation
from skimage.measure import label
from worlds import SAMPLES

from medgen import io
from medgen.bundle import Bundle, Contract
from medgen.data.classic import Classical, classical_batch
from medgen.data.dataset import ScanDataset
from medgen.data.lesions import Lesion
from medgen.data.manifest import index
from medgen.data.painting import indices
from medgen.data.phantoms import Lesion as Planted
from medgen.data.phantoms import chest_xray, ct_block, head
from medgen.data.recipe import CropOrPad, Orient, Percentiles, Recipe, Window
from medgen.errors import CapabilityError, ConfigError, DataError, LeakageError
from medgen.grid import Grid
from medgen.log import reporting
from medgen.models import build, config_of
from medgen.scan import Scan
from medgen.tasks.ways.base import Made, Material
from medgen.tasks.ways.classic import ClassicWay
from medgen.tasks.ways.edit import EditWay
from medgen.tasks.ways.interpolate import InterpolateWay
from medgen.tasks.ways.lesion import LesionWay
from medgen.tasks.ways.shapes import Shapes
from medgen.tasks.ways.sources import patient_name, source_name

SHAPE = (18, 22, 18)
HEADS = Recipe(steps=(Orient(), CropOrPad(shape=(16, 20, 16)), Percentiles()))
CHESTS = Recipe(steps=(CropOrPad(shape=(32, 32, 1)), Window(low=0, high=4095)))


class Listener:
    """Hears notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, what: str, total: float | int | None) -> object:
        return None

    def advance(self, handle: object, amount: float | int, text: str) -> None: ...

    def stop(self, handle: object) -> None: ...


def table(folder: Path, rows: list[dict[str, str]]) -> Path:
    names = sorted({"split", *(name for row in rows for name in row)})
    with (folder / "scans.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows({"split": "train"} | row for row in rows)
    return folder / "scans.csv"


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Material:
    """Six heads of two classes, the ill ones with masks whose labels are 2."""
    folder = tmp_path_factory.mktemp("heads")
    rows = []
    for seed in range(6):
        ill = seed % 2 == 1
        blobs = (Planted((-28.0 + 6 * seed, 12.0, 34.0), 26.0, 225.0),) if ill else ()
        scan, mask = head(seed, shape=SHAPE, spacing=10.0, lesions=blobs)
        io.write(scan, folder / f"Doe_{seed}.nii.gz")
        row = {
            "path": f"Doe_{seed}.nii.gz", "case": f"Doe_{seed}", "patient": f"John^Doe{seed}", "split": "train",
            "label": "ill" if ill else "well", "age": str(40 + 7 * seed), "sex": "FM"[seed % 2], "nickname": "Johnny",
        }  # fmt: skip
        if ill:
            io.write(mask.with_voxels(2 * mask.voxels), folder / f"Doe_{seed}_mask.nii.gz")
            row["mask"] = f"Doe_{seed}_mask.nii.gz"
        rows.append(row)
    return Material(index(table(folder, rows)), HEADS, io.ReadOptions(), seed=5)


@pytest.fixture(scope="module")
def chests(tmp_path_factory) -> Material:
    """Four radiographs without classes."""
    folder = tmp_path_factory.mktemp("chests")
    for seed in range(4):
        io.write(chest_xray(seed, size=40), folder / f"x{seed}.nii.gz")
    rows = [{"path": f"x{seed}.nii.gz", "split": "train"} for seed in range(4)]
    return Material(index(table(folder, rows)), CHESTS, io.ReadOptions())


def same(a: Made, b: Made) -> bool:
    masks = (a.mask is None) == (b.mask is None)
    if a.mask is not None and b.mask is not None:
        masks = np.array_equal(a.mask.voxels, b.mask.voxels)
    told = (a.label, a.sources, a.patient, a.parameters, a.covariates, a.how)
    return (
        masks and bool(torch.equal(a.x, b.x)) and np.array_equal(a.scan.voxels, b.scan.voxels)
        and told == (b.label, b.sources, b.patient, b.parameters, b.covariates, b.how)
    )  # fmt: skip


def original(made: Made, material: Material) -> Scan:
    row = next(row for row in material.manifest.rows if source_name(row, "") == made.sources[0])
    return io.read(material.manifest.locate(row.path))


def keeps_its_promises(way, again, material: Material, label: str) -> list[Made]:
    """Determinism, independence of how many, geometry, unit, range, names: what every way promises."""
    found = way.make(label, 0, 5)
    assert all(same(a, b) for a, b in zip(found[3:], again.make(label, 3, 2), strict=True))
    assert not torch.equal(found[0].x, found[3].x)
    told = json.dumps([[one.sources, one.patient, dict(one.parameters), dict(one.covariates)] for one in found])
    assert "Doe" not in told
    assert "Johnny" not in told
    for one in found:
        source = original(one, material)
        assert one.origin == "derived"
        assert one.scan.grid == source.grid
        assert one.scan.voxels.dtype == source.voxels.dtype
        assert one.scan.scale.unit == source.scale.unit
        assert one.scan.header.synthetic
        assert source.physical().min() <= one.scan.physical().min()
        assert one.scan.physical().max() <= source.physical().max()
        assert one.x.shape[1:] == torch.Size(n for n in material.recipe.seen or ())
        assert 0 <= float(one.x.min()) < float(one.x.max()) <= 1
        if one.mask is not None:
            assert one.mask.grid == source.grid
            assert one.mask.is_label
    return found


# -- classical transforms --------------------------------------------------------------------------------


def ball(grid: Grid, radius: float) -> tuple[Scan, Scan]:
    """A bright ball away from the middle, and its mask."""
    centre = grid.world([0.6 * grid.shape[0], 0.4 * grid.shape[1], 0.5 * (grid.shape[2] - 1)])
    shape = np.linalg.norm(grid.world(indices(grid.shape)) - centre, axis=-1) < radius
    scan = Scan(np.where(shape, 1000, 100).astype(np.int16)[None], grid)
    return scan, Scan(3 * shape[None].astype(np.uint8), grid, is_label=True)


GRIDS = {
    "volume": Grid((40, 48, 24), np.diag([2.0, 2.0, 4.0, 1.0])),
    "oblique": Grid((32, 32, 32), np.array([[0, -2.4, 0.5, 3], [2.0, 0, 0, -7], [0, 0.6, 3.0, 9], [0, 0, 0, 1.0]])),
    "image": Grid((64, 60, 1), np.diag([-2.0, -3.0, 1, 1])),
    "sagittal image": Grid((1, 64, 60), np.diag([5.0, 2.0, 3.0, 1])),
}


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_ball_and_its_mask_stay_together(kind, seed):
    scan, mask = ball(GRIDS[kind], 18.0)
    drawn = Classical.drawn(seed, scan, strength=1.5, mirror=("LR", "PA", "IS")).model_copy(update={"blur": 0.0})
    moved, regions = drawn.apply(scan, mask)
    bright = moved.physical()[0] > 550 if drawn.gamma <= 1 else moved.physical()[0] > 100 + 900 * 0.5**drawn.gamma
    assert not np.array_equal(regions.voxels, mask.voxels)
    both = (bright & (regions.voxels[0] == 3)).sum()
    assert 2 * both / (bright.sum() + (regions.voxels[0] == 3).sum()) > 0.9
    assert set(np.unique(regions.voxels)) == {0, 3}
    assert moved.grid == scan.grid
    assert regions.grid == mask.grid
    assert moved.voxels.dtype == scan.voxels.dtype
    assert regions.voxels.dtype == mask.voxels.dtype


@pytest.mark.parametrize("kind", ["volume", "image"])
def test_content_moves_by_the_stated_millimetres(kind):
    grid = GRIDS[kind]
    scan, mask = ball(grid, 18.0)

    def middle(mask: Scan) -> np.ndarray:
        return (np.argwhere(mask.voxels[0]).mean(0) - (np.asarray(grid.shape) - 1) / 2) * grid.spacing

    shift = (6.0, -6.0, 0.0)  # whole voxels of both
    _, moved = Classical(shift=shift).apply(scan, mask)
    assert np.abs(middle(moved) - middle(mask) - shift).max() < 0.5
    _, turned = Classical(rotate=(0, 0, 30.0)).apply(scan, mask)
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    expected = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ middle(mask)
    assert np.abs(middle(turned) - expected).max() < 0.5
    _, grown = Classical(scale=(1.25, 1.25, 1.0)).apply(scan, mask)
    assert np.abs(middle(grown) - middle(mask) * [1.25, 1.25, 1]).max() < 0.6
    assert np.isclose(grown.voxels.sum() / mask.voxels.sum(), 1.25**2, rtol=0.08)
    _, mirrored = Classical(mirror=(0,)).apply(scan, mask)
    assert np.array_equal(mirrored.voxels, mask.voxels[:, ::-1])


def test_nothing_drawn_changes_nothing():
    for scan in (head(0, shape=SHAPE, spacing=10.0)[0], chest_xray(0, size=32)):
        assert np.array_equal(Classical().apply(scan)[0].voxels, scan.voxels)


def test_left_and_right_are_exchanged_only_on_demand():
    scan = head(0, shape=SHAPE, spacing=10.0)[0]
    assert not any(Classical.drawn(seed, scan).mirror for seed in range(20))
    assert {Classical.drawn(seed, scan, mirror=("LR",)).mirror for seed in range(20)} == {(), (0,)}


def test_values_with_a_unit_keep_their_meaning():
    block, chest = ct_block(0, shape=(12, 10, 6)), chest_xray(0, size=32)
    drawn = [Classical.drawn(seed, block) for seed in range(8)]
    assert all(one.gamma == 1 and not one.shading for one in drawn)
    assert len({Classical.drawn(seed, chest).gamma for seed in range(8)}) == 8


def test_bending_never_folds():
    grid = GRIDS["volume"]
    scan, _ = ball(grid, 18.0)
    for seed in range(3):
        drawn = Classical.drawn(seed, scan, strength=3.0).model_copy(update={"bend": 30.0})
        looks = drawn._looks(grid)
        change = np.stack([np.stack(np.gradient(one)) for one in looks])
        assert np.linalg.det(np.moveaxis(change, (0, 1), (-2, -1))).min() > 0


def test_what_was_written_down_repeats_the_scan():
    scan, mask = head(1, shape=SHAPE, spacing=10.0, lesions=(Planted((-28.0, 12.0, 34.0), 26.0, 225.0),))
    drawn = Classical.drawn(3, scan)
    again = Classical.model_validate_json(drawn.model_dump_json())
    for a, b in zip(drawn.apply(scan, mask), again.apply(scan, mask), strict=True):
        assert np.array_equal(a.voxels, b.voxels)


def test_classical_transforms_refuse_what_makes_no_sense(unchecked_types):
    scan, mask = ball(GRIDS["volume"], 18.0)
    with pytest.raises(ConfigError, match="strength"):
        Classical.drawn(0, scan, strength=0.0)
    with pytest.raises(ConfigError, match="mirror"):
        Classical.drawn(0, scan, mirror=("up",))
    with pytest.raises(DataError, match="one grid"):
        Classical().apply(scan, mask.onto(mask.grid.crop((0, 0, 0), (10, 10, 10)), outside=0))


@pytest.mark.parametrize("space", [(32, 40), (32, 40, 24)])
def test_a_batch_moves_with_its_labels(space):
    x = torch.full((3, 2, *space), 0.1)
    middle = tuple(slice(n // 4, n // 2) for n in space)
    x[(slice(None), slice(None), *middle)] = 0.9
    labels = (x[:, 0] > 0.5).long() * 7
    moved, regions = classical_batch(x, torch.Generator().manual_seed(1), 1.5, labels, spacing=(1.0,) * len(space))
    again, _ = classical_batch(x, torch.Generator().manual_seed(1), 1.5, spacing=(1.0,) * len(space))
    assert torch.equal(moved, again)
    assert moved.shape == x.shape
    assert regions.dtype == labels.dtype
    assert set(regions.unique().tolist()) == {0, 7}
    bright = moved[:, 0] > 0.45  # gamma moves the middle of 0.1 and 0.9 little
    both = (bright & (regions == 7)).flatten(1).sum(1)
    assert (2 * both / (bright.flatten(1).sum(1) + (regions == 7).flatten(1).sum(1)) > 0.9).all()
    assert not torch.equal(moved[0], moved[1])
    assert moved.min() >= 0


def test_classic_way(heads):
    found = keeps_its_promises(ClassicWay(heads), ClassicWay(heads), heads, "ill")
    assert ClassicWay(heads).labels == ("ill", "well")
    assert all(one.label == "ill" and set(np.unique(one.mask.voxels)) == {0, 2} for one in found)
    assert {one.sources for one in found[:3]} == {
        (source_name(row, ""),) for row in heads.manifest.where(label="ill").rows
    }
    patients = {source_name(row, ""): patient_name(row, "") for row in heads.manifest.rows}
    assert all(one.patient == patients[one.sources[0]] for one in found)
    assert all(set(one.covariates) == {"age", "sex"} for one in found)
    numbers = {name: value for name, value in found[0].parameters.items() if name != "seed"}
    scan = Classical.model_validate(json.loads(json.dumps(numbers))).apply(original(found[0], heads))[0]
    assert np.array_equal(scan.voxels, found[0].scan.voxels)


def test_classic_way_of_images_without_classes(chests):
    found = keeps_its_promises(ClassicWay(chests), ClassicWay(chests), chests, "")
    assert ClassicWay(chests).labels == ("",)
    assert all(one.mask is None for one in found)
    with pytest.raises(DataError, match="'ill'"):
        ClassicWay(chests).make("ill", 0, 1)


def test_a_scan_that_cannot_be_read_is_named_once_and_left_out(chests, tmp_path):
    for path in chests.manifest.root.glob("*.nii.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes() if path.name != "x1.nii.gz" else b"nothing")
    broken = Material(moved_to(chests, tmp_path), CHESTS, io.ReadOptions())
    with reporting(listener := Listener()):
        found = ClassicWay(broken).make("", 0, 8)
    assert len(found) == 8
    assert len({one.sources for one in found}) == 3
    assert [note.startswith("Skipped x1") for note in listener.notes] == [True]


def moved_to(material: Material, root: Path):
    return replace(material.manifest, root=root)


def test_nobody_held_out_is_a_source(chests):
    rows = tuple(replace(row, split="test") for row in chests.manifest.rows)
    with pytest.raises(LeakageError, match="training scans alone"):
        ClassicWay(Material(replace(chests.manifest, rows=rows), CHESTS, io.ReadOptions()))


# -- models ----------------------------------------------------------------------------------------------


def with_model(material: Material, kind: dict, **changes) -> Material:
    """The material with a small model, fitted where that has a closed form, of random weights else."""
    seen = [io.read(material.manifest.locate(row.path)) for row in material.manifest.rows]
    ready = material.recipe(seen[0])
    joint = 0 if "context" in kind else len(kind.get("labels", ()))
    told = {"shape": material.recipe.seen, "channels": seen[0].channels + joint} | kind
    torch.manual_seed(0)
    model = build(config_of(told))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    if not model.players():
        rows = tuple(row for row in material.manifest.rows if row.mask or not joint)
        data = ScanDataset(
            replace(material.manifest, rows=rows), material.recipe, classes=model.config.classes,
            labels=model.config.labels,
        )  # fmt: skip
        model.finalise(data.batches(4))
    contract = Contract(
        spacing=seen[0].grid.spacing, low=0, high=4095, integers=True, planar=seen[0].is_planar,
        channels=seen[0].channels, grid=ready.grid.to_dict(), slope=ready.scale.slope, intercept=ready.scale.intercept,
    )  # fmt: skip
    return replace(material, bundle=Bundle({"model": model.eval()}, material.recipe, contract), **changes)


MIXTURE = {"kind": "mixture", "rank": 4, "mixtures": 1, "lead": 4}
VAE = {"kind": "vae", "latent": 4, "width": 4, "levels": 1}
AGE_SEX = [{"name": "age", "mean": 57.5, "sd": 13.0}, {"name": "sex", "levels": ["F", "M"]}]


# -- lesions ---------------------------------------------------------------------------------------------


def test_a_lesion_is_put_in_with_its_exact_mask(heads):
    way = LesionWay(heads, "insert")
    assert way.labels == ("well",)
    found = keeps_its_promises(way, LesionWay(heads, "insert"), heads, "well")
    for one in found:
        before, after = original(one, heads).voxels, one.scan.voxels
        # The label that lesions have in these data.
        assert np.array_equal(one.mask.voxels, 2 * (before != after))
        facts = one.parameters
        assert facts["voxels"] == (before != after).sum() > 0
        lesion = Lesion(facts["kind"], facts["size"], facts["contrast"], facts["seed"])
        again, _, _ = lesion.painted(original(one, heads))
        assert np.array_equal(again.voxels, after)
    assert len({one.parameters["kind"] for one in way.make("well", 0, 12)}) > 3


def test_lesions_in_images(chests):
    found = keeps_its_promises(LesionWay(chests), LesionWay(chests), chests, "")
    for one in found:
        assert np.array_equal(one.mask.voxels > 0, original(one, chests).voxels != one.scan.voxels)
        assert set(np.unique(one.mask.voxels)) == {0, 1}


def test_lesions_may_have_the_shape_of_training_scans_own(heads):
    found = LesionWay(heads, "insert", library="own").make("well", 0, 3)
    shapes = {source_name(row, ""): row for row in heads.manifest.where(label="ill").rows}
    for one in found:
        place, shape = one.sources
        drawn = io.read(heads.manifest.locate(shapes[shape].mask)).voxels > 0
        assert not (one.mask.voxels[0] > 0)[~drawn[0]].any()
        assert one.parameters["drawn_mask"]
        assert place not in shapes


@pytest.mark.parametrize("kind", [MIXTURE, VAE, MIXTURE | {"labels": (2,)}])
def test_a_lesion_is_taken_out_and_nothing_else_changes(heads, kind):
    material = with_model(heads, kind)
    way = LesionWay(material, "remove", healthy_label="well")
    assert way.labels == ("well",)
    found = keeps_its_promises(way, LesionWay(material, "remove", healthy_label="well"), material, "well")
    for one in found:
        row = next(row for row in heads.manifest.rows if source_name(row, "") == one.sources[0])
        before, marked = io.read(heads.manifest.locate(row.path)), io.read(heads.manifest.locate(row.mask)).voxels > 0
        changed = before.voxels != one.scan.voxels
        near = binary_dilation(marked[0], np.ones((3, 3, 3)))[None]
        assert not changed[~near].any()
        assert changed[marked].mean() > 0.8
        assert not one.mask.voxels.any()
        assert one.parameters["filled_by"] == ("inpaints" if kind["kind"] == "mixture" else "restores")


def test_each_scan_gets_or_loses_a_lesion(heads):
    assert LesionWay(heads).labels == ("well",)
    material = with_model(heads, MIXTURE)
    way = LesionWay(material, ill_label="ill", healthy_label="well")
    assert way.labels == ("ill", "well")
    assert {one.parameters["direction"] for one in way.make("ill", 0, 3)} == {"insert"}
    assert {one.parameters["direction"] for one in way.make("well", 0, 3)} == {"remove"}


def test_lesions_are_refused_in_a_sentence(heads, chests):
    with pytest.raises(ConfigError, match="give a bundle"):
        LesionWay(heads, "remove")
    with pytest.raises(CapabilityError, match=r"neither inpaints nor restores.*vae"):
        LesionWay(with_model(heads, {"kind": "gan", "width": 4}), "remove")
    with pytest.raises(DataError, match="No training scan suits"):
        LesionWay(replace(heads, manifest=heads.manifest.where(label="ill")), "insert")
    with pytest.raises(ConfigError, match="Kinds"):
        LesionWay(heads, kinds=())
    with pytest.raises(DataError, match=r"no scan|No training scan"):
        LesionWay(with_model(chests, MIXTURE), "remove")


# -- between two patients --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MIXTURE, MIXTURE | {"labels": (2,)}])
def test_scans_between_two_patients(heads, kind):
    material = with_model(heads, kind)
    found = InterpolateWay(material).make("ill", 0, 5)
    assert all(same(a, b) for a, b in zip(found[2:], InterpolateWay(material).make("ill", 2, 3), strict=True))
    patients = {source_name(row, ""): patient_name(row, "") for row in heads.manifest.rows}
    for one in found:
        a, b = one.sources
        assert patients[a] == one.patient != patients[b]
        assert 0.25 <= one.parameters["t"] <= 0.75
        assert one.scan.grid == original(one, heads).grid
        assert one.scan.voxels.dtype == np.uint16
        ages = [float(row.covariates["age"]) for row in heads.manifest.rows if source_name(row, "") in one.sources]
        assert min(ages) < float(one.covariates["age"]) < max(ages)
        assert "Doe" not in json.dumps([one.sources, one.patient, dict(one.parameters), dict(one.covariates)])
        assert (one.mask is not None) == ("labels" in kind)
        if one.mask is not None:
            assert one.mask.grid == one.scan.grid
            assert set(np.unique(one.mask.voxels)) <= {0, 2}


def test_the_ends_of_the_way_are_what_the_model_makes_of_the_two_scans(heads):
    material = with_model(heads, MIXTURE)
    one = InterpolateWay(material, low=0.0, high=0.0).make("ill", 0, 1)[0]
    coded = material.bundle.model.reconstruct(torch.tensor(HEADS(original(one, heads)).voxels)[None])
    assert torch.allclose(one.x, coded[0].clamp(0, 1), atol=1e-5)


def test_interpolation_takes_two_patients(heads):
    material = with_model(heads, MIXTURE)
    few = replace(material.manifest, rows=material.manifest.rows[:1] + material.manifest.where(label="ill").rows)
    with pytest.raises(DataError, match="two patients"):
        InterpolateWay(replace(material, manifest=few)).make("well", 0, 1)
    with pytest.raises(DataError, match="two patients"):
        InterpolateWay(replace(material, manifest=replace(few, rows=few.rows[:1])))
    with pytest.raises(CapabilityError, match=r"does not encode.*vae"):
        InterpolateWay(with_model(heads, {"kind": "gan", "width": 4}))
    with pytest.raises(ConfigError, match="give a bundle"):
        InterpolateWay(heads)


# -- one thing changed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(heads) -> Material:
    """With a flow that was told of age and sex."""
    kind = {"kind": "flow", "width": 4, "levels": 1, "steps": 2, "covariates": AGE_SEX, "classes": ("ill", "well")}
    return with_model(heads, kind)


def test_one_thing_about_a_scan_is_changed(told):
    way, again = (EditWay(told, {"age": "70:80", "sex": "F|M"}) for _ in range(2))
    found = keeps_its_promises(way, again, told, "well")
    rows = {source_name(row, ""): row for row in told.manifest.rows}
    for one in found:
        row = rows[one.sources[0]]
        assert 70 <= float(one.covariates["age"]) <= 80
        assert one.covariates["sex"] == {"F": "M", "M": "F"}[row.covariates["sex"]]
        assert one.parameters["varied"]["age"] == {"from": row.covariates["age"], "to": one.covariates["age"]}


def test_a_flow_that_changes_nothing_gives_the_scan_back(told):
    one = next(
        one for one in EditWay(told, {"age": "40"}).make("well", 0, 3)
        if one.parameters["varied"]["age"]["from"] == "40"
    )  # fmt: skip
    prepared = torch.tensor(HEADS(original(one, told)).voxels)
    assert (one.x - prepared).abs().max() < 0.01


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ({"weight": "60:80"}, "not told of the covariate 'weight'.*age, sex"),
        ({"age": "80:40"}, "range"),
        ({"age": "old"}, "age is a number"),
        ({"sex": "X"}, "one of F, M"),
        ({}, "what is to change"),
    ],
)
def test_what_cannot_be_changed_is_refused(told, vary, says):
    with pytest.raises(ConfigError, match=says):
        EditWay(told, vary)


def test_a_model_that_was_told_nothing_edits_nothing(heads):
    with pytest.raises(ConfigError, match="told none"):
        EditWay(with_model(heads, MIXTURE), {"age": "40:80"})


# -- masks that scans are drawn for ----------------------------------------------------------------------

GIVEN = {"kind": "flow", "width": 4, "levels": 1, "steps": 2, "context": 1, "labels": (2,)}


@pytest.fixture(scope="module")
def outlined(tmp_path_factory) -> Material:
    """Ten images with a dark ring in a bright disc of varying size and place, labels 1 and 4."""
    folder, rows = tmp_path_factory.mktemp("outlined"), []
    grid = Grid((32, 40, 1), np.diag([1.0, 1.5, 1.0, 1.0]))
    at = indices(grid.shape) * grid.spacing
    for n in range(10):
        away = np.linalg.norm(at - [14 + n % 4, 28 + n % 3, 0], axis=-1)
        mask = np.where(away < 5 + 0.3 * n, 4, np.where(away < 10 + 0.3 * n, 1, 0)).astype(np.uint8)[None]
        io.write(Scan((100 + 20 * mask).astype(np.int16), grid), folder / f"x{n}.nii.gz")
        io.write(Scan(mask, grid, is_label=True), folder / f"x{n}_mask.nii.gz")
        rows.append({"path": f"x{n}.nii.gz", "mask": f"x{n}_mask.nii.gz", "patient": f"p{n}", "case": f"x{n}"})
    recipe = Recipe(steps=(CropOrPad(shape=(32, 40, 1)), Window(low=0, high=255)))
    return with_model(
        Material(index(table(folder, rows)), recipe, io.ReadOptions()), GIVEN | {"context": 2, "labels": (1, 4)}
    )


@pytest.mark.parametrize("kind", ["real", "deformed", "sampled"])
def test_shapes(outlined, kind):
    shapes = Shapes(outlined, kind)
    found = [shapes(i) for i in range(12)]
    assert shapes.kind == kind
    assert torch.equal(Shapes(outlined, kind)(7)[0], found[7][0])
    real = {tuple(Shapes(outlined, "real")(i)[0].flatten().tolist()) for i in range(10)}
    for drawn, sources in found:
        assert drawn.shape == (2, 32, 40)
        assert set(drawn.unique().tolist()) == {0, 1}
        assert drawn.sum(0).max() == 1
        assert len(sources) == (kind != "sampled")
        assert (tuple(drawn.flatten().tolist()) in real) == (kind == "real")
        # A disc within a ring: one part each, and of what is not the ring the disc and the rest.
        assert [label(channel, return_num=True)[1] for channel in drawn.numpy()] == [1, 1]
        assert label(1 - drawn[0].numpy(), return_num=True, connectivity=1)[1] == 2
    assert len({tuple(drawn.flatten().tolist()) for drawn, _ in found}) == (10 if kind == "real" else 12)
    if kind != "sampled":
        assert {sources for _, sources in found[:10]} == {(source_name(row, ""),) for row in outlined.manifest.rows}


def test_shapes_of_volumes(heads):
    given = with_model(heads, GIVEN)
    with reporting(listener := Listener()):
        shapes = Shapes(given, "sampled")
    assert shapes.kind == "deformed"
    assert ["too little" in note for note in listener.notes] == [True]
    real, deformed = Shapes(given)(0), shapes(0)
    assert real[0].shape == deformed[0].shape == (1, 16, 20, 16)
    assert len(real[1]) == 1
    assert real[1][0] in {source_name(row, "") for row in heads.manifest.rows}
    row = next(row for row in heads.manifest.rows if source_name(row, "") == deformed[1][0])
    drawn = io.read(heads.manifest.locate(row.mask)).onto(HEADS.grid(original_of(row, heads)), outside=0)
    assert 0.3 < 2 * (deformed[0][0].numpy() * (drawn.voxels[0] > 0)).sum() / (
        deformed[0].sum() + (drawn.voxels > 0).sum()
    ) < 1  # fmt: skip


def original_of(row, material: Material) -> Scan:
    return io.read(material.manifest.locate(row.path))


def test_shapes_are_for_models_that_are_given_masks(heads, chests, unchecked_types):
    with pytest.raises(ConfigError, match="given none"):
        Shapes(with_model(heads, MIXTURE))
    with pytest.raises(DataError, match="no training scan"):
        Shapes(with_model(chests, GIVEN))
    with pytest.raises(ConfigError, match="one of real"):
        Shapes(with_model(heads, GIVEN), "round")


def test_text_in_the_pixels_goes_nowhere(tmp_path):
    for n, path in enumerate(sorted((SAMPLES / "xray" / "normal").iterdir())[:3]):
        ds = pydicom.dcmread(path)
        ds.BurnedInAnnotation = "YES" if n == 0 else "NO"
        ds.save_as(tmp_path / f"x{n}.dcm")
    found = index(tmp_path)
    rows = tuple(replace(row, split="train") for row in found.rows)
    material = Material(replace(found, rows=rows), CHESTS, io.ReadOptions())
    with reporting(listener := Listener()):
        made = ClassicWay(material).make("", 0, 6)
    assert len({one.sources for one in made}) == 2
    assert ["burned into" in note for note in listener.notes] == [True]
