"""`medgen compare`: several presets, one folder, the same splits and voxels, one table."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medgen import io
from medgen.data.dataset import ScanDataset
from medgen.data.recipe import Recipe
from medgen.errors import ConfigError, DataError
from medgen.io.source import ReadOptions
from medgen.log import note, track
from medgen.metrics.image import psnr, ssim_map
from medgen.tasks.plan import Choices, Look, look_at, planned, shared_recipe
from medgen.tasks.trial import tried
from medgen.tasks.workspace import Workspace

# One of every kind that trains in minutes on a laptop.
DEFAULT = ("gaussian", "gmm", "patchgmm", "autoencoder", "vae", "hvae", "vqvae", "pixelcnn", "glow", "waveletflow")
COLUMNS = {
    "bits_per_dim": "bits/dim",
    "density": "density",
    "psnr_db": "PSNR dB",
    "ssim": "SSIM",
    "auroc": "class AUROC",
    "calibration_error": "class ECE",
    "train_seconds": "train s",
    "sample_seconds": "sample s",
    "peak_mb": "peak MB",
    "parameters": "parameters",
}


@dataclass(frozen=True)
class Compared:
    """What a comparison found: a row of plain values a preset or baseline, and where the files are."""

    rows: tuple[dict[str, Any], ...]
    folder: Path

    @property
    def failed(self) -> int:
        """How many presets could not be trained or measured."""
        return sum("error" in row for row in self.rows)


def compare(
    data: str | Path,
    out: str | Path,
    *,
    presets: Sequence[str] = DEFAULT,
    label: str | None = None,
    domain: str | None = None,
    overrides: Sequence[str] = (),
    minutes: float = 5,
    seed: int = 0,
    device: str = "auto",
    options: ReadOptions = ReadOptions(),
    force: bool = False,
) -> Compared:
    """Train several presets on one folder, each in a process of its own, and measure all on the same test scans.

    `out` gets `comparison.csv`, `comparison.json`, `comparison.md` and the bundles. An interrupted comparison goes
    on where it was. Beside the presets stand the simplest methods: the mean training scan, and lossless PNG.

    Args:
        data: a folder, zip, CSV or .npz of scans.
        out: a folder that must not exist.
        presets: names such as 'vae' (vae2d or vae3d, as the scans are), or YAML files.
        label, domain: learn these scans only.
        overrides: 'a.b=c' changes of every preset.
        minutes: training time of each.
        seed: decides splits, order, noise.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        options: how strict reading is.
        force: replace an existing output.

    Raises:
        DataError, ConfigError, OutputError.
    """
    base = Choices(None, label, domain, list(overrides), minutes, seed)
    settings = {"data": str(Path(data).resolve()), "presets": [str(name) for name in presets], **base.settings()}
    settings |= {"options": vars(options)}
    work = Workspace(out, settings, force=force)
    with io.opened(data) as place:
        each, look, recipe = _agreed(place, base, presets, options)
        work.record()
        rows = _baselines(look, recipe, options)
        for one in track(each, "Comparing presets"):
            rows.append(_row(one, work, place, recipe, device, options))
            _write(rows, work.folder)
    folder = work.finish({"command": "compare", "settings": settings, "recipe": recipe.model_dump(mode="json")})
    return Compared(tuple(rows), folder)


def would_train(
    data: str | Path, presets: Sequence[str], *, label: str | None = None, domain: str | None = None,
    overrides: Sequence[str] = (), seed: int = 0, options: ReadOptions = ReadOptions(),
) -> dict[str, Any]:  # fmt: skip
    """What a comparison would train, and on which voxels; nothing is written.

    Raises:
        DataError, ConfigError.
    """
    base = Choices(None, label, domain, list(overrides), seed=seed)
    with io.opened(data) as place:
        each, look, recipe = _agreed(place, base, presets, options)
        return {"presets": [planned(look, one).preset for one in each], "recipe": recipe.model_dump(mode="json")}


def _agreed(
    place: str | Path, base: Choices, presets: Sequence[str], options: ReadOptions
) -> tuple[list[Choices], Look, Recipe]:
    """What every preset is asked for, the scans, and the voxels that suit all presets.

    Raises:
        DataError: there is nothing to learn from, or to compare on.
        ConfigError: presets share a name, or do not fit.
    """
    names = [Path(name).stem for name in presets]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"compare takes presets with different names; found {', '.join(names) or 'none'}.")
    each = [replace(base, preset=name) for name in presets]
    look = look_at(place, base, options)
    if not len(look.manifest.split("test")):
        raise DataError("No scan is left for the test split, on which models are compared. Add scans.")
    return each, look, shared_recipe(look, each)


def _row(
    choices: Choices, work: Workspace, place: str | Path, recipe: Recipe, device: str, options: ReadOptions
) -> dict[str, Any]:
    """The numbers of one preset; from the journal where an earlier session found them."""
    name = Path(str(choices.preset)).stem
    if name not in work.done:
        told = [*choices.overrides, f"recipe={recipe.model_dump_json()}"]
        note(f"Trying {name}.")
        found = tried(
            {
                "choices": asdict(replace(choices, overrides=told, preset=str(choices.preset))),
                "options": vars(options),
                "data": str(place),
                "out": str(work.folder / "bundles" / name),
                "device": device,
            }
        )
        if "error" in found:  # the same command tries it again
            note(f"{name}: {found['error']}")
            return {"preset": name, **found}
        work.record(name, found)
    return {"preset": name, **_plain(work.done[name])}


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """Measured numbers under the table's names; a bound or an estimate says so in its own column."""
    told = {name.removeprefix("test_"): value for name, value in found.items()}
    for kind in ("bound", "estimate"):
        if f"bits_per_dim_{kind}" in told:
            told["bits_per_dim"], told["density"] = told.pop(f"bits_per_dim_{kind}"), kind
    if "bits_per_dim" in told:
        told.setdefault("density", "exact")
    return told


def _baselines(look: Look, recipe: Recipe, options: ReadOptions) -> list[dict[str, Any]]:
    """What needs no model: the mean training scan as everybody's reconstruction, and PNG as a density."""
    train = ScanDataset(look.manifest.split("train"), recipe, options=options)
    test = ScanDataset(look.manifest.split("test"), recipe, options=options)
    mean = torch.stack([train[n]["x"] for n in range(len(train))]).mean(0)[None]
    x = torch.stack([test[n]["x"] for n in range(len(test))])
    similar = torch.cat([ssim_map(one[None], mean).flatten(1).mean(1) for one in x])
    bits = [_png_bits(one.numpy()) for one in x]
    return [
        {"preset": "mean of training scans", "psnr_db": round(float(psnr(x, mean.expand_as(x)).mean()), 2),
         "ssim": round(float(similar.mean()), 4)},
        {"preset": "lossless PNG", "bits_per_dim": round(float(np.mean(bits)), 4), "density": "code length"},
    ]  # fmt: skip


def _png_bits(x: np.ndarray) -> float:
    """Bits a voxel of a scan (c, *space) in 8-bit PNG, plane by plane."""
    levels = (np.clip(x, 0, 1) * 255).round().astype(np.uint8).reshape(-1, x.shape[-2], x.shape[-1])
    # A volume's planes go below one another, so that one header serves them all.
    held = BytesIO()
    Image.fromarray(levels.reshape(-1, x.shape[-1])).save(held, "PNG", optimize=True)
    return 8 * held.tell() / levels.size


def _write(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    shown = ["preset", *COLUMNS]
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*shown, "error"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "comparison.json").write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text("\n".join(lines(rows)) + "\n", encoding="utf-8")


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table as Markdown, a line a row."""
    told = [["preset", *COLUMNS.values()]]
    told += [[str(row["preset"]), *(_said(row.get(name)) for name in COLUMNS)] for row in rows]
    wide = [max(len(row[n]) for row in told) for n in range(len(told[0]))]
    drawn = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)) + " |" for row in told]
    return [drawn[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *drawn[1:]]


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


__all__ = ["COLUMNS", "DEFAULT", "Compared", "compare", "lines", "would_train"]
