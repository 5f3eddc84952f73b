"""Phantoms: nobody's body, yet anatomy; the sample data are what the code makes."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

import medgen.io as io
from medgen.data.manifest import index
from medgen.data.phantoms import Lesion, chest_xray, ct_block, head, write_samples
from medgen.errors import DataError, OutputError
from medgen.scan import Scan

SAMPLES = Path(__file__).resolve().parents[1] / "data_samples"
SMALL = {"shape": (24, 30, 24), "spacing": 7.5}


def same(one: Scan, other: Scan) -> bool:
    return one.grid == other.grid and one.header == other.header and np.array_equal(one.voxels, other.voxels)


def at(scan: Scan, *xyz: float) -> float:
    """Mean value of the 3 x 3 x 3 voxels about a place in millimetres."""
    i, j, k = np.rint(scan.grid.index(np.array(xyz))).astype(int)
    return float(scan.physical()[0, i - 1 : i + 2, j - 1 : j + 2, k - 1 : k + 2].mean())


# -- heads -------------------------------------------------------------------------------------------


def test_a_head_is_a_matter_of_its_seed_alone():
    np.random.seed(1)  # the global state must not matter
    one = head(7, **SMALL)[0]
    np.random.seed(2)
    assert same(one, head(7, **SMALL)[0])
    assert not np.array_equal(one.voxels, head(8, **SMALL)[0].voxels)


def test_a_head_has_the_default_format_it_promises():
    scan, mask = head(0)
    assert scan.voxels.shape == (1, 36, 44, 36)
    assert scan.voxels.dtype == np.uint16
    assert scan.grid.axcodes == "RAS"
    assert np.allclose(scan.grid.spacing, 5.0)
    assert np.abs(scan.grid.centre - [0, -18, 16]).max() < 1e-9
    assert (scan.header.modality, scan.header.synthetic) == ("MR", True)
    assert mask.is_label
    assert mask.grid == scan.grid
    assert mask.voxels.max() == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_head_has_tissues_in_their_order(seed: int):
    scan, _ = head(seed, shape=(60, 74, 60), spacing=3.0)
    values = scan.voxels[0].astype(float)
    white = at(scan, 26, -20, 36)
    assert 110 < white < 230
    assert values[:3, :3].mean() < 8  # air, with a noise floor
    ring = values[scan.grid.shape[0] // 2, :, scan.grid.shape[2] // 2]
    assert ring.max() > 1.1 * white  # fat of the scalp is brightest
    inside = values[20:40, 20:54, 28:44]
    assert inside.min() < 0.45 * white  # CSF in ventricles and sulci


def test_heads_differ_as_people_do():
    heads = np.stack([head(seed, **SMALL)[0].voxels[0].astype(float) for seed in range(6)])
    flat = heads.reshape(6, -1)
    alike = np.corrcoef(flat)[np.triu_indices(6, 1)]
    assert alike.min() > 0.5
    assert alike.max() < 0.97
    # Left and right are alike, but never mirror images.
    for one in heads:
        mirrored = np.corrcoef(one.ravel(), one[::-1].ravel())[0, 1]
        assert 0.7 < mirrored < 0.995


def test_one_seed_is_one_person_on_any_grid():
    coarse = head(3, shape=(20, 24, 20), spacing=9.0)[0]
    fine = head(3, shape=(60, 72, 60), spacing=3.0)[0].onto(coarse.grid, outside=0.0)
    other = head(4, shape=(20, 24, 20), spacing=9.0)[0]
    likeness = np.corrcoef(coarse.voxels.ravel(), fine.voxels.ravel())[0, 1]
    assert likeness > 0.97
    assert likeness > np.corrcoef(coarse.voxels.ravel(), other.voxels.ravel())[0, 1] + 0.03


def test_a_lesion_changes_nothing_outside_itself():
    lesion = Lesion((-28.0, 18.0, 34.0), 16.0, 40.0)
    (ill, mask), (well, _) = head(5, lesions=[lesion]), head(5)
    changed = ill.voxels != well.voxels
    covered = mask.voxels.astype(bool)
    assert covered.sum() > 50
    assert changed[covered].mean() > 0.9
    away = np.linalg.norm(ill.grid.world(np.argwhere(changed[0])) - lesion.centre, axis=-1)
    assert away.max() < 2.2 * lesion.radius
    assert at(ill, *lesion.centre) < 0.6 * at(well, *lesion.centre)


def test_the_mask_has_the_lesions_volume_and_place():
    lesion = Lesion((30.0, -40.0, 30.0), 20.0, 215.0)
    mask = head(1, shape=(72, 88, 72), spacing=2.5, lesions=[lesion])[1]
    volume = mask.voxels.sum() * mask.grid.voxel_volume
    assert 0.6 < volume / (4 / 3 * np.pi * 20**3) < 1.7
    assert np.abs(mask.grid.world(np.argwhere(mask.voxels[0])).mean(axis=0) - lesion.centre).max() < 6
    coarse = head(1, lesions=[lesion])[1]
    assert abs(coarse.voxels.sum() * coarse.grid.voxel_volume / volume - 1) < 0.1


def test_two_lesions_are_two():
    from scipy.ndimage import label

    lesions = [Lesion((-30.0, 20.0, 30.0), 12.0, 40.0), Lesion((30.0, -40.0, 30.0), 12.0, 215.0)]
    assert label(head(2, lesions=lesions)[1].voxels[0])[1] == 2


@pytest.mark.parametrize("wrong", [{"shape": (0, 3, 3)}, {"spacing": 0.0}, {"spacing": -5.0}, {"spacing": 1e3}])
def test_impossible_heads_are_refused(wrong: dict):
    with pytest.raises(DataError, match="A head needs"):
        head(0, **wrong)


@pytest.mark.parametrize(
    "wrong", [((0.0, 0.0, 0.0), 0.0, 50.0), ((0.0, 0.0, 0.0), 5.0, -1.0), ((float("nan"), 0.0, 0.0), 5.0, 50.0)]
)
def test_impossible_lesions_are_refused(wrong: tuple):
    with pytest.raises(DataError, match="lesion"):
        Lesion(*wrong)


# -- chests ------------------------------------------------------------------------------------------


def test_a_radiograph_is_planar_and_bright_where_dense():
    scan = chest_xray(0)
    assert scan.voxels.shape == (1, 64, 64, 1)
    assert scan.is_planar
    assert scan.voxels.dtype == np.uint16
    assert scan.voxels.max() < 4096
    assert scan.header.photometric == "MONOCHROME2"
    assert (scan.header.modality, scan.header.space, scan.header.synthetic) == ("DX", 0, True)
    for seed in range(4):
        image = chest_xray(seed).voxels[0, :, :, 0].astype(float)
        lungs = image[[14, 15, 16, 47, 48, 49], 20:36].mean()
        assert image[29:35, 36:44].mean() > lungs + 800  # spine and heart
        assert image[:3, 30:40].mean() < 700  # air beside the patient
        heart_left, heart_right = image[38:42, 38:44].mean(), image[22:26, 38:44].mean()
        assert heart_left > heart_right  # on the patient's left, the picture's right


def test_opacity_fills_lung_and_little_else():
    for seed in range(4):
        well, ill = (chest_xray(seed, opacity=o).voxels[0, :, :, 0].astype(float) for o in (False, True))
        more = ill - well
        lung = np.zeros((64, 64), bool)
        lung[8:28, 8:50] = lung[36:57, 8:50] = True
        assert np.percentile(more[lung], 97) > 350
        assert np.abs(more[:, 56:]).mean() < 150  # abdomen


def test_radiographs_depend_on_seed_and_not_on_size():
    one = chest_xray(4).voxels
    assert np.array_equal(one, chest_xray(4).voxels)
    assert not np.array_equal(one, chest_xray(5).voxels)
    large = chest_xray(4, size=128).voxels[0, :, :, 0].reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert np.corrcoef(large.ravel(), one.ravel())[0, 1] > 0.97
    with pytest.raises(DataError, match="size"):
        chest_xray(0, size=4)


# -- torsos ------------------------------------------------------------------------------------------


def test_a_ct_has_the_numbers_of_its_tissues():
    for seed in range(3):
        scan = ct_block(seed, (48, 40, 12), False)
        assert scan.scale.unit == "HU"
        assert scan.grid.axcodes == "LPS"
        assert abs(at(scan, 0, 128, 0) + 1000) < 25  # air in front
        assert 30 < at(scan, 62, 10, 0) < 90  # liver, on the patient's right
        assert at(scan, 0, -44, 0) > 120  # vertebra
        assert scan.physical().max() > 350
        below = scan.physical()[0, :, :, 6]
        world = scan.grid.world(np.argwhere(np.ones_like(below))[:, :2] @ np.eye(2, 3) + [0, 0, 6])
        table = below.ravel()[(world[:, 1] < -122) & (np.abs(world[:, 0]) < 60)]
        assert table.max() > -700  # something solid under the patient


def test_an_oblique_grid_holds_the_same_body():
    straight, tilted = ct_block(2, (56, 46, 30), False), ct_block(2, (48, 40, 16))
    assert not np.allclose(np.abs(tilted.grid.direction), np.eye(3), atol=0.05)
    assert np.allclose(tilted.grid.direction.T @ tilted.grid.direction, np.eye(3))
    assert tilted.grid.spacing == pytest.approx((7.5, 7.5, 6.0))
    moved = straight.onto(tilted.grid, outside=-1000.0).physical()
    assert np.corrcoef(moved.ravel(), tilted.physical().ravel())[0, 1] > 0.95
    with pytest.raises(DataError, match="CT block"):
        ct_block(0, (0, 1, 1))


# -- the sample data ---------------------------------------------------------------------------------


def sums() -> dict[str, str]:
    lines = (SAMPLES / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def test_the_samples_are_complete_and_unchanged():
    files = {p.relative_to(SAMPLES).as_posix(): p for p in SAMPLES.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert set(files) == set(sums())
    for name, digest in sums().items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in files.values()) < 4e6


def test_the_samples_read_as_the_readme_says():
    table = index(SAMPLES)
    assert not [skip for skip in table.skipped if skip.reason != "not a scan"]
    heads = [row for row in table.rows if row.path.startswith("heads/")]
    ill = [row for row in table.rows if row.path.startswith("heads_ill/")]
    assert (len(heads), len(ill)) == (64, 2)
    assert all(row.mask for row in ill)
    assert (len(table.where(label="normal")), len(table.where(label="opacity"))) == (24, 12)
    assert len(table.where(domain="CT")) == 1
    assert len(table.patients) == len(table) == 103
    text = (SAMPLES / "README.md").read_text(encoding="utf-8")
    assert "nobody" in text
    assert "CC0" in text


def test_every_sample_says_that_it_is_synthetic():
    import nibabel

    for source in io.find(SAMPLES).sources:
        if source.kind == "nifti":
            assert b"SYNTHETIC" in nibabel.load(source.files[0]).header["descrip"].item(), source.path
        else:
            assert io.header(source)[2].synthetic, source.path


def test_the_code_still_makes_these_samples():
    # Values are compared, not bytes: those also depend on the compressor and on medgen's version.
    for seed in (1, 64):
        made, shipped = (
            head(seed, shape=(32, 40, 32), spacing=5.5)[0],
            io.read(SAMPLES / f"heads/sub-{seed:03d}_T1w.nii.gz"),
        )
        assert np.array_equal(made.voxels, shipped.voxels)
        assert made.grid.close(shipped.grid)
    made, shipped = ct_block(1), io.read(SAMPLES / "ct_oblique")
    assert np.array_equal(made.physical(), shipped.physical())
    assert made.grid.close(shipped.grid)
    for name, seed in (("normal/024", 24), ("opacity/101", 101)):
        shipped = io.read(SAMPLES / f"xray/{name}.dcm")
        assert np.array_equal(chest_xray(seed, opacity=seed > 100).voxels, shipped.voxels)


@pytest.mark.slow
def test_all_samples_can_be_made_again(tmp_path: Path):
    made = write_samples(tmp_path / "samples")
    assert {path.relative_to(tmp_path / "samples").as_posix() for path in made} == {*sums(), "SHA256SUMS"}
    shipped = {Path(s.path).relative_to(SAMPLES).as_posix(): s for s in io.find(SAMPLES).sources}
    again = {
        Path(s.path).relative_to(tmp_path / "samples").as_posix(): s for s in io.find(tmp_path / "samples").sources
    }
    assert set(shipped) == set(again)
    for name, source in shipped.items():
        one, other = io.read(source), io.read(again[name])
        assert np.array_equal(one.voxels, other.voxels), name
        assert one.grid.close(other.grid), name
    for line in (tmp_path / "samples" / "SHA256SUMS").read_text().splitlines():
        digest, name = re.fullmatch(r"([0-9a-f]{64})  (.+)", line).groups()
        assert hashlib.sha256((tmp_path / "samples" / name).read_bytes()).hexdigest() == digest


def test_samples_never_replace_anything(tmp_path: Path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        write_samples(tmp_path)
    assert (tmp_path / "mine").read_text() == "x"
