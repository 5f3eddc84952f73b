"""How fast a CT series is found and read: medgen beside SimpleITK, MONAI and plain pydicom, interleaved in one run.

    python benchmarks/read_dicom.py [--slices 200] [--rounds 5] [--syntax native|rle|jpegls|j2k]

Each reader runs in a process of its own that has imported everything; times are medians over rounds in which all
readers take turns, because a busy machine drifts by more than the readers differ. Peak memory is that of the process.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

RESULTS = Path(__file__).parent / "results" / "read_dicom.json"
SYNTAXES = {"native": None, "rle": RLELossless, "jpegls": JPEGLSLossless, "j2k": JPEG2000Lossless}


def write_series(folder: Path, slices: int, syntax: str | None) -> None:
    """A CT series of 512 x 512 smooth noise."""
    rng = np.random.default_rng(0)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    base = np.cumsum(rng.normal(0, 3, (512, 512)), 1).astype(np.int16)
    for k in range(slices):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        ds.ImageType, ds.Modality, ds.PatientID, ds.PatientName = ["ORIGINAL", "PRIMARY", "AXIAL"], "CT", "1", "Bench"
        ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series, study, frame
        ds.InstanceNumber, ds.SliceThickness, ds.PixelSpacing = k + 1, 1.5, [0.7, 0.7]
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [-180, -180, 1.5 * k], [1, 0, 0, 0, 1, 0]
        ds.Rows = ds.Columns = 512
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
        # As many small elements as a scanner writes.
        for element in range(60):
            ds.add_new((0x0019, 0x1000 + element), "LO", f"value {element}")
        ds.PixelData = (base + rng.integers(0, 8, base.shape, dtype=np.int16)).astype("<i2").tobytes()
        ds["PixelData"].VR = "OW"
        if syntax:
            ds.compress(syntax)
        ds.save_as(folder / f"{slices - k:04d}.dcm", enforce_file_format=True)


def by_medgen(folder: Path) -> np.ndarray:
    from medgen.io.dicom.read import find_series, read_series

    sources, _ = find_series(sorted(folder.iterdir()))
    return read_series(sources[0]).voxels


def by_simpleitk(folder: Path) -> np.ndarray:
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return SimpleITK.GetArrayViewFromImage(reader.Execute())


def by_monai(folder: Path) -> np.ndarray:
    from monai.data import PydicomReader

    reader = PydicomReader()
    return reader.get_data(reader.read(folder))[0]


def by_pydicom(folder: Path) -> np.ndarray:
    """What many scripts do: parse everything, sort, stack."""
    import pydicom

    slices = sorted((pydicom.dcmread(path) for path in folder.iterdir()), key=lambda ds: ds.ImagePositionPatient[2])
    return np.stack([ds.pixel_array for ds in slices])


READERS: dict[str, Callable[[Path], np.ndarray]] = {
    "medgen": by_medgen,
    "SimpleITK": by_simpleitk,
    "MONAI PydicomReader": by_monai,
    "pydicom pixel_array": by_pydicom,
}


def serve(name: str, folder: Path, small: Path, line) -> None:
    """Read whenever asked, and tell seconds and the process's peak memory."""
    READERS[name](small)  # imports and warms up
    while line.recv():
        started = time.perf_counter()
        shape = READERS[name](folder).shape
        seconds = time.perf_counter() - started
        line.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, shape))


def measure(folder: Path, small: Path, rounds: int) -> dict[str, dict]:
    context = multiprocessing.get_context("spawn")
    lines, processes = {}, []
    for name in READERS:
        lines[name], far = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, folder, small, far), daemon=True))
        processes[-1].start()
    times: dict[str, list[float]] = {name: [] for name in READERS}
    memory = {}
    for round_number in range(rounds + 1):
        for name, line in lines.items():
            line.send(True)
            seconds, memory[name], _ = line.recv()
            if round_number:  # the first round only fills the file cache
                times[name].append(seconds)
    for line in lines.values():
        line.send(False)
    for process in processes:
        process.join()
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "seconds": round(median[name], 4),
            "rounds": [round(value, 4) for value in times[name]],
            "of SimpleITK": round(median[name] / median["SimpleITK"], 3),
            "peak MiB": round(memory[name]),
        }
        for name in READERS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--syntax", choices=SYNTAXES, default="native")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, small = Path(place) / "series", Path(place) / "small"
        folder.mkdir()
        small.mkdir()
        write_series(folder, options.slices, SYNTAXES[options.syntax])
        write_series(small, 3, SYNTAXES[options.syntax])
        found = measure(folder, small, options.rounds)
    print(f"{options.slices} x 512 x 512 int16, {options.syntax}; medians of {options.rounds} rounds")
    for name, row in found.items():
        print(f"{name:22} {row['seconds']:8.3f} s {row['of SimpleITK']:7.2f} x SimpleITK {row['peak MiB']:7} MiB peak")
    ratio = found["MONAI PydicomReader"]["seconds"] / found["medgen"]["seconds"]
    print(f"medgen is {ratio:.1f} times as fast as MONAI's PydicomReader")
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[f"{options.syntax} {options.slices}"] = {
        "machine": f"{platform.system()} {platform.machine()}, {multiprocessing.cpu_count()} cores",
        "python": platform.python_version(),
        "readers": found,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
