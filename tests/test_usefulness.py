"""`medgen evaluate --utility`: a planted benefit is found, a planted null is called one, nobody held out is used."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import quick

import medgen
from medgen.bundle import Bundle
from medgen.errors import CapabilityError, ConfigError, DataError, LeakageError
from medgen.io.source import ReadOptions
from medgen.log import progress
from medgen.metrics.rivals import STRENGTHS
from medgen.tasks.arms import (
    ALONE,
    BOTH,
    CHOSEN,
    CLASSICAL,
    REAL,
    Classifier,
    Examples,
    Lesson,
    Outliner,
    mixed_name,
    taught_with,
)  # fmt: skip
from medgen.tasks.intake import training_scans
from medgen.tasks.made import drawn_by, examples_of, known_to
from medgen.tasks.study import MEAN, Made, Study, Useful
from medgen.tasks.usefulness import usefulness
from medgen.tasks.usefulness_table import RESEARCH, lines

QUICK = Useful(ratios=(1, 4), learners=("svm",), resamples=200, seed=1)


def scans(n: int, seed: int, *, signal: float = 1.0, space: tuple[int, ...] = (8, 6)) -> Examples:
    """Scans of two classes; class 1 is brighter in one half by `signal`."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = 0.5 + 0.12 * rng.standard_normal((n, 1, *space))
    x[:, :, : space[0] // 2] += (0.07 * signal * (2 * y - 1)).reshape(-1, *[1] * (len(space) + 1))
    return Examples(x.clip(0, 1).astype(np.float32), y, None, tuple(f"p{seed}-{i}" for i in range(n)))


def studied(made, *, val: Examples | None = None, asked: Useful = QUICK, draws: int = 3) -> list[dict]:
    study = Study([Classifier("svm", 2)], val, scans(160, 99), asked, None)
    with progress("Teaching") as bar:
        for draw in range(draws):
            real = scans(8, 100 + draw, signal=0.6)
            study.taught(8, draw, real, Made(made, real, 2, asked), bar)
    return study.rows(8, draws)


def test_synthetic_scans_that_hold_what_few_real_ones_lack_are_found_to_help():
    rows = studied(lambda labels, seed: scans(len(labels), seed % 1000), val=scans(60, 55))
    by_arm = {row["arm"]: row for row in rows}
    assert list(by_arm) == [
        REAL, ALONE, mixed_name(1), mixed_name(4), CLASSICAL, "real + mixup", "real + SMOTE", "real + mixture", BOTH,
        CHOSEN,
    ]  # fmt: skip
    four, chosen = by_arm[mixed_name(4)], by_arm[CHOSEN]
    assert four["gain_verdict"] == chosen["gain_verdict"] == "helps"
    assert four["gain"] == pytest.approx(four["value"] - by_arm[REAL]["value"])
    assert four["over_classical"] == pytest.approx(four["value"] - by_arm[CLASSICAL]["value"])
    for row in rows:
        low, high = row["value_interval"]
        assert low <= row["value"] <= high
    assert len(chosen["chosen"].split(", ")) == 3
    assert by_arm[ALONE]["share"] == pytest.approx(by_arm[ALONE]["value"] / by_arm[REAL]["value"])
    assert "gain" not in by_arm[REAL]
    assert "over_classical" not in by_arm[CLASSICAL]


def test_synthetic_scans_without_a_signal_are_no_benefit_and_without_validation_nothing_is_chosen():
    rows = studied(lambda labels, seed: scans(len(labels), seed % 1000, signal=0.0))
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm[mixed_name(1)]["gain_verdict"] == "no benefit"
    assert by_arm[mixed_name(4)]["gain_verdict"] != "helps"
    assert by_arm[ALONE]["gain_verdict"] == "harms"
    assert CHOSEN not in by_arm
    assert by_arm[BOTH]["chosen"].startswith("1 x synthetic")
    # The same scans once more say nothing new.
    real = scans(8, 100, signal=0.6)
    again = studied(lambda labels, seed: real.rows(np.resize(np.arange(8), len(labels))), draws=1)
    assert next(row for row in again if row["arm"] == mixed_name(1))["gain_verdict"] != "helps"


def test_scans_that_were_made_count_together_as_much_as_the_real_ones_at_most():
    real = Lesson(np.zeros((4, 1, 2, 2)), np.array([0, 1, 0, 1]))
    for count, weight in ((2, 1.0), (4, 1.0), (16, 0.25)):
        both = taught_with(real, np.ones((count, 1, 2, 2)), np.resize([0, 1], count))
        assert both.weights.tolist() == [1.0] * 4 + [weight] * count
    soft = taught_with(real, np.ones((2, 1, 2, 2)), np.array([[0.5, 0.5], [0.1, 0.9]]))
    assert soft.told.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1], [0.5, 0.5], [0.1, 0.9]]


def test_what_learners_said_is_kept_and_not_asked_again(tmp_path, monkeypatch):
    asked, test, real = replace(QUICK, ratios=(1,)), scans(30, 99), scans(8, 100)
    drawn = []

    def draw(labels, seed):
        drawn.append(len(labels))
        return scans(len(labels), 5)

    def run() -> list[dict]:
        study = Study([Classifier("svm", 2)], None, test, asked, tmp_path / "kept")
        with progress("Teaching") as bar:
            study.taught(0, 0, real, Made(draw, real, 2, asked), bar)
        return study.rows(0, 1)

    first = run()
    assert drawn == [8]
    monkeypatch.setattr(Classifier, "outcomes", lambda *_: pytest.fail("asked again"))
    assert run() == first
    assert drawn == [8]


def test_pairs_are_taught_with_rivals_that_have_maps():
    rng = np.random.default_rng(0)
    maps = np.zeros((6, 12, 12), dtype=np.int64)
    for one in maps:
        a, b = rng.integers(1, 6, size=2)
        one[a : a + 5, b : b + 5] = 3
    x = (0.3 + 0.4 * (maps == 3))[:, None].astype(np.float32)
    real = Examples(x, np.zeros(6, dtype=np.int64), maps, tuple("abcdef"))
    learner = Outliner((3,), steps=3)
    rivals = learner.rivals(real, 9, 0)
    assert set(rivals) == {"real + SMOTE", "real + mixture"}
    for scan, drawn in rivals.values():
        assert scan.shape == (9, 1, 12, 12)
        assert set(np.unique(drawn)) == {0, 3}
        # A map lies where its scan is bright.
        assert scan[:, 0][drawn == 3].mean() > scan[:, 0][drawn == 0].mean() + 0.2
    found = learner.outcomes(Lesson(x, maps, strength=1.0), real, 0)
    assert found.shape == (1, 6)
    counts = np.ones((1, 6), dtype=np.int64)
    assert learner.values(found, real, counts)[0] == pytest.approx(found.mean())


# -- bundles -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaussian(xrays, tmp_path_factory) -> Path:
    """Both classes of radiographs as Gaussians."""
    return medgen.train(xrays, tmp_path_factory.mktemp("bundles") / "gaussian", preset="gaussian2d", minutes=None)


@pytest.fixture(scope="module")
def known(xrays, gaussian):
    return training_scans(Bundle.load(gaussian), xrays, ReadOptions())


def test_the_command_measures_and_says_what_it_found(xrays, gaussian, command, tmp_path):
    out = tmp_path / "use"
    asked = ("--utility", "--ratios", "0.5,2", "--learners", "svm,logistic", "-o", out, "-q")
    code, told, err = command("evaluate", xrays, "-m", gaussian, *asked)
    assert code == 0, err
    assert RESEARCH in told
    # Few were held out: drawing two patients again and again would look like certainty.
    assert f"{mixed_name(2)}: cannot tell" in told
    assert "Over tuned classical" in told
    assert "verdicts take 5" in told
    assert sorted(path.name for path in out.iterdir() if path.name.startswith("utility")) == [
        "utility.csv", "utility.md", "utility.png",
    ]  # fmt: skip
    assert not (out / "training").exists()
    with (out / "utility.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["learner"] for row in rows} == {"svm", "logistic"}
    assert {row["size"] for row in rows} == {"all"}
    strength = next(row["chosen"] for row in rows if row["arm"] == CLASSICAL)
    assert float(strength.removeprefix("strength ")) in STRENGTHS
    assert json.loads((out / "run.json").read_text())["found"]["utility"]["measure"] == "AUROC"


def test_a_learning_curve_trains_generators_on_the_drawn_patients_alone(xrays, gaussian, known, monkeypatch):
    from medgen.tasks import usefulness as task

    bundle, seen = Bundle.load(gaussian), []
    trained = task.trained_anew

    def watched(bundle, rows, minutes, **told):
        seen.append(rows)
        return trained(bundle, rows, minutes, **told)

    monkeypatch.setattr(task, "trained_anew", watched)
    asked = replace(QUICK, ratios=(1,), low_data=(3, 5, 500), draws=2, minutes=1)
    found = usefulness(bundle, known, asked, ReadOptions(), device="cpu")
    assert {row["size"] for row in found["rows"]} == {3, 5}
    assert any("500" in told for told in found["notes"])
    assert [len(rows.split("train")) for rows in seen] == [6, 6, 10, 10]
    for rows in seen:
        assert {row.split for row in rows.rows} <= {"train", "val"}
        assert [sum(r.label == name for r in rows.split("train").rows) for name in known.labels] == [
            len(rows.split("train")) // 2
        ] * 2
    assert "3 training scans of each class, 2 draws" in "\n".join(lines(found))
    # Draws are of different patients.
    assert {row.case for row in seen[0].split("train").rows} != {row.case for row in seen[1].split("train").rows}


def test_learned_anew_is_learned_of_the_same_config(xrays, known, xray_bundle):
    from medgen.tasks.made import trained_anew

    bundle = Bundle.load(xray_bundle)
    real = examples_of(bundle, known.split("train"), ReadOptions())
    rows = known_to(known, real.rows(slice(6)), 3, 0)
    assert {row.case for row in rows.split("train").rows} == set(real.cases[:6])
    model = trained_anew(bundle, rows, 0.01, seed=3, device="cpu", options=ReadOptions())
    assert model.config == bundle.model.config
    made = drawn_by(model, real)(np.array([0, 1] * 17), 4)
    assert made.x.shape == (34, 1, 16, 16)
    assert made.y.tolist() == [0, 1] * 17
    # Scan i does not depend on how many are drawn.
    assert np.array_equal(made.x[:5], drawn_by(model, real)(np.array([0, 1] * 17)[:5], 4).x)
    assert torch.isfinite(torch.from_numpy(made.x)).all()


def test_scans_of_a_folder_are_used_unless_they_were_made_of_held_out_ones(xrays, gaussian, known, command, tmp_path):
    out = tmp_path / "made"
    told = command("augment", xrays, "-o", out, "--bundle", gaussian, "--per-class", 12, "-q")
    assert told[0] == 0, told[2]
    asked = replace(QUICK, synthetic=out, ratios=(0.5, 1, 50))
    found = usefulness(Bundle.load(gaussian), known, asked, ReadOptions())
    arms = {row["arm"] for row in found["rows"]}
    assert mixed_name(0.5) in arms
    assert mixed_name(50) not in arms
    assert any("ratio of 50" in told for told in found["notes"])
    table = out / "manifest.csv"
    with table.open() as file:
        rows = list(csv.DictReader(file))
    rows[0]["sources"] = known.split("test").rows[0].case
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(LeakageError, match="held out"):
        usefulness(Bundle.load(gaussian), known, asked, ReadOptions())


def test_pairs_of_a_joint_bundle_are_measured_by_dice(heads, tmp_path):
    from medgen import io

    folder = tmp_path / "pairs"
    for n, path in enumerate(sorted(heads.iterdir())[:24]):
        scan = io.read(path)
        bright = (scan.physical() > np.percentile(scan.physical(), 80)).astype(np.uint8)
        io.write(scan, folder / f"sub-{n:02d}.nii.gz")
        io.write(replace(scan, voxels=bright, is_label=True), folder / f"sub-{n:02d}_mask.nii.gz")
    bundle = medgen.train(folder, tmp_path / "joint", preset="gaussian3d", minutes=None, masks="joint")
    loaded = Bundle.load(bundle)
    rows = training_scans(loaded, folder, ReadOptions())
    found = usefulness(loaded, rows, replace(QUICK, ratios=(1,), steps=2, resamples=50), ReadOptions())
    assert found["measure"] == "Dice"
    assert {REAL, ALONE, CLASSICAL, "real + mixture", mixed_name(1), BOTH} <= {row["arm"] for row in found["rows"]}
    assert all(0 <= row["value"] <= 1 for row in found["rows"])


def test_what_cannot_be_measured_is_refused(xrays, heads_bundle, heads, gaussian, command, known, tmp_path):
    for wrong in ({"ratios": ()}, {"ratios": (0,)}, {"learners": ("forest",)}, {"draws": 0}, {"low_data": (1,)}):
        with pytest.raises(ConfigError):
            Useful(**wrong)
    with pytest.raises(ConfigError, match="--low-data trains"):
        Useful(low_data=(5,), synthetic="made")
    with pytest.raises(DataError, match="two or more classes"):
        medgen.evaluate(heads, heads_bundle, useful=QUICK)
    code, _, err = command("evaluate", xrays, "-m", gaussian, "--low-data", "5", "-q")
    assert code == 2
    assert "--utility" in err
    code, _, err = command("evaluate", xrays, "-m", gaussian, "--utility", "--ratios", "many", "-q")
    assert code == 2
    assert "takes numbers" in err
    with pytest.raises(DataError, match="not learn from this folder"):
        usefulness(Bundle.load(gaussian), None, QUICK, ReadOptions())
    with pytest.raises(DataError, match="No size"):
        usefulness(Bundle.load(gaussian), known, replace(QUICK, low_data=(900,)), ReadOptions())
    out = tmp_path / "dae"
    assert command("train", xrays, "-o", out, "--preset", "dae2d", *quick(("fit.images=8", "model.width=4")))[0] == 0
    with pytest.raises(CapabilityError, match="draws no scans"):
        medgen.evaluate(xrays, out, useful=QUICK)


def test_a_folder_without_a_class_is_refused(xrays, gaussian, known, tmp_path):
    shutil.copytree(xrays / "normal", tmp_path / "half" / "normal")
    with pytest.raises(DataError, match="no synthetic scan"):
        usefulness(Bundle.load(gaussian), known, replace(QUICK, synthetic=tmp_path / "half"), ReadOptions())


def test_two_targets_have_a_mean(xrays, gaussian, known):
    asked = replace(QUICK, learners=("svm", "cnn"), ratios=(1,), steps=2, runs=1, resamples=20)
    rows = usefulness(Bundle.load(gaussian), known, asked, ReadOptions())["rows"]
    values = {(row["learner"], row["arm"]): row["value"] for row in rows}
    for arm in (REAL, CLASSICAL, ALONE):
        assert values[MEAN, arm] == pytest.approx((values["svm", arm] + values["cnn", arm]) / 2)
