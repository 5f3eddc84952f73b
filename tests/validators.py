"""Judges from outside: dicom3tools, dcm2niix and SimpleITK on files medgen wrote."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest

# Validators up to 2024 do not know the attribute Synthetic Data, which the standard added in 2024.
_ALLOWED = re.compile(r"</\(0008,001c\)> - Attribute with an even group number is not a recognized standard attribute")
_HARMLESS = re.compile(
    r"needed to build DICOMDIR"
    r"|\(0008,001c\)"
    r"|Laterality\(0020,0060\)> - is only permitted to be empty when actually unknown"
    r"|RescaleType\(0028,1054\)\[1\]> - Unrecognized defined term = <US>"
    # The tools are older than the change that lets Secondary Captures lie in a patient.
    r"|(SliceThickness|ImagePositionPatient|ImageOrientationPatient|FrameOfReferenceUID|PositionReferenceIndicator)"
    r"\([0-9a-f,]+\)> - Attribute is not present in standard DICOM IOD"
)


def tool(name: str) -> str:
    """Path of a program, from the environment's own folder or the system's; skips the test where it is absent."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def dciodvfy(file: Path) -> tuple[list[str], list[str]]:
    """Errors and warnings of one file, without those everybody gets; the exit status says nothing."""
    run = subprocess.run([tool("dciodvfy"), "-new", str(file)], capture_output=True, text=True, errors="replace")
    lines = (run.stdout + run.stderr).splitlines()
    assert any(line.endswith("Image") for line in lines), f"not recognised: {lines}"
    errors = [line for line in lines if line.startswith("Error") and not _ALLOWED.search(line)]
    warnings = [line for line in lines if line.startswith("Warning") and not _HARMLESS.search(line)]
    return errors, warnings


def assert_conforms(files: Sequence[Path], *, warnings: bool = True) -> None:
    """Every file passes dciodvfy, and together they agree on patient, study and series."""
    for file in files:
        errors, warned = dciodvfy(file)
        assert errors == [], f"{file.name}: {errors}"
        if warnings:
            assert warned == [], f"{file.name}: {warned}"
        assert not [line for line in warned if "Modality LUT" in line]
    assert_one_study(files)


def assert_one_study(files: Sequence[Path]) -> None:
    """dcentvfy finds no patient, study, series or equipment attribute on which the files differ."""
    run = subprocess.run([tool("dcentvfy"), *map(str, files)], capture_output=True, text=True, errors="replace")
    assert run.returncode == 0, run.stdout + run.stderr


def by_simpleitk(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Values (i, j, k) and affine to RAS+ mm, as SimpleITK finds and reads the only series in the files' folder."""
    import SimpleITK

    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(Path(files[0]).parent))
    assert len(names) == len(files)
    return read_by_simpleitk([Path(name) for name in names])


def read_by_simpleitk(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Values (i, j, k) and affine to RAS+ mm of files in the order of their positions, as SimpleITK reads them."""
    import SimpleITK

    names = [str(file) for file in files]
    image = SimpleITK.ReadImage(names) if len(names) > 1 else SimpleITK.ReadImage(names[0])
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).T, np.diag([-1.0, -1, 1, 1]) @ affine


def by_dcm2niix(folder: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values (i, j, k) and affine to RAS+ mm, as dcm2niix converts the one series in a folder."""
    out.mkdir(parents=True)
    command = [tool("dcm2niix"), "-b", "n", "-z", "n", "-f", "x", "-o", str(out), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    files = sorted(out.glob("*.nii"))
    assert len(files) == 1, f"{files}\n{run.stdout}{run.stderr}"
    image = nibabel.load(files[0])
    return np.asanyarray(image.dataobj), image.affine


def assert_same_places(read: tuple[np.ndarray, np.ndarray], values: np.ndarray, affine: np.ndarray) -> None:
    """Every value, all of them different, lies at the same millimetre in both.

    Nothing of medgen is used: the places of `values` follow from their index and `affine`.
    """
    found, found_affine = read
    assert found.size == values.size == np.unique(values).size
    mine, theirs = np.argsort(values, axis=None), np.argsort(found, axis=None)
    np.testing.assert_array_equal(values.ravel()[mine], found.ravel()[theirs])

    def places(order: np.ndarray, shape: tuple[int, ...], matrix: np.ndarray) -> np.ndarray:
        ijk = np.stack(np.unravel_index(order, shape), axis=-1)
        return ijk @ matrix[:3, :3].T + matrix[:3, 3]

    apart = np.abs(places(mine, values.shape, affine) - places(theirs, found.shape, found_affine))
    assert apart.max() <= 1e-3, f"up to {apart.max()} mm apart"
