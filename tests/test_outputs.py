"""What was made becomes a dataset of the same build as the user's own, which medgen and others read back."""

import csv
import gzip
import json
import subprocess
import tracemalloc
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from validators import assert_conforms, tool

from medgen import io
from medgen.data.manifest import Manifest, index
from medgen.data.phantoms import Lesion, chest_xray, head
from medgen.errors import ConfigError, DataError, OutputError
from medgen.grid import Grid
from medgen.io.raster import stream_npz
from medgen.io.source import ReadOptions
from medgen.scan import Scale, Scan
from medgen.tasks.outputs.files import Facts, Output, class_folder
from medgen.tasks.outputs.layout import Layout, layout_of
from medgen.tasks.ways.base import Made

COLOUR = ReadOptions(colour=True)
FACTS = Facts("a small VAE", "5e" * 32, 7)


@cache
def _phantoms() -> tuple[Scan, Scan, Scan]:
    lesion = Lesion((20.0, -20.0, 20.0), 14.0, 215.0)
    return *head(0, shape=(14, 17, 12), spacing=11.0, lesions=[lesion]), chest_xray(0, size=24)


def brain(n: int, *, label: str = "", masked: bool = True, **more) -> Made:
    scan, mask, _ = _phantoms()
    # Oblique, so that a transposed axis or a lost rotation cannot hide.
    turn = np.eye(4)
    turn[:3, :3] = [[0.0, -0.8, 0.6], [1.0, 0.0, 0.0], [0.0, 0.6, 0.8]]
    grid = Grid(scan.grid.shape, turn @ scan.grid.affine)
    scan = replace(scan, grid=grid, voxels=scan.voxels + np.uint16(n))
    scan = scan.with_header(modality="MR", body_part="HEAD", synthetic=True)
    mask = replace(mask, grid=grid, voxels=np.roll(mask.voxels, n, 1))
    told = {"age": str(30 + n), "sex": "F"}
    return Made(torch.zeros(1, 4, 4, 4), scan, label, mask if masked else None, told, **more)


def chest(n: int, *, label: str = "", masked: bool = False) -> Made:
    scan = _phantoms()[2]
    mask = scan.with_voxels(np.roll(scan.voxels > np.median(scan.voxels), n, 1).astype(np.uint8), scale=Scale())
    scan = scan.with_voxels(np.minimum(scan.voxels, 200) + np.uint8(n))
    return Made(torch.zeros(1, 4, 4), scan, label, replace(mask, is_label=True) if masked else None)


def several(made, labels=("a", "b b"), **more) -> dict[str, Made]:
    return {f"SYN-{n:04d}": made(n, label=labels[n % len(labels)], **more) for n in range(1, 7)}


def written(folder: Path, layout: Layout, made: dict[str, Made], facts: Facts = FACTS) -> list[dict]:
    output = Output(folder, layout, facts)
    rows = [output.write(name, one) for name, one in made.items()]
    scores = ({"r_voxel": 1.25, "p_label": 0.5} for _ in rows)
    return output.finish(
        [{**json.loads(json.dumps(row)), "scores": score} for row, score in zip(rows, scores, strict=True)]
    )


def same_voxels(folder: Path, path: str, scan: Scan, *, millimetres: float | None = 1e-3) -> None:
    """The numbers are exact, and every voxel lies where it lay, whichever way the axes run."""
    read = io.read(
        str(folder / path) if ";" not in path else ";".join(str(folder / p) for p in path.split(";")), COLOUR
    )
    if millimetres is None:
        np.testing.assert_array_equal(read.physical(), scan.physical())
        return
    back = read.onto(scan.grid, outside=-1)
    np.testing.assert_array_equal(back.physical(), scan.physical())
    corners = np.sort(read.grid.corners(), axis=0) - np.sort(scan.grid.corners(), axis=0)
    assert np.abs(corners).max() <= millimetres


NNUNET = Layout("nnunet", "nifti", ("MR",), {"background": 0, "lesion": 1}, apart=True)
LAYOUTS = {
    "flat nifti": (Layout("flat", "nifti"), partial(several, brain, ("",))),
    "flat nifti, no masks": (Layout("flat", "nifti"), partial(several, brain, ("",), masked=False)),
    "classes nifti": (Layout("classes", "nifti"), partial(several, brain)),
    "classes nifti, no masks": (Layout("classes", "nifti"), partial(several, brain, masked=False)),
    "images+labels nifti": (Layout("images+labels", "nifti"), partial(several, brain)),
    "table nifti": (Layout("table", "nifti"), partial(several, brain)),
    "classes dicom": (Layout("classes", "dicom", ending=""), partial(several, brain)),
    "flat dicom, no masks": (Layout("flat", "dicom", ending=""), partial(several, brain, ("",), masked=False)),
    "images+labels dicom": (Layout("images+labels", "dicom", ending=""), partial(several, brain, ("",))),
    "classes png": (Layout("classes", "png", ending=".png"), partial(several, chest)),
    "images+labels png": (Layout("images+labels", "png", ending=".png"), partial(several, chest, masked=True)),
    "classes dicom, X-rays": (Layout("classes", "dicom", ending=""), partial(several, chest, masked=True)),
    "npz": (Layout("npz", "npz", ending=".npz"), partial(several, chest, ("0", "1"))),
    "npz of volumes": (Layout("npz", "npz", ending=".npz"), partial(several, brain, ("0", "1"), masked=False)),
    "nnunet": (NNUNET, partial(several, brain, ("",))),
    "nnunet png": (
        Layout("nnunet", "png", ("X-ray",), {"background": 0, "dark": 1}, ending=".png", apart=True),
        partial(several, chest, ("",), masked=True),
    ),
    "bids": (Layout("bids", "nifti", suffixes=("T1w",)), partial(several, brain, ("",))),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_reads_back_as_it_was_made(name, tmp_path):
    layout, make = LAYOUTS[name]
    made = make()
    rows = written(tmp_path, layout, made)
    table, found = index(tmp_path / "manifest.csv"), index(tmp_path)
    assert {row.case for row in table.rows} == set(made)
    assert {row.split for row in table.rows} == {"train"}
    in_folder = {row.path: row for row in found.rows}
    for row in table.rows:
        one = made[row.case]
        assert (row.label, bool(row.mask)) == (one.label, one.mask is not None)
        assert dict(row.covariates) == dict(one.covariates)
        kept = layout.format in ("nifti",) or (layout.format == "dicom" and one.scan.header.modality == "MR")
        same_voxels(tmp_path, row.path, one.scan, millimetres=1e-3 if kept else None)
        assert row.path in in_folder, sorted(in_folder)
        alike = in_folder[row.path]
        assert (alike.mask, alike.kind) == (row.mask, row.kind)
        assert alike.label == one.label
        if one.mask is not None:
            mask = io.read(tmp_path / row.mask)
            scan = io.read(";".join(str(tmp_path / part) for part in row.path.split(";")), COLOUR)
            assert mask.grid.shape == scan.grid.shape
            if layout.format != "png":
                np.testing.assert_allclose(mask.grid.affine, scan.grid.affine, atol=1e-4)
                assert mask.is_label
            assert mask.voxels.dtype.kind in "ui"
            same_voxels(tmp_path, row.mask, one.mask, millimetres=1e-3 if kept else None)
    assert len(found.rows) == len(made)
    assert [row["case"] for row in rows] == list(made)


# -- the user's own layout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_written_is_recognised_as_what_it_was_written_as(name, tmp_path):
    layout, make = LAYOUTS[name]
    written(tmp_path, layout, make())
    manifest = index(tmp_path)
    found = layout_of(tmp_path, manifest)
    masks, classes = any(row.mask for row in manifest.rows), bool(manifest.labels)
    own = {"table": "images+labels", "flat": "images+labels" if masks else "flat"}.get(layout.kind, layout.kind)
    own = "classes" if own == "images+labels" and classes and not masks else own
    assert (found.kind, found.format) == (own, layout.format)
    assert (found.channels, dict(found.labels), found.suffixes, found.ending) == (
        layout.channels, dict(layout.labels), layout.suffixes, layout.ending,
    )  # fmt: skip
    listed = layout_of(tmp_path / "manifest.csv", index(tmp_path / "manifest.csv"))
    assert (listed.kind, listed.format) == ("npz" if layout.kind == "npz" else "table", layout.format)


def test_another_format_keeps_what_it_can_of_the_layout(tmp_path):
    for name, asked, kind in [
        ("nnunet", "dicom", "images+labels"), ("bids", "dicom", "images+labels"), ("classes nifti", "dicom", "classes"),
        ("npz", "nifti", "classes"), ("classes png", "npz", "npz"), ("classes dicom, X-rays", "png", "classes"),
        ("flat dicom, no masks", "nifti", "flat"),
    ]:  # fmt: skip
        layout, make = LAYOUTS[name]
        folder = tmp_path / f"{name}-{asked}"
        written(folder, layout, make())
        manifest = index(folder)
        found = layout_of(folder, manifest, asked)
        assert (found.kind, found.format) == (kind, asked)
    with pytest.raises(ConfigError, match="has not"):
        layout_of(tmp_path / "bids-dicom", index(tmp_path / "bids-dicom"), "npz", masked=True)
    with pytest.raises(ConfigError, match="volumes of 12 slices"):
        layout_of(tmp_path / "bids-dicom", index(tmp_path / "bids-dicom"), "png")
    assert layout_of(tmp_path / "nnunet-dicom", index(tmp_path / "nnunet-dicom"), masked=False).kind == "images+labels"


def test_older_descriptions_of_the_decathlon_become_nnunets_without_its_list_of_cases(tmp_path):
    written(tmp_path, NNUNET, several(brain, ("",)))
    told = {
        "name": "Heads", "description": "Left and right", "reference": "https://example.org/heads", "licence": "CC-BY",
        "tensorImageSize": "3D", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Front"},
        "numTraining": 6, "training": [{"image": "./imagesTr/DOE.nii.gz"}], "test": ["./imagesTs/ROE.nii.gz"],
        "made_in": "/home/doe/heads",
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(told))
    layout = layout_of(tmp_path, index(tmp_path))
    assert (layout.kind, layout.channels, dict(layout.labels)) == ("nnunet", ("MRI",), {"background": 0, "Front": 1})
    assert dict(layout.extra) == {key: told[key] for key in ("description", "reference", "licence", "tensorImageSize")}
    written(tmp_path / "out", layout, several(brain, ("",)))
    text = (tmp_path / "out" / "dataset.json").read_text()
    assert "DOE" not in text
    assert "ROE" not in text
    assert "doe" not in text
    (tmp_path / "dataset.json").write_text('{"channel_names": 3}')
    with pytest.raises(DataError, match="expected an nnU-Net description"):
        layout_of(tmp_path, Manifest(index(tmp_path / "out").rows, (), tmp_path))


# -- several channels --------------------------------------------------------------------------------------


def stack(one: Made, channels: int, names: tuple[str, ...] = ()) -> Made:
    voxels = np.concatenate([one.scan.voxels + one.scan.voxels.dtype.type(10 * n) for n in range(channels)])
    return replace(one, scan=one.scan.with_voxels(voxels).with_header(channels=names))


CHANNELS = {
    "nnunet": (Layout("nnunet", "nifti", ("T1", "FLAIR"), {"background": 0, "a": 1}, apart=True), 2),
    "bids": (Layout("bids", "nifti", suffixes=("T1w", "FLAIR"), apart=True), 2),
    "table, a file a channel": (Layout("table", "nifti", apart=True), 2),
    "one file of all channels": (Layout("classes", "nifti"), 1),
    "dicom, a series a channel": (Layout("flat", "dicom", ending=""), 2),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_scans_of_several_channels_read_back_as_one(name, tmp_path):
    layout, files = CHANNELS[name]
    made = {case: stack(one, 2) for case, one in several(brain, ("",)).items()}
    written(tmp_path, layout, made)
    table = index(tmp_path / "manifest.csv")
    for row in table.rows:
        assert len(row.path.split(";")) == files
        same_voxels(tmp_path, row.path, made[row.case].scan)
        same_voxels(tmp_path, row.mask, made[row.case].mask)
    in_folder = {part for row in index(tmp_path).rows for part in row.path.split(";")}
    if name != "dicom, a series a channel":
        assert in_folder == {part for row in table.rows for part in row.path.split(";")}
    if name == "nnunet":
        assert_nnunet(tmp_path)


def test_a_colour_picture_is_one_file(tmp_path):
    made = {}
    for case, one in several(chest).items():
        voxels = np.concatenate([one.scan.voxels.astype(np.uint8) + np.uint8(n) for n in range(3)])
        made[case] = replace(one, scan=one.scan.with_voxels(voxels, scale=Scale()).with_header(photometric="RGB"))
    for layout in (LAYOUTS["classes png"][0], LAYOUTS["npz"][0]):
        folder = tmp_path / layout.format
        for row in written(folder, layout, made):
            assert ";" not in row["path"]
            same_voxels(folder, row["path"], made[row["case"]].scan, millimetres=None)


# -- rules of others ---------------------------------------------------------------------------------------


def assert_nnunet(folder: Path) -> None:
    """nnU-Net's integrity rules, from its documentation, by nibabel alone."""
    told = json.loads((folder / "dataset.json").read_text())
    assert {"channel_names", "labels", "numTraining", "file_ending"} <= set(told)
    values = sorted(told["labels"].values())
    assert values == list(range(len(values)))
    assert told["labels"]["background"] == 0
    ending = told["file_ending"]
    labels = {file.name.removesuffix(ending) for file in (folder / "labelsTr").iterdir()}
    images = {file.name for file in (folder / "imagesTr").iterdir()}
    channels = sorted(told["channel_names"], key=int)
    assert channels == [str(n) for n in range(len(channels))]
    assert len(labels) == told["numTraining"]
    assert images == {f"{case}_{n:04d}{ending}" for case in labels for n in range(len(channels))}
    for case in labels:
        label = nibabel.load(folder / "labelsTr" / f"{case}{ending}")
        assert set(np.unique(label.dataobj).tolist()) <= set(values)
        assert np.asanyarray(label.dataobj).dtype.kind in "ui"
        for n in range(len(channels)):
            image = nibabel.load(folder / "imagesTr" / f"{case}_{n:04d}{ending}")
            assert image.shape == label.shape
            assert len(image.shape) == 3
            assert np.isfinite(image.get_fdata()).all()
            np.testing.assert_array_equal(image.affine, label.affine)
            np.testing.assert_array_equal(image.header.get_zooms(), label.header.get_zooms())
            assert image.header["qform_code"] > 0
            np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)


def test_a_dataset_for_nnunet_keeps_its_rules_and_the_users_own_words(tmp_path):
    layout = replace(NNUNET, extra={"licence": "CC-BY-4.0", "overwrite_image_reader_writer": "NibabelIO"})
    written(tmp_path, layout, several(brain, ("",)), replace(FACTS, name="Heads"))
    assert_nnunet(tmp_path)
    told = json.loads((tmp_path / "dataset.json").read_text())
    assert told["channel_names"] == {"0": "MR"}
    assert (told["name"], told["licence"]) == ("Heads", "CC-BY-4.0")
    assert told["overwrite_image_reader_writer"] == "NibabelIO"


def derived(n: int, **more) -> Made:
    return replace(brain(n, **more), how="lesion", sources=("C-0123456789ab",), patient="P-0123456789ab")


@pytest.mark.parametrize("mask", ["dseg", "label-lesion_mask"])
def test_bids_is_valid_for_its_own_validator(mask, tmp_path):
    program = tool("bids-validator-deno")
    made = several(brain, ("ill", "well")) | {"SYN-0007": derived(7), "SYN-0008": derived(8)}
    made = {case: stack(one, 2) for case, one in made.items()}
    layout = Layout("bids", "nifti", suffixes=("T1w", "FLAIR"), mask=mask, apart=True)
    rows = written(tmp_path, layout, made)
    for own in ("run.json", "contact_sheet.png", "bundle/bundle.json", "privacy.json", "bundle/preview.png"):
        (tmp_path / own).parent.mkdir(exist_ok=True)
        (tmp_path / own).write_text("{}")
    run = subprocess.run([program, "--json", str(tmp_path)], capture_output=True, text=True)
    if "issues" not in run.stdout:
        pytest.skip(f"bids-validator-deno does not run here: {run.stderr[-300:]}")
    issues = json.loads(run.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert run.returncode == 0
    found = index(tmp_path)
    assert {row.mask for row in found.rows} == {row["mask"] for row in rows}
    # What shows one patient stays one patient's.
    assert {row.patient for row in found.rows if "ses-" in row.path} == {"sub-P0123456789ab"}
    assert {row.covariates["group"] for row in found.rows if "ses-" not in row.path} == {"ill", "well"}
    sidecar = json.loads((tmp_path / rows[0]["path"].split(";")[0]).with_name("sub-SYN0001_T1w.json").read_text())
    assert sidecar["SyntheticData"] is True
    assert (sidecar["GeneratorModel"], sidecar["WeightsSHA256"], sidecar["Seed"]) == ("a small VAE", "5e" * 32, 7)
    told = json.loads((tmp_path / "dataset_description.json").read_text())
    assert (told["DatasetType"], told["GeneratedBy"][0]["Name"], len(told["Authors"])) == ("derivative", "medgen", 2)


@pytest.mark.parametrize("name", ["classes dicom", "classes dicom, X-rays"])
def test_series_conform(name, tmp_path):
    layout, make = LAYOUTS[name]
    made = make()
    made = {
        "SYN-0001": made["SYN-0001"],
        "SYN-0002": replace(made["SYN-0002"], how="edit", sources=("C-0123456789ab",)),
    }
    for row in written(tmp_path, layout, made):
        place = tmp_path / row["path"]
        files = sorted(place.glob("*.dcm")) if place.is_dir() else [place]
        assert_conforms(files[:1] if place.is_dir() else files)
        first = pydicom.dcmread(files[0])
        assert first.SyntheticData == "YES"
        assert str(first.PatientID) == row["patient"]
        assert ("shows nobody" in first.DerivationDescription) == (row["origin"] == "synthetic")
        assert ("a small VAE" in first.DerivationDescription) == (row["how"] != "classic")


@pytest.mark.parametrize("name", ["classes dicom", "images+labels dicom", "bids"])
def test_scans_of_one_patient_keep_their_own_masks_without_the_table(name, tmp_path):
    layout, _ = LAYOUTS[name]
    labels = ("a", "b") if layout.kind == "classes" else ("",)
    made = {f"SYN-{n:04d}": derived(n, label=labels[n % len(labels)]) for n in range(1, 7)}
    rows = {row["path"]: row for row in written(tmp_path, layout, made)}
    (tmp_path / "manifest.csv").unlink()
    found = index(tmp_path)
    assert len({row.patient for row in found.rows}) == 1
    assert {row.path: row.mask for row in found.rows} == {path: row["mask"] for path, row in rows.items()}


# -- honesty, privacy and interruptions --------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["classes nifti", "classes dicom", "images+labels png", "npz", "nnunet", "bids"])
def test_the_same_scans_give_the_same_bytes_also_after_an_interruption(name, tmp_path):
    layout, make = LAYOUTS[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    written(whole, layout, make())
    output = Output(broken, layout, FACTS)
    rows = [output.write(case, one) for case, one in make().items()]
    for row in rows[-2:]:
        for part in filter(None, (*row["path"].split(";"), row["mask"])):
            place = broken / part
            if place.is_dir():
                next(place.glob("*.dcm")).unlink()
            else:
                place.write_bytes(place.read_bytes()[:40])
    left = broken / f"{rows[-1]['path']}.4711.part"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"unfinished")
    (broken / "journal.json.part").write_text("somebody else's")
    rest = {row["case"]: row for row in rows[:-2]}
    again = Output(broken, layout, FACTS)
    rows = [rest.get(case) or again.write(case, one) for case, one in make().items()]
    scored = [{**row, "scores": {"r_voxel": 1.25, "p_label": 0.5}} for row in rows]
    again.finish(scored)
    again.finish(scored)
    assert (broken / "journal.json.part").read_text() == "somebody else's"
    (broken / "journal.json.part").unlink()
    assert tree(broken) == tree(whole)


@pytest.mark.parametrize("name", ["classes nifti", "images+labels dicom", "npz of volumes", "nnunet", "bids"])
def test_nobodys_name_is_in_what_is_written(name, tmp_path):
    layout, make = LAYOUTS[name]
    of = {"sources": ("CANARY^PHI/scan", "CANARY^PHI/other"), "patient": "CANARY^PHI", "how": "interpolate"}
    made = {case: replace(one, **of) for case, one in make().items()}
    rows = written(tmp_path, layout, made)
    for path, content in tree(tmp_path).items():
        assert "CANARY" not in path
        content = gzip.decompress(content) if path.endswith(".gz") else content
        assert b"CANARY" not in content, path
        assert str(tmp_path).encode() not in content, path
        if path not in ("participants.json", "README.md"):
            assert b"shows nobody" not in content, path
    assert len({row["patient"] for row in rows}) == 1
    table = index(tmp_path / "manifest.csv")
    assert {row.split for row in table.rows} == {"train"}
    with (tmp_path / "manifest.csv").open(newline="") as file:
        told = list(csv.DictReader(file))
    assert {row["origin"] for row in told} == {"derived"}
    assert all(len(row["sources"].split(";")) == 2 for row in told)


def test_the_table_says_how_each_scan_was_made(tmp_path):
    made = several(brain)
    made["SYN-0002"] = replace(made["SYN-0002"], parameters={"t": 0.25, "of": ["a", "b"]}, covariates={"model": "X"})
    written(tmp_path, LAYOUTS["classes nifti"][0], made)
    with (tmp_path / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["origin"] == "synthetic"
    assert (rows[0]["how"], rows[0]["model"], rows[0]["seed"]) == ("sample", "a small VAE", "7")
    assert rows[0]["weights_sha256"] == "5e" * 32
    assert json.loads(rows[1]["parameters"]) == {"t": 0.25, "of": ["a", "b"]}
    assert (rows[1]["covariate_model"], rows[1]["age"]) == ("X", "")
    assert (rows[0]["r_voxel"], rows[0]["p_label"]) == ("1.25", "0.5")
    assert list(rows[0])[-1] == "root"
    # Only what is known of the scans themselves is a covariate, also in a copy that medgen saves.
    table = index(tmp_path / "manifest.csv")
    assert dict(table.rows[0].covariates) == {"age": "31", "sex": "F"}
    table.save(tmp_path / "copy.csv")
    assert dict(Manifest.load(tmp_path / "copy.csv").rows[0].covariates) == {"age": "31", "sex": "F"}


def test_pictures_of_reports_are_no_scans(tmp_path):
    layout, make = LAYOUTS["classes png"]
    rows = written(tmp_path, layout, make())
    for own in ("contact_sheet.png", "bundle/preview.png"):
        (tmp_path / own).parent.mkdir(exist_ok=True)
        (tmp_path / own).write_bytes((tmp_path / rows[0]["path"]).read_bytes())
    found = index(tmp_path)
    assert len(found.rows) == len(rows)
    assert {row.label for row in found.rows} == {"a", "b b"}


def test_what_is_wrong_is_refused_in_a_sentence(tmp_path):
    plain = Output(tmp_path, Layout("flat", "nifti"), FACTS)
    good = brain(1)
    assert good.mask is not None
    shifted = good.mask.grid.affine.copy()
    shifted[0, 3] += 0.2
    moved = replace(good.mask, grid=Grid(good.mask.grid.shape, shifted))
    soft = good.mask.with_voxels(good.mask.voxels * np.float32(0.4))
    empty = good.scan.with_voxels(np.full(good.scan.voxels.shape, np.nan, np.float32))
    for made, says in [
        (replace(good, mask=moved), "its scan's grid"), (replace(good, mask=soft), "one label a voxel"),
        (replace(good, mask=good.mask.onto(good.mask.grid.crop((0, 0, 0), (9, 9, 9)), outside=0)), "its scan's grid"),
        (replace(good, scan=empty), "finite"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=says):
            plain.write("SYN-0001", made)
    assert tree(tmp_path) == {}
    with pytest.raises(ConfigError, match="letters, digits and hyphens"):
        plain.write("../SYN-0001", good)
    nnunet = Output(tmp_path, NNUNET, FACTS)
    for made, says in [
        (replace(good, mask=None), "masks"), (stack(good, 2), "channels of dataset.json"),
        (replace(good, mask=good.mask.with_voxels(good.mask.voxels * np.uint8(3))), "label 3"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=says):
            nnunet.write("SYN-0001", made)
    npz = Output(tmp_path, Layout("npz", "npz"), FACTS)
    with pytest.raises(ConfigError, match="masks"):
        npz.write("SYN-0001", good)
    with pytest.raises(ConfigError, match="one channel"):
        npz.write("SYN-0001", stack(replace(good, mask=None), 2))
    with pytest.raises(DataError, match="T1w"):
        Output(tmp_path, Layout("bids", "nifti", suffixes=("T1w",)), FACTS).write("SYN-0001", stack(good, 2))
    for kind, format in (("nnunet", "dicom"), ("bids", "png"), ("npz", "png"), ("flat", "npz")):
        with pytest.raises(ConfigError):
            Layout(kind, format)
    assert tree(tmp_path) == {}


def test_an_npz_of_scans_of_several_shapes_is_refused(tmp_path):
    output = Output(tmp_path, Layout("npz", "npz"), FACTS)
    one = chest(1)
    rows = [output.write("SYN-0001", one)]
    smaller = one.scan.onto(one.scan.grid.crop((0, 0, 0), (9, 9, 1)), outside=0)
    rows.append(output.write("SYN-0002", replace(one, scan=smaller)))
    with pytest.raises(DataError, match="2 shapes"):
        output.finish(rows)
    assert index(tmp_path / "arrays").rows


def test_labels_of_an_npz_are_numbers(tmp_path):
    for number, (labels, expected) in enumerate(
        [(("3", "10"), {"3", "10"}), (("cat", "ant"), {"0", "1"}), (("0 1", "1 1"), {"0 1", "1 1"}), (("",), {""})]
    ):
        written(tmp_path / str(number), Layout("npz", "npz"), several(chest, labels))
        assert {row.label for row in index(tmp_path / str(number)).rows} == expected
        assert {row.label for row in index(tmp_path / str(number) / "manifest.csv").rows} == set(labels)


def test_an_npz_is_written_picture_by_picture(tmp_path):
    picture = np.arange(2**18, dtype=np.float32).reshape(512, 512)
    tracemalloc.start()
    stream_npz(tmp_path / "a.npz", (picture + n for n in range(40)), (40, 512, 512), picture.dtype, np.arange(40))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * picture.nbytes
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["train_images"][17], picture + 17)
        np.testing.assert_array_equal(arrays["train_labels"], np.arange(40)[:, None])
    for count, shape in ((3, (512, 512)), (5, (512, 512)), (4, (512, 511))):
        with pytest.raises(OutputError):
            stream_npz(tmp_path / "b.npz", [picture] * count, (4, *shape), picture.dtype)
    assert not (tmp_path / "b.npz").exists()


def test_classes_are_folders_that_every_system_can_have():
    assert [class_folder(name) for name in ("a", "Healthy control", "3", "labels", "Train")] == [
        "a", "Healthy control", "3", "class-labels", "class-Train",
    ]  # fmt: skip
    for name in ("..", "a/b", "a;b", "a#1", "a.", ".hidden", "x" * 300, "a\n", "x.part", "C:\\x"):
        safe = class_folder(name)
        assert safe == Path(safe).name
        assert not set(safe) & set(";#\\/:\n")
        assert not safe.startswith(".")
        assert len(safe) < 200
