"""A volume four times the training patch along each axis: scored and sampled tile by tile, and all at once.

Each measurement is a process of its own; memory is its resident peak above the size before. What is compared: the
log-density map in nats a voxel, and the sample on [0, 1] (continuous, so that rounding hides nothing).

    python benchmarks/flow_tiles.py
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from flow_memory import patches, resident
from measure import keep, table
from safetensors.torch import load_file, save_file

from medgen.config import load_preset
from medgen.data.dataset import Batch
from medgen.models import build, config_of
from medgen.models.base import Model

PATCH = 32  # voxels along an axis: 16 positions of the finest level


def pyramid(side: int, tile: int) -> Model:
    """The 3D preset with couplings that do something, as after training."""
    values = {**load_preset("waveletflow3d").model, "shape": (PATCH,) * 3, "patch": PATCH // 2, "tile": tile, "bits": 0}
    torch.manual_seed(0)
    model = build(config_of(values)).eval()
    model.initialise(Batch(patches(PATCH, 4).x))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def measured(what: str, side: int, tile: int, place: str) -> dict[str, float]:
    """Do it once, keep the outcome as a file, and tell peak MB above the start and seconds."""
    model, x = pyramid(side, tile), patches(side, 1).x
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = resident("VmRSS"), time.perf_counter()
    found = model.log_prob_map(x) if what == "score" else model.sample(1, seed=1, shape=(side,) * 3)
    facts = {"peak_mb": resident("VmHWM") - before, "seconds": time.perf_counter() - began}
    save_file({"found": found}, place)
    return facts


def child(what: str, side: int, tile: int) -> tuple[dict[str, float], torch.Tensor]:
    with tempfile.TemporaryDirectory() as work:
        place = str(Path(work) / "found.safetensors")
        told = [sys.executable, __file__, "--child", json.dumps([what, side, tile, place])]
        ran = subprocess.run(told, capture_output=True, text=True)
        if ran.returncode:
            sys.exit(ran.stderr)
        return json.loads(ran.stdout.splitlines()[-1]), load_file(place)["found"]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--side", type=int, default=4 * PATCH, help="of the volume, voxels")
    options.add_argument("--child", help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.child:
        print(json.dumps(measured(*json.loads(options.child))))
        return
    began, rows, results = time.monotonic(), [], {"patch": PATCH, "side": options.side}
    for what in ("score", "sample"):
        small, _ = child(what, PATCH, PATCH // 2)
        tiled, by_tiles = child(what, options.side, PATCH // 2)
        whole, at_once = child(what, options.side, options.side)
        apart = float((by_tiles - at_once).abs().max())
        rows.append(
            (
                what,
                small["peak_mb"],
                tiled["peak_mb"],
                whole["peak_mb"],
                f"{apart:.1e}",
                whole["seconds"] / tiled["seconds"],
            )
        )
        results[what] = {"patch": small, "tiles": tiled, "at once": whole, "largest difference": apart}
    head = (
        "",
        f"{PATCH}^3, MB",
        f"{options.side}^3 in tiles, MB",
        "at once, MB",
        "largest difference",
        "time, at once : tiles",
    )
    table(rows, head)
    keep("flow_tiles", results, began)


if __name__ == "__main__":
    main()
