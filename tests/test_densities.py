"""What tasks do with densities: surprise scored by hand, only real voxels, odd sizes, covariates and given masks."""

import csv
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from voxels import FAMILY, preset
from worlds import QUICK_2D, QUICK_3D

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import Batch, model_view
from medgen.data.manifest import Manifest, index
from medgen.data.window import flat, real_voxels
from medgen.errors import CapabilityError, ConfigError, DataError
from medgen.grid import Grid
from medgen.log import reporting
from medgen.models import FAMILIES, family
from medgen.scan import Scan
from medgen.scores.likelihoods import log_density
from medgen.seeds import voxel_uniform
from medgen.tasks.anomaly import Scored, Scores
from medgen.tasks.calibration import normals, p_value
from medgen.tasks.detector import Detector, usual_questions
from medgen.tasks.plan import Choices, plan_training
from medgen.tasks.quality import quality

ONCE = {"minutes": None}


class Notes:
    """A reporter that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def start(self, what: str, total: float | int | None) -> object:
        return what

    def advance(self, handle: object, amount: float | int, text: str) -> None:
        pass

    def stop(self, handle: object) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def voxels() -> Iterator[None]:
    """The family of independent voxels, while this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "voxels", FAMILY)
        yield


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_case(scores: Scores) -> dict[str, Scored]:
    return {scan.case: scan for scan in scores.scans}


# -- surprise ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def surprise(heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of independent voxels on the world of heads, with a map."""
    place = tmp_path_factory.mktemp("surprise")
    return medgen.train(heads, place / "bundle", preset=preset(place, 3), **ONCE)


def test_the_score_is_the_mean_surprise_of_a_voxel_in_nats(heads, surprise, tmp_path):
    bundle = Bundle.load(surprise)
    scores = by_case(medgen.score(heads, surprise, tmp_path / "out", maps=False))
    manifest = index(heads)
    for row in manifest.rows[:5]:
        x = model_view(bundle.recipe(io.read(manifest.locate(row.path))))[None]
        expected = -float(bundle.model.log_prob(x)) / x.numel()
        assert scores[row.case].score == pytest.approx(expected, rel=1e-5)
    held = [scores[row.case].score for row in manifest.split("calibration").rows]
    assert sorted(bundle.calibration["scores"]) == pytest.approx(sorted(held), rel=1e-5)


def test_a_scan_that_surprises_too_little_is_as_suspicious_as_one_that_surprises_too_much(heads, surprise):
    """The mean of all scans is the likeliest scan of all, and nobody looks like that."""
    bundle = Bundle.load(surprise)
    detector = Detector.of(bundle)
    dull, _ = detector(bundle.model.mean.detach()[None])
    wild, _ = detector(1 - bundle.model.mean.detach()[None])
    assert dull < min(detector.scores) < max(detector.scores) < wild
    lowest = 1 / (len(detector.scores) + 1)
    assert p_value(detector.scores, dull) == p_value(detector.scores, wild) == pytest.approx(lowest)


def test_the_map_says_where_a_scan_surprises_either_way(heads, surprise):
    bundle = Bundle.load(surprise)
    detector = Detector.of(bundle)
    x = bundle.model.mean.detach()[None] + bundle.model.sd[None] * 1.0  # every voxel surprises as it should
    loud, quiet = x.clone(), x.clone()
    loud[..., 4:9, 5:10, 6:11] += 4 * bundle.model.sd[..., 4:9, 5:10, 6:11]
    quiet[..., 4:9, 5:10, 6:11] = bundle.model.mean.detach()[..., 4:9, 5:10, 6:11]
    plain = detector(x)[1]
    assert plain.min() >= 0
    for changed in (loud, quiet):
        z = detector(changed)[1]
        assert z.shape == bundle.model.config.shape
        assert z.min() >= 0
        assert not np.array_equal(z[6, 7, 8], plain[6, 7, 8])
        assert np.array_equal(z[12:], plain[12:])


def test_a_map_lies_on_the_scan_s_own_grid_and_ill_scans_stand_out(ill_head, surprise, tmp_path):
    scores = medgen.score(ill_head, surprise, tmp_path / "out", rate=0.1)
    (scan,) = scores.scans
    source = io.read(ill_head)
    z_map = io.read(next((tmp_path / "out" / "maps").glob("*_map.nii.gz")), io.ReadOptions(on_nan="zero"))
    assert z_map.grid.close(source.grid)
    assert scan.z_max > 3
    assert scan.flagged is not None


@pytest.mark.parametrize("sign", [1, -1])
def test_two_sided_z_is_symmetrical_about_the_healthy_mean(sign):
    rng = np.random.default_rng(0)
    residuals = rng.normal(5, 1, (30, 10, 12)).astype(np.float32)
    learnt = normals(residuals, two_sided=True)
    assert np.allclose(learnt.mean, residuals.mean(0), atol=1e-5)
    assert np.allclose(learnt.z_map(learnt.mean + sign * 3 * learnt.sd), 3, atol=1e-3)
    assert (learnt.maxima > 0).all()


@pytest.mark.parametrize("shows", ["density", "bound", "estimate"])
def test_a_density_without_places_gives_a_score_and_no_map(heads, tmp_path, shows):
    bundle = medgen.train(heads, tmp_path / "b", preset=preset(tmp_path, 3, shows=shows), **ONCE)
    notes = Notes()
    with reporting(notes):
        scores = medgen.score(heads / "sub-003_T1w.nii.gz", bundle, tmp_path / "out")
    (scan,) = scores.scans
    assert scan.p is not None
    assert (scan.z_max, scan.mask_mm3) == (None, None)
    assert not (tmp_path / "out" / "maps").exists()
    assert any("not where" in said for said in notes.said)
    loaded = Bundle.load(bundle)
    x = model_view(loaded.recipe(io.read(heads / "sub-003_T1w.nii.gz")))[None]
    noise = float(loaded.model.log_prob_estimate(x)[0] - loaded.model.log_prob(x)) if shows == "estimate" else 0.0
    assert scan.score == pytest.approx(-(float(loaded.model.log_prob(x)) + noise) / x.numel(), rel=1e-5)


def examined(model, batch):
    """How unusual a model alone finds each scan of a batch."""
    return torch.from_numpy(Detector({"model": model}, usual_questions(model)).examined(batch)[0]).float()


def test_an_estimate_does_not_depend_on_the_company(heads, tmp_path):
    folder = medgen.train(heads, tmp_path / "b", preset=preset(tmp_path, 3, shows="estimate"), **ONCE)
    model = Bundle.load(folder).model
    x = torch.rand(3, 1, *model.config.shape)
    together = examined(model, Batch(x))
    assert torch.allclose(together, torch.cat([examined(model, Batch(x[n : n + 1])) for n in range(3)]))


def test_a_model_that_can_tell_nothing_is_refused_and_the_others_named(heads, tmp_path):
    folder = medgen.train(heads, tmp_path / "b", preset=preset(tmp_path, 3, shows="nothing"), **ONCE)
    assert not (folder / "preview.png").exists()
    with pytest.raises(CapabilityError, match=r"voxels cannot score anomalies.*Models that can: .*vae.*voxels"):
        medgen.score(heads, folder, tmp_path / "out")
    with pytest.raises(CapabilityError, match=r"voxels cannot augment.*vae"):
        medgen.augment(heads, tmp_path / "made", bundle=folder)
    assert not list(tmp_path.glob("out*"))


def test_the_class_that_suits_a_scan_best_counts_whatever_its_label(xrays, tmp_path):
    folder = medgen.train(xrays, tmp_path / "b", preset=preset(tmp_path, 2, step=[4, 4]), **ONCE)
    model = Bundle.load(folder).model
    assert model.config.classes == ("normal", "opacity")
    x = torch.rand(4, 1, *model.config.shape)
    each = torch.stack([-model.log_prob(x, torch.full((4,), c)) / x[0].numel() for c in (0, 1)])
    for cond in (None, torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)):
        assert torch.allclose(examined(model, Batch(x, cond)), each.amin(0))


@pytest.mark.parametrize(
    ("shows", "bits", "name"),
    [
        ("map", 0, "held_out_bits_per_dim"),
        ("map", 8, "held_out_bits_per_dim"),
        ("bound", 0, "held_out_bits_per_dim_bound"),
        ("bound", 8, "held_out_bits_per_dim_bound"),
        ("estimate", 0, "held_out_bits_per_dim_estimate"),
        ("estimate", 5, "held_out_bits_per_dim_estimate"),
    ],
)
def test_exact_bound_and_estimate_have_names_of_their_own(xrays, tmp_path, shows, bits, name):
    made = preset(tmp_path, 2, shows=shows, bits=bits, step=[4, 4])
    bundle = Bundle.load(medgen.train(xrays, tmp_path / "b", label="normal", preset=made, **ONCE))
    manifest = index(xrays).where(label="normal", split="calibration")
    x = torch.stack([model_view(bundle.recipe(io.read(manifest.locate(row.path)))) for row in manifest.rows])
    # A density of continuous values is told of grey levels of 8 bits, with noise between them.
    u = voxel_uniform((16, 16), seed=0)
    seen = x if bits else ((255 * x).round() + u - 0.5) / 255
    nats = float(bundle.model.log_prob(seen).detach().mean()) / 256
    expected = ((0 if bits else math.log(255)) - nats) / math.log(2)
    noise = 3 / 256 / math.sqrt(len(x)) if shows == "estimate" else 0
    assert bundle.metrics[name] == pytest.approx(expected, abs=1e-3 + 2 * noise)
    assert bundle.metrics["held_out_scans"] == len(x)
    if shows == "estimate":
        error = bundle.metrics[f"{name}_standard_error"]
        assert error == pytest.approx(1 / 256 / math.sqrt(len(x)) / math.log(2), abs=1e-4)
    assert set(bundle.metrics) <= {"held_out_scans", name, f"{name}_standard_error"}


# -- only real voxels ----------------------------------------------------------------------------------


def made_scan(shape: tuple[int, int, int], seed: int = 0, dtype: type = np.float32, **affine) -> Scan:
    """Noise on a lattice of its own."""
    matrix = np.diag([2.0, 3.0, 4.0, 1.0])
    matrix[:3, 3] = [-7, 5, 3]
    voxels = np.random.default_rng(seed).uniform(10, 200, (1, *shape)).astype(dtype)
    return Scan(voxels, Grid(shape, matrix))


WINDOWS = {
    "crop": lambda g: g.patch((1, 2, 1), (3, 3, 2)),
    "pad": lambda g: g.pad((1, 0, 2), (0, 3, 1)),
    "aside": lambda g: g.patch((4, -2, 3), (5, 6, 5)),
    "elsewhere": lambda g: g.patch((40, 0, 0), (3, 3, 3)),
    "flipped": lambda g: g.pad((2, 1, 0), (1, 1, 1)).flip(1),
    "turned": lambda g: g.pad((2, 1, 0), (1, 1, 1)).permute((2, 0, 1)),
    "finer": lambda g: g.respaced((1.0, 2.0, 1.5)).pad((3, 3, 3), (2, 2, 2)),
    "coarser": lambda g: g.respaced((5.0, 5.0, 5.0)).pad((1, 1, 1), (1, 1, 1)),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_real_voxels_are_those_that_a_scan_of_ones_covers(window):
    scan = made_scan((6, 5, 7))
    grid = WINDOWS[window](scan.grid)
    ones = Scan(np.ones((1, 6, 5, 7), np.uint8), scan.grid, is_label=True)
    assert np.array_equal(real_voxels(grid, scan.grid), ones.onto(grid, outside=0).voxels[0] > 0)


@pytest.mark.parametrize("planar", [True, False], ids=["image", "volume"])
def test_maps_learn_a_voxel_from_the_scans_that_have_it(planar):
    rng = np.random.default_rng(3)
    shape = (14, 12) if planar else (8, 9, 10)
    maps = rng.gamma(2.0, size=(12, *shape)).astype(np.float32)
    holes = maps.copy()
    holes[:4, -3:] = np.nan
    learnt, whole, few = (
        normals(holes, two_sided=True),
        normals(maps, two_sided=True),
        normals(maps[4:], two_sided=True),
    )
    assert np.allclose(learnt.mean[:-3], whole.mean[:-3])
    assert np.allclose(learnt.mean[-3:], few.mean[-3:])
    assert np.isfinite(learnt.sd).all()
    assert np.isfinite(learnt.maxima).all()
    nobody = maps.copy()
    nobody[:, 0] = np.nan
    assert np.array_equal(np.isfinite(normals(nobody).mean), np.isfinite(nobody).all(0))
    assert np.isfinite(normals(nobody).tails).all()


def cropped(folder: Path, into: Path, names: list[str]) -> Path:
    """Heads that lost three voxels at one end of each axis."""
    into.mkdir()
    for name in names:
        scan = io.read(folder / name)
        io.write(scan.onto(scan.grid.crop((3, 0, 3), (13, 13, 13)), outside=0), into / name)
    return into


def test_padding_counts_neither_in_the_score_nor_in_the_map(heads, surprise, tmp_path):
    """The score of a smaller scan is the mean over its own voxels."""
    small = cropped(heads, tmp_path / "small", ["sub-001_T1w.nii.gz"])
    loaded = Bundle.load(surprise)
    source = io.read(small / "sub-001_T1w.nii.gz")
    (scan,) = medgen.score(small, loaded, tmp_path / "out").scans
    ready = loaded.recipe(source)
    real = real_voxels(ready.grid, source.grid)
    assert 0.3 < real.mean() < 0.8
    surprise_map = -loaded.model.log_prob_map(model_view(ready)[None])[0, 0].detach().numpy()
    assert scan.score == pytest.approx(float(surprise_map[real].mean()), rel=1e-4)
    assert scan.score != pytest.approx(float(surprise_map.mean()), rel=1e-2)
    z = Detector.of(loaded)(model_view(ready)[None], real=torch.tensor(real)[None])[1]
    assert np.array_equal(np.isfinite(z), real)


def test_what_a_scan_s_neighbours_pad_does_not_leak_into_its_map(surprise):
    """Padding has no say in the local mean either."""
    detector = Detector.of(Bundle.load(surprise))
    x = torch.rand(1, 1, *detector.models["model"].config.shape)
    real = torch.ones(1, *detector.models["model"].config.shape, dtype=torch.bool)
    real[:, 9:] = False
    other = x.clone()
    other[:, :, 9:] = 55.0
    (one, first), (two, second) = detector(x, real=real), detector(other, real=real)
    assert one == two
    assert np.array_equal(first, second, equal_nan=True)


def test_log_density_leaves_padding_out_where_the_model_has_a_map(surprise):
    model = Bundle.load(surprise).model
    x = torch.rand(2, 1, *model.config.shape)
    real = torch.rand(2, *model.config.shape) > 0.5
    expected = [float(model.log_prob_map(x)[n, 0][real[n]].mean()) for n in (0, 1)]
    assert log_density(model, Batch(x, real=real))[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert log_density(model, Batch(x))[0].tolist() == pytest.approx((model.log_prob(x) / x[0].numel()).tolist())


# -- odd sizes -----------------------------------------------------------------------------------------


def blob_world(folder: Path, shape: tuple[int, int, int], n: int = 14) -> Path:
    """NIfTI volumes of bright blobs that move about, all on one lattice; PNG where there is a single slice last."""
    folder.mkdir()
    axes = np.meshgrid(*[np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in shape], indexing="ij")
    for seed in range(n):
        rng = np.random.default_rng(seed)
        distance = sum((axis - rng.uniform(-0.3, 0.3)) ** 2 for axis in axes)
        values = 200 * np.exp(-4 * distance) + 20 + rng.normal(0, 3, shape)
        voxels = values.clip(0, 255).round().astype(np.uint8)[None]
        if shape[2] == 1:
            Image.fromarray(voxels[0, :, :, 0].T).save(folder / f"p{seed:02d}.png")
        else:
            io.write(Scan(voxels, Grid(shape, np.diag([2.0, 2.0, 3.0, 1.0]))), folder / f"p{seed:02d}.nii.gz")
    return folder


ODD = {
    # scans, the model's stride, its shape, shape of what it makes
    "image": ((45, 53, 1), [8, 8], (48, 56), (45, 53, 1)),
    "volume": ((31, 40, 27), [8, 8, 8], (32, 40, 32), (31, 40, 27)),
    "sagittal slice": ((1, 30, 26), [4, 4], (32, 28), (30, 26, 1)),
    "coronal slice": ((29, 1, 26), [4, 4], (32, 28), (29, 26, 1)),
    "few slices": ((32, 32, 5), [8, 8, 1], (32, 32, 5), (32, 32, 5)),
    "few slices, halved": ((32, 32, 5), [8, 8, 8], (32, 32, 8), (32, 32, 5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_any_size_is_learned_scored_and_made(tmp_path, name):
    shape, step, model_shape, made_shape = ODD[name]
    world = blob_world(tmp_path / "world", shape)
    made = preset(tmp_path, len(step), step=step)
    folder = medgen.train(world, tmp_path / "b", preset=made, **ONCE)
    bundle = Bundle.load(folder)
    assert bundle.model.config.shape == model_shape
    scores = medgen.score(world, folder, tmp_path / "scores", rate=0.3)
    assert not scores.failed
    for path in sorted(world.iterdir())[:2]:
        source = io.read(path)
        z_map = io.read(tmp_path / "scores" / "maps" / f"{path.name.split('.')[0]}_map.nii.gz")
        assert z_map.grid.close(source.grid)
        assert np.isfinite(z_map.voxels).all()
    done = medgen.augment(world, tmp_path / "made", bundle=folder, n=2)
    new = [io.read(path) for path in sorted((tmp_path / "made" / "images").iterdir())]
    assert sum(done.written.values()) == len(new) == 2
    source = flat(io.read(next(world.iterdir())))
    assert all(scan.grid.shape == made_shape for scan in new)
    assert all(scan.voxels.dtype == np.uint8 for scan in new)
    assert all(scan.grid.close(source.grid) for scan in new)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "volume"])
def test_a_twin_model_takes_odd_sizes_too(tmp_path, name):
    shape, _, _, made_shape = ODD[name]
    world = blob_world(tmp_path / "world", shape)
    overrides = (*(QUICK_2D if shape[2] == 1 else QUICK_3D), "fit.images=8")
    folder = medgen.train(world, tmp_path / "b", overrides=overrides, **ONCE)
    scores = medgen.score(world, folder, tmp_path / "scores", maps=False)
    assert not scores.failed
    medgen.augment(world, tmp_path / "made", bundle=folder, n=1)
    (new,) = (tmp_path / "made" / "images").iterdir()
    assert io.read(new).grid.shape == made_shape


def test_a_single_slice_is_an_image_however_it_lies(tmp_path):
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1)):
        scan = made_scan((7, 5, 1)).onto(made_scan((7, 5, 1)).grid.permute(order), outside=0)
        turned = flat(scan)
        assert turned.is_planar
        assert sorted(turned.grid.shape) == [1, 5, 7]
        back = turned.onto(scan.grid, outside=-1)
        assert np.array_equal(back.voxels, scan.voxels)
    line = made_scan((7, 1, 1))
    assert flat(line) is line
    column = made_scan((1, 1, 7))
    assert flat(column) is column


# -- bad values ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """8-bit pictures, and a bundle trained on them."""
    place = tmp_path_factory.mktemp("pictures")
    world = blob_world(place / "world", (16, 16, 1))
    return world, medgen.train(world, place / "bundle", preset=preset(place, 2, step=[4, 4]), **ONCE)


def test_constant_scans_are_refused_in_a_sentence(pictures, heads, surprise, tmp_path):
    world, bundle = pictures
    (tmp_path / "flat").mkdir()
    Image.fromarray(np.full((16, 16), 90, np.uint8)).save(tmp_path / "flat" / "grey.png")
    shutil.copy(world / "p00.png", tmp_path / "flat")
    scores = by_case(medgen.score(tmp_path / "flat", bundle, tmp_path / "out"))
    assert "constant" in scores["grey"].error
    assert not scores["p00"].error
    scan = io.read(heads / "sub-001_T1w.nii.gz")
    (tmp_path / "still").mkdir()
    io.write(scan.with_voxels(np.full_like(scan.voxels, 300)), tmp_path / "still" / "a.nii.gz")
    io.write(scan, tmp_path / "still" / "b.nii.gz")
    scores = by_case(medgen.score(tmp_path / "still", surprise, tmp_path / "out3"))
    assert "constant" in scores["a"].error
    assert not scores["b"].error


def test_constant_scans_are_left_out_of_training(tmp_path):
    world = blob_world(tmp_path / "world", (16, 16, 1))
    Image.fromarray(np.full((16, 16), 90, np.uint8)).save(world / "p00.png")
    notes = Notes()
    with reporting(notes):
        medgen.train(world, tmp_path / "b", preset=preset(tmp_path, 2, step=[4, 4]), **ONCE)
    assert any("Skipped p00" in said and "constant" in said for said in notes.said)


def test_values_beyond_the_recipe_s_range_are_cut_and_counted(pictures, tmp_path):
    _, bundle = pictures
    (tmp_path / "in").mkdir()
    bright = np.full((16, 16), 100, np.uint16) + np.arange(16, dtype=np.uint16)
    bright[:4] = 900
    Image.fromarray(bright).save(tmp_path / "in" / "bright.png")
    (scan,) = medgen.score(tmp_path / "in", bundle, tmp_path / "out").scans
    assert "64 of 256 voxels (25%) lie outside 0 to 255 and were cut" in scan.warnings
    assert not scan.error


def test_training_says_how_many_scans_do_not_suit_a_fixed_range(tmp_path):
    world = blob_world(tmp_path / "world", (16, 16, 1))
    recipe = "{steps: [{do: crop_or_pad, shape: [16, 16, 1]}, {do: window, low: 0, high: 60}]}"
    notes = Notes()
    with reporting(notes):
        medgen.train(world, tmp_path / "b", preset=preset(tmp_path, 2, recipe, step=[4, 4]), **ONCE)
    assert any("does not suit" in said and "outside 0 to 60" in said for said in notes.said)


def test_not_a_number_is_refused_or_counts_as_zero_where_asked(heads, surprise, tmp_path):
    scan = io.read(heads / "sub-001_T1w.nii.gz")
    voxels = scan.voxels.astype(np.float32)
    voxels[0, 8, 8, 8] = np.nan
    (tmp_path / "in").mkdir()
    io.write(scan.with_voxels(voxels), tmp_path / "in" / "a.nii.gz")
    io.write(scan, tmp_path / "in" / "b.nii.gz")
    scores = by_case(medgen.score(tmp_path / "in", surprise, tmp_path / "out"))
    assert "finite" in scores["a"].error or "not a number" in scores["a"].error
    zero = medgen.score(tmp_path / "in", surprise, tmp_path / "out2", options=io.ReadOptions(on_nan="zero"))
    assert not zero.failed


# -- covariates ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of heads with age and sex, a word too many, a constant, and gaps."""
    folder = tmp_path_factory.mktemp("people")
    names = sorted(path.name for path in heads.iterdir())[:30]
    lines = ["path,age,sex,town,planet,height"]
    for n, name in enumerate(names):
        shutil.copy(heads / name, folder)
        age = "n/a" if n == 3 else str(40 + 2 * n)
        lines.append(f"{name},{age},{'FM'[n % 2]},town {n},Earth,")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


@pytest.fixture(scope="module")
def told(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is told age and sex."""
    place = tmp_path_factory.mktemp("told")
    return medgen.train(people, place / "b", preset=preset(place, 3), covariates=("age", "sex"), **ONCE)


def test_covariates_are_described_by_the_training_scans_alone(people, told):
    config = Bundle.load(told).model.config
    cells = [row.covariates for row in index(people).split("train").rows]
    ages = np.array([float(row["age"]) for row in cells if row["age"] != "n/a"])
    age, sex = config.covariates
    assert (age.name, age.levels, sex.name, sex.levels) == ("age", (), "sex", ("F", "M"))
    assert (age.mean, age.sd) == pytest.approx((ages.mean(), ages.std(ddof=1)))
    assert config.condition_width == 3


def test_a_scan_is_scored_as_what_its_table_says_it_is_and_as_average_where_it_says_nothing(people, told, tmp_path):
    bundle = Bundle.load(told)
    age = bundle.model.config.covariates[0]
    table = rows(people)[:3]
    name = table[1]["path"]
    shutil.copy(people.parent / name, tmp_path / name)
    expected = {}
    x = model_view(bundle.recipe(io.read(tmp_path / name)))[None]
    for case, years, sex in (("old", "90", "F"), ("young", "20", "M"), ("unknown", "", "")):
        (tmp_path / f"{case}.csv").write_text(f"path,case,age,sex\n{name},{case},{years},{sex}\n")
        row = [(float(years) - age.mean) / age.sd if years else 0.0, float(sex == "F"), float(sex == "M")]
        expected[case] = -float(bundle.model.log_prob(x, torch.tensor([row]))) / x.numel()
        (scan,) = medgen.score(tmp_path / f"{case}.csv", told, tmp_path / f"out {case}", maps=False).scans
        assert scan.score == pytest.approx(expected[case], rel=1e-4)
    assert len(set(expected.values())) == 3
    (scan,) = medgen.score(tmp_path / name, told, tmp_path / "bare", maps=False).scans
    assert scan.score == pytest.approx(expected["unknown"], rel=1e-4)


@pytest.mark.slow
def test_invented_people_are_written_down_as_the_model_was_told_of_them(people, told, tmp_path):
    medgen.augment(people, tmp_path / "made", bundle=told, n=12)
    bundle = Bundle.load(told)
    table = rows(tmp_path / "made" / "manifest.csv")
    ages = np.array([float(row["age"]) for row in table])
    assert {row["sex"] for row in table} == {"F", "M"}
    age = bundle.model.config.covariates[0]
    assert len(set(ages)) == 12
    assert abs(ages.mean() - age.mean) < 1.5 * age.sd
    from medgen.tasks.conditions import conditions_for

    cells = [{"age": row["age"], "sex": row["sex"]} for row in table]
    cond = conditions_for(bundle.model.config, [""] * 12, cells)
    # The mean of this family moves by 0.1 age + 0.2 F + 0.3 M; its samples are that brighter.
    shift = (cond * torch.tensor([0.1, 0.2, 0.3])).sum(1).numpy()
    brightness = [float(io.read(tmp_path / "made" / row["path"]).physical().mean()) for row in table]
    assert np.corrcoef(shift, brightness)[0, 1] > 0.9
    again = medgen.augment(people, tmp_path / "again", bundle=told, n=3)
    assert sum(again.written.values()) == 3
    assert rows(tmp_path / "again" / "manifest.csv") == table[:3]
    made = index(tmp_path / "made" / "manifest.csv")
    assert made.rows[0].covariates["age"] == table[0]["age"]


@pytest.mark.parametrize(
    ("column", "says"),
    [("weight", "weight.*age"), ("height", "height"), ("planet", "planet.*same"), ("town", "town.*different words")],
)
def test_a_column_that_tells_nothing_is_refused_by_name(people, tmp_path, column, says):
    with pytest.raises(DataError, match=f"(?s){says}"):
        medgen.train(people, tmp_path / "b", preset=preset(tmp_path, 3), covariates=["age", column], **ONCE)
    assert not (tmp_path / "b").exists()


def test_a_family_without_covariates_refuses_them_and_names_one_that_takes_them(people, tmp_path):
    with pytest.raises(ConfigError, match=r"mixture takes no covariates.*voxels"):
        medgen.train(people, tmp_path / "b", preset="gmm", covariates=("age",), **ONCE)
    with pytest.raises(ConfigError, match=r"vae takes no context.*voxels"):
        medgen.train(people, tmp_path / "b", masks="given", **ONCE)


def test_the_command_line_takes_a_list_of_columns(people, command, tmp_path):
    code, out, _ = command(
        "train", people, "-o", tmp_path / "b", "--preset", preset(tmp_path, 3), "--covariates", "age, sex",
        "--dry-run", "--json",
    )  # fmt: skip
    assert code == 0
    assert '"age"' in out
    assert '"levels"' in out
    code, _, err = command("train", people, "-o", tmp_path / "b", "--preset", "gmm", "--covariates", "age")
    assert code == 2
    assert "takes no covariates" in err


def test_classes_and_covariates_go_together(xrays, tmp_path):
    lines = ["path,label,age"]
    for n, path in enumerate(sorted(xrays.glob("*/*.png"))):
        lines.append(f"{path},{path.parent.name},{30 + n}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    made = preset(tmp_path, 2, step=[4, 4])
    folder = medgen.train(tmp_path / "table.csv", tmp_path / "b", preset=made, covariates=["age"], **ONCE)
    model = Bundle.load(folder).model
    assert model.config.condition_width == 3
    x, cond = torch.rand(2, 1, 16, 16), torch.tensor([[1.0, 0.0, 0.7], [0.0, 1.0, -2.0]])
    each = []
    for chosen in ([1.0, 0.0], [0.0, 1.0]):
        row = torch.cat([torch.tensor([chosen, chosen]), cond[:, 2:]], 1)
        each.append(-model.log_prob(x, row) / 256)
    assert torch.allclose(examined(model, Batch(x, cond)), torch.stack(each).amin(0))
    done = medgen.augment(tmp_path / "table.csv", tmp_path / "made", bundle=folder, per_class=2)
    assert sum(done.written.values()) == 4
    assert not medgen.score(tmp_path / "table.csv", folder, tmp_path / "s", maps=False).failed


# -- a given mask --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes with masks of their blobs, on a finer grid than the scans; every third scan has none."""
    folder = tmp_path_factory.mktemp("masked") / "world"
    blob_world(folder, (12, 13, 8), n=18)
    (folder / "masks").mkdir()
    (folder / "images").mkdir()
    for n, path in enumerate(sorted(folder.glob("*.nii.gz"))):
        scan = io.read(path)
        if n % 3:
            mask = Scan((scan.voxels > 150).astype(np.uint8) * 7, scan.grid, is_label=True)
            io.write(mask, folder / "masks" / path.name)
        path.rename(folder / "images" / path.name)
    return folder


@pytest.fixture(scope="module")
def given(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is given masks."""
    place = tmp_path_factory.mktemp("given")
    return medgen.train(masked, place / "b", preset=preset(place, 3), masks="given", **ONCE)


@pytest.mark.slow
def test_a_scan_is_scored_with_its_own_mask_and_with_an_empty_one_where_it_has_none(masked, given, tmp_path):
    bundle = Bundle.load(given)
    assert bundle.model.config.context == 1
    manifest = index(masked)
    assert sum(bool(row.mask) for row in manifest.rows) == 12
    scores = by_case(medgen.score(masked, given, tmp_path / "out"))
    for row in manifest.rows:
        source = io.read(manifest.locate(row.path))
        ready = bundle.recipe(source)
        context = torch.zeros(1, 1, *ready.grid.shape)
        if row.mask:
            drawn = io.read(manifest.locate(row.mask))
            moved = Scan((drawn.voxels > 0).astype(np.uint8), drawn.grid, is_label=True).onto(ready.grid, outside=0)
            context[0, 0] = torch.tensor(moved.voxels[0].astype(np.float32))
            assert 0 < context.mean() < 1
        real = torch.tensor(real_voxels(ready.grid, source.grid))
        told = -bundle.model.log_prob_map(model_view(ready)[None], None, context)[0, 0][real].mean()
        assert scores[row.case].score == pytest.approx(float(told), rel=1e-4)


def test_scans_are_made_for_the_training_masks_in_turn_and_the_masks_lie_beside(masked, given, tmp_path):
    done = medgen.augment(masked, tmp_path / "made", bundle=given, n=4)
    table = rows(tmp_path / "made" / "manifest.csv")
    assert sum(done.written.values()) == len(table) == 4
    originals = {
        io.read(path).voxels.astype(bool).tobytes() for path in (masked / "masks").iterdir()
    }  # fmt: skip
    for row in table:
        scan, mask = (io.read(tmp_path / "made" / row[name]) for name in ("path", "mask"))
        assert mask.grid.close(scan.grid)
        assert set(np.unique(mask.voxels)) == {0, 7}
        assert mask.voxels.astype(bool).tobytes() in originals
    found = index(tmp_path / "made" / "manifest.csv")
    assert all(row.mask for row in found.rows)
    scans = [row for row in index(tmp_path / "made").rows if row.kind == "nifti"]
    assert len(scans) == 4
    assert all(row.mask for row in scans)


def test_masks_are_needed_and_npz_has_no_place_for_them(masked, heads, given, tmp_path):
    with pytest.raises(ConfigError, match="npz"):
        medgen.augment(masked, tmp_path / "a", bundle=given, format="npz")
    with pytest.raises(DataError, match="no training scan has one"):
        medgen.train(heads, tmp_path / "b", preset=preset(tmp_path, 3), masks="given", **ONCE)
    with pytest.raises(ConfigError, match="expected 1, found 2"):
        medgen.train(masked, tmp_path / "c", preset=preset(tmp_path, 3, context=2), **ONCE)


def test_held_out_metrics_know_the_mask(masked, given):
    bundle = Bundle.load(given)
    from medgen.data.dataset import ScanDataset
    from medgen.tasks.conditions import told_of

    held = ScanDataset(index(masked).split("calibration"), bundle.recipe, **told_of(bundle.model.config))
    assert {f"held_out_{name}": value for name, value in quality(bundle.model, held).items()} == bundle.metrics
    assert isinstance(index(masked), Manifest)


# -- every family that is told more than a class ---------------------------------------------------------

TOLD = [name for name in FAMILIES if "context" in family(name).Config.model_fields]


@pytest.fixture(scope="module")
def told_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of an odd size with ages and masks."""
    folder = tmp_path_factory.mktemp("told") / "world"
    blob_world(folder, (19, 22, 1), n=14)
    lines = ["path,mask,age"]
    for n, path in enumerate(sorted(folder.glob("*.png"))):
        mask = (np.asarray(Image.open(path)) > 150).astype(np.uint8)
        Image.fromarray(mask).save(folder / f"{path.stem}_mask.png")
        lines.append(f"{path.name},{path.stem}_mask.png,{30 + n}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOLD)
def test_every_family_that_can_is_told_covariates_and_masks(told_pictures, tmp_path, kind):
    fields = family(kind).Config.model_fields
    small = {name: value for name, value in {"width": 8, "levels": 1, "steps": 2, "depth": 1}.items() if name in fields}
    # Of a GAN's architectures few take an image, and without codes it cannot score.
    small |= {"architecture": {"kind": "unet"}, "start": "noise", "inference": "posthoc"} if kind == "gan" else {}
    made = preset(tmp_path, 2, **small | {"kind": kind})
    trained = medgen.train(told_pictures, tmp_path / "b", preset=made, covariates=["age"], masks="given", **ONCE)
    bundle = Bundle.load(trained)
    assert bundle.model.config.condition_width == bundle.model.config.context == 1
    scores = medgen.score(told_pictures, trained, tmp_path / "scores")
    assert not scores.failed
    assert all(np.isfinite(scan.score) for scan in scores.scans)
    done = medgen.augment(told_pictures, tmp_path / "made", bundle=trained, n=2)
    table = rows(tmp_path / "made" / "manifest.csv")
    assert sum(done.written.values()) == len(table) == 2
    for row in table:
        assert 0 < float(row["age"]) < 80
        scan, mask = (io.read(tmp_path / "made" / row[name]) for name in ("path", "mask"))
        assert scan.grid.shape == mask.grid.shape == (19, 22, 1)


def test_thick_slices_are_not_padded_for_a_family_that_asks_how_far_they_lie_apart(tmp_path):
    folder = tmp_path / "thick"
    folder.mkdir()
    for seed in range(6):
        voxels = np.random.default_rng(seed).integers(50, 200, (1, 16, 13, 5)).astype(np.uint8)
        io.write(Scan(voxels, Grid((16, 13, 5), np.diag([1.0, 1.0, 6.0, 1.0]))), folder / f"p{seed}.nii.gz")
    plan = plan_training(folder, Choices(preset="glow3d", overrides=["model.levels=2"]))
    assert plan.model.spacing == (1.0, 1.0, 6.0)
    assert plan.model.shape == (16, 16, 5)
    even = plan_training(folder, Choices(preset="glow3d", overrides=["model.levels=2", "model.spacing=[1, 1, 1]"]))
    assert even.model.shape == (16, 16, 8)
