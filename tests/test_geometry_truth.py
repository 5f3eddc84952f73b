"""A marked voxel lands on the millimetre that nibabel and SimpleITK give.

Absolute, never round trips: two mistakes that undo each other survive every round trip.
"""

from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from scipy.spatial.transform import Rotation

from medgen.grid import Grid
from medgen.io.itk import read_itk
from medgen.io.nifti import nifti_header, read_nifti, write_nifti
from medgen.scan import Scan

SHAPE = (5, 4, 3)
MARK = (3, 1, 2)
TURNS = {"straight": (0, 0, 0), "oblique": (17, -8, 33), "half a turn, nearly": (0.3, 179.5, 0.2)}


def affines() -> Iterator[tuple[str, np.ndarray]]:
    """The 48 ways to lay three voxel axes along the body's, straight and turned."""
    for (name, degrees), order, signs in product(TURNS.items(), permutations(range(3)), product([1, -1], repeat=3)):
        affine = np.eye(4)
        turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
        affine[:3, :3] = turn @ np.eye(3)[:, order] * signs * [0.8, 1.3, 2.5]
        affine[:3, 3] = [-31.5, 12.25, 70.0]
        yield f"{name}, {''.join(nib.aff2axcodes(affine))}", affine


CASES = dict(affines())
EVERY = pytest.mark.parametrize("affine", CASES.values(), ids=CASES.keys())


def marked(shape: tuple = SHAPE) -> np.ndarray:
    voxels = np.zeros(shape, dtype=np.int16)
    voxels[MARK] = 100
    return voxels


def place_of_mark(scan: Scan) -> np.ndarray:
    (found,) = np.argwhere(scan.voxels[0] == 100)
    return scan.grid.world(found)


def nibabel_place(path: Path) -> np.ndarray:
    image = nib.load(path)
    (found,) = np.argwhere(np.asarray(image.dataobj) == 100)
    return nib.affines.apply_affine(image.affine, found)


def simpleitk_place(path: Path) -> np.ndarray:
    """In RAS+; SimpleITK speaks LPS+."""
    image = SimpleITK.ReadImage(str(path))
    (found,) = np.argwhere(SimpleITK.GetArrayFromImage(image) == 100)
    x, y, z = image.TransformIndexToPhysicalPoint([int(n) for n in found[::-1]])
    return np.array([-x, -y, z])


def simpleitk_image(affine: np.ndarray) -> SimpleITK.Image:
    """The marked image as SimpleITK would hold it, from an LPS+ matrix spelled out here."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(marked().T))
    lps = np.diag([-1, -1, 1]) @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:, 3].tolist())
    return image


def test_there_are_48_orientations_of_each() -> None:
    assert len(CASES) == 48 * len(TURNS)


@EVERY
def test_written_from_an_object(affine: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    truth = (affine @ [*MARK, 1])[:3]
    scan = Scan(marked()[None], Grid(SHAPE, affine))
    np.testing.assert_allclose(place_of_mark(scan), truth, atol=1e-9)
    path = write_nifti(scan, tmp_path / "a.nii")
    np.testing.assert_allclose(nibabel_place(path), truth, atol=1e-4)
    np.testing.assert_allclose(simpleitk_place(path), truth, atol=1e-4)
    # Readers that prefer the qform end up there too, as well as its three float32 can say: near half a
    # turn the fourth part of the quaternion is lost to rounding.
    qform = nib.load(path).header.get_qform()
    np.testing.assert_allclose((qform @ [*MARK, 1])[:3], truth, atol=1e-2 if "half" in request.node.name else 1e-4)


@EVERY
def test_read_from_a_nibabel_file(affine: np.ndarray, tmp_path: Path) -> None:
    image = nib.Nifti1Image(marked(), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    truth = nibabel_place(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(truth, (affine @ [*MARK, 1])[:3], atol=1e-4)
    np.testing.assert_allclose(place_of_mark(read_nifti(tmp_path / "a.nii.gz")), truth, atol=1e-4)
    assert nifti_header(tmp_path / "a.nii.gz")[0].close(Grid(SHAPE, affine), millimetres=1e-3)


@EVERY
@pytest.mark.parametrize("form", ["sform", "qform"])
def test_read_from_a_nibabel_file_with_one_form(affine: np.ndarray, form: str, tmp_path: Path) -> None:
    image = nib.Nifti1Image(marked(), affine)
    image.set_sform(affine if form == "sform" else None, int(form == "sform"))
    image.set_qform(affine, int(form == "qform"))
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(
        place_of_mark(read_nifti(tmp_path / "a.nii")), nibabel_place(tmp_path / "a.nii"), atol=1e-6
    )


@EVERY
def test_read_from_simpleitk_files(affine: np.ndarray, tmp_path: Path) -> None:
    image = simpleitk_image(affine)
    truth = (affine @ [*MARK, 1])[:3]
    for name in ("a.nii", "a.nrrd", "a.mha"):
        path = tmp_path / name
        SimpleITK.WriteImage(image, str(path))
        np.testing.assert_allclose(simpleitk_place(path), truth, atol=1e-3)
        scan = read_nifti(path) if name == "a.nii" else read_itk(path)
        np.testing.assert_allclose(place_of_mark(scan), simpleitk_place(path), atol=1e-3)


def test_moving_to_another_orientation_moves_no_mark() -> None:
    scan = Scan(marked()[None], Grid(SHAPE, CASES["oblique, RAS"]))
    truth = place_of_mark(scan)
    for letters in {name.split(", ")[-1] for name in CASES}:
        turned = scan.onto(scan.grid.reorient(letters), outside=0.0)
        np.testing.assert_allclose(place_of_mark(turned), truth, atol=1e-9)
        assert turned.grid.axcodes == letters


def test_resampling_agrees_with_simpleitk_in_world_space() -> None:
    """The same interpolation, asked of SimpleITK in its own LPS+ geometry."""
    rng = np.random.default_rng(3)
    source = Grid((14, 12, 10), CASES["oblique, PIL"])
    # Finer than the source, so that no smoothing takes part; turned the other way about the same middle.
    turn = Rotation.from_euler("xyz", [-20, 40, 10], degrees=True).as_matrix() * 0.7
    affine = np.eye(4)
    affine[:3, :3] = turn
    affine[:3, 3] = source.centre - turn @ [4.5, 4.5, 4.5]
    target = Grid((10, 10, 10), affine)
    values = rng.random((14, 12, 10)).astype(np.float32)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values.T))
    image.SetSpacing(source.spacing)
    image.SetDirection((source.lps[:3, :3] / source.spacing).ravel().tolist())
    image.SetOrigin(source.lps[:3, 3].tolist())
    lps = target.lps
    truth = SimpleITK.Resample(
        image,
        list(target.shape),
        SimpleITK.Transform(),
        SimpleITK.sitkLinear,
        lps[:3, 3].tolist(),
        list(target.spacing),
        (lps[:3, :3] / target.spacing).ravel().tolist(),
        -5.0,
    )
    ours = Scan(values[None], source).onto(target, outside=-5.0)
    np.testing.assert_allclose(ours.voxels[0], SimpleITK.GetArrayFromImage(truth).T, atol=1e-5)
