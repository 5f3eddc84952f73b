"""`medgen augment` on 44 T1 brains: 20 volumes as NIfTI and 20 as DICOM, judged by validators and for copies.

    python benchmarks/augment_brains.py --minutes 5 --out somewhere

Every DICOM file must pass dciodvfy (the one known line about Synthetic Data apart); SimpleITK and nibabel must put
the corners of both formats where medgen does; no volume may be a copy of a training brain by the r = d1/d2 test,
computed again here with another set of patients in the second place.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
import torch
from measure import keep, shared_data

import medgen
from medgen.bundle import Bundle
from medgen.data.dataset import model_view
from medgen.metrics.memorisation import CopyDetector, CopyTest

ALLOWED = re.compile(r"</\(0008,001c\)> - Attribute with an even group number is not a recognized standard attribute")


def dicom_errors(files: list[Path]) -> list[str]:
    found = []
    for file in files:
        run = subprocess.run(["dciodvfy", "-new", str(file)], capture_output=True, text=True, errors="replace")
        lines = (run.stdout + run.stderr).splitlines()
        found += [f"{file.name}: {line}" for line in lines if line.startswith("Error") and not ALLOWED.search(line)]
    return found


def corner_error_mm(folder: Path, grid: medgen.Grid) -> float:
    """Furthest that SimpleITK and medgen are apart on a voxel corner of a series."""
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    picture = SimpleITK.ReadImage(files)
    last = np.asarray(picture.GetSize()) - 1
    lps = [
        np.asarray(picture.TransformContinuousIndexToPhysicalPoint((last * c).tolist())) for c in np.ndindex(2, 2, 2)
    ]
    ras = np.asarray(lps) * [-1, -1, 1]
    mine = grid.corners()
    return float(max(np.linalg.norm(mine - corner, axis=1).min() for corner in ras))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--minutes", type=float, default=5)
    options.add_argument("--out", type=Path, default=None, help="keep the outputs here")
    options = options.parse_args()
    began = time.monotonic()
    brains = shared_data() / "brain_t1_ds002748" / "mni2mm"
    work = options.out or Path(tempfile.mkdtemp())
    started = time.monotonic()
    first = medgen.augment(brains, work / "nifti", n=20, minutes=options.minutes)
    minutes = (time.monotonic() - started) / 60
    second = medgen.augment(brains, work / "dicom", n=20, bundle=work / "nifti" / "bundle", format="dicom", seed=1)
    volumes = sorted((work / "nifti" / "images").glob("*.nii.gz"))
    series = sorted(path for path in (work / "dicom").iterdir() if path.is_dir())
    files = [file for folder in series for file in sorted(folder.glob("*.dcm"))]
    errors = dicom_errors(files) if shutil.which("dciodvfy") else ["dciodvfy is not installed"]
    scans = [medgen.read(path) for path in (*volumes, *series)]
    nifti_mm = max(np.abs(nibabel.load(p).affine - s.grid.affine).max() for p, s in zip(volumes, scans, strict=False))
    dicom_mm = max(corner_error_mm(p, s.grid) for p, s in zip(series, scans[len(volumes) :], strict=True))
    bundle = Bundle.load(work / "nifti" / "bundle")
    everybody = sorted(brains.glob("*.nii.gz"))
    known = torch.stack([model_view(bundle.recipe(medgen.read(path))) for path in everybody])
    detector = CopyDetector(known, [path.name for path in everybody])
    found = detector.nearest(torch.stack([model_view(bundle.recipe(scan)) for scan in scans]))
    results = {
        "written": {"nifti": len(volumes), "dicom_series": len(series), "dicom_files": len(files)},
        "minutes_with_training": round(minutes, 2),
        "dciodvfy_errors": len(errors),
        "furthest_corner_mm": {"nifti": float(nifti_mm), "dicom": dicom_mm},
        "copy_test": first.privacy["copies"],
        "copies_drawn_again": first.rejected.get("copy", 0) + second.rejected.get("copy", 0),
        "lowest_r_among_all_44": min(min(one.r.values()) for one in found),
        "copies_written": sum(map(CopyTest(**first.privacy["copies"]).is_copy, found)),
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    for error in errors[:5]:
        print(error)
    keep("augment_brains", results, began)


if __name__ == "__main__":
    main()
