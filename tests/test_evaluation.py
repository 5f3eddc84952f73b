"""`medgen evaluate` on ill scans: who is healthy, what is painted, what stands beside the detector."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from worlds import QUICK_2D, SAMPLES

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.data.controls import CONTROLS
from medgen.data.lesions import KINDS_B, Mask
from medgen.data.phantoms import head
from medgen.data.recipe import Percentiles, Recipe
from medgen.errors import ConfigError, DataError
from medgen.io.source import ReadOptions
from medgen.scan import Scan
from medgen.tasks.cases import painted, refuse_overlap, sorted_scans
from medgen.tasks.detection import BASELINES, DETECTOR, MAPPED, Case, Method, controlled, measured
from medgen.tasks.detection_table import lines
from medgen.tasks.evaluate import Asked

METHODS = [DETECTOR, *BASELINES]
OWN = Asked(paint="own", kinds=("scaled", "missing-slice"))


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals are tested where they are made."""
    monkeypatch.setattr("medgen.tasks.detection._DRAWS", 20)


@pytest.fixture(scope="module")
def normal_bundle(xrays, tmp_path_factory) -> Path:
    """A bundle trained for a moment on the healthy radiographs alone."""
    out = tmp_path_factory.mktemp("bundles") / "normal"
    return medgen.train(xrays, out, label="normal", minutes=None, overrides=QUICK_2D)


# -- whole scans -----------------------------------------------------------------------------------------


def test_ill_classes_are_told_from_the_class_learned_beside_every_baseline(xrays, normal_bundle, tmp_path):
    asked = Asked(rate=0.2)
    found = medgen.evaluate(xrays, normal_bundle, split="all", detection=asked, out=tmp_path / "out")["detection"]
    assert [row["method"] for row in found["rows"]] == METHODS
    assert {row["ill"] for row in found["rows"]} == {"opacity"}
    with (tmp_path / "out" / "scans.csv").open() as file:
        scans = list(csv.DictReader(file))
    for row, false in zip(found["rows"], found["false_positives"], strict=True):
        mine = [scan for scan in scans if scan["method"] == row["method"]]
        sick = [scan["group"] == "opacity" for scan in mine]
        unusual = [float(scan["unusual"]) for scan in mine]
        assert sum(sick) == row["scans"] == 12
        assert row["auroc"] == pytest.approx(roc_auc_score(sick, unusual))
        assert row["average_precision"] == pytest.approx(average_precision_score(sick, unusual))
        assert row["auroc_interval"].low <= row["auroc"] <= row["auroc_interval"].high
        assert "voxel_ap" not in row
        healthy = [float(scan["p"]) for scan in mine if scan["group"] == "healthy"]
        assert min(healthy) > 0
        assert false["flagged"] == pytest.approx(np.mean(np.asarray(healthy) <= 0.2))
    behind = {row["method"]: row.get("auroc_behind") for row in found["rows"]}
    rows = {row["method"]: row["auroc"] for row in found["rows"]}
    assert behind.pop(DETECTOR) is None
    assert all(gap == pytest.approx(rows[DETECTOR] - rows[name]) for name, gap in behind.items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "detection.md", "detection.csv", "scans.csv", "false_positives.csv", "controls.csv", "ranks.png", "run.json",
    }  # fmt: skip


def test_a_bundle_that_learned_every_class_has_nobody_to_detect(xrays, xray_bundle):
    found = medgen.evaluate(xrays, xray_bundle)
    assert "detection" not in found
    assert {"psnr_db", "ssim", "scans", "left_out", "split"} <= set(found)
    told = medgen.evaluate(xrays, xray_bundle, detection=Asked(healthy=["normal"]))
    assert told["detection"]["rows"][0]["ill"] == "opacity"
    assert {name: told[name] for name in found} == found


def test_nobody_is_tested_whom_a_baseline_learned_from(xrays, normal_bundle, heads, heads_bundle, tmp_path):
    for folder, bundle in ((xrays, normal_bundle), (heads, heads_bundle)):
        scans = sorted_scans(Bundle.load(bundle), folder, ReadOptions())
        assert len(scans.train) >= 3 <= len(scans.held)
        assert not set(scans.healthy.patients) & (set(scans.train.patients) | set(scans.held.patients))
    shutil.copytree(xrays, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "opacity")
    scans = sorted_scans(Bundle.load(normal_bundle), tmp_path / "other", ReadOptions(), all_healthy=True)
    assert "did not learn from this folder" in scans.says
    assert not set(scans.healthy.patients) & set(scans.train.patients)
    assert len(scans.healthy) + len(scans.train) == 24


def test_who_is_ill_may_be_said(xrays, normal_bundle):
    bundle = Bundle.load(normal_bundle)
    assert set(sorted_scans(bundle, xrays, ReadOptions(), split="all").ill) == {"opacity"}
    assert not sorted_scans(bundle, xrays, ReadOptions(), split="all", ill=["something else"]).ill
    turned = sorted_scans(bundle, xrays, ReadOptions(), split="all", healthy=["opacity"])
    assert set(turned.ill) == {"normal"}
    counts = [sum(map(len, sorted_scans(bundle, xrays, ReadOptions(), split=s).ill.values())) for s in ("test", "all")]
    assert counts[0] < counts[1] == 12


# -- findings --------------------------------------------------------------------------------------------


def test_painted_heads_are_measured_in_voxels_and_again_the_same(heads, heads_bundle, command):
    found = medgen.evaluate(heads, heads_bundle, detection=OWN)["detection"]
    assert [(row["ill"], row["method"]) for row in found["rows"]] == [(k, m) for k in OWN.kinds for m in METHODS]
    for row in found["rows"]:
        assert ("voxel_ap" in row) == (row["method"] == DETECTOR or BASELINES[row["method"]]["do"] in MAPPED)
        if "voxel_ap" in row:
            assert 0 <= row["voxel_ap"] <= 1
            assert row.get("dice", 0) <= row["best_dice"] + 1e-9
            assert 0 <= row["aupro"] <= 1
    assert [row["method"] for row in found["controls"]] == METHODS
    assert all(set(CONTROLS) < set(row) for row in found["controls"])
    code, out, _ = command("evaluate", heads, "-m", heads_bundle, "--paint", "own", "--kinds", "scaled", "--json", "-q")
    assert code == 0
    again = json.loads(out)["detection"]
    assert again["rows"][0]["voxel_ap"] == pytest.approx(found["rows"][0]["voxel_ap"], abs=1e-6)
    assert again["painted"] == ["scaled"]


def test_masks_of_findings_make_a_scan_ill_in_a_folder_never_seen(heads, heads_bundle, tmp_path, command):
    folder = tmp_path / "clinic"
    folder.mkdir()
    for path in (*sorted(heads.iterdir())[:16], *(SAMPLES / "heads_ill").glob("*.nii.gz")):
        shutil.copy(path, folder)
    out = tmp_path / "out"
    code, told, _ = command("evaluate", folder, "-m", heads_bundle, "--split", "all", "-o", out, "-q")
    assert code == 0
    assert "with findings" in told
    assert "did not learn from this folder" in told
    with (out / "detection.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["scans"] for row in rows} == {"2"}
    assert float(rows[0]["voxel_ap_low"]) <= float(rows[0]["voxel_ap"])
    code, _, err = command("evaluate", folder, "-m", heads_bundle, "--split", "all", "-o", out, "-q")
    assert code == 3
    assert "exists already" in err


def test_what_trained_a_detector_does_not_test_it(heads, heads_bundle, tmp_path, command):
    bundle = Bundle.load(heads_bundle)
    for known, asked in (("scaled", OWN), ("hyper", Asked(paint="own"))):
        trained = replace(bundle, training={**bundle.training, "anomaly_kinds": ["blob", known]})
        with pytest.raises(DataError, match=f"trained to find {known}"):
            medgen.evaluate(heads, trained, detection=asked)
    trained = replace(bundle, training={**bundle.training, "mask_hashes": ["abc"]})
    refuse_overlap(trained, KINDS_B, [Mask("other", "", 1.0, "def")])
    with pytest.raises(DataError, match="1 of these 2 masks, mine among them"):
        refuse_overlap(trained, (), [Mask("mine", "", 1.0, "abc"), Mask("other", "", 1.0, "def")])
    code, _, err = command("evaluate", heads, "-m", heads_bundle, "--paint", "own", "--kinds", "cut-paste")
    assert code == 2
    assert "no lesion of the kind 'cut-paste'" in err
    with pytest.raises(ConfigError, match="nonsense"):
        Asked(kinds=["hyper", "nonsense"])


def test_drawn_masks_are_painted_and_their_bundle_refused(heads, heads_bundle, tmp_path):
    mask = io.read(SAMPLES / "heads_ill" / "sub-101_T1w_mask.nii.gz")
    io.write(replace(mask, is_label=True), tmp_path / "lesion.nii.gz")
    asked = Asked(paint=str(tmp_path), kinds=("scaled",))
    bundle = Bundle.load(heads_bundle)
    found = medgen.evaluate(heads, bundle, detection=asked)["detection"]
    assert found["masks"] == 1
    from medgen.data.lesions import mask_library

    hashes = [mask_library(tmp_path)[0].sha256]
    with pytest.raises(DataError, match=r"1 of these 1 masks, lesion.nii.gz among them"):
        medgen.evaluate(heads, replace(bundle, training={**bundle.training, "mask_hashes": hashes}), detection=asked)


# -- measured truths ---------------------------------------------------------------------------------------


def people(count: int) -> list[Case]:
    scan = Recipe(steps=(Percentiles(),))(head(0, shape=(12, 14, 12), spacing=14.0)[0])
    return [Case(f"c{n}", f"p{n}", scan) for n in range(count)]


def telling(name: str, values: dict[str, float], **more) -> Method:
    return Method(name, lambda case: (values[case.name], None), np.linspace(-1, 1, 39), **more)


def test_perfect_random_and_two_sided_methods_get_what_they_deserve():
    healthy = people(40)
    ill = [replace(case, name=f"ill{case.name}", patient=f"ill{case.patient}") for case in people(20)]
    calm = {case.name: value for case, value in zip(healthy, np.linspace(-0.9, 0.9, 40), strict=True)}
    ends = {case.name: 5.0 if n % 2 else -5.0 for n, case in enumerate(ill)}
    high = {case.name: 5.0 for case in ill}
    same = {case.name: 0.0 for case in ill}
    methods = [
        telling("high", calm | high), telling("both", calm | ends, two_sided=True),
        telling("one", calm | ends), telling("none", calm | same),
    ]  # fmt: skip
    found = measured(methods, healthy, {"ill": ill}, rate=0.05)
    rows = {row["method"]: row for row in found["rows"]}
    assert [rows[name]["auroc"] for name in ("high", "both", "one", "none")] == [1, 1, 0.5, 0.5]
    assert rows["high"]["sensitivity"] == rows["both"]["sensitivity"] == rows["high"]["average_precision"] == 1
    assert rows["none"]["auroc_behind"] == 0.5
    assert rows["both"]["auroc_behind_interval"] == (0, 0)
    false = {row["method"]: row for row in found["false_positives"]}
    assert false["high"]["flagged"] == 0
    assert false["high"]["calibration_scans"] == 39
    low, upper = false["high"]["expected_interval"]
    assert low <= 0.05 <= upper


def test_a_map_that_is_the_mask_is_perfect_and_marks_are_counted():
    healthy, sick = people(6), []
    for lesions in painted(healthy, ["scaled"], (), seed=1).values():
        sick += lesions
    # Nine looks, so some of the six are painted twice.
    assert len(sick) == 9
    assert len({case.lesion for case in sick}) == 9
    everywhere = np.zeros(sick[0].mask.shape, np.float32)

    def ask(case: Case) -> tuple[float, np.ndarray]:
        return 0.0, everywhere + (0 if case.mask is None else case.mask)

    method = Method("oracle", ask, np.zeros(20), level=0.5)
    (row,) = measured([method], healthy, {"scaled": sick})["rows"]
    assert [row[name] for name in ("voxel_ap", "best_dice", "dice")] == [1, 1, 1]
    assert row["aupro"] == pytest.approx(1)
    loud = replace(method, ask=lambda case: (0.0, everywhere + 1))
    (false,) = measured([loud], healthy, {"scaled": sick})["false_positives"]
    assert false["marked"] == 1


def test_controls_show_what_a_score_takes_for_healthy():
    def detail(case: Case) -> tuple[float, None]:
        return float(np.abs(np.diff(case.ready.voxels, axis=1)).mean()), None

    healthy = []
    for n in range(6):
        scan: Scan = Recipe(steps=(Percentiles(),))(head(n, shape=(18, 22, 18), spacing=10.0)[0])
        healthy.append(Case(f"c{n}", f"p{n}", scan))
    one, two = controlled(
        [Method("detail", detail, np.linspace(0.02, 0.2, 20)), Method("both", detail, np.zeros(1), two_sided=True)],
        healthy,
    )
    assert {"constant", "blurred"} <= set(one["below"])
    assert one["noise"] == 1
    assert one["mean"] == pytest.approx(np.mean([one[name] for name in CONTROLS]))
    assert two["noise"] == 1


def test_a_table_is_readable_without_anything_to_tell():
    found = {"healthy_scans": 0, "rate": 0.05, "rows": [{"ill": "x", "method": "m", "scans": 1}], "false_positives": []}
    assert any("| x   | m      | 1     |" in line for line in lines(found))
