"""What every benchmark shares: where the data is, what machine this is, and how results are kept."""

import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("medgen", "torch", "monai", "numpy", "pydicom", "nibabel", "SimpleITK", "scikit-learn")


def shared_data() -> Path:
    """The folder with real scans: $MEDGEN_DATA, or shared/data beside the checkout."""
    place = Path(os.environ.get("MEDGEN_DATA", HERE.parents[1] / "shared" / "data"))
    if not place.is_dir():
        sys.exit("These benchmarks need the development scans; set MEDGEN_DATA to their folder.")
    return place


def machine() -> dict:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        told = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def peak_mb() -> float:
    """Highest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def keep(name: str, results: dict, began: float) -> None:
    """Write results/NAME.json with machine, seconds and peak memory, and say so."""
    stated = {
        "benchmark": name,
        "seconds": round(time.monotonic() - began, 1),
        "peak_mb": round(peak_mb()),
        "machine": machine(),
        **results,
    }
    place = HERE / "results" / f"{name}.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(stated, indent=1, default=float) + "\n")
    print(f"{stated['seconds']} s, peak {stated['peak_mb']} MB; wrote {place.relative_to(HERE.parent)}")


def table(rows: list[tuple], head: tuple) -> None:
    """Print a table in markdown."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |")
