"""augment: what it writes is decided by its seed, made of training scans alone, labelled, told apart and nobody's."""

import csv
import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worlds import small_chest

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.data.manifest import index
from medgen.errors import ConfigError, DataError, OutputError, PrivacyError
from medgen.grid import Grid
from medgen.models.mixture import Mixture
from medgen.scan import Scan
from medgen.tasks.augment import Augmented
from medgen.tasks.outputs.files import Output
from medgen.tasks.ways.base import Made
from medgen.tasks.ways.sources import patient_name, secret_of, source_name

ONCE = {"minutes": None, "preset": "gaussian2d"}
# Nobody whose name this is may be told of.
NAMES = ("canary", "ann^doe", "anndoe")
SPLITS = ["train"] * 12 + ["val"] * 2 + ["calibration"] * 8 + ["test"] * 4


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path, *but: str) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def save_table(folder: Path, rows: list[dict[str, str]]) -> Path:
    with (folder / "people.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "people.csv"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Pictures of two classes, 12 + 12 for training; a corner shines in every one of those held out."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for n in range(52):
        split, label = SPLITS[n // 2], ("a", "b")[n % 2]
        shown = small_chest(n, 16)[0].numpy()
        shown = 200 * (shown if label == "a" else shown.T)
        if split != "train":
            shown[:3, :3] = 255
        Image.fromarray(shown.T.round().astype(np.uint8)).save(folder / f"canary_{n}.png")
        rows.append({"path": f"canary_{n}.png", "case": f"canary_{n}", "patient": f"Ann^Doe{n}", "label": label,
                     "split": split})  # fmt: skip
    return save_table(folder, rows)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Volumes, each with a mask of a ball that is labelled 3."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    i, j, k = np.meshgrid(*[np.arange(n) for n in (10, 12, 8)], indexing="ij")
    grid = Grid((10, 12, 8), np.diag([9.0, 9.0, 9.0, 1.0]))
    for n in range(26):
        rng = np.random.default_rng(n)
        middle, radius = rng.uniform(3.5, 5.5, 3), rng.uniform(1.8, 2.6)
        ball = (i - middle[0]) ** 2 + (j - middle[1]) ** 2 + (k - middle[2] + 1) ** 2 < radius**2
        shown = 300 + 20 * rng.normal() + 15 * i + 400 * ball + rng.normal(0, 10, ball.shape)
        io.write(Scan(shown.astype(np.uint16)[None], grid), folder / f"canary_{n}.nii.gz")
        io.write(Scan(3 * ball.astype(np.uint8)[None], grid, is_label=True), folder / f"canary_{n}_mask.nii.gz")
        rows.append({"path": f"canary_{n}.nii.gz", "mask": f"canary_{n}_mask.nii.gz", "case": f"canary_{n}",
                     "patient": f"Ann^Doe{n}", "age": str(30 + n), "split": SPLITS[n]})  # fmt: skip
    return save_table(folder, rows)


@pytest.fixture(scope="session")
def flat_bundle(pictures, tmp_path_factory) -> Path:
    return medgen.train(pictures, tmp_path_factory.mktemp("bundles") / "flat", **ONCE)


@pytest.fixture(scope="session")
def pair_bundle(pairs, tmp_path_factory) -> Path:
    return medgen.train(
        pairs, tmp_path_factory.mktemp("bundles") / "pairs", preset="gaussian3d", masks="joint", minutes=None
    )


WAYS_2D = {
    "sample": {}, "interpolate": {}, "classic": {}, "lesion": {},
    "mix": {"mix": {"sample": 2, "classic": 1, "interpolate": 1}},
}  # fmt: skip
WAYS_3D = {
    "sample": {}, "interpolate": {}, "classic": {}, "lesion": {"lesions": "remove"},
    "mix": {"mix": {"sample": 1, "classic": 1}},
}  # fmt: skip


def checked(out: Path, data: Path, done: Augmented, count: int) -> list[dict[str, str]]:
    """What holds of every output: all for training, of training scans alone, nobody named, and read back."""
    rows, known = table(out / "manifest.csv"), index(data)
    assert len(rows) == sum(done.written.values()) == count
    key = secret_of(known)
    sources = {source_name(row, key) for row in known.split("train").rows}
    patients = {patient_name(row, key) for row in known.split("train").rows}
    for row in rows:
        assert row["split"] == "train"
        told = set(filter(None, row["sources"].split(";")))
        assert told <= sources
        assert (row["origin"] == "derived") == bool(told) == (row["patient"] in patients)
    for name, content in contents(out).items():
        text = name.lower().encode() + content.lower()
        assert not [one for one in NAMES if one.encode() in text], name
    assert {one.split for one in index(out / "manifest.csv").rows} == {"train"}
    return rows


@pytest.mark.parametrize("how", WAYS_2D)
def test_every_way_makes_pictures_of_each_class(pictures, flat_bundle, tmp_path, how):
    done = medgen.augment(pictures, tmp_path / "out", bundle=flat_bundle, how=how, per_class=4, **WAYS_2D[how])
    rows = checked(tmp_path / "out", pictures, done, 8)
    assert [row["label"] for row in rows] == ["a"] * 4 + ["b"] * 4
    for row in rows:
        voxels = io.read(tmp_path / "out" / row["path"]).voxels[0, :, :, 0]
        # Held-out scans shine in a corner, and nothing that is made of training scans does.
        assert voxels[:3, :3].mean() < 120
    if how == "mix":
        for label in "ab":
            ways = sorted(row["how"] for row in rows if row["label"] == label)
            assert ways == ["classic", "interpolate", "sample", "sample"]


@pytest.mark.parametrize("how", WAYS_3D)
def test_every_way_makes_volumes_with_masks(pairs, pair_bundle, tmp_path, how):
    done = medgen.augment(pairs, tmp_path / "out", bundle=pair_bundle, how=how, n=4, reject=0, **WAYS_3D[how])
    for row in checked(tmp_path / "out", pairs, done, 4):
        scan, mask = (io.read(tmp_path / "out" / row[name]) for name in ("path", "mask"))
        assert mask.grid.close(scan.grid)
        assert set(np.unique(mask.voxels)) <= {0, 3}
        assert mask.voxels.any() == (how != "lesion")
        if how in ("sample", "classic"):
            inside = mask.voxels > 0
            assert scan.physical()[inside].mean() > scan.physical()[~inside].mean() + 150


def test_the_folder_says_what_it_is(pictures, flat_bundle, tmp_path):
    mix = {"how": "mix", "mix": {"sample": 1, "classic": 1}}
    done = medgen.augment(pictures, tmp_path / "out", bundle=flat_bundle, n=6, **mix)
    out = tmp_path / "out"
    assert done.written == {"synthetic by sample": 3, "derived by classic": 3} or sum(done.written.values()) == 6
    privacy = json.loads((out / "privacy.json").read_text())
    assert privacy["copies"]["held_out"] == 16
    assert {"closeness", "likelihood_attack"} <= set(privacy)
    told = json.loads((out / "run.json").read_text())
    assert (told["command"], told["written"], told["privacy"]) == ("augment", done.written, privacy)
    card = (out / "README.md").read_text()
    for word in ("never test on them", "same fold", "other_patient", "Candidates rejected", "distance attack"):
        assert word in card
    assert (out / "contact_sheet.png").is_file()
    assert done.private == tmp_path / "out.private"
    used = {source for row in table(out / "manifest.csv") for source in row["sources"].split(";") if source}
    listed = table(done.private / "sources.csv")
    assert {row["source"] for row in listed} == used
    assert all(row["case"].startswith("canary") and row["patient"].startswith("P-") for row in listed)


def test_the_same_seed_makes_the_same_bytes_and_an_interrupted_run_too(pictures, flat_bundle, tmp_path, monkeypatch):
    mix = {"bundle": flat_bundle, "how": "mix", "mix": {"sample": 2, "classic": 1}, "n": 12}
    medgen.augment(pictures, tmp_path / "whole", **mix)
    original, count = Output.write, [0]

    def interrupted(self, name, one):
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return original(self, name, one)

    monkeypatch.setattr(Output, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        medgen.augment(pictures, tmp_path / "out", **mix)
    monkeypatch.setattr(Output, "write", original)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="other settings"):
        medgen.augment(pictures, tmp_path / "out", **mix | {"n": 13})
    medgen.augment(pictures, tmp_path / "out", **mix)
    assert contents(tmp_path / "out", "run.json") == contents(tmp_path / "whole", "run.json")
    assert contents(tmp_path / "out.private") == contents(tmp_path / "whole.private")
    with pytest.raises(OutputError, match="exists already"):
        medgen.augment(pictures, tmp_path / "out", **mix)
    medgen.augment(pictures, tmp_path / "out", force=True, **mix | {"how": "sample", "mix": {}, "n": 2})
    assert len(table(tmp_path / "out" / "manifest.csv")) == 2
    assert not (tmp_path / "out.private").exists()


def test_classical_transforms_need_no_model(pictures, tmp_path):
    done = medgen.augment(pictures, tmp_path / "out", how="classic", ratio=0.5)
    rows = checked(tmp_path / "out", pictures, done, 12)
    assert {(row["model"], row["weights_sha256"]) for row in rows} == {("", "")}
    assert not (tmp_path / "out" / "bundle").exists()


def unbalanced(pictures: Path, folder: Path, few: int) -> Path:
    """The table with few training scans of class b."""
    rows, kept = table(pictures), 0
    for row in rows:
        row["path"] = str(pictures.parent / row["path"])
    left = []
    for row in rows:
        kept += (there := row["split"] == "train" and row["label"] == "b")
        left += [] if there and kept > few else [row]
    return save_table(folder, left)


def test_classes_are_made_equal(pictures, tmp_path):
    some = unbalanced(pictures, tmp_path, 5)
    medgen.augment(some, tmp_path / "out", how="classic", balance=True)
    assert [row["label"] for row in table(tmp_path / "out" / "manifest.csv")] == ["b"] * 7
    with pytest.raises(ConfigError, match="balanced already"):
        medgen.augment(pictures, tmp_path / "none", how="classic", balance=True)
    medgen.augment(some, tmp_path / "more", how="classic", balance=True, ratio=0.5)
    assert [row["label"] for row in table(tmp_path / "more" / "manifest.csv")] == ["a"] * 6 + ["b"] * 13


def test_a_class_of_one_patient(pictures, tmp_path):
    some = unbalanced(pictures, tmp_path, 1)
    done = medgen.augment(some, tmp_path / "out", how="classic", per_class=3)
    assert len({row["patient"] for row in table(tmp_path / "out" / "manifest.csv") if row["label"] == "b"}) == 1
    assert sum(done.written.values()) == 6
    with pytest.raises(DataError, match="class 'b' has 1"):
        medgen.augment(some, tmp_path / "no", how="interpolate", per_class=3, **ONCE)
    assert not (tmp_path / "no.part").exists()


def test_labels_missing_for_some(pictures, tmp_path):
    rows = table(pictures)
    for n, row in enumerate(rows):
        row["path"] = str(pictures.parent / row["path"])
        row["label"] = "" if n % 5 == 0 else row["label"]
    done = medgen.augment(save_table(tmp_path, rows), tmp_path / "out", how="classic", n=4)
    assert sum(done.written.values()) == 4


def test_a_model_that_returns_training_scans_is_refused_and_its_copies_are_listed(
    pictures, flat_bundle, tmp_path, monkeypatch
):
    bundle, known = Bundle.load(flat_bundle), index(pictures)
    train = [
        torch.tensor(bundle.recipe(io.read(known.locate(row.path))).voxels[..., 0]) for row in known.split("train").rows
    ]
    monkeypatch.setattr(
        Mixture, "sample", lambda self, n, *, seed, cond=None: torch.stack([train[(seed + i) % 24] for i in range(n)])
    )
    with pytest.raises(PrivacyError, match="memorised"):
        medgen.augment(pictures, tmp_path / "out", bundle=flat_bundle, n=8, reject=0)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()
    listed = table(tmp_path / "out.private" / "copies.csv")
    names = {source_name(row, secret_of(known)) for row in known.split("train").rows}
    assert len(listed) == 20
    assert {row["nearest"] for row in listed} <= names


def test_a_model_of_new_people_passes(pictures, flat_bundle, tmp_path, monkeypatch):
    def new(self, n, *, seed, cond=None):
        drawn = torch.stack([small_chest(seed % 2**30 + 1000 + i, 16) for i in range(n)]) * 200 / 255
        turn = (cond == 1) if cond.ndim == 1 else cond[:, 1] == 1
        return torch.where(turn.reshape(-1, 1, 1, 1), drawn.transpose(2, 3), drawn)

    monkeypatch.setattr(Mixture, "sample", new)
    done = medgen.augment(pictures, tmp_path / "out", bundle=flat_bundle, n=40)
    assert done.rejected.get("copy", 0) <= 2
    assert sum(done.rejected.values()) <= 8


def test_memory_does_not_grow_with_the_number_of_scans(pictures, flat_bundle, tmp_path, monkeypatch):
    original, alive = Output.write, []
    gc.collect()
    before = sum(type(held) is Made for held in gc.get_objects())

    def counted(self, name, one):
        if len(alive) % 20 == 19:
            alive.append(sum(type(held) is Made for held in gc.get_objects()) - before)
        else:
            alive.append(0)
        return original(self, name, one)

    monkeypatch.setattr(Output, "write", counted)
    medgen.augment(pictures, tmp_path / "out", bundle=flat_bundle, n=240)
    assert 0 < max(alive) <= 170
    assert max(alive[160:]) <= max(alive[:160]) + 40


@pytest.mark.parametrize("format", ["nifti", "dicom", "png", "npz"])
def test_any_format_names_nobody(pictures, flat_bundle, tmp_path, format):
    mix = {"how": "mix", "mix": {"sample": 1, "classic": 1}}
    done = medgen.augment(pictures, tmp_path / "out", bundle=flat_bundle, n=4, format=format, **mix)
    assert done.format == format
    checked(tmp_path / "out", pictures, done, 4)


def test_whoever_lacks_the_table_cannot_check_a_guess_of_a_name(pictures):
    known = index(pictures)
    row, key = known.rows[0], secret_of(known)
    other = replace(known, rows=(*known.rows[:-1], replace(known.rows[-1], case="somebody else")))
    assert source_name(row, key) != source_name(row, secret_of(other))
    assert patient_name(row, key) != patient_name(row, secret_of(other))
    assert secret_of(index(pictures, seed=9)) == key
    assert key != known.hash()


def test_unknown_wishes_are_refused(pictures, tmp_path):
    for wish, says in (
        ({"hwo": "classic"}, "no 'hwo'"), ({"n": 3, "ratio": 1.0}, "exclude"),
        ({"how": "mix"}, "mix"), ({"reject": 0.7}, "less than half"), ({"how": "edit"}, "--vary"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            medgen.augment(pictures, tmp_path / "out", **wish)
    assert not list(tmp_path.iterdir())
