"""The table of a dataset: what names tell, and that no patient is ever in two splits."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medgen.io as io
from medgen.data.manifest import Manifest, Row, index
from medgen.data.splits import QUOTAS, SPLITS, assigned
from medgen.errors import ConfigError, DataError, LeakageError, OutputError
from medgen.grid import Grid
from medgen.io.dicom.write import Provenance, write_series
from medgen.io.raster import write_npz
from medgen.scan import Header, Scale, Scan

_made = iter(range(1, 10**9))


def touch(folder: Path, *names: str) -> None:
    """Tiny files of different content: indexing looks at names, and at bytes only to find copies."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{next(_made):09d}".encode())


def rows(table: Manifest, *fields: str) -> list[tuple]:
    return [tuple(getattr(row, field) for field in fields) for row in table.rows]


def dicom(folder: Path, name: str, slices: int = 3) -> Path:
    start = next(_made)
    voxels = (np.arange(12 * slices, dtype=np.int16) + np.int16(start % 1000)).reshape(1, 4, 3, slices)
    grid = Grid((4, 3, slices), np.diag([-2.0, -2, 3, 1]))
    scan = Scan(voxels, grid, Scale(unit="HU"), Header("CT" if slices > 1 else "DX", space=int(slices > 1)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_series(scan, folder, provenance=Provenance("test", content="synthetic", seed=start), name=name)
    return folder


# -- what names tell ---------------------------------------------------------------------------------


def test_a_flat_folder_where_nothing_tells_the_patient(tmp_path: Path):
    touch(tmp_path, *(f"IXI{n:03d}-Guys-{n}.nii.gz" for n in range(12)))
    table = index(tmp_path)
    assert len(table) == len(table.patients) == 12
    assert rows(table, "case", "path", "kind")[3] == ("IXI003-Guys-3", "IXI003-Guys-3.nii.gz", "nifti")
    assert "nothing tells whose 12 of them are" in table.summary()
    assert {row.split for row in table.rows} == set(SPLITS)


def test_a_modality_at_the_end_of_a_name_shares_the_patient(tmp_path: Path):
    touch(tmp_path, *(f"IXI{n:03d}-Guys-{n}-{m}.nii.gz" for n in range(5) for m in ("T1", "T2")))
    table = index(tmp_path)
    assert len(table.patients) == 5
    assert table.domains == ("T1w", "T2w")


def test_nested_folders_may_repeat_a_name(tmp_path: Path):
    touch(tmp_path, "site1/001.nii.gz", "site2/001.nii.gz", "site2/002.nii.gz", "site1/002.nii.gz", "001.nii.gz")
    table = index(tmp_path)
    assert len(table.patients) == 5
    assert {row.case for row in table.rows} == {"site1_001", "site2_001", "site1_002", "site2_002", "001"}
    assert table.labels == ()


def test_class_folders_are_labels(tmp_path: Path):
    touch(tmp_path, *(f"normal/{n}.png" for n in range(9)), *(f"pneumonia/{n}.png" for n in range(5)))
    table = index(tmp_path)
    assert Counter(row.label for row in table.rows) == {"normal": 9, "pneumonia": 5}
    assert len(table.patients) == 14
    assert {row.split for row in table.where(label="pneumonia").rows} == set(SPLITS)


def test_class_folders_of_dicom_pictures(tmp_path: Path):
    for label, count in (("normal", 4), ("opacity", 3)):
        for n in range(count):
            made = dicom(tmp_path / "work" / f"{label}{n}", f"P-{label}-{n}", slices=1)
            (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
            (made / "0001.dcm").rename(tmp_path / "data" / label / f"{n}.dcm")
    table = index(tmp_path / "data")
    assert Counter(row.label for row in table.rows) == {"normal": 4, "opacity": 3}
    assert table.domains == ("DX",)
    assert len(table.patients) == 7


@pytest.mark.parametrize(
    "names",
    [
        [f"sub-{n:02d}/anat/sub-{n:02d}_T1w.nii.gz" for n in range(4)],
        [f"sub-{n:02d}/sub-{n:02d}_run-{r}_T1w.nii.gz" for n in range(4) for r in (1, 2)],
        [f"patient{n}/scan{s}.nii.gz" for n in range(4) for s in range(3)],
        [f"P{n:03d}/T1.nii.gz" for n in range(4)],
        [f"anna{'b' * n}/T{m}.nii.gz" for n in range(4) for m in (1, 2)],
        [f"x{'b' * n}/brain.nii.gz" for n in range(4)],
        [f"{n}/scan.nii.gz" for n in range(4)],
    ],
    ids=["bids", "flat bids", "patient folders", "one scan each", "modalities", "same name", "numbers"],
)
def test_patient_folders_are_no_classes(tmp_path: Path, names: list[str]):
    touch(tmp_path, *names)
    table = index(tmp_path)
    assert table.labels == ()
    assert len(table.patients) == 4
    assert len(table) == len(names)
    by_folder = {row.path.split("/")[0]: row.patient for row in table.rows}
    assert len(set(by_folder.values())) == 4


def test_modality_and_session_folders_are_no_classes(tmp_path: Path):
    touch(tmp_path, *(f"{m}/IXI{n}.nii.gz" for m in ("T1", "T2") for n in range(5)))
    table = index(tmp_path)
    assert table.labels == ()
    assert table.domains == ("T1w", "T2w")
    touch(tmp_path / "b", *(f"ses-{s}/{n}.nii.gz" for s in "12" for n in range(5)))
    assert index(tmp_path / "b").labels == ()


def test_folders_that_share_patients_are_no_classes(tmp_path: Path):
    touch(tmp_path, *(f"{kind}/sub-{n:02d}_T1w.nii.gz" for kind in ("native", "aligned") for n in range(5)))
    table = index(tmp_path)
    assert table.labels == ()
    assert len(table.patients) == 5


def test_bids(tmp_path: Path):
    touch(
        tmp_path,
        *(
            f"sub-{n:02d}/ses-{s}/anat/sub-{n:02d}_ses-{s}_{m}.nii.gz"
            for n in range(6)
            for s in "AB"
            for m in ("T1w", "T2w")
        ),
        "derivatives/lesions/sub-00/ses-A/anat/sub-00_ses-A_label-L_mask.nii.gz",
        "derivatives/lesions/sub-01/anat/sub-01_ses-B_space-T1w_dseg.nii.gz",
        "derivatives/prep/sub-01/anat/sub-01_ses-B_desc-preproc_T1w.nii.gz",
        "derivatives/prep/sub-02/anat/sub-02_ses-A_desc-brain_mask.nii.gz",
    )
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tgender\tsite\tlabel\tscore\n"
        + "".join(f"sub-{n:02d}\t{20 + n}\t{'m' if n % 2 else 'female'}\t{'AB'[n % 2]}\tx\tn/a\n" for n in range(6))
    )
    table = index(tmp_path)
    assert len(table) == 24
    assert table.patients == tuple(f"sub-{n:02d}" for n in range(6))
    assert table.domains == ("T1w@A", "T1w@B", "T2w@A", "T2w@B")
    assert table.rows[0].covariates == {
        "age": "20",
        "sex": "F",
        "site": "A",
        "participant_label": "x",
        "session": "A",
    }
    masked = {row.case: Path(row.mask).name for row in table.rows if row.mask}
    assert masked == {
        "sub-00_ses-A_T1w": "sub-00_ses-A_label-L_mask.nii.gz",
        "sub-00_ses-A_T2w": "sub-00_ses-A_label-L_mask.nii.gz",
        "sub-01_ses-B_T1w": "sub-01_ses-B_space-T1w_dseg.nii.gz",
        "sub-01_ses-B_T2w": "sub-01_ses-B_space-T1w_dseg.nii.gz",
    }
    reasons = {Path(skip.path).name: skip.reason for skip in table.skipped}
    assert "derived" in reasons["sub-01_ses-B_desc-preproc_T1w.nii.gz"]
    assert "brain mask" in reasons["sub-02_ses-A_desc-brain_mask.nii.gz"]


def test_a_flat_bids_cohort_uses_the_table_beside_its_folder(tmp_path: Path):
    touch(tmp_path, *(f"mni/sub-{n:02d}_T1w_space-MNI.nii.gz" for n in range(4)))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\n02\t33\nsub-03\tn/a\n")
    table = index(tmp_path / "mni")
    assert [row.covariates for row in table.rows] == [{}, {}, {"age": "33"}, {}]


def test_nnunet_channels_of_a_case_are_one_row(tmp_path: Path):
    cases = [f"BRATS_{n:03d}" for n in range(6)]
    touch(tmp_path, *(f"imagesTr/{case}_{c:04d}.nii.gz" for case in cases for c in (0, 1)))
    touch(
        tmp_path, *(f"labelsTr/{case}.nii.gz" for case in cases), "imagesTs/T_1_0000.nii.gz", "imagesTs/T_1_0001.nii.gz"
    )
    touch(tmp_path, "imagesTr/odd_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "FLAIR"}}))
    table = index(tmp_path)
    assert len(table) == 7
    row = next(row for row in table.rows if row.case == "BRATS_002")
    assert row.path == "imagesTr/BRATS_002_0000.nii.gz;imagesTr/BRATS_002_0001.nii.gz"
    assert (row.mask, row.domain) == ("labelsTr/BRATS_002.nii.gz", "T1w+FLAIR")
    assert table.locate(row.path).split(";")[1] == str(tmp_path / "imagesTr/BRATS_002_0001.nii.gz")
    assert {row.split for row in table.rows if row.case == "T_1"} == {"test"}
    assert not {row.split for row in table.rows if row.case != "T_1"} & {"test", ""}
    assert [skip.reason for skip in table.skipped if "odd" in skip.path] == ["channels 0000, 0001 expected, found 0000"]


def test_nnunet_rows_read_as_channels(tmp_path: Path):
    for c in (0, 1):
        (tmp_path / "imagesTr").mkdir(exist_ok=True)
        io.write(
            Scan(np.full((1, 3, 3, 3), c, np.int16), Grid((3, 3, 3), np.eye(4))),
            tmp_path / f"imagesTr/a_{c:04d}.nii.gz",
        )
    table = index(tmp_path)
    assert io.read(table.locate(table.rows[0].path)).voxels[:, 0, 0, 0].tolist() == [0, 1]


def test_numbers_that_count_cases_are_no_channels(tmp_path: Path):
    touch(tmp_path, *(f"imagesTr/case_{n:04d}.nii.gz" for n in range(1, 6)))
    assert len(index(tmp_path)) == 5


@pytest.mark.parametrize(
    ("scan", "mask"),
    [
        ("images/a1.nii.gz", "labels/a1.nii.gz"),
        ("imagesTr/a1.nii.gz", "labelsTr/a1.nii.gz"),
        ("x/images/a1.png", "x/masks/a1.png"),
        ("a1.nii.gz", "a1_mask.nii.gz"),
        ("a1.nii.gz", "a1_seg.nii.gz"),
        ("a1.nii.gz", "a1_labels.nii.gz"),
        ("a1.png", "a1_label.png"),
        ("a1_image.nrrd", "a1_label.nrrd"),
        ("p1/T1.nii.gz", "p1/lesion.nii.gz"),
        ("p1/T1.nii.gz", "p1/seg_net-20.nii.gz"),
        ("p26_FLAIR_space-MNI.nii.gz", "p26_lesion_space-MNI.nii.gz"),
        ("TCGA-FG-1_T1c.nii.gz", "TCGA-FG-1_seg-mav.nii.gz"),
        ("sub-01_T1w.nii.gz", "sub-01_T1w_mask.nii.gz"),
    ],
)
def test_a_mask_belongs_to_its_scan_and_is_never_one(tmp_path: Path, scan: str, mask: str):
    touch(tmp_path, scan, mask)
    other = scan.replace("p1", "p7") if "p1" in scan else re.sub(r"(\D)1|26", r"\g<1>7", scan, count=1)
    touch(tmp_path, other)
    table = index(tmp_path)
    assert {row.path: row.mask for row in table.rows} == {scan: mask, other: ""}


def test_of_several_masks_one_is_used_and_the_others_are_told(tmp_path: Path):
    touch(tmp_path, "p1/T1.nii.gz", "p1/seg_a.nii.gz", "p1/seg_bb.nii.gz", "p1/lonely/x9_mask.nii.gz")
    table = index(tmp_path)
    assert table.rows[0].mask == "p1/seg_a.nii.gz"
    reasons = {Path(skip.path).name: skip.reason for skip in table.skipped}
    assert reasons["seg_bb.nii.gz"].startswith("another mask of")


def test_a_mask_in_another_space_does_not_fit(tmp_path: Path):
    touch(tmp_path, "sub-01_space-MNI_T1w.nii.gz", "sub-01_T1w.nii.gz", "sub-01_space-MNI_mask.nii.gz")
    masks = {row.case: row.mask for row in index(tmp_path).rows}
    assert masks == {"sub-01_T1w": "", "sub-01_space-MNI_T1w": "sub-01_space-MNI_mask.nii.gz"}


def test_pictures_of_lesions_are_scans(tmp_path: Path):
    touch(tmp_path, *(f"benign/lesion_{n}.png" for n in range(3)), *(f"malign/skin_lesion_{n}.png" for n in range(3)))
    assert Counter(row.label for row in index(tmp_path).rows) == {"benign": 3, "malign": 3}


def test_dicom_trees_tell_patients_by_pseudonym(tmp_path: Path):
    for name in ("CANARY^ANNA", "CANARY^BERT"):
        for n in (1, 2):
            dicom(tmp_path / name / f"series{n}", name)
    table = index(tmp_path)
    assert (len(table), len(table.patients), table.domains) == (4, 2, ("CT",))
    assert table.labels == ()
    assert not any("CANARY" in row.case + row.patient for row in table.rows)
    assert {row.path for row in table.rows} >= {"CANARY^ANNA/series1"}
    for row in table.rows:
        assert io.read(table.locate(row.path)).voxels.shape == (1, 4, 3, 3)


def test_a_series_is_its_own_root(tmp_path: Path):
    table = index(dicom(tmp_path / "series", "X"))
    assert io.read(table.locate(table.rows[0].path)).channels == 1
    assert rows(table, "path", "split") == [(".", "train")]


def test_one_file_is_a_table_of_one(tmp_path: Path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    table = index(tmp_path / "a.nii.gz")
    assert rows(table, "case", "path", "split") == [("a", "a.nii.gz", "train")]


# -- official parts ----------------------------------------------------------------------------------


def collection(path: Path, n: int = 40) -> None:
    random = np.random.default_rng(3)
    images = {split: random.integers(0, 255, (n, 5, 5), dtype=np.uint8) for split in ("train", "val", "test")}
    images["train"][:3] = images["val"][:3]
    images["train"][-1] = images["train"][-2]
    write_npz(path, images, {split: np.arange(n) % 2 for split in images})


def test_npz_parts_are_kept_and_val_is_cut_from_train(tmp_path: Path):
    collection(tmp_path / "x.npz")
    table = index(tmp_path / "x.npz")
    splits = {row.path.partition("#")[2]: row.split for row in table.rows}
    assert all(splits[f"test/{n}"] == "test" and splits[f"val/{n}"] == "calibration" for n in range(40))
    for label in table.labels:
        here = [r.split for r in table.where(label=label).rows if "#train/" in r.path and r.split != "calibration"]
        assert Counter(here)["val"] == round(len(here) / 10)
    assert set(splits.values()) == set(SPLITS)


def test_copies_in_npz_never_train_what_is_held_out(tmp_path: Path):
    collection(tmp_path / "x.npz")
    splits = {row.path.partition("#")[2]: row.split for row in index(tmp_path).rows}
    assert [splits[f"train/{n}"] for n in range(3)] == ["calibration"] * 3
    assert splits["train/38"] == splits["train/39"]


def test_train_and_test_folders_are_parts_and_their_folders_classes(tmp_path: Path):
    touch(
        tmp_path,
        *(f"{part}/{label}/{label}{n}.jpg" for part in ("train", "test") for label in ("ok", "ill") for n in range(20)),
    )
    table = index(tmp_path)
    assert table.labels == ("ill", "ok")
    for row in table.rows:
        assert (row.split == "test") == row.path.startswith("test/")
    assert {row.split for row in table.rows} == set(SPLITS)


def test_official_parts_that_share_a_patient_are_refused(tmp_path: Path):
    touch(tmp_path, "train/sub-01_T1w.nii.gz", "test/sub-01_T2w.nii.gz", "test/sub-02_T2w.nii.gz")
    with pytest.raises(LeakageError, match=r"sub-01_T\dw \(t.*are of one patient, but the dataset's own parts"):
        index(tmp_path)


# -- splits ------------------------------------------------------------------------------------------


def test_quotas_and_the_floor_of_calibration():
    assert Counter(assigned({f"p{n}": ("", "") for n in range(200)}, {}).values()) == {
        "train": 120,
        "val": 20,
        "calibration": 40,
        "test": 20,
    }
    assert Counter(assigned({f"p{n}": ("", "") for n in range(64)}, {}).values())["calibration"] == 19
    assert Counter(assigned({f"p{n}": ("", "") for n in range(44)}, {}).values())["calibration"] == 13
    assert Counter(assigned({f"p{n}": ("", "") for n in range(4)}, {}).values()) == dict.fromkeys(SPLITS, 1)


@pytest.mark.parametrize(
    ("n", "expected"), [(1, ["train"]), (2, ["calibration", "train"]), (3, ["calibration", "test", "train"])]
)
def test_fewer_than_four_patients(n: int, expected: list[str]):
    assert sorted(assigned({f"p{k}": ("", "") for k in range(n)}, {}).values()) == expected


def test_a_rare_class_beside_a_large_one_is_for_testing():
    strata = {f"p{n}": ("normal", "") for n in range(30)} | {"q1": ("ill", "")}
    assert assigned(strata, {})["q1"] == "test"


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    shares=st.dictionaries(st.sampled_from(SPLITS), st.floats(0.05, 1), min_size=1),
    seed=st.integers(0, 5),
)
def test_splits_are_fair_whatever_the_dataset(sizes: list[int], shares: dict[str, float], seed: int):
    strata = {f"{s}-{n}": (f"class{s}", "") for s, size in enumerate(sizes) for n in range(size)}
    splits = assigned(strata, {}, quotas=shares, seed=seed)
    assert set(splits) == set(strata)
    assert set(splits.values()) <= set(shares)
    backwards = dict(reversed(strata.items()))
    assert assigned(backwards, {}, quotas=shares, seed=seed) == splits
    for s, size in enumerate(sizes):
        counts = Counter(splits[f"{s}-{n}"] for n in range(size))
        if size >= 4 * len(shares):
            assert all(counts[split] >= 1 for split in shares)
        if size >= 4 and {"calibration", "train"} <= set(shares) and size >= 10:
            assert counts["calibration"] >= min(19, int(0.3 * size)) or counts["train"] == 1


def test_another_seed_is_another_draw():
    strata = {f"p{n}": ("", "") for n in range(50)}
    assert assigned(strata, {}, seed=0) != assigned(strata, {}, seed=1)


@pytest.mark.parametrize("quotas", [{"train": -1.0}, {"learn": 1.0}, {"train": 0.0}, {}, {"train": float("nan")}])
def test_quotas_that_make_no_sense(tmp_path: Path, quotas: dict):
    touch(tmp_path, "a.nii")
    with pytest.raises(ConfigError, match="Quotas are shares"):
        index(tmp_path, quotas=quotas)


def test_known_patients_never_move(tmp_path: Path):
    touch(tmp_path, *(f"a{n}.nii.gz" for n in range(20)))
    first = index(tmp_path)
    first.save(tmp_path / "table.csv")
    touch(tmp_path, *(f"b{n}.nii.gz" for n in range(30)))
    later = index(tmp_path, known=Manifest.load(tmp_path / "table.csv"), seed=9)
    before = {row.patient: row.split for row in first.rows}
    after = {row.patient: row.split for row in later.rows}
    assert {patient: after[patient] for patient in before} == before
    assert Counter(after.values()) == {"train": 25, "val": 5, "calibration": 15, "test": 5}


def test_copies_of_a_file_move_together(tmp_path: Path):
    touch(tmp_path, *(f"a{n}.nii" for n in range(40)))
    for n in range(0, 40, 2):
        (tmp_path / f"z{n}.nii").write_bytes((tmp_path / f"a{n}.nii").read_bytes())
    split = {row.case: row.split for row in index(tmp_path).rows}
    assert all(split[f"z{n}"] == split[f"a{n}"] for n in range(0, 40, 2))


def test_long_files_that_differ_in_the_middle_are_no_copies(tmp_path: Path):
    for n in range(40):
        (tmp_path / f"a{n}.nii").write_bytes(bytes(100_000) + bytes([n]) + bytes(100_000))
    assert {row.split for row in index(tmp_path).rows} == set(SPLITS)


def test_a_copy_of_a_known_patient_follows_and_two_known_copies_are_refused(tmp_path: Path):
    touch(tmp_path, *(f"a{n}.nii" for n in range(10)))
    known = index(tmp_path)
    (tmp_path / "copy.nii").write_bytes((tmp_path / "a3.nii").read_bytes())
    split = {row.case: row.split for row in index(tmp_path, known=known).rows}
    assert split["copy"] == split["a3"]
    other = next(name for name in SPLITS if name != split["a3"])
    worse = replace(known, rows=(*known.rows, Row("copy", "copy", "copy.nii", "nifti", split=other)))
    with pytest.raises(LeakageError, match="copies of one file"):
        index(tmp_path, known=worse)


# -- tables ------------------------------------------------------------------------------------------


def write_csv(path: Path, header: str, *lines: str) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def test_a_csv_of_paths_is_enough(tmp_path: Path):
    touch(tmp_path, "x/sub-01_T1w.nii.gz", "x/sub-01_T2w.nii.gz", "x/b.png")
    series = dicom(tmp_path / "ct", "SOMEBODY")
    collection(tmp_path / "n.npz", 4)
    lines = ["x/sub-01_T1w.nii.gz", "x/sub-01_T2w.nii.gz", str(tmp_path / "x/b.png"), "ct", "n.npz#test/3", "ct/"]
    table = index(write_csv(tmp_path / "t.csv", "path", *lines[:5]))
    assert rows(table, "case", "patient", "kind", "domain") == [
        ("sub-01_T1w", "sub-01", "nifti", "T1w"),
        ("sub-01_T2w", "sub-01", "nifti", "T2w"),
        ("b", "b", "raster", ""),
        ("row-4", table.rows[3].patient, "dicom", "CT"),
        ("row-5", "row-5", "npz", "n"),
    ]
    assert "SOMEBODY" not in table.rows[3].patient
    assert series.exists()
    assert io.read(table.locate(table.rows[4].path)).voxels.shape == (1, 5, 5, 1)


def test_a_csv_says_what_it_knows(tmp_path: Path):
    touch(tmp_path, *(f"{n}.nii.gz" for n in range(6)), "m.nii.gz")
    table = index(
        write_csv(
            tmp_path / "t.csv",
            "path,patient,label,mask,domain,split,age,scanner",
            "0.nii.gz,p,ill,m.nii.gz,GE,test,50,a",
            "1.nii.gz,p,,,GE,,,",
            *(f"{n}.nii.gz,q{n},,,GE,,4{n}," for n in range(2, 6)),
        )
    )
    assert rows(table, "patient", "label", "mask", "domain", "split")[:2] == [
        ("p", "ill", "m.nii.gz", "GE", "test"),
        ("p", "", "", "GE", "test"),
    ]
    assert table.rows[0].covariates == {"age": "50", "scanner": "a"}
    assert {row.split for row in table.rows} == set(SPLITS)


def test_a_csv_that_splits_a_patient_is_refused(tmp_path: Path):
    touch(tmp_path, "a.nii", "b.nii")
    with pytest.raises(LeakageError, match=r"a \(train\) and b \(test\) are of one patient") as error:
        index(write_csv(tmp_path / "t.csv", "path,case,patient,split", "a.nii,a,CANARY,train", "b.nii,b,CANARY,test"))
    assert "CANARY" not in str(error.value)


def test_a_csv_that_splits_copies_is_refused(tmp_path: Path):
    touch(tmp_path, "a.nii")
    (tmp_path / "b.nii").write_bytes((tmp_path / "a.nii").read_bytes())
    with pytest.raises(LeakageError, match="copies of one file"):
        index(write_csv(tmp_path / "t.csv", "path,split", "a.nii,train", "b.nii,test"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.nii,x\n", "expected a column 'path'; found file, label"),
        ("path\n", "a header but no rows"),
        ("", "no header"),
        ("path\ngone.nii\n", "line 2: no such scan or mask"),
        ("path,mask\na.nii,gone.nii\n", "line 2: no such scan or mask"),
        ("path\na.nii\n\n;\n", "no such scan or mask"),
        ("path,split\na.nii,validation\n", "a split is one of"),
        ("path,case\na.nii,x\nb.nii,x\n", "x appears more than once"),
        ("path,root\na.nii,.\nb.nii,..\n", "one table has one root"),
    ],
)
def test_tables_that_cannot_be_used_say_why(tmp_path: Path, text: str, message: str):
    touch(tmp_path, "a.nii", "b.nii")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        index(tmp_path / "t.csv")


def test_a_table_that_is_no_text(tmp_path: Path):
    (tmp_path / "t.csv").write_bytes(b"path\n\xff\xfe\x00\n")
    with pytest.raises(DataError, match="UTF-8"):
        index(tmp_path / "t.csv")


def test_saved_and_loaded_it_is_the_same_table(tmp_path: Path):
    data = tmp_path / "data"
    touch(
        data, *(f"sub-{n:02d}/anat/sub-{n:02d}_T1w.nii.gz" for n in range(5)), "sub-01/anat/sub-01_lesion_mask.nii.gz"
    )
    (data / "participants.tsv").write_text(
        'participant_id\tnote\nsub-01\t"a, ""b"" ü"\nsub-02\t=1+1\n', encoding="utf-8"
    )
    table = index(data)
    (tmp_path / "out").mkdir()
    for place in (data / "t.csv", tmp_path / "out" / "t.csv"):
        table.save(place)
        loaded = Manifest.load(place)
        assert loaded.rows == table.rows
        assert loaded.hash() == table.hash()
        assert all(Path(loaded.locate(row.path)).is_file() for row in loaded.rows)
        again = index(place)
        assert rows(again, "case", "patient", "path", "mask", "split") == rows(
            table, "case", "patient", "path", "mask", "split"
        )
    with (tmp_path / "out" / "t.csv").open(encoding="utf-8") as stream:
        assert {line["root"] for line in csv.DictReader(stream)} == {"../data"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["t.csv"]


def test_a_dataset_that_moves_with_its_table_still_loads(tmp_path: Path):
    touch(tmp_path / "here", "a.nii", "b.nii")
    index(tmp_path / "here").save(tmp_path / "here" / "t.csv")
    (tmp_path / "here").rename(tmp_path / "there")
    loaded = Manifest.load(tmp_path / "there" / "t.csv")
    assert all(Path(loaded.locate(row.path)).is_file() for row in loaded.rows)


def test_a_loaded_table_with_a_leak_is_refused(tmp_path: Path):
    touch(tmp_path, *(f"sub-0{n}_{m}.nii" for n in range(5) for m in ("T1w", "T2w")))
    index(tmp_path).save(tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    split = lines[1].split(",")[7]
    lines[1] = lines[1].replace(f",{split},", f",{'val' if split != 'val' else 'train'},")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(LeakageError, match="are of one patient"):
        Manifest.load(tmp_path / "t.csv")


def test_saving_where_nothing_can_be_written(tmp_path: Path):
    touch(tmp_path, "a.nii")
    table = index(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        table.save(tmp_path / "file" / "t.csv")


def test_the_hash_knows_rows_but_not_their_order_or_root(tmp_path: Path):
    row = Row("a", "p", "a.nii", "nifti", covariates={"age": "3"}, split="train")
    other = Row("b", "q", "b.nii", "nifti", split="test")
    table = Manifest((row, other), (), tmp_path)
    assert table.hash() == Manifest((other, row), (), tmp_path / "x").hash()
    changes = {"case": "c", "patient": "r", "path": "c.nii", "kind": "itk", "label": "x", "mask": "m", "domain": "d"}
    changes |= {"split": "val", "covariates": {"age": "4"}}
    for name, value in changes.items():
        assert Manifest((replace(row, **{name: value}), other), (), tmp_path).hash() != table.hash(), name


def test_parts_of_a_table():
    made = [
        Row(f"c{n}", f"p{n}", "x", "nifti", label="ab"[n % 2], domain="AB"[n // 2], split=SPLITS[n]) for n in range(4)
    ]
    table = Manifest(tuple(made), (), Path("."))
    assert table.split("val").patients == ("p1",)
    assert table.where(label="a", domain="B").patients == ("p2",)
    assert (table.labels, table.domains, table.patients) == (("a", "b"), ("A", "B"), ("p0", "p1", "p2", "p3"))
    assert "A, a: 1 scans; patients: train 1" in table.summary()


# -- nothing there -----------------------------------------------------------------------------------


def test_folders_without_scans_say_what_was_looked_for_and_found(tmp_path: Path):
    with pytest.raises(DataError, match=r"no scan found\. Looked for NIfTI.*DICOM.*found no files at all"):
        index(tmp_path)
    touch(tmp_path, "a.txt", "b.txt", "c.json", "data.zip")
    with pytest.raises(DataError, match=r"found 2 x \.txt, 1 x \.json, 1 x \.zip \(packed"):
        index(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        index(tmp_path / "gone")
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        index(tmp_path / "gone.csv")
    touch(tmp_path / "m", "a_mask.nii.gz", "b_mask.nii.gz")
    with pytest.raises(DataError, match="2 masks, but no scan"):
        index(tmp_path / "m")


def test_a_semicolon_in_a_name_is_left_out_with_the_reason(tmp_path: Path):
    touch(tmp_path, "a;b.nii", "c.nii")
    table = index(tmp_path)
    assert rows(table, "case") == [("c",)]
    assert "rename it" in table.skipped[0].reason
    assert "1 x a ';' in its name" in table.summary()


# -- real scans --------------------------------------------------------------------------------------


def test_real_cohort_with_a_table_beside_it(shared_data: Path):
    table = index(shared_data / "brain_t1_ds002748" / "mni2mm")
    assert (len(table), len(table.patients), table.domains) == (44, 44, ("T1w",))
    assert table.rows[0].covariates["sex"] == "M"
    assert {row.covariates["group"] for row in table.rows} == {"depr", "control"}
    assert Counter(row.split for row in table.rows) == {"train": 23, "val": 4, "calibration": 13, "test": 4}


def test_real_masks(shared_data: Path):
    table = index(shared_data / "hippocampus_msd")
    assert len(table) == len(table.patients) == 195
    assert all(row.mask == row.path.replace("images/", "labels/") for row in table.rows)
    lesions = index(shared_data / "lesion_ms" / "mni2mm")
    assert (len(lesions), lesions.patients, lesions.domains) == (3, ("patient26",), ("FLAIR", "T1w", "T2w"))
    assert {row.mask for row in lesions.rows} == {"patient26_lesion_space-MNI_res-2.nii.gz"}


def test_real_pairs_share_a_patient(shared_data: Path):
    table = index(shared_data / "brain_t1t2_ds011" / "aligned")
    assert (len(table), len(table.patients), table.domains) == (20, 10, ("T1w", "T2w"))


def test_real_collections(shared_data: Path):
    table = index(shared_data / "medmnist")
    chest = table.where(domain="pneumoniamnist")
    assert len(chest) == 4708 + 524 + 624
    assert Counter(row.split for row in chest.rows if "#test/" in row.path) == {"test": 624}
    # Some training pictures occur in the official val part too: they are not trained on.
    moved = [row for row in chest.rows if "#train/" in row.path and row.split == "calibration"]
    assert 8 <= len(moved) <= 20
    assert table.where(domain="retinamnist").labels == ("0", "1", "2", "3", "4")


def test_real_dicom(shared_data: Path):
    table = index(shared_data / "dicom")
    assert table.labels == ()
    assert table.domains == ("CT", "MR")
    glioblastoma = index(shared_data / "dicom" / "mr_gbm_pgbm003_siemens")
    assert (len(glioblastoma), len(glioblastoma.patients)) == (2, 1)
    assert all(not row.patient.lower().startswith("pgbm") for row in glioblastoma.rows)


def test_quotas_are_those_of_the_documentation():
    assert QUOTAS == {"train": 0.6, "val": 0.1, "calibration": 0.2, "test": 0.1}
