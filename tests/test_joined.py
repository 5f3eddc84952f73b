"""Several modalities of a patient as the channels of one scan."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

import medgen
from medgen import io
from medgen.bundle import Bundle, Contract
from medgen.data.manifest import Manifest, Row, index
from medgen.errors import DataError, PrivacyError
from medgen.grid import Grid
from medgen.io.dicom.write import Provenance, write_series
from medgen.io.source import ReadOptions
from medgen.log import reporting
from medgen.scan import Scan
from medgen.tasks.derived import derived_scan
from medgen.tasks.intake import require_training_scans, scans_for, taken_in, training_scans
from medgen.tasks.outputs.files import Facts, Output
from medgen.tasks.outputs.layout import layout_of
from medgen.tasks.plan import Choices, plan_training
from medgen.tasks.ways.base import Made
from medgen.tasks.ways.sample import synthetic_scan

GRID = Grid((8, 8, 8), np.eye(4))


class Notes:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        """Keep it."""
        self.said.append(message)

    def start(self, what: str, total: float | None) -> object:
        """Draw nothing."""

    def advance(self, handle: object, amount: float, text: str) -> None:
        """Draw nothing."""

    def stop(self, handle: object) -> None:
        """Draw nothing."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T1w and T2w of twelve people in BIDS, a mask of each T2w; sub-03 has no T2w."""
    folder = tmp_path_factory.mktemp("both") / "world"
    rng = np.random.default_rng(3)
    apart = np.sqrt(sum((axis - 3.5) ** 2 for axis in np.indices((8, 8, 8))))
    for n in range(12):
        place = folder / f"sub-{n:02d}" / "anat"
        place.mkdir(parents=True)
        drawn = (apart < rng.uniform(2, 3)).astype(np.uint8)
        for name, bright in (("T1w", 90), ("T2w", 180)):
            if (n, name) == (3, "T2w"):
                continue
            values = (30 + bright * drawn + rng.normal(0, 4, drawn.shape)).clip(0, 255).astype(np.uint8)
            io.write(Scan(values[None], GRID), place / f"sub-{n:02d}_{name}.nii.gz")
        if n != 3:
            io.write(Scan(drawn[None], GRID, is_label=True), place / f"sub-{n:02d}_T2w_mask.nii.gz")
    return folder


def test_a_patients_scans_become_channels_in_the_order_asked_for(both):
    manifest = index(both)
    assert manifest.domains == ("T1w", "T2w")
    joined = manifest.joined(("T2w", "T1w"))
    assert len(joined) == 11
    assert {row.domain for row in joined.rows} == {"T2w+T1w"}
    row = joined.rows[0]
    assert row.path.split(";")[0].endswith("_T2w.nii.gz")
    assert row.mask.endswith("_T2w_mask.nii.gz")
    scan = io.read(joined.locate(row.path))
    assert scan.channels == 2
    assert scan.voxels[0].max() > scan.voxels[1].max()
    assert [(skip.path, skip.reason) for skip in joined.skipped[len(manifest.skipped) :]] == [
        ("sub-03", "no T2w to join")
    ]
    # Nobody changes the split.
    assert {row.patient: row.split for row in joined.rows}.items() <= {
        row.patient: row.split for row in manifest.rows
    }.items()


def rows(*cells: tuple[str, str, str]) -> Manifest:
    made = [
        Row(path, patient, path, "nifti", domain=domain, split="train", covariates={"age": "40"})
        for patient, path, domain in cells
    ]
    return Manifest(tuple(made), (), Path("data"))


def test_sessions_are_joined_apart_and_a_second_scan_of_one_is_named():
    table = rows(
        ("p", "ses-1/p_ses-1_T1w.nii", "T1w"), ("p", "ses-2/p_ses-2_T2w.nii", "T2w"),
        ("p", "ses-2/p_ses-2_T1w.nii", "T1w"), ("p", "ses-2/p_ses-2_run-2_T1w.nii", "T1w"),
    )  # fmt: skip
    joined = table.joined(("T1w", "T2w"))
    assert [row.case for row in joined.rows] == ["p_ses-2"]
    assert joined.rows[0].covariates == {"age": "40"}
    assert {skip.path: skip.reason for skip in joined.skipped} == {
        "p_ses-1": "no T2w to join",
        "ses-2/p_ses-2_run-2_T1w.nii": "one T1w of this session is joined already",
    }


def test_a_domain_that_is_called_so_is_not_joined():
    table = rows(("p", "a.nii", "T1w+T2w"), ("q", "b.nii", "T1w"), ("q", "c.nii", "T2w"))
    assert [row.path for row in table.of_domain("T1w+T2w").rows] == ["a.nii"]


def test_what_cannot_be_joined_is_refused():
    table = rows(("p", "a.nii", "T1w"), ("q", "b.nii", "T2w"))
    with pytest.raises(DataError, match="No patient has a scan of each of T1w, T2w"):
        table.of_domain("T1w+T2w")
    with pytest.raises(DataError, match="names one twice"):
        table.of_domain("T1w+T1w")
    with pytest.raises(DataError, match=r"no domain 'T1w\+PD'\. Domains: T1w, T2w"):
        table.of_domain("T1w+PD")


def test_a_bundle_of_joined_scans_knows_its_scans_again(both, tmp_path):
    made = medgen.train(both, tmp_path / "b", preset="gmm", domain="T1w+T2w", masks="joint", minutes=None)
    bundle = Bundle.load(made)
    assert (bundle.contract.channels, bundle.model.config.channels) == (2, 3)
    assert bundle.training["domains"] == ["T1w+T2w"]
    known = training_scans(bundle, both, ReadOptions())
    assert known is not None
    assert known.hash() == bundle.training["manifest_sha256"]
    assert len(scans_for(bundle, both, ReadOptions())) == 11
    assert medgen.evaluate(both, made)["scans"] >= 1
    # Of others there is nothing to join.
    only = replace(index(both), rows=index(both).where(domain="T1w").rows)
    only.save(tmp_path / "t1.csv")
    with pytest.raises(PrivacyError, match="did not learn from these scans"):
        require_training_scans(bundle, tmp_path / "t1.csv", ReadOptions())


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T1w and T2w of eight people in BIDS: the T2w five times as bright as the T1w, and on another level."""
    folder = tmp_path_factory.mktemp("unlike") / "world"
    rng = np.random.default_rng(4)
    apart = np.sqrt(sum((axis - 3.5) ** 2 for axis in np.indices((8, 8, 8))))
    for n in range(8):
        place = folder / f"sub-{n:02d}" / "anat"
        place.mkdir(parents=True)
        head = (apart < rng.uniform(2.2, 3.2)) * rng.uniform(0.8, 1, (8, 8, 8))
        for name, low, high in (("T1w", 0.0, 0.15), ("T2w", 0.05, 0.78)):
            values = (low + (high - low) * head).astype(np.float32)
            io.write(Scan(values[None], GRID), place / f"sub-{n:02d}_{name}.nii.gz")
    return folder


def test_each_modality_is_learned_in_its_own_range_and_drawn_in_it(unlike, tmp_path):
    made = medgen.train(unlike, tmp_path / "b", preset="gaussian", domain="T1w+T2w", minutes=None)
    bundle = Bundle.load(made)
    contract = bundle.contract
    assert contract.names == ("T1w", "T2w")
    assert contract.slope == pytest.approx((0.15, 0.73), rel=0.03)
    assert contract.intercept == pytest.approx((0, 0.05), abs=1e-6)
    # A real scan: the brightest of each channel is 1, and physical values come back.
    manifest = index(unlike).joined(("T1w", "T2w"))
    source = io.read(manifest.locate(manifest.rows[0].path))
    ready = bundle.recipe(source)
    assert ready.voxels.max(axis=(1, 2, 3)).tolist() == [1, 1]
    back = ready.onto(source.grid, outside=ready.scale.intercept).physical()
    cut = np.minimum(source.physical(), np.reshape([high for _, high in ready.scale.clip], (2, 1, 1, 1)))
    np.testing.assert_allclose(back, cut, rtol=1e-5, atol=1e-7)
    # A generated one: a file for each modality, as bright as that modality is.
    values = bundle.model.sample(2, seed=0)[0].clamp(0, 1)
    scan = synthetic_scan(bundle, values)
    assert scan.header.channels == ("T1w", "T2w")
    output = Output(tmp_path, layout_of(unlike, manifest), Facts("gaussian"))
    row = output.write("SYN-1", Made(values, scan, "", how="sample"))
    written = [io.read(tmp_path / path) for path in row["path"].split(";")]
    assert [path.rpartition("_")[2] for path in row["path"].split(";")] == ["T1w.nii.gz", "T2w.nii.gz"]
    for n, (one, high) in enumerate(zip(written, (0.15, 0.78), strict=True)):
        np.testing.assert_allclose(one.physical()[0], scan.physical()[n], rtol=1e-6, atol=1e-7)
        assert 0.8 * high < np.percentile(one.physical(), 99) < 1.05 * high
    # In one file all channels share a slope, so they are physical values there.
    io.write(scan, tmp_path / "both.nii.gz")
    whole = io.read(tmp_path / "both.nii.gz")
    np.testing.assert_array_equal(whole.physical(), scan.physical())
    # In DICOM each channel is a series with its own steps.
    series = write_series(scan.with_header(modality="MR", space=1), tmp_path / "dicom", provenance=Provenance("made"))
    for n, folder in enumerate(sorted({file.parent for file in series})):
        read = io.read(folder, ReadOptions(real_world=True)).onto(scan.grid, outside=0)
        np.testing.assert_allclose(read.physical()[0], scan.physical()[n], atol=2e-5)
    # Between two real scans, and back in a file like theirs.
    taken = [taken_in(bundle, manifest.locate(row.path), ReadOptions()) for row in manifest.rows[:2]]
    between = taken[0].ready.scale.between(taken[1].ready.scale, 0.5)
    derived = derived_scan(taken[0].x[0], taken[0], between)
    assert derived.physical().max(axis=(1, 2, 3)) == pytest.approx(np.array([0.15, 0.78]), rel=0.05)


def test_a_contract_of_other_channels_than_it_states_is_refused(unlike, tmp_path):
    plan = {"spacing": (1, 1, 1), "low": 0, "high": 1, "grid": GRID.to_dict(), "channels": 2}
    assert Contract(**plan, slope=[1.0, 2.0], intercept=[0.0, 0.0]).slope == (1.0, 2.0)
    assert Contract(**plan, slope=2, intercept=0).slope == 2.0
    for wrong in ({"slope": [1.0, 2.0, 3.0], "intercept": [0.0] * 3}, {"names": ["T1w"]}, {"slope": [1.0, 2.0]}):
        with pytest.raises(ValidationError, match=r"channel|intercept"):
            Contract(**plan, **wrong)


def test_joined_scans_are_scored_from_the_folder_they_lie_in(both, tmp_path):
    made = medgen.train(both, tmp_path / "b", preset="gmm", domain="T1w+T2w", minutes=None)
    scores = medgen.score(both, made, tmp_path / "s", maps=False)
    assert not scores.failed
    assert len(scores.scans) == 11


def test_the_plan_says_who_was_left_out(both):
    notes = Notes()
    with reporting(notes):
        plan_training(both, Choices("gmm", domain="T1w+T2w"))
    assert any("Left out: sub-03 (no T2w to join)" in said for said in notes.said)


def test_a_class_of_one_patient_is_spoken_of_and_one_that_nobody_is_left_to_learn_from_is_left_out(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["path,patient,label,split"]
    for n, label in enumerate(["common"] * 6 + ["rare", "alone"]):
        io.write(Scan(rng.integers(0, 255, (1, 8, 8, 8)).astype(np.uint8), GRID), tmp_path / f"{n}.nii.gz")
        lines.append(f"{n}.nii.gz,p{n},{label},{'test' if label == 'alone' else 'train'}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    notes = Notes()
    with reporting(notes):
        plan = plan_training(tmp_path / "table.csv", Choices("gmm"))
    assert plan.model.classes == ("common", "rare")
    assert any("No scan is left to learn alone from" in said for said in notes.said)
    assert any("One patient is left to learn rare from" in said for said in notes.said)
