"""Every real DICOM series: read, written as a copy, judged by others, and read again, with nothing lost on the way.

    python benchmarks/dicom_round_trip.py

Written twice, into the patient's study and under a pseudonym. The files must pass dciodvfy; SimpleITK and dcm2niix
must put every corner where medgen does, within a thousandth of a millimetre; voxels must come back exactly. What
medgen refuses or skips must be what it should refuse. The exit status is 1 where an expectation fails.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
from measure import keep, shared_data, table

from medgen import io
from medgen.errors import DataError, MedgenError
from medgen.io.dicom.write import Provenance, write_series
from medgen.scan import Scan

MILLIMETRES = 1e-3
# The validator is older than the attribute Synthetic Data, which the standard added in 2024.
ALLOWED = re.compile(r"</\(0008,001c\)> - Attribute with an even group number is not a recognized standard attribute")
ENCODINGS, ENCODED_SUM = "mr_siemens_transfer_syntaxes", 38036663
# Each series, by where it begins, and what must come of it: 'exact', or the word its refusal or skipping must hold.
EXPECTED = {
    "mr_gbm_pgbm003_siemens/11-T1post-18670": "exact",
    "mr_gbm_pgbm003_siemens/36468-FLAIRreg-58706": "exact",
    "ct_ge_small17": "exact",
    "dicom2nifti/ge/": "exact",
    "dicom2nifti/hitachi": "exact",
    "dicom2nifti/generic/compressed_rle": "exact",
    "dicom2nifti/generic/compressed_jpegls": "exact",
    "dicom2nifti/generic/compressed_j2k": "exact",
    "dicom2nifti/philips_enhanced": "exact",
    "dicom2nifti/siemens_multiframe": "exact",
    "dicom2nifti/hyperfine": "exact",
    "pydicom_data/eCT_Supplemental": "exact",
    **{f"{ENCODINGS}/{number}.dcm": "exact" for number in range(1, 10)},
    "ct_ge_gantrytilt_varspacing": "--on-gap",
    "dicom2nifti/failing/gantrytilting": "--on-tilt",
    "pydicom_data/emri_small.dcm": "ImagePositionPatient",
    "pydicom_data/emri_small_RLE.dcm": "ImagePositionPatient",
    "pydicom_data/parametric_map_float.dcm": "Parametric Map",
}


@dataclass(frozen=True)
class Outcome:
    """What became of a series; distances in millimetres are the worst of both identities."""

    series: str
    shape: str
    outcome: str
    again: float | None = None
    simpleitk: float | None = None
    dcm2niix: float | None = None
    voxels: str = ""


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        sys.exit(f"{name} is not installed. Install dicom3tools (apt) and dcm2niix (pip install dcm2niix).")
    return found


def conformance_errors(files: list[Path]) -> list[str]:
    """What dciodvfy calls an error, and disagreements between the files of the series."""
    errors = []
    for file in files:
        run = subprocess.run([tool("dciodvfy"), "-new", str(file)], capture_output=True, text=True, errors="replace")
        lines = (run.stdout + run.stderr).splitlines()
        errors += [line for line in lines if line.startswith("Error") and not ALLOWED.search(line)]
    together = subprocess.run([tool("dcentvfy"), *map(str, files)], capture_output=True, text=True, errors="replace")
    return errors + ([together.stderr.strip()[:200]] if together.returncode else [])


def by_simpleitk(folder: Path) -> nibabel.Nifti1Image:
    image = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return nibabel.Nifti1Image(
        SimpleITK.GetArrayFromImage(image).T.astype(np.float64), np.diag([-1, -1, 1, 1]) @ affine
    )


def by_dcm2niix(folder: Path, out: Path) -> nibabel.Nifti1Image:
    out.mkdir()
    command = [tool("dcm2niix"), "-b", "n", "-z", "n", "-f", "x", "-o", str(out), str(folder)]
    subprocess.run(command, capture_output=True, check=True)
    (file,) = out.glob("*.nii")
    image = nibabel.load(file)
    return nibabel.Nifti1Image(image.get_fdata(), image.affine)


def image_of(scan: Scan, values: np.ndarray) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(values[0].astype(np.float64), scan.grid.affine)


def apart(theirs: nibabel.Nifti1Image, mine: nibabel.Nifti1Image) -> float:
    """How far the corners of two images lie apart, mm; infinite where their values or sizes differ."""
    theirs, mine = nibabel.as_closest_canonical(theirs), nibabel.as_closest_canonical(mine)
    if theirs.shape != mine.shape or not np.allclose(theirs.get_fdata(), mine.get_fdata(), rtol=1e-6, atol=1e-3):
        return np.inf
    corners = np.array([[*(np.array(at) * (np.array(mine.shape) - 1)), 1] for at in np.ndindex(2, 2, 2)])
    return float(np.abs(corners @ (theirs.affine - mine.affine).T).max())


def written(scan: Scan, files: tuple[Path, ...], identity: str, work: Path) -> tuple[list[str], float, float, float]:
    """What is wrong with a copy of `scan`, and how far it lies off when read by medgen, SimpleITK and dcm2niix."""
    place = work / identity
    made = write_series(scan, place, provenance=Provenance("a copy", content="copy"), source=files, identity=identity)
    again = io.read(place)
    moved = again.onto(scan.grid, outside=scan.scale.intercept)
    faults = conformance_errors(made)
    if not np.array_equal(moved.voxels, scan.voxels) or moved.voxels.dtype.kind == "f":
        faults.append("voxels differ")
    if (again.header.modality, again.scale.unit) != (scan.header.modality, scan.scale.unit):
        faults.append("modality or unit differ")
    # MR has no rescale: what the numbers mean stands in the Real World Value Mapping.
    mapped = scan.header.modality == "MR" and (scan.scale.slope, scan.scale.intercept) != (1, 0)
    meant = io.read(place, io.ReadOptions(real_world=mapped)).onto(scan.grid, outside=0)
    if not np.allclose(meant.physical(), scan.physical(), rtol=1e-6, equal_nan=True):
        faults.append("physical values differ")
    told = image_of(again, again.scale.physical(again.voxels))
    distances = (
        apart(image_of(again, again.voxels), image_of(scan, scan.voxels)),
        apart(by_simpleitk(place), told),
        apart(by_dcm2niix(place, work / "nii"), told),
    )
    shutil.rmtree(work / "nii")
    for who, distance in zip(("medgen", "SimpleITK", "dcm2niix"), distances, strict=True):
        if distance > MILLIMETRES:
            faults.append(f"{who} finds it {distance:.3g} mm away")
    return faults, *distances


def round_trip(source: io.Source, name: str) -> Outcome:
    try:
        scan = io.read(source)
    except DataError as error:
        return Outcome(name, "", f"refused: {error}")
    shape = " x ".join(map(str, scan.grid.shape))
    faults: list[str] = []
    distances = []
    with tempfile.TemporaryDirectory() as work:
        for identity in ("keep", "pseudonym"):
            try:
                found, *off = written(scan, source.files, identity, Path(work))
            except MedgenError as error:
                return Outcome(name, shape, f"not written ({identity}): {error}")
            faults += found
            distances.append(off)
    if name.startswith(ENCODINGS) and int(scan.voxels.sum(dtype=np.int64)) != ENCODED_SUM:
        faults.append(f"pixels do not add up to {ENCODED_SUM}")
    outcome = "; ".join(dict.fromkeys(faults)) or "exact"
    content = hashlib.sha256(np.ascontiguousarray(scan.voxels).data).hexdigest()[:16]
    return Outcome(name, shape, outcome, *np.max(distances, axis=0).tolist(), content)


def expectation(name: str) -> str:
    return next((expected for place, expected in EXPECTED.items() if name.startswith(place)), "nothing known of it")


def as_expected(outcome: Outcome) -> bool:
    expected = expectation(outcome.series)
    if expected == "exact":
        return outcome.outcome == "exact"
    return outcome.outcome.startswith(("refused", "skipped")) and expected in outcome.outcome


def main() -> None:
    began = time.monotonic()
    folder = shared_data() / "dicom"
    outcomes: list[Outcome] = []
    for place in sorted({path.parent for path in folder.rglob("*.dcm")}):
        # By folder: three of them hold one series in three encodings, which together would be copies of one.
        found = io.find(place)
        for source in found.sources:
            outcomes.append(round_trip(source, Path(source.path).relative_to(folder).as_posix()))
        for skip in found.skipped:
            if not skip.path.endswith((".md", ".txt", ".json")):
                name = Path(skip.path).relative_to(folder).as_posix()
                outcomes.append(Outcome(name, "", f"skipped: {skip.reason}"))
    rows = [
        (o.series, o.shape, o.outcome, expectation(o.series), "yes" if as_expected(o) else "NO",
         *("" if far is None else f"{far:.1e}" for far in (o.again, o.simpleitk, o.dcm2niix)))
        for o in outcomes
    ]  # fmt: skip
    head = ("series", "shape", "outcome", "expected", "met", "again, mm", "SimpleITK, mm", "dcm2niix, mm")
    table(rows, head)
    absent = [place for place in EXPECTED if not any(o.series.startswith(place) for o in outcomes)]
    failed = [o.series for o in outcomes if not as_expected(o)] + absent
    encoded = {o.voxels for o in outcomes if o.series.startswith(ENCODINGS)}
    failed += ["the nine encodings differ"] if len(encoded) != 1 else []
    print(f"{len(outcomes)} series, {len(failed)} not as expected{': ' + ', '.join(failed) if failed else ''}")
    kept = [vars(o) | {"expected": expectation(o.series), "met": as_expected(o)} for o in outcomes]
    keep("dicom_round_trip", {"series": kept, "not_as_expected": failed}, began)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
