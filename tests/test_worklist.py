"""What a scoring run leaves: the worklist, what was found, what nobody looked at, and pictures."""

import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.report.sheet import sheet
from medgen.tasks import anomaly
from medgen.tasks.calibration import clusters, p_value
from medgen.tasks.detector import Detector
from medgen.tasks.findings import Finding
from medgen.tasks.norms import norms
from medgen.tasks.worklist import Scored, file_name, own_name, suspicious_first

ONE = Finding(10.0, 1.0, 2.0, 3.0, 1.5, 2.5, 3.5, 4.5, 0.05, True)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def knowing_clusters(bundle: Bundle) -> Detector:
    """The bundle's detector, told that healthy scans have clusters of at most 9 voxels above z = 2."""
    detector = Detector.of(bundle)
    assert detector.normals is not None
    largest = np.arange(len(detector.normals.maxima), dtype=float) % 10
    return replace(detector, normals=replace(detector.normals, largest=largest, forming=2.0))


@pytest.fixture(scope="module")
def done(heads, ill_head, heads_bundle, tmp_path_factory) -> tuple[Path, anomaly.Scores]:
    """Two healthy heads and an ill one, scored at 10 %."""
    place = tmp_path_factory.mktemp("worklist")
    (place / "scans").mkdir()
    for path in (heads / "sub-001_T1w.nii.gz", heads / "sub-002_T1w.nii.gz", ill_head):
        shutil.copy(path, place / "scans")
    (place / "scans" / "sub-900_T1w.nii.gz").write_bytes(b"nothing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anomaly, "Detector", type("Told", (), {"of": staticmethod(knowing_clusters)}))
        return place / "out", medgen.score(place / "scans", heads_bundle, place / "out", rate=0.1)


def test_the_table_has_a_rank_and_every_column(done):
    out, scores = done
    table = rows(out / "scores.csv")
    columns = "rank case score unusual p flagged z_max mask_mm3 findings warnings error"
    assert list(table[0]) == columns.split()
    assert [row["rank"] for row in table] == ["1", "2", "3", ""]
    assert "101" in table[0]["case"]
    assert table[-1]["error"]
    first = scores.scans[0]
    assert int(table[0]["findings"]) == sum(one.p <= 0.1 for one in first.findings)


def test_findings_are_those_of_the_map_in_the_file(done, heads_bundle):
    out, scores = done
    scan = scores.scans[1]  # a head on the model's own lattice, so the file holds the map itself
    written = io.read(out / "maps" / f"{scan.case}_map.nii.gz", io.ReadOptions(on_nan="zero"))
    sizes = sorted(clusters(written.voxels[0], 2.0)[1], reverse=True)[:20]
    volumes = [one.volume_mm3 for one in scan.findings]
    assert volumes == pytest.approx([size * written.grid.voxel_volume for size in sizes])
    for one in scan.findings:
        at = np.rint(written.grid.index(np.array([one.peak_x, one.peak_y, one.peak_z]))).astype(int)
        assert written.voxels[0][tuple(at)] == pytest.approx(one.highest, abs=1e-3)
    assert max(one.highest for one in scan.findings) == pytest.approx(scan.z_max, abs=1e-3)
    table = rows(out / "findings.csv")
    assert [row["case"] for row in table] == [s.case for s in scores.scans for _ in s.findings or ()]
    stated = json.loads((out / "scores.json").read_text())["scans"][1]["findings"]
    assert stated == [asdict(one) for one in scan.findings]


def test_an_ill_head_has_a_finding_in_its_lesion(done, ill_head):
    _, scores = done
    assert scores.scans[0].findings[0].p <= 0.1
    assert all(scan.findings for scan in scores.scans[:-1])


def test_what_was_not_scored_has_a_mask_of_its_own(done):
    out, scores = done
    for scan in scores.scans[:-1]:
        z = np.asarray(nibabel.load(out / "maps" / f"{scan.case}_map.nii.gz").dataobj)
        place = out / "maps" / f"{scan.case}_scored.nii.gz"
        assert place.exists() == bool(np.isnan(z).any())
        if place.exists():
            where = nibabel.load(place)
            assert np.array_equal(np.asarray(where.dataobj) > 0, np.isfinite(z))
            assert where.shape == z.shape
    assert len(list((out / "maps").glob("*_scored.nii.gz"))) == 1  # the finer, wider one


def test_the_most_suspicious_are_seen_at_a_glance(done, tmp_path):
    with Image.open(done[0] / "worklist.png") as picture:
        assert picture.size[1] > 200
    tile = Image.new("RGB", (300, 100), (200, 0, 0))
    for n in range(7):
        tile.save(tmp_path / f"{n}.png")
    sheet(sorted(tmp_path.glob("*.png")), tmp_path / "all.png", title="seven", width=1000)
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.size[0] <= 1000
        seen = (np.asarray(picture) == (200, 0, 0)).all(-1).sum()
    assert seen == 7 * 300 * 100


def test_a_bundle_that_knows_no_clusters_lists_none(heads, heads_bundle, tmp_path, monkeypatch):
    def forgetting(bundle: Bundle) -> Detector:
        detector = Detector.of(bundle)
        assert detector.normals is not None
        return replace(detector, normals=replace(detector.normals, largest=np.empty(0)))

    monkeypatch.setattr(anomaly, "Detector", type("Told", (), {"of": staticmethod(forgetting)}))
    scores = medgen.score(heads / "sub-002_T1w.nii.gz", heads_bundle, tmp_path / "out")
    assert scores.scans[0].findings is None
    assert rows(tmp_path / "out" / "scores.csv")[0]["findings"] == ""
    assert not (tmp_path / "out" / "findings.csv").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scan_without_a_finite_score_is_not_called_anything(heads, heads_bundle, tmp_path, monkeypatch, value):
    def silent(self, *_, **__):
        return value, None

    monkeypatch.setattr(Detector, "__call__", silent)
    with pytest.raises(medgen.errors.DataError, match="no finite score"):
        medgen.score(heads / "sub-002_T1w.nii.gz", heads_bundle, tmp_path / "out")


def test_a_map_of_nothing_is_no_healthy_map(heads, heads_bundle, tmp_path, monkeypatch):
    def blind(self, x, **_):
        return 1.0, np.full(x.shape[2:], np.nan, np.float32)

    monkeypatch.setattr(Detector, "__call__", blind)
    (scan,) = medgen.score(heads / "sub-002_T1w.nii.gz", heads_bundle, tmp_path / "out").scans
    assert (scan.z_max, scan.mask_mm3, scan.findings) == (None, None, None)


# -- many scans, and who they are ------------------------------------------------------------------------


@pytest.fixture
def answering(monkeypatch):
    """Make every scan score what is listed, in turn."""

    def told(scores: list[float]) -> None:
        rest = iter(scores)
        monkeypatch.setattr(Detector, "__call__", lambda self, x, **_: (next(rest), None))

    return told


def people(heads: Path, place: Path, count: int, **columns: list[str]) -> Path:
    """A CSV of the first heads with these columns."""
    files = sorted(heads.iterdir())[:count]
    with place.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *columns])
        writer.writerows([str(path), *(cells[n] for cells in columns.values())] for n, path in enumerate(files))
    return place


def test_scans_unlike_the_calibration_scans_are_told_so(heads, heads_bundle, tmp_path, answering):
    healthy = np.asarray(Bundle.load(heads_bundle).calibration["scores"])
    sites = people(heads, tmp_path / "s.csv", 12, domain=["a", "b"] * 6)
    answering([float(healthy.max()) + 1 + n for n in range(12)])
    done = medgen.score(sites, heads_bundle, tmp_path / "far", maps=False)
    assert [said for said in done.notes if "12 of 12 scans have p <= 0.05" in said]
    assert json.loads((tmp_path / "far" / "run.json").read_text())["notes"] == list(done.notes)
    table = rows(tmp_path / "far" / "groups.csv")
    assert [(row["column"], row["group"], row["flagged"]) for row in table] == [
        ("domain", "a", "6"),
        ("domain", "b", "6"),
    ]
    assert json.loads((tmp_path / "far" / "scores.json").read_text())["groups"][0]["scans"] == 6
    answering([float(one) for one in healthy[:12]])
    near = medgen.score(sites, heads_bundle, tmp_path / "near", maps=False)
    assert not near.notes


def test_a_score_is_placed_among_those_of_the_same_age(heads, heads_bundle, tmp_path, answering):
    bundle = Bundle.load(heads_bundle)
    ages = np.linspace(20, 80, 40)
    learnt = norms(ages / 10 + 0.1 * np.sin(7 * ages), [{"age": str(age)} for age in ages])
    bundle = replace(bundle, calibration={**bundle.calibration, "norms": learnt.plain()})
    told = people(heads, tmp_path / "s.csv", 4, age=["70", "25", "", "5"])
    answering([7.0, 7.0, 7.0, 7.0])
    scans = {scan.case[4:7]: scan for scan in medgen.score(told, bundle, tmp_path / "out", maps=False).scans}
    assert scans["001"].p > 0.1
    assert scans["001"].warnings == ()
    assert scans["002"].p == pytest.approx(1 / 41)
    assert scans["002"].flagged
    assert "no age told" in scans["003"].warnings[0]
    assert scans["003"].p == p_value(
        np.asarray(bundle.calibration["scores"]), 7.0, two_sided=Detector.of(bundle).two_sided
    )
    assert "extrapolation" in scans["004"].warnings[0]


# -- order and names -------------------------------------------------------------------------------------


def test_the_lowest_p_comes_first_then_the_farthest_and_failures_last():
    scans = [
        Scored("bad", error="no"),
        Scored("far", 9.0, 8.0, 0.05),
        Scored("farther", 9.5, 9.0, 0.05),
        Scored("usual", 1.0, 0.1, 0.9),
        Scored("b", 1.0, 0.1, 0.9),
    ]
    assert [scan.case for scan in suspicious_first(scans)] == ["farther", "far", "b", "usual", "bad"]
    without = [Scored("low", 1.0), Scored("high", 2.0)]
    assert [scan.case for scan in suspicious_first(without)] == ["high", "low"]


@pytest.mark.parametrize("scan", [Scored("a", 1.0, 2.0, 0.5, True, 3.0, 4.0, (ONE,), ("w",)), Scored("b", error="e")])
def test_the_journal_brings_a_scan_back(scan):
    assert Scored.of(json.loads(json.dumps(asdict(scan)))) == scan


def test_no_two_cases_share_a_file_name():
    assert own_name("sub-01") == "sub-01"
    assert file_name("a b") == file_name("a_b") == "a_b"
    assert len({own_name(case) for case in ("a b", "a_b", "a+b", "a/b")}) == 4
    assert set(own_name("../x:y")) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
