"""The pictures of docs/flows.md: heads drawn by a pyramid flow, and a lesion in each scale's likelihood map.

python benchmarks/flow_pictures.py --minutes 3
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import medgen
from medgen import io
from medgen.bundle import Bundle
from medgen.data.dataset import model_view
from medgen.models.pyramidflow import PyramidFlow
from medgen.report.pictures import contact_sheet, planes, views

ROOT = Path(__file__).resolve().parents[1]
TALL = 176


def scale_maps(bundle: Bundle, model: PyramidFlow) -> Image.Image:
    """The first head with a lesion, then each scale's map through the lesion, one row each."""
    place = sorted((ROOT / "data_samples" / "heads_ill").glob("*_T1w.nii.gz"))[0]
    prepared = bundle.recipe(io.read(place))
    mask = io.read(place.with_name(place.name.replace(".nii.gz", "_mask.nii.gz"))).onto(prepared.grid, outside=0)
    at = [round(float(n.mean())) for n in np.nonzero(mask.voxels[0] > 0)]
    maps = model.log_prob_maps(model_view(prepared)[None])
    rows = [("the head", views(prepared, at))]
    for number, found in enumerate(maps):
        values = found[0, 0].numpy()
        low, high = np.percentile(values, [1, 99])
        name = "coarsest" if number == len(maps) - 1 else f"details of {2**number} to {2 ** (number + 1)} voxels"
        rows.append((name, planes(np.clip((values - low) / max(high - low, 1e-9), 0, 1), at, planar=False)))
    return stacked(rows)


def stacked(rows: list[tuple[str, list[np.ndarray]]]) -> Image.Image:
    drawn = []
    for name, pictures in rows:
        tiles = [Image.fromarray((255 * p).astype(np.uint8)) for p in pictures]
        tiles = [t.resize((round(t.width * TALL / t.height), TALL), Image.Resampling.NEAREST) for t in tiles]
        row = Image.new("L", (190 + sum(t.width + 6 for t in tiles), TALL + 6), 16)
        ImageDraw.Draw(row).text((8, TALL // 2), name, fill=225)
        left = 190
        for tile in tiles:
            row.paste(tile, (left, 3))
            left += tile.width + 6
        drawn.append(row)
    sheet = Image.new("L", (max(row.width for row in drawn), sum(row.height for row in drawn)), 16)
    for number, row in enumerate(drawn):
        sheet.paste(row, (0, number * row.height))
    return sheet


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--minutes", type=float, default=3)
    options = options.parse_args()
    images = ROOT / "docs" / "images"
    with tempfile.TemporaryDirectory() as work:
        place = Path(work) / "flow"
        medgen.train(ROOT / "data_samples" / "heads", place, preset="waveletflow3d", minutes=options.minutes)
        bundle = Bundle.load(place)
    model = bundle.model
    if not isinstance(model, PyramidFlow):
        raise SystemExit("waveletflow3d should be a pyramid flow.")
    scans = [bundle.contract.physical_scan(value) for value in model.sample(4, seed=0).numpy()]
    contact_sheet(
        scans, images / "flow_samples.png", title="SYNTHETIC: drawn by waveletflow3d from sample heads, seed 0"
    )
    with torch.no_grad():
        scale_maps(bundle, model).save(images / "flow_scales.png")


if __name__ == "__main__":
    main()
