"""How long light commands take as whole processes, and whether they load torch.

    python benchmarks/startup.py [--runs 5]

Each command runs once to warm the file cache, then `--runs` times. Seconds on the clock (medians) grow with whatever
else the machine does, so the goal, half a second, is held against the fewest processor seconds of the runs: what one
run takes on a quiet machine. Importing what DICOM and a command line need is measured too: nobody can be faster. The
exit status is 1 where a command misses the goal or loads torch.
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import HERE, keep, table

FLOOR = "import numpy, pydicom, typer"
COMMANDS = (("--help",), ("info", "data_samples/xray"), ("models",))
GOAL = 0.5
HEAVY = ("torch", "monai")


def command(arguments: tuple[str, ...]) -> list[str]:
    """The installed command, else the same through the interpreter; without arguments, the imports alone."""
    if not arguments:
        return [sys.executable, "-c", FLOOR]
    beside = Path(sys.executable).parent / "medgen"
    start = [str(beside)] if beside.exists() else [sys.executable, "-c", "from medgen.cli import main; main()"]
    return [*start, *arguments]


def processor() -> float:
    """Processor seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(arguments: tuple[str, ...]) -> tuple[float, float]:
    """On the clock, and of the processor."""
    started, before = time.perf_counter(), processor()
    subprocess.run(command(arguments), cwd=HERE.parent, capture_output=True, check=True)
    return time.perf_counter() - started, processor() - before


def imported(arguments: tuple[str, ...]) -> list[str]:
    """Which of the heavy packages a command loads, from the interpreter's own account of imports."""
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    run = subprocess.run(command(arguments), cwd=HERE.parent, capture_output=True, text=True, env=environment)
    names = set(re.findall(r"\|\s+([\w.]+)$", run.stderr, re.MULTILINE))
    return [name for name in HEAVY if name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    began = time.monotonic()
    found = {}
    for arguments in ((), *COMMANDS):
        seconds(arguments)
        runs = [seconds(arguments) for _ in range(options.runs)]
        found[" ".join(("medgen", *arguments)) if arguments else FLOOR] = {
            "seconds": round(statistics.median(clock for clock, _ in runs), 3),
            "processor_seconds": round(min(used for _, used in runs), 3),
            "runs": [[round(clock, 3), round(used, 3)] for clock, used in runs],
            "loads": imported(arguments),
        }
    rows = [
        (name, row["seconds"], row["processor_seconds"], ", ".join(row["loads"]) or "neither")
        for name, row in found.items()
    ]
    table(rows, ("command", f"seconds, median of {options.runs}", "processor seconds, least", "torch or monai loaded"))
    keep("startup", {"goal_seconds": GOAL, "load_average": round(os.getloadavg()[0], 1), "commands": found}, began)
    sys.exit(any(row["processor_seconds"] > GOAL or row["loads"] for row in found.values()))


if __name__ == "__main__":
    main()
