"""Train, augment, score and convert as functions: every number on its millimetre, every interruption survived."""

import csv
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from worlds import QUICK_2D, QUICK_3D, SAMPLES

import medgen
import medgen.tasks.anomaly
import medgen.tasks.augment
import medgen.tasks.convert
from medgen import io
from medgen.bundle import Bundle
from medgen.data.manifest import Manifest, index
from medgen.errors import BundleError, ConfigError, DataError, OutputError, PrivacyError
from medgen.grid import Grid
from medgen.io.raster import write_npz
from medgen.io.source import ReadOptions
from medgen.log import reporting
from medgen.models.vae import VAE
from medgen.scan import Scale
from medgen.tasks.calibration import mask_threshold
from medgen.tasks.detector import Detector
from medgen.tasks.outputs.files import Output


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


def some(folder: Path, into: Path, names: list[str] | int) -> Path:
    """Copies of the first so many files of a folder, or of those named."""
    into.mkdir(parents=True, exist_ok=True)
    chosen = sorted(folder.iterdir())[:names] if isinstance(names, int) else [folder / name for name in names]
    for path in chosen:
        shutil.copy(path, into)
    return into


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- train ---------------------------------------------------------------------------------------------


def test_training_leaves_a_bundle_and_nothing_else(heads, heads_bundle):
    assert not list(heads_bundle.parent.glob("*.part"))
    assert set(files(heads_bundle)) == {
        "README.md", "bundle.json", "calibration.safetensors", "preview.png", "run.json", "weights.safetensors"
    }  # fmt: skip
    bundle = Bundle.load(heads_bundle)
    manifest = index(heads)
    assert bundle.training["scans"] == len(manifest.split("train"))
    assert (
        bundle.training["manifest_sha256"] == manifest.split("train").hash()
        or bundle.training["manifest_sha256"] == manifest.hash()
    )
    assert bundle.calibration["scans"] == len(manifest.split("calibration")) >= 19
    assert bundle.metrics["held_out_psnr_db"] > 10
    assert np.isfinite(bundle.metrics["held_out_bits_per_dim_bound"])
    assert bundle.contract.modality in ("", "MR")
    with Image.open(heads_bundle / "preview.png") as preview:
        assert preview.size[0] > 100


def test_the_same_command_trains_the_same_weights(heads, heads_bundle, tmp_path):
    again = medgen.train(heads, tmp_path / "again", minutes=None, overrides=QUICK_3D)
    assert Bundle.load(again).weights_sha256 == Bundle.load(heads_bundle).weights_sha256
    other = medgen.train(heads, tmp_path / "other", minutes=None, overrides=QUICK_3D, seed=1)
    assert Bundle.load(other).weights_sha256 != Bundle.load(heads_bundle).weights_sha256


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_scans_makes_a_bundle_that_works(heads, tmp_path, count):
    few = some(heads, tmp_path / "few", count)
    bundle = medgen.train(few, tmp_path / "bundle", minutes=None, overrides=(*QUICK_3D, "fit.images=16"))
    notes = Notes()
    with reporting(notes):
        scores = medgen.score(few, bundle, tmp_path / "scores")
    assert len(scores.scans) == count
    assert all(np.isfinite(scan.score) and scan.p is None and scan.flagged is None for scan in scores.scans)
    assert any("no p-value" in said for said in notes.said)
    assert not list((tmp_path / "scores").rglob("*mask*"))
    # With a single patient to learn from, all that is drawn shows that patient.
    with pytest.raises(PrivacyError, match="1 patient to learn from"):
        medgen.augment(few, tmp_path / "made", bundle=bundle, n=2)
    assert not list(tmp_path.glob("made*"))


def test_a_bundle_draws_only_beside_the_scans_it_learned_from(heads, heads_bundle, tmp_path):
    """Elsewhere nobody could tell whether what it draws copies one of its patients."""
    others = some(heads, tmp_path / "others", 8)
    with pytest.raises(PrivacyError, match="did not learn from these scans"):
        medgen.augment(others, tmp_path / "out", bundle=heads_bundle, n=1)
    with pytest.raises(DataError, match="did not learn from this folder"):
        medgen.evaluate(others, heads_bundle)
    assert medgen.evaluate(others, heads_bundle, split="all")["scans"] == 8
    assert not list(tmp_path.glob("out*"))


def test_one_class_may_be_learned_alone(xrays, tmp_path):
    folder = medgen.train(xrays, tmp_path / "b", label="normal", minutes=None, overrides=(*QUICK_2D, "fit.images=32"))
    bundle = Bundle.load(folder)
    assert bundle.model.config.classes == ()
    assert bundle.training["scans"] == len(index(xrays).where(label="normal", split="train"))
    with pytest.raises(DataError, match=r"no class 'odd'.*normal, opacity"):
        medgen.train(xrays, tmp_path / "c", label="odd")


def test_a_preset_for_the_wrong_dimensions_is_refused(xrays, tmp_path):
    with pytest.raises(ConfigError, match=r"vae3d.*3D.*images"):
        medgen.train(xrays, tmp_path / "b", preset="vae3d")
    assert not list(tmp_path.iterdir())


def test_a_written_out_recipe_is_the_one_in_the_bundle(heads, tmp_path):
    preset = tmp_path / "mine.yaml"
    text = (Path(medgen.__file__).parent.parent / "configs" / "vae3d.yaml").read_text()
    text = text.replace("recipe: auto", "recipe: {steps: [{do: crop_or_pad, shape: [8, 8, 8]}, {do: percentiles}]}")
    preset.write_text(text)
    few = some(heads, tmp_path / "few", 8)
    overrides = (*QUICK_3D, "fit.images=16", "model.levels=0", "model.fold=2")
    bundle = Bundle.load(medgen.train(few, tmp_path / "b", preset=preset, minutes=None, overrides=overrides))
    assert bundle.recipe.shape == (8, 8, 8)
    assert bundle.model.config.shape == (8, 8, 8)


def test_minutes_bound_the_images_of_a_run(heads, tmp_path):
    few = some(heads, tmp_path / "few", 6)
    overrides = [*QUICK_3D, "fit.images=100000000"]
    bundle = Bundle.load(medgen.train(few, tmp_path / "b", minutes=0.01, overrides=overrides))
    assert 8 <= bundle.training["images_seen"] < 100_000


def test_an_unfinished_run_of_other_settings_and_a_stranger_s_folder_are_left_alone(heads, tmp_path):
    few = some(heads, tmp_path / "few", 4)
    stranger = tmp_path / "b.part"
    stranger.mkdir()
    (stranger / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="no unfinished run of medgen"):
        medgen.train(few, tmp_path / "b", minutes=None, overrides=QUICK_3D)
    assert (stranger / "precious.txt").read_text() == "mine"


def test_force_replaces_outputs_of_medgen_only(heads, tmp_path):
    few = some(heads, tmp_path / "few", 4)
    out = tmp_path / "b"
    overrides = (*QUICK_3D, "fit.images=8")
    medgen.train(few, out, minutes=None, overrides=overrides)
    with pytest.raises(OutputError, match="exists already"):
        medgen.train(few, out, minutes=None, overrides=overrides)
    medgen.train(few, out, minutes=None, overrides=overrides, force=True)
    for name in ("home", "file"):
        place = tmp_path / name
        if name == "home":
            place.mkdir()
            (place / "precious.txt").write_text("mine")
        else:
            place.write_text("mine")
        with pytest.raises(OutputError, match="not made by medgen"):
            medgen.train(few, place, minutes=None, overrides=overrides, force=True)
        assert "mine" in (place / "precious.txt" if name == "home" else place).read_text()


# -- score ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(heads, ill_head, heads_bundle, tmp_path_factory) -> tuple[Path, Path, medgen.tasks.anomaly.Scores]:
    """Three heads of the world, an ill one on a finer grid, and a corrupt file, scored."""
    place = tmp_path_factory.mktemp("scored")
    folder = some(heads, place / "scans", ["sub-001_T1w.nii.gz", "sub-002_T1w.nii.gz", "sub-003_T1w.nii.gz"])
    shutil.copy(ill_head, folder)
    (folder / "sub-900_T1w.nii.gz").write_bytes((folder / "sub-001_T1w.nii.gz").read_bytes()[:500])
    return folder, place / "out", medgen.score(folder, heads_bundle, place / "out", rate=0.1)


def test_one_corrupt_scan_among_many_is_named_and_the_others_scored(scored):
    _, out, scores = scored
    assert len(scores.scans) == 5
    assert scores.failed == 1
    bad = scores.scans[-1]
    assert "900" in bad.case
    assert bad.error
    assert bad.score is None
    assert all(scan.score is not None and not scan.error for scan in scores.scans[:-1])
    assert json.loads((out / "run.json").read_text())["failed"] == 1


def test_the_table_is_sorted_with_the_most_suspicious_first(scored):
    _, out, scores = scored
    table = rows(out / "scores.csv")
    assert [row["case"] for row in table] == [scan.case for scan in scores.scans]
    ps = [float(row["p"]) for row in table if row["p"]]
    assert len(ps) == 4
    assert ps == sorted(ps)
    assert "101" in table[0]["case"]
    stated = json.loads((out / "scores.json").read_text())
    assert [scan["case"] for scan in stated["scans"]] == [row["case"] for row in table]
    assert stated["rate"] == 0.1
    assert "not a medical device" in stated["research_use_only"]


def test_p_values_and_flags_follow_from_the_calibration(scored, heads_bundle):
    _, _, scores = scored
    known = Bundle.load(heads_bundle).calibration["scores"]
    for scan in scores.scans[:-1]:
        assert 1 / (len(known) + 1) <= scan.p <= 1
        assert scan.flagged == (scan.p <= 0.1)
    assert scores.scans[0].flagged


@pytest.mark.parametrize("case", ["sub-001", "sub-101"])
def test_map_and_mask_lie_on_the_source_s_grid_exactly(scored, heads_bundle, case):
    folder, out, scores = scored
    source = nibabel.load(folder / f"{case}_T1w.nii.gz")
    (name,) = [scan.case for scan in scores.scans if case in scan.case]
    z_map = nibabel.load(out / "maps" / f"{name}_map.nii.gz")
    mask = nibabel.load(out / "maps" / f"{name}_mask.nii.gz")
    for image in (z_map, mask):
        assert image.shape == source.shape
        assert np.allclose(image.affine, source.affine, atol=1e-4)
    z = np.asarray(z_map.dataobj)
    marked = np.asarray(mask.dataobj)
    assert set(np.unique(marked)) <= {0, 1}
    bundle = Bundle.load(heads_bundle)
    threshold = mask_threshold(np.asarray(bundle.calibration["maxima"]), 0.1)
    assert np.array_equal(marked > 0, np.nan_to_num(z, nan=-np.inf) > threshold)
    (scan,) = [scan for scan in scores.scans if scan.case == name]
    assert scan.mask_mm3 == pytest.approx(marked.sum() * abs(np.linalg.det(source.affine[:3, :3])), rel=1e-4)
    assert np.nanmax(z) <= scan.z_max + 1e-3


def test_what_was_not_scored_is_nan_and_what_was_is_not(scored, heads_bundle):
    folder, out, scores = scored
    source = io.read(folder / "sub-101_T1w.nii.gz")
    (name,) = [scan.case for scan in scores.scans if "101" in scan.case]
    z = np.asarray(nibabel.load(out / "maps" / f"{name}_map.nii.gz").dataobj)
    window = Bundle.load(heads_bundle).recipe.grid(source)
    centres = source.grid.world(np.stack(np.meshgrid(*[np.arange(n) for n in source.grid.shape], indexing="ij"), -1))
    at = window.index(centres)
    well_inside = ((at >= 0) & (at <= np.asarray(window.shape) - 1)).all(-1)
    well_outside = ((at < -1) | (at > np.asarray(window.shape))).any(-1)
    assert well_outside.any()
    assert np.isfinite(z[well_inside]).all()
    assert np.isnan(z[well_outside]).all()


def test_a_map_in_the_file_is_the_model_s_map_of_the_prepared_scan(scored, heads, heads_bundle):
    """The world's own heads have the model's lattice, so the map is a copy: no interpolation can hide an error."""
    folder, out, scores = scored
    bundle = Bundle.load(heads_bundle)
    prepared = bundle.recipe(io.read(folder / "sub-002_T1w.nii.gz"))
    score, z = Detector.of(bundle)(torch.tensor(prepared.voxels)[None])
    (scan,) = [scan for scan in scores.scans if "002" in scan.case]
    assert scan.score == pytest.approx(score, rel=1e-5)
    written = io.read(out / "maps" / f"{scan.case}_map.nii.gz", io.ReadOptions(on_nan="zero"))
    back = written.onto(prepared.grid, outside=0)
    assert np.allclose(back.physical()[0], z, atol=1e-4)


def test_every_scored_scan_has_a_picture(scored):
    _, out, scores = scored
    for scan in scores.scans[:-1]:
        with Image.open(out / "pictures" / f"{scan.case}.png") as picture:
            assert picture.size[0] > 100
    assert len(list((out / "pictures").iterdir())) == 4


def test_a_score_does_not_depend_on_the_company(scored, heads, heads_bundle, tmp_path):
    _, _, scores = scored
    alone = medgen.score(heads / "sub-002_T1w.nii.gz", heads_bundle, tmp_path / "alone", rate=0.1)
    (together,) = [scan for scan in scores.scans if "002" in scan.case]
    assert (alone.scans[0].score, alone.scans[0].p) == (together.score, together.p)
    again = medgen.score(heads / "sub-002_T1w.nii.gz", heads_bundle, tmp_path / "again", rate=0.1)
    maps = [files(tmp_path / name)[f"maps/{alone.scans[0].case}_map.nii.gz"] for name in ("alone", "again")]
    assert maps[0] == maps[1]
    assert again.scans[0] == alone.scans[0]


def test_numbers_without_maps(heads, heads_bundle, tmp_path):
    medgen.score(heads / "sub-002_T1w.nii.gz", heads_bundle, tmp_path / "out", maps=False)
    assert set(files(tmp_path / "out")) == {"scores.csv", "scores.json", "run.json"}


def test_with_five_normals_there_is_a_sentence_and_no_mask(heads, tmp_path):
    few = some(heads, tmp_path / "few", 17)
    folder = medgen.train(few, tmp_path / "b", minutes=None, overrides=(*QUICK_3D, "fit.images=16"))
    count = Bundle.load(folder).calibration["scans"]
    assert 3 <= count < 19
    notes = Notes()
    with reporting(notes):
        scores = medgen.score(heads / "sub-050_T1w.nii.gz", folder, tmp_path / "out", rate=0.05)
    assert any(f"needs 19 held-out healthy scans; the bundle has {count}" in said for said in notes.said)
    assert scores.scans[0].flagged is None
    assert scores.scans[0].mask_mm3 is None
    assert scores.scans[0].p >= 1 / (count + 1)
    assert [path for path in files(tmp_path / "out") if "map" in path]
    assert not [path for path in files(tmp_path / "out") if "mask" in path]
    # As many as it has are enough for a rate they can promise.
    wide = medgen.score(heads / "sub-050_T1w.nii.gz", folder, tmp_path / "wide", rate=0.4)
    assert wide.scans[0].flagged is not None


def test_images_are_scored_by_class_and_without(xrays, xray_bundle, tmp_path):
    scores = medgen.score(xrays, xray_bundle, tmp_path / "classes")
    assert len(scores.scans) == 36
    assert scores.failed == 0
    flat = some(xrays / "normal", tmp_path / "flat", 3)
    assert medgen.score(flat, xray_bundle, tmp_path / "plain").failed == 0


def test_an_image_s_map_has_the_image_s_pixels(xrays, xray_bundle, tmp_path):
    scores = medgen.score(xrays / "normal" / "001.png", xray_bundle, tmp_path / "out")
    z = io.read(tmp_path / "out" / "maps" / f"{scores.scans[0].case}_map.nii.gz", io.ReadOptions(on_nan="zero"))
    assert z.grid.close(io.read(xrays / "normal" / "001.png").grid)


def test_items_of_an_npz_are_scored_by_their_names(xrays, xray_bundle, tmp_path):
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted((xrays / "normal").iterdir())[:3]])
    write_npz(tmp_path / "few.npz", {"test": pictures}, {"test": np.zeros(3, np.uint8)})
    scores = medgen.score(tmp_path / "few.npz", xray_bundle, tmp_path / "out")
    assert scores.failed == 0
    assert len({scan.case for scan in scores.scans}) == 3
    assert len(list((tmp_path / "out" / "maps").glob("*_map.nii.gz"))) == 3


def test_names_that_look_alike_as_files_keep_their_own_maps(heads, heads_bundle, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, source in (("a b", "sub-001"), ("a_b", "sub-002"), ("a+b", "sub-003")):
        shutil.copy(heads / f"{source}_T1w.nii.gz", folder / f"{name}.nii.gz")
    scores = medgen.score(folder, heads_bundle, tmp_path / "out")
    assert len(scores.scans) == 3
    assert len(list((tmp_path / "out" / "maps").glob("*_map.nii.gz"))) == 3
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 3


def test_scans_of_another_kind_or_place_are_refused_one_by_one(heads, heads_bundle, tmp_path):
    folder = some(heads, tmp_path / "scans", 2)
    scan = io.read(heads / "sub-001_T1w.nii.gz")
    negative = scan.with_voxels(scan.voxels.astype(np.int16) - 1000)
    io.write(negative, folder / "sub-800_ct.nii.gz")
    far = scan.grid.affine.copy()
    far[:3, 3] += 500
    io.write(
        type(scan)(scan.voxels, Grid(scan.grid.shape, far), scan.scale, scan.header), folder / "sub-801_far.nii.gz"
    )
    io.write(scan.with_voxels(np.full_like(scan.voxels, 7)), folder / "sub-802_flat.nii.gz")
    scores = medgen.score(folder, heads_bundle, tmp_path / "out")
    errors = {scan.case[:7]: scan.error for scan in scores.scans}
    assert scores.failed == 3
    assert "goes down to -9" in errors["sub-800"]
    assert "field of view" in errors["sub-801"]
    assert "constant" in errors["sub-802"] or "span" in errors["sub-802"]


def test_only_unreadable_scans_are_an_error_and_leave_no_output(heads, heads_bundle, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "a.nii.gz").write_bytes(next(heads.iterdir()).read_bytes()[:300])
    with pytest.raises(DataError, match="None of the 1"):
        medgen.score(folder, heads_bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scoring_goes_on_where_it_was_interrupted(heads, heads_bundle, tmp_path, monkeypatch):
    from medgen.tasks import anomaly

    folder = some(heads, tmp_path / "scans", 5)
    medgen.score(folder, heads_bundle, tmp_path / "whole")
    original, seen = anomaly._Run.score, []

    def interrupted(self, path, case):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(case)
        return original(self, path, case)

    monkeypatch.setattr(anomaly._Run, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        medgen.score(folder, heads_bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.part").rglob("*.nii.gz")}
    assert stamps
    monkeypatch.setattr(anomaly._Run, "score", original)
    medgen.score(folder, heads_bundle, tmp_path / "out")
    assert not (tmp_path / "out.part").exists()
    for path, stamp in stamps.items():
        assert (tmp_path / "out" / path.relative_to(tmp_path / "out.part")).stat().st_mtime_ns == stamp
    whole, out = files(tmp_path / "whole"), files(tmp_path / "out")
    assert set(whole) == set(out)
    assert whole["scores.csv"] == out["scores.csv"]


def test_scores_by_another_calibration_or_reading_are_not_mixed_with_those_found_before(
    heads, heads_bundle, tmp_path, monkeypatch
):
    from medgen.tasks import anomaly

    folder, out, bundle = some(heads, tmp_path / "scans", 2), tmp_path / "out", Bundle.load(heads_bundle)
    with monkeypatch.context() as patch:
        patch.setattr(anomaly._Run, "score", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            medgen.score(folder, bundle, out)
    recalibrated = replace(bundle, calibration={**bundle.calibration, "scores": [0.0, *bundle.calibration["scores"]]})
    moved = {name: 2 * tensor if name == "sd" else tensor for name, tensor in bundle.tensors.items()}
    for other in (recalibrated, replace(bundle, tensors=moved)):
        with pytest.raises(OutputError, match="other settings"):
            medgen.score(folder, other, out)
    with pytest.raises(OutputError, match="other settings"):
        medgen.score(folder, bundle, out, options=ReadOptions(on_nan="zero"))
    assert not medgen.score(folder, heads_bundle, out).failed


# -- augment -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(heads, heads_bundle, tmp_path_factory) -> tuple[Path, medgen.tasks.augment.Augmented]:
    """Five synthetic heads."""
    out = tmp_path_factory.mktemp("made") / "out"
    return out, medgen.augment(heads, out, bundle=heads_bundle, n=5)


def test_nifti_in_nifti_out_on_the_same_lattice_in_the_same_units(made, heads):
    out, done = made
    assert (done.written, done.format, done.folder) == ({"synthetic by sample": 5}, "nifti", out)
    found = io.find(out)
    assert len([source for source in found.sources if source.kind == "nifti"]) == 5
    original = io.read(heads / "sub-001_T1w.nii.gz")
    for path in sorted((out / "images").iterdir()):
        image = nibabel.load(path)
        assert image.get_data_dtype().kind in "iu"
        assert bytes(image.header["descrip"]).startswith(b"SYNTHETIC")
        scan = io.read(path)
        assert scan.header.synthetic
        assert np.allclose(scan.grid.direction, original.grid.direction)
        assert scan.grid.spacing == pytest.approx(original.grid.spacing)
        # On the originals' own lattice: whole voxels apart.
        offset = original.grid.index(scan.grid.origin)
        assert np.allclose(offset, np.round(offset), atol=1e-3)
        assert original.physical().min() - 20 <= scan.physical().min()
        assert scan.physical().max() <= 1.6 * original.physical().max()


def test_the_manifest_of_an_augmentation_can_be_learned_from(made):
    out, _ = made
    table = rows(out / "manifest.csv")
    assert [row["case"] for row in table] == [f"SYN-{n:04d}" for n in range(1, 6)]
    assert {row["split"] for row in table} == {"train"}
    assert {(row["origin"], row["how"], row["sources"]) for row in table} == {("synthetic", "sample", "")}
    assert all(float(row[name]) > 0 for row in table for name in ("r_voxel", "r_registered", "r_feature"))
    manifest = index(out / "manifest.csv")
    assert isinstance(manifest, Manifest)
    assert len(manifest.split("train")) == 5
    assert all(Path(manifest.locate(row.path)).is_file() for row in manifest.rows)


def test_an_augmentation_says_what_it_is_and_what_was_tested(made):
    out, done = made
    told = json.loads((out / "run.json").read_text())
    assert told["command"] == "augment"
    assert told["privacy"]["copies"]["held_out"] > 10
    assert told["privacy"] == json.loads((out / "privacy.json").read_text())
    assert told["written"] == done.written
    assert told["rejected"] == done.rejected
    assert len(told["weights_sha256"]) == 64
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size[0] > 100
    assert not (out / "journal.json").exists()


def test_the_same_seed_writes_the_same_bytes_and_another_nothing_in_common(made, heads, heads_bundle, tmp_path):
    out, _ = made
    medgen.augment(heads, tmp_path / "again", bundle=heads_bundle, n=3)
    medgen.augment(heads, tmp_path / "other", bundle=heads_bundle, n=5, seed=1)
    first = {path.name: path.read_bytes() for path in (out / "images").iterdir()}
    for path in (tmp_path / "again" / "images").iterdir():
        assert path.read_bytes() == first[path.name]
    scans = [io.read(path).voxels.tobytes() for path in (out / "images").iterdir()]
    scans += [io.read(path).voxels.tobytes() for path in (tmp_path / "other" / "images").iterdir()]
    assert len(set(scans)) == 10


def test_png_classes_in_png_classes_out(xrays, xray_bundle, tmp_path):
    done = medgen.augment(xrays, tmp_path / "out", bundle=xray_bundle, per_class=3)
    assert (sum(done.written.values()), done.format) == (6, "png")
    for label in ("normal", "opacity"):
        pictures = sorted((tmp_path / "out" / label).glob("*.png"))
        assert len(pictures) == 3
        for path in pictures:
            with Image.open(path) as picture:
                assert picture.size == (16, 16)
                assert picture.mode == "L"
    manifest = index(tmp_path / "out" / "manifest.csv")
    assert manifest.labels == ("normal", "opacity")


def test_classes_are_filled_in_turn_when_only_a_total_is_asked_for(xrays, xray_bundle, tmp_path):
    medgen.augment(xrays, tmp_path / "out", bundle=xray_bundle, n=5)
    labels = [row["label"] for row in rows(tmp_path / "out" / "manifest.csv")]
    assert labels == ["normal", "opacity", "normal", "opacity", "normal"]


@pytest.fixture(scope="module")
def dicom_out(tmp_path_factory) -> Path:
    """Radiographs of two classes as DICOM, learned and augmented in one command."""
    out = tmp_path_factory.mktemp("dicom") / "out"
    medgen.augment(SAMPLES / "xray", out, per_class=2, minutes=None, overrides=(*QUICK_2D, "fit.images=64"))
    return out


def test_dicom_classes_in_dicom_classes_out(dicom_out):
    found = io.find(dicom_out)
    series = [source for source in found.sources if source.kind == "dicom"]
    assert len(series) == 4
    for label in ("normal", "opacity"):
        assert len(list((dicom_out / label).iterdir())) == 2
    original = pydicom.dcmread(SAMPLES / "xray" / "normal" / "001.dcm")
    for source in series:
        header = pydicom.dcmread(source.files[0])
        assert header.PatientName in ("", "SYNTHETIC") or "SYN" in str(header.PatientName)
        assert header.SyntheticData == "YES"
        assert (header.Rows, header.Columns) == (64, 64)
        assert header.Modality == original.Modality
        assert header.SOPClassUID == original.SOPClassUID or header.Modality in ("DX", "CR", "OT")
    assert len({pydicom.dcmread(source.files[0]).PatientID for source in series}) == 4
    assert len({pydicom.dcmread(source.files[0]).SOPInstanceUID for source in series}) == 4


def test_augment_leaves_a_bundle_that_scores(dicom_out, tmp_path):
    scores = medgen.score(SAMPLES / "xray" / "opacity" / "101.dcm", dicom_out / "bundle", tmp_path / "out")
    assert scores.failed == 0


def test_ct_comes_back_in_hounsfield_units(tmp_path):
    from medgen.data.phantoms import ct_block
    from medgen.io.dicom.write import Provenance, write_series

    folder = tmp_path / "ct"
    lowest = highest = 0.0
    for seed in range(10):
        scan = ct_block(seed, shape=(12, 10, 8), oblique=False)
        lowest, highest = min(lowest, float(scan.voxels.min())), max(highest, float(scan.voxels.max()))
        write_series(scan, folder / f"p{seed}", provenance=Provenance("phantom", content="synthetic"), name=f"P{seed}")
    out = tmp_path / "out"
    medgen.augment(folder, out, n=2, minutes=None, overrides=(*QUICK_3D, "fit.images=16", "model.fold=2"))
    series = [source for source in io.find(out).sources if source.kind == "dicom"]
    assert len(series) == 2
    for source in series:
        scan = io.read(source)
        assert scan.scale.unit == "HU"
        assert scan.header.modality == "CT"
        assert lowest <= scan.physical().min() < -20
        assert 60 < scan.physical().max() <= highest


def test_npz_in_npz_out(xrays, tmp_path):
    pictures = [np.asarray(Image.open(path)) for path in sorted(xrays.glob("*/*.png"))]
    labels = np.array([[0]] * 24 + [[1]] * 12, np.uint8)
    write_npz(tmp_path / "chest.npz", {"train": np.stack(pictures)}, {"train": labels})
    done = medgen.augment(
        tmp_path / "chest.npz", tmp_path / "out", n=6, minutes=None, overrides=(*QUICK_2D, "fit.images=64")
    )
    assert (sum(done.written.values()), done.format) == (6, "npz")
    with np.load(tmp_path / "out" / "synthetic.npz") as arrays:
        assert arrays["train_images"].shape == (6, 16, 16)
        assert arrays["train_images"].dtype == np.uint8
        assert arrays["train_labels"].ravel().tolist() == [0, 1, 0, 1, 0, 1]
    # Upright as the originals: bright pixels where theirs are.
    mean = np.stack(pictures).astype(float).mean(0)
    with np.load(tmp_path / "out" / "synthetic.npz") as arrays:
        ours = arrays["train_images"].astype(float).mean(0)
    assert np.corrcoef(mean.ravel(), ours.ravel())[0, 1] > 0.8
    assert np.corrcoef(mean.ravel(), ours.T.ravel())[0, 1] < np.corrcoef(mean.ravel(), ours.ravel())[0, 1]
    assert not (tmp_path / "out" / "arrays").exists()
    manifest = index(tmp_path / "out" / "manifest.csv")
    assert io.read(manifest.locate(manifest.rows[2].path)).voxels.shape == (1, 16, 16, 1)


def test_another_format_may_be_asked_for(xrays, xray_bundle, tmp_path):
    for chosen, ending in (("nifti", ".nii.gz"), ("dicom", ".dcm")):
        done = medgen.augment(xrays, tmp_path / chosen, bundle=xray_bundle, n=2, format=chosen)
        assert done.format == chosen
        assert len([name for name in files(tmp_path / chosen) if name.endswith(ending)]) == 2


def test_orders_that_contradict_themselves_are_refused(heads, heads_bundle, xrays, xray_bundle, tmp_path):
    with pytest.raises(ConfigError, match="per-class"):
        medgen.augment(heads, tmp_path / "a", bundle=heads_bundle, per_class=2)
    with pytest.raises(ConfigError, match="exclude"):
        medgen.augment(xrays, tmp_path / "b", bundle=xray_bundle, per_class=2, n=3)
    with pytest.raises(ConfigError, match="at least 1"):
        medgen.augment(heads, tmp_path / "c", bundle=heads_bundle, n=0)
    assert not list(tmp_path.iterdir())


def test_generation_goes_on_where_it_was_interrupted(made, heads, heads_bundle, tmp_path, monkeypatch):
    whole, _ = made
    original, count = Output.write, [0]

    def interrupted(self, name, one):
        if count[0] == 2:
            raise KeyboardInterrupt
        count[0] += 1
        return original(self, name, one)

    monkeypatch.setattr(Output, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        medgen.augment(heads, tmp_path / "out", bundle=heads_bundle, n=5)
    assert not (tmp_path / "out").exists()
    part = tmp_path / "out.part"
    stamps = {path.name: path.stat().st_mtime_ns for path in (part / "images").iterdir()}
    assert len(stamps) == 2
    written: list[str] = []

    def counted(self, name, one):
        written.append(name)
        return original(self, name, one)

    monkeypatch.setattr(Output, "write", counted)
    done = medgen.augment(heads, tmp_path / "out", bundle=heads_bundle, n=5)
    assert written == ["SYN-0003", "SYN-0004", "SYN-0005"]
    assert done.written == {"synthetic by sample": 5}
    for name, stamp in stamps.items():
        assert (tmp_path / "out" / "images" / name).stat().st_mtime_ns == stamp
    for path in (whole / "images").iterdir():
        assert (tmp_path / "out" / "images" / path.name).read_bytes() == path.read_bytes()
    assert rows(tmp_path / "out" / "manifest.csv") == rows(whole / "manifest.csv")


def test_an_interrupted_training_within_augment_goes_on(xrays, tmp_path, monkeypatch):
    from medgen.training import fit

    overrides = (*QUICK_2D, "fit.images=96", "fit.batch_size=8", "fit.precision=float32")
    medgen.augment(xrays, tmp_path / "whole", n=2, minutes=None, overrides=overrides)
    step, count = fit._Run._step, [0]

    def interrupted(self, batch):
        count[0] += 1
        if count[0] == 5:
            import signal

            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(fit._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        medgen.augment(xrays, tmp_path / "out", n=2, minutes=None, overrides=overrides)
    medgen.augment(xrays, tmp_path / "out", n=2, minutes=None, overrides=overrides)
    whole, out = Bundle.load(tmp_path / "whole" / "bundle"), Bundle.load(tmp_path / "out" / "bundle")
    assert whole.weights_sha256 == out.weights_sha256
    assert not (tmp_path / "out" / "training").exists()


# -- copies of patients ----------------------------------------------------------------------------------


def training_scans(folder: Path, bundle_folder: Path) -> torch.Tensor:
    bundle, manifest = Bundle.load(bundle_folder), index(folder)
    paths = [manifest.locate(row.path) for row in manifest.split("train").rows]
    return torch.stack([torch.tensor(bundle.recipe(io.read(path)).voxels) for path in paths])


@pytest.mark.parametrize("disguise", ["exact", "noised", "flipped"])
def test_a_generator_that_returns_training_scans_is_caught(heads, heads_bundle, tmp_path, monkeypatch, disguise):
    known = training_scans(heads, heads_bundle)

    def copying(self, n, *, seed, cond=None):
        picked = known[[(seed + i) % len(known) for i in range(n)]]
        noise = torch.randn(picked.shape, generator=torch.Generator().manual_seed(seed))
        return {"exact": picked, "noised": picked + 0.05 * noise, "flipped": picked.flip(2)}[disguise]

    monkeypatch.setattr(VAE, "sample", copying)
    with pytest.raises(PrivacyError, match="memorised"):
        medgen.augment(heads, tmp_path / "out", bundle=heads_bundle, n=2)
    assert not (tmp_path / "out").exists()
    scans = [name for name in files(tmp_path) if name.endswith((".nii.gz", ".png", ".npz", ".npy", ".dcm"))]
    assert scans == ["out.private/copies.png"]
    assert len(rows(tmp_path / "out.private" / "copies.csv")) == 20


def test_copies_are_told_by_the_splits_of_training_whatever_the_seed(heads, heads_bundle, tmp_path, monkeypatch):
    """With another seed some training scans look held out; they are the bundle's patients all the same."""
    bundle, learned = Bundle.load(heads_bundle), {row.case for row in index(heads).split("train").rows}
    other = index(heads, seed=1)
    rows = [row for name in ("calibration", "test") for row in other.split(name).rows if row.case in learned]
    copies = torch.stack([torch.tensor(bundle.recipe(io.read(other.locate(row.path))).voxels) for row in rows])
    monkeypatch.setattr(VAE, "sample", lambda self, n, *, seed, cond=None: copies[[seed % len(copies)] * n])
    with pytest.raises(PrivacyError, match="memorised"):
        medgen.augment(heads, tmp_path / "out", bundle=heads_bundle, n=2, seed=1)


def test_a_copy_now_and_then_is_drawn_again(heads, heads_bundle, tmp_path, monkeypatch):
    known, original = training_scans(heads, heads_bundle), VAE.sample

    def sometimes(self, n, *, seed, cond=None):
        drawn = original(self, n, seed=seed, cond=cond)
        drawn[1::3] = known[: len(drawn[1::3])]
        return drawn

    monkeypatch.setattr(VAE, "sample", sometimes)
    done = medgen.augment(heads, tmp_path / "out", bundle=heads_bundle, n=3)
    assert done.rejected["copy"] >= 1
    assert sum(done.written.values()) == 3
    found = [io.read(path) for path in sorted((tmp_path / "out" / "images").iterdir())]
    originals = [io.read(path).onto(found[0].grid, outside=0).voxels for path in heads.iterdir()]
    assert not any(np.array_equal(scan.voxels, voxels) for scan in found for voxels in originals)


# -- convert -------------------------------------------------------------------------------------------


def test_dicom_to_nifti_keeps_place_and_units(tmp_path):
    done = medgen.tasks.convert.convert(SAMPLES / "ct_oblique", tmp_path / "out")
    assert len(done.written) == 1
    source, (path,) = io.read(SAMPLES / "ct_oblique"), list((tmp_path / "out").glob("*.nii.gz"))
    there = io.read(path)
    assert there.grid.close(source.grid)
    assert np.array_equal(there.physical(), source.physical())


def test_files_that_are_no_scans_are_no_failure(heads, tmp_path):
    folder = some(heads, tmp_path / "in", 2)
    (folder / "notes.txt").write_text("hello")
    done = medgen.tasks.convert.convert(folder, tmp_path / "out")
    assert done.failed == 0
    assert len(done.written) == 2


def test_a_corrupt_scan_among_many_is_left_out_and_counted(heads, tmp_path):
    folder = some(heads, tmp_path / "in", 3)
    path = sorted(folder.iterdir())[1]
    path.write_bytes(path.read_bytes()[:300])
    done = medgen.tasks.convert.convert(folder, tmp_path / "out")
    assert done.failed == 1
    assert len(done.written) == len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    assert path.name in str(done.skipped[0].path)


def test_scans_whose_names_would_meet_are_all_written(heads, tmp_path):
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    scans = [io.read(path) for path in sorted(heads.iterdir())[:3]]
    for scan, name in zip(scans, ("a/b.nii.gz", "a_b.nii.gz", "a_b.nii"), strict=True):
        io.write(scan, folder / name)
    done = medgen.tasks.convert.convert(folder, tmp_path / "out")
    assert len(done.written) == 3
    written = [io.read(path).voxels.tobytes() for path in (tmp_path / "out").glob("*.nii.gz")]
    assert sorted(written) == sorted(scan.voxels.tobytes() for scan in scans)


def test_what_cannot_be_a_picture_is_said(heads, tmp_path):
    with pytest.raises(DataError, match="Nothing of"):
        medgen.tasks.convert.convert(some(heads, tmp_path / "in", 1), tmp_path / "out", format="png")
    assert not (tmp_path / "out").exists()


def test_a_scale_survives_conversion(heads, tmp_path):
    scan = io.read(heads / "sub-001_T1w.nii.gz")
    (tmp_path / "in").mkdir()
    io.write(scan.with_voxels(scan.voxels, scale=Scale(2.5, -30.0)), tmp_path / "in" / "x.nii.gz")
    medgen.tasks.convert.convert(tmp_path / "in", tmp_path / "out")
    assert np.allclose(io.read(tmp_path / "out" / "x.nii.gz").physical(), scan.voxels * 2.5 - 30)


# -- a bundle that is not one ------------------------------------------------------------------------------


def test_a_wrong_bundle_is_refused_before_anything_is_written(heads, tmp_path):
    with pytest.raises(BundleError):
        medgen.score(heads, tmp_path / "none", tmp_path / "out")
    with pytest.raises(BundleError):
        medgen.augment(heads, tmp_path / "out", bundle=heads)
    assert not list(tmp_path.iterdir())
