"""Embed, interpolate and traverse: codes that can be read, scans that lie where their sources do, nobody named."""

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from worlds import QUICK_2D, SAMPLES

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import Batch
from medgen.data.manifest import index
from medgen.errors import CapabilityError, ConfigError, DataError, OutputError, PrivacyError
from medgen.io.raster import write_npz
from medgen.models import FAMILIES, build, config_of, family
from medgen.report.scatter import scatter
from medgen.tasks.codes import Code, Coder
from medgen.tasks.intake import taken_in
from medgen.tasks.walks import between, conditions_between


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rebuilt(bundle: Bundle, path: Path) -> np.ndarray:
    """The reconstruction of a scan, in physical values, as the tasks condition it."""
    row = index(path).rows[0]
    scan = taken_in(bundle, str(path), io.ReadOptions())
    coder = Coder(bundle, ("encodes", "decodes"), "test", "cpu")
    code = coder.encode(scan, row)
    twin = bundle.model.reconstruct(scan.x, code.cond)[0].clamp(0, 1).numpy()
    return scan.ready.scale.physical(twin.reshape(1, *scan.ready.grid.shape))


def like(bundle: Path, into: Path, kind: dict, *, seed: int = 0) -> Path:
    """A bundle with another, untrained model in place of the one in `bundle`."""
    given = Bundle.load(bundle)
    torch.manual_seed(seed)
    told = {"shape": given.model.config.shape, "channels": given.model.config.channels}
    model = build(config_of(told | kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    into.mkdir(parents=True)
    Bundle({"model": model.eval()}, given.recipe, given.contract).save(into)
    return into


@pytest.fixture(scope="module")
def map_bundle(heads_bundle, tmp_path_factory) -> Path:
    """An autoencoder with a code map for the heads."""
    kind = {"kind": "autoencoder", "code": "map", "latent": 3, "width": 4, "levels": 1, "fold": 2}
    return like(heads_bundle, tmp_path_factory.mktemp("map") / "bundle", kind)


@pytest.fixture(scope="module")
def flow_bundle(xray_bundle, tmp_path_factory) -> Path:
    """A flow for the radiographs."""
    return like(xray_bundle, tmp_path_factory.mktemp("flow") / "bundle",
                {"kind": "flow", "width": 4, "levels": 1, "steps": 2})  # fmt: skip


def defaults_can(kind: str) -> frozenset[str]:
    return family(kind).abilities(family(kind).Config(shape=(64, 64)))


# -- embed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(xrays, xray_bundle, tmp_path_factory) -> Path:
    """All radiographs and a damaged one in the codes of their bundle."""
    place = tmp_path_factory.mktemp("embedded")
    shutil.copytree(xrays, place / "in")
    (place / "in" / "normal" / "zz.png").write_bytes(b"\x89PNG nonsense")
    found = medgen.embed(place / "in", xray_bundle, place / "out")
    assert found.failed == 1
    return place / "out"


def test_every_scan_has_a_row_with_its_code(embedded, xray_bundle):
    table = rows(embedded / "codes.csv")
    assert len(table) == 37
    assert list(table[0])[:5] == ["case", "patient", "label", "split", "z1"]
    assert {row["label"] for row in table} == {"normal", "opacity"}
    bad = [row for row in table if row["error"]]
    assert len(bad) == 1
    assert "zz" in bad[0]["case"]
    assert bad[0]["z1"] == ""
    good = [row for row in table if not row["error"]]
    numbers = np.asarray([[float(row[f"z{n + 1}"]) for n in range(6)] for row in good])
    with np.load(embedded / "codes.npz") as held:
        assert held["codes"].shape == (36, 6, 1, 1)
        assert np.allclose(held["codes"].reshape(36, 6), numbers, rtol=1e-5, atol=1e-6)
        assert held["cases"].tolist() == [row["case"] for row in good]
        assert held["labels"].tolist() == [row["label"] for row in good]
        assert held["splits"].tolist() == [row["split"] for row in good]
    with Image.open(embedded / "codes.png") as picture:
        assert picture.size[0] > 400
    told = json.loads((embedded / "run.json").read_text())
    assert (told["command"], told["scans"], told["failed"]) == ("embed", 36, 1)
    assert not list(embedded.parent.glob("*.part"))
    assert not (embedded / "parts").exists()


def test_a_code_is_the_encoder_s_mean_and_labels_have_no_say_in_it(xrays, xray_bundle, embedded, tmp_path):
    bundle, first = Bundle.load(xray_bundle), sorted((xrays / "normal").iterdir())[0]
    x = taken_in(bundle, str(first), io.ReadOptions()).x
    known = [bundle.model.encode(x, torch.tensor([k])).mean.detach().numpy().ravel() for k in range(2)]
    # Alone, nothing tells its class.
    medgen.embed(first, xray_bundle, tmp_path / "alone")
    (alone,) = np.load(tmp_path / "alone" / "codes.npz")["codes"]
    assert min(float(np.abs(alone.ravel() - one).max()) for one in known) < 1e-5
    number = [row["case"].endswith(first.stem) for row in rows(embedded / "codes.csv")].index(True)
    assert np.allclose(np.load(embedded / "codes.npz")["codes"][number], alone, atol=1e-5)


def test_maps_are_whole_in_the_array_and_means_in_the_table(heads, map_bundle, tmp_path):
    for name in sorted(path.name for path in heads.iterdir())[:3]:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(heads / name, tmp_path / "in")
    found = medgen.embed(tmp_path / "in", map_bundle, tmp_path / "out")
    assert found.columns == 3
    assert any("map of" in sentence for sentence in found.notes)
    codes = np.load(tmp_path / "out" / "codes.npz")["codes"]
    assert codes.shape == (3, *found.code_shape)
    assert codes.ndim == 5
    table = [[float(row[f"z{n + 1}"]) for n in range(3)] for row in rows(tmp_path / "out" / "codes.csv")]
    assert np.allclose(codes.reshape(3, 3, -1).mean(2), table, rtol=1e-5, atol=1e-6)


def test_an_interrupted_embedding_goes_on_where_it_stopped(xrays, xray_bundle, tmp_path, monkeypatch):
    from medgen.tasks import codes

    original, count = codes.Coder.encode, [0]

    def interrupted(self, scan, row):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return original(self, scan, row)

    monkeypatch.setattr(codes.Coder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        medgen.embed(xrays / "normal", xray_bundle, tmp_path / "out")
    assert (tmp_path / "out.part" / "journal.json").exists()
    medgen.embed(xrays / "normal", xray_bundle, tmp_path / "out")
    assert count[0] == 4 + len(list((xrays / "normal").iterdir())) - 3
    medgen.embed(xrays / "normal", xray_bundle, tmp_path / "again")
    first, again = (files(tmp_path / name) for name in ("out", "again"))
    assert {k: v for k, v in first.items() if k != "run.json"} == {k: v for k, v in again.items() if k != "run.json"}


def test_a_flow_s_noise_is_in_the_array_only(xrays, flow_bundle, tmp_path):
    found = medgen.embed(xrays / "opacity", flow_bundle, tmp_path / "out")
    codes = np.load(tmp_path / "out" / "codes.npz")["codes"]
    assert codes.shape[1:] == found.code_shape == (256,)
    assert found.columns == 0
    assert any("noise" in sentence for sentence in found.notes)
    table = rows(tmp_path / "out" / "codes.csv")
    assert list(table[0]) == ["case", "patient", "label", "split", "warnings", "error"]
    assert len(table) == len(codes)


def test_points_of_one_class_have_one_colour(tmp_path):
    points = np.asarray([[0.0, 0.0], [10.0, 10.0], [10.0, 0.0]])
    scatter(points, ["a", "b", "a"], tmp_path / "x.png", title="t", axes=("p", "q"))
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    inside = pixels[26:503, 26:503].reshape(-1, 3)
    blue, orange = ((inside == colour).all(1).sum() for colour in ((86, 180, 233), (230, 159, 0)))
    assert blue == pytest.approx(2 * orange, rel=0.05)
    # The second number points up.
    there = np.argwhere((pixels[:505, :505] == (230, 159, 0)).all(2)).mean(0)
    assert there[0] < 100
    assert there[1] > 400
    scatter(np.zeros((1, 2)), [""], tmp_path / "y.png", title="t", axes=("p", "q"))


# -- interpolate -----------------------------------------------------------------------------------------


def test_the_ends_are_reconstructions_on_the_source_s_grid_in_its_unit(heads, ill_head, heads_bundle, tmp_path):
    first, bundle = sorted(heads.iterdir())[0], Bundle.load(heads_bundle)
    done = medgen.interpolate(first, ill_head, heads_bundle, tmp_path / "out", steps=3)
    assert (done.format, done.way, done.written) == ("nifti", "linear", 3)
    table = rows(tmp_path / "out" / "steps.csv")
    assert [float(row["t"]) for row in table] == [0.0, 0.5, 1.0]
    scans = [io.read(tmp_path / "out" / row["path"]) for row in table]
    source = io.read(first)
    for scan in scans:
        assert scan.grid.close(source.grid)
        assert scan.voxels.dtype == source.voxels.dtype
        assert scan.header.synthetic
    window = bundle.recipe.grid(source)
    expected = rebuilt(bundle, first)
    ours = scans[0].onto(window, outside=0).physical()
    inside = scans[0].with_voxels(np.ones_like(scans[0].voxels)).onto(window, outside=0).voxels > 0
    assert np.allclose(ours[inside], expected[inside], atol=0.51)
    # The other end means what the other scan's numbers mean, on the first one's grid.
    assert np.allclose(
        scans[2].onto(window, outside=0).physical()[inside], rebuilt(bundle, ill_head)[inside], atol=0.51
    )
    # nibabel agrees on where it is.
    theirs = nibabel.load(tmp_path / "out" / table[0]["path"])
    assert np.allclose(theirs.affine, nibabel.load(first).affine, atol=1e-4)
    assert (tmp_path / "out" / "contact_sheet.png").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["content"] == "derived"


def test_on_a_finer_grid_the_scan_is_whole(heads, ill_head, heads_bundle, tmp_path):
    medgen.interpolate(ill_head, sorted(heads.iterdir())[1], heads_bundle, tmp_path / "out", steps=2)
    source = io.read(ill_head)
    for row in rows(tmp_path / "out" / "steps.csv"):
        scan = io.read(tmp_path / "out" / row["path"])
        assert scan.grid.close(source.grid)
        assert scan.physical().max() <= 1.3 * source.physical().max()
        assert np.isfinite(scan.physical()).all()


def test_pictures_become_pictures_and_items_of_an_npz_items(xrays, xray_bundle, tmp_path):
    a, b = sorted((xrays / "normal").iterdir())[0], sorted((xrays / "opacity").iterdir())[0]
    assert medgen.interpolate(a, b, xray_bundle, tmp_path / "png", steps=4).format == "png"
    table = rows(tmp_path / "png" / "steps.csv")
    with Image.open(tmp_path / "png" / table[0]["path"]) as picture:
        assert picture.size == (16, 16)
        ours = np.asarray(picture)
    expected = rebuilt(Bundle.load(xray_bundle), a)[0, :, :, 0].T
    assert np.abs(ours - expected).max() <= 0.51
    arrays = np.stack([np.asarray(Image.open(one)) for one in (a, b)])
    write_npz(tmp_path / "two.npz", {"train": arrays}, {"train": np.asarray([0, 1])})
    ends = [f"{tmp_path / 'two.npz'}#train/{n}" for n in range(2)]
    assert medgen.interpolate(*ends, xray_bundle, tmp_path / "npz", steps=4).format == "npz"
    held = np.load(tmp_path / "npz" / "scans.npz")["train_images"]
    assert held.shape == (4, 16, 16)
    assert np.array_equal(held[0], ours)
    assert [row["path"] for row in rows(tmp_path / "npz" / "steps.csv")] == [f"scans.npz#train/{n}" for n in range(4)]


def test_a_great_circle_keeps_the_length_and_meets_its_ends():
    torch.manual_seed(0)
    a, b = torch.randn(1, 400), torch.randn(1, 400)
    assert torch.equal(between(a, b, 0.0, "spherical"), a)
    assert torch.equal(between(a, b, 1.0, "spherical"), b)
    for t in (0.25, 0.5, 0.9):
        lengths = [float(between(a, b, t, way).norm()) for way in ("spherical", "linear")]
        assert lengths[0] == pytest.approx((1 - t) * float(a.norm()) + t * float(b.norm()), rel=0.02)
        assert torch.allclose(between(a, b, t, "linear"), a + t * (b - a), atol=1e-6)
    assert float(between(a, b, 0.5, "linear").norm()) < 0.8 * float(a.norm())
    # Codes that point the same way, or exactly away from each other, have no one circle.
    for other in (2 * a, -a):
        assert bool(torch.isfinite(between(a, other, 0.3, "spherical")).all())
    quarter = between(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5, "spherical")
    assert torch.allclose(quarter, torch.full((1, 2), 0.5**0.5))


def test_noise_codes_are_joined_by_a_great_circle(xrays, flow_bundle, tmp_path):
    a, b = sorted((xrays / "normal").iterdir())[:2]
    done = medgen.interpolate(a, b, flow_bundle, tmp_path / "out", steps=3)
    assert done.way == "spherical"
    # A bijection's reconstruction is the scan, as the recipe prepared it.
    table = rows(tmp_path / "out" / "steps.csv")
    ours = io.read(tmp_path / "out" / table[0]["path"]).physical()
    ready = taken_in(Bundle.load(flow_bundle), str(a), io.ReadOptions()).ready.physical()
    assert np.abs(ours - ready).max() <= 1.01
    with pytest.raises(CapabilityError, match="noise of one number a voxel"):
        medgen.traverse(flow_bundle, tmp_path / "t")


def test_what_cannot_be_interpolated_is_refused(xrays, xray_bundle, tmp_path):
    a, b = sorted((xrays / "normal").iterdir())[:2]
    with pytest.raises(ConfigError, match="2 or more"):
        medgen.interpolate(a, b, xray_bundle, tmp_path / "out", steps=1)
    with pytest.raises(DataError, match=r"expected one scan, found 24.*Name one"):
        medgen.interpolate(xrays / "normal", b, xray_bundle, tmp_path / "out")
    denoiser = {"kind": "autoencoder", "skips": True, "noise": 0.2, "width": 4, "levels": 1}
    place = like(xray_bundle, tmp_path / "denoiser", denoiser)
    for call in (
        lambda: medgen.embed(a, place, tmp_path / "out"),
        lambda: medgen.interpolate(a, b, place, tmp_path / "out"),
        lambda: medgen.traverse(place, tmp_path / "out"),
    ):
        with pytest.raises(CapabilityError, match=r"does not encode.*Models that do: .*vae"):
            call()
    masked = like(xray_bundle, tmp_path / "masked", {"kind": "flow", "width": 4, "levels": 1, "steps": 1, "context": 1})
    with pytest.raises(CapabilityError, match="given an image"):
        medgen.embed(a, masked, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError):
        medgen.traverse(xray_bundle, tmp_path / "out", force=True)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", [k for k in FAMILIES if {"encodes", "decodes"} <= defaults_can(k)])
def test_between_two_classes_every_family_has_a_way(kind, xrays, xray_bundle):
    given = Bundle.load(xray_bundle)
    small = {"width": 8, "latent": 4, "depth": 1, "levels": 1}
    fields = {name: value for name, value in small.items() if name in family(kind).Config.model_fields}
    torch.manual_seed(0)
    model = build(config_of({"kind": kind, "shape": (16, 16), "classes": ("normal", "opacity"), **fields}))
    manifest = index(xrays)
    chosen = [manifest.where(label=label).rows[n] for n in range(4) for label in ("normal", "opacity")]
    scans = [taken_in(given, manifest.locate(row.path), io.ReadOptions()) for row in chosen]
    batch = Batch(torch.cat([scan.x for scan in scans]), torch.tensor([0, 1] * 4))
    model.initialise(batch)
    model.finalise([batch])
    coder = Coder(Bundle({"model": model.eval()}, given.recipe, given.contract), ("encodes", "decodes"), "test", "cpu")
    ends = [coder.code(scan.x, torch.tensor([n])) for n, scan in enumerate(scans[:2])]
    if "reconstructs" in model.abilities(model.config):
        for n, end in enumerate(ends):
            twin = model.reconstruct(scans[n].x, torch.tensor([n]))[0].clamp(0, 1)
            assert torch.allclose(coder.decode(end), twin.detach(), atol=1e-4)
    middle = Code(between(ends[0].z, ends[1].z, 0.5, "linear"), conditions_between(coder, *ends, 0.5))
    assert middle.cond is not None
    assert torch.allclose(middle.cond, torch.tensor([[0.5, 0.5]]))
    assert bool(torch.isfinite(coder.decode(middle)).all())
    # Which class an unlabelled scan is told is one of the two, and always the same.
    told = [coder.encode(scans[0], chosen[0]).cond for _ in range(2)]
    assert told[0] is not None
    assert torch.equal(*told)


# -- traverse --------------------------------------------------------------------------------------------


def test_each_row_moves_one_number_of_the_code_by_so_many_spreads(xray_bundle, tmp_path):
    done = medgen.traverse(xray_bundle, tmp_path / "out", dimensions=2, steps=3, reach=2.0)
    assert (done.written, done.format) == (6, "png")
    table = rows(tmp_path / "out" / "steps.csv")
    assert [float(row["t"]) for row in table] == [-2.0, 0.0, 2.0] * 2
    assert [row["direction"] for row in table[::3]] == list(done.way)
    assert float(table[0]["spread"]) >= float(table[3]["spread"]) > 0
    scans = [io.read(tmp_path / "out" / row["path"]).physical() for row in table]
    # The middle of every row is the same scan; the ends are not.
    assert np.array_equal(scans[1], scans[4])
    assert not np.array_equal(scans[0], scans[2])
    # The same command writes the same scans.
    medgen.traverse(xray_bundle, tmp_path / "again", dimensions=2, steps=3, reach=2.0)
    first, again = (files(tmp_path / name) for name in ("out", "again"))
    assert {k: v for k, v in first.items() if k != "run.json"} == {k: v for k, v in again.items() if k != "run.json"}


def test_the_direction_that_codes_spread_along_is_found(xray_bundle, tmp_path):
    given = Bundle.load(xray_bundle)
    fields = {"kind": "autoencoder", "shape": (16, 16), "latent": 4, "width": 4, "levels": 0}
    model = build(config_of(fields)).eval()
    with torch.no_grad():
        model.prior.factors.copy_(torch.diag_embed(torch.tensor([0.1, 5.0, 1.0, 0.0])).expand_as(model.prior.factors))
        # Codes are the brightness of four corners.
        model.linear_in.weight.zero_()
        model.linear_out.weight.zero_()
        for n, voxel in enumerate((0, 15, 240, 255)):
            model.linear_in.weight[n, voxel] = 20.0
            model.linear_out.weight[voxel, n] = 0.05
        for bias in (model.linear_in.bias, model.linear_out.bias):
            bias.zero_()
        model.template.fill_(0.5)
    (tmp_path / "b").mkdir()
    Bundle({"model": model}, given.recipe, given.contract).save(tmp_path / "b")
    done = medgen.traverse(tmp_path / "b", tmp_path / "out", dimensions=4, steps=2)
    assert done.way[:2] == ("z2", "z3")
    assert "z4" in done.notes[0]
    moved = [
        io.read(tmp_path / "out" / row["path"]).physical()[0, :, :, 0] for row in rows(tmp_path / "out" / "steps.csv")
    ]
    changed = np.argwhere(np.abs(moved[1] - moved[0]) > 2)
    assert changed.shape == (1, 2)


def test_it_starts_from_a_scan_on_its_grid_or_from_the_mean_of_several(heads, map_bundle, heads_bundle, tmp_path):
    first = sorted(heads.iterdir())[0]
    done = medgen.traverse(map_bundle, tmp_path / "one", scans=first, dimensions=2, steps=3)
    assert done.way == ("component 1", "component 2")
    source = io.read(first)
    table = rows(tmp_path / "one" / "steps.csv")
    middle = io.read(tmp_path / "one" / table[1]["path"])
    assert middle.grid.close(source.grid)
    assert middle.voxels.dtype == source.voxels.dtype
    several = tmp_path / "several"
    several.mkdir()
    for path in sorted(heads.iterdir())[:4]:
        shutil.copy(path, several)
    (several / "sub-999_T1w.nii.gz").write_bytes(b"damaged")
    medgen.traverse(heads_bundle, tmp_path / "mean", scans=several, dimensions=1, steps=3)
    scan = io.read(tmp_path / "mean" / rows(tmp_path / "mean" / "steps.csv")[1]["path"])
    assert scan.grid.shape == Bundle.load(heads_bundle).recipe.shape
    assert (tmp_path / "mean" / "traversal.png").exists()


# -- the command line ------------------------------------------------------------------------------------


def test_the_commands_say_what_they_wrote(command, xrays, xray_bundle, tmp_path):
    a, b = sorted((xrays / "normal").iterdir())[:2]
    folder = tmp_path / "in"
    shutil.copytree(xrays / "opacity", folder)
    code, out, _ = command("embed", folder, "-m", xray_bundle, "-o", tmp_path / "e", "-q")
    assert code == 0
    assert "codes.csv" in out
    (folder / "bad.png").write_bytes(b"\x89PNG nonsense")
    code, out, _ = command("embed", folder, "-m", xray_bundle, "-o", tmp_path / "e2", "--json", "-q")
    assert code == 3
    told = json.loads(out)
    assert told["failed"] == 1
    assert len(told["scans"]) == 13
    code, out, _ = command("interpolate", a, b, "-m", xray_bundle, "-o", tmp_path / "i", "--steps", "3", "-q")
    assert code == 0
    assert "3 scans" in out
    code, out, _ = command("traverse", "-m", xray_bundle, "-o", tmp_path / "t", "--dimensions", "1", "--json", "-q")
    assert code == 0
    assert json.loads(out)["written"] == 7
    code, _, err = command("traverse", "-m", xray_bundle, "-o", tmp_path / "t")
    assert code == 3
    assert "--force" in err


def test_a_dry_run_writes_nothing(command, xrays, xray_bundle, tmp_path):
    a, b = sorted((xrays / "normal").iterdir())[:2]
    for arguments in (("embed", a), ("interpolate", a, b), ("traverse",), ("traverse", "--scan", a)):
        code, out, _ = command(*arguments, "-m", xray_bundle, "-o", tmp_path / "out", "--dry-run")
        assert code == 0
        assert "Would" in out
        code, out, _ = command(*arguments, "-m", xray_bundle, "-o", tmp_path / "out", "--dry-run", "--json")
        assert json.loads(out)
    assert not list(tmp_path.iterdir())


# -- privacy ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nobody_is_named_and_derived_scans_say_what_they_are(tmp_path):
    from test_privacy_canary import disguised, traces

    for label in ("normal", "opacity"):
        for n, path in enumerate(sorted((SAMPLES / "xray" / label).iterdir())[:8]):
            number = n + (100 if label == "opacity" else 0)
            disguised(path, tmp_path / "in" / label / f"CANARY{number:03d}.dcm", number)
    out = tmp_path / "out"
    bundle = medgen.train(tmp_path / "in", out / "b", minutes=None, overrides=(*QUICK_2D, "fit.images=32"))
    a, b = (tmp_path / "in" / "normal" / "CANARY000.dcm", tmp_path / "in" / "opacity" / "CANARY100.dcm")
    medgen.embed(tmp_path / "in", bundle, out / "e")
    medgen.interpolate(a, b, bundle, out / "i", steps=3)
    medgen.traverse(bundle, out / "t", scans=a, dimensions=1, steps=2)
    medgen.traverse(bundle, out / "t2", scans=tmp_path / "in", dimensions=1, steps=2)
    assert traces(out) == []
    made = [pydicom.dcmread(path) for path in sorted((out / "i").rglob("*.dcm"))]
    assert len(made) == 3
    for ds in made:
        assert "DERIVED" in ds.ImageType
        assert ds.SyntheticData == "YES"
        assert "two patients" in ds.DerivationDescription
        assert "SourceImageSequence" not in ds
    assert len({ds.StudyInstanceUID for ds in made}) == 3
    # Text burned into the pixels may come through a network.
    disguised(sorted((SAMPLES / "xray" / "normal").iterdir())[0], tmp_path / "burned.dcm", 7, BurnedInAnnotation="YES")
    with pytest.raises(PrivacyError, match="burned into"):
        medgen.interpolate(a, tmp_path / "burned.dcm", bundle, out / "no")
    assert not list(out.glob("no*"))
