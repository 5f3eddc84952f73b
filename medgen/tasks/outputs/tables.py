"""What describes all scans of a folder: the table, nnU-Net's description, and the .npz that holds small scans."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgen import io
from medgen.data.layout import MADE, RESERVED
from medgen.errors import DataError
from medgen.io.atomic import replacing
from medgen.io.nifti import nifti_header
from medgen.io.raster import as_pictures, stream_npz
from medgen.io.source import ReadOptions
from medgen.tasks.outputs.layout import Layout

# What medgen wrote itself may be of three channels.
_OWN = ReadOptions(colour=True)
_NPZ = "synthetic.npz"


def write_manifest(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The table of all scans, which `medgen.data.manifest.index` reads: all of them are for training.

    From `origin` on stand the columns that say how a scan was made, the scores of the gates last.
    """
    told = _columns(name for row in rows for name in row.get("covariates", {}))
    scores = _columns(name for row in rows for name in row.get("scores", {}))
    first = [name for name in RESERVED if name != "root"]
    header = [*first, *[_covariate(name, scores) for name in told], *MADE, *scores, "root"]
    with replacing(folder / "manifest.csv", force=True) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            known = row.get("covariates", {})
            cells = [row.get(name, "") for name in first[:-1]] + ["train"]
            cells += [known.get(name, "") for name in told]
            cells += [_cell(row.get(name, "")) for name in MADE]
            cells += [_cell(row.get("scores", {}).get(name, "")) for name in scores]
            writer.writerow([*cells, "."])


def _columns(names: Iterator[str]) -> list[str]:
    return sorted(set(names))


def _covariate(name: str, scores: Sequence[str]) -> str:
    return f"covariate_{name}" if name in RESERVED or name in MADE or name in scores else name


def _cell(value: Any) -> Any:
    """A value as text: pseudonyms joined by ';', parameters as compact JSON."""
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True, separators=(",", ":")) if value else ""
    if isinstance(value, (list, tuple)):
        return ";".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else value


def write_json(told: Mapping[str, Any], file: Path) -> None:
    """A description, at once or not at all."""
    with replacing(file, force=True) as part:
        part.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_dataset_json(rows: Sequence[Mapping[str, Any]], folder: Path, layout: Layout, name: str) -> None:
    """nnU-Net's description: what the user's own said, with the number of scans there are now."""
    channels = {str(number): channel for number, channel in enumerate(layout.channels or ("image",))}
    told = {
        **layout.extra,
        "name": name,
        "channel_names": channels,
        "labels": dict(layout.labels),
        "numTraining": len(rows),
        "file_ending": layout.ending,
    }
    write_json(told, folder / "dataset.json")


# -- .npz ----------------------------------------------------------------------------------------------------


def as_npz(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Collect the scans in one .npz, one after another; returns the rows with the paths they have there."""
    files = [folder / "arrays" / f"{row['case']}.nii" for row in rows]
    if not (folder / _NPZ).is_file() or all(file.is_file() for file in files):
        shape, kind = _common(files)
        pictures = (as_pictures([io.read(file, _OWN)])[0] for file in files)
        stream_npz(folder / _NPZ, pictures, (len(files), *shape), kind, _numbers([row["label"] for row in rows]))
    return [{**row, "path": f"{_NPZ}#train/{n}"} for n, row in enumerate(rows)]


def _common(files: Sequence[Path]) -> tuple[tuple[int, ...], np.dtype]:
    """The shape that all scans have, as pictures, and the type that holds them all."""
    shapes, kinds = set(), set()
    for file in files:
        grid, channels, kind, _ = nifti_header(file)
        shapes.add((*grid.shape, channels))
        kinds.add(kind)
    if len(shapes) != 1:
        raise DataError(f"An .npz holds scans of one shape; found {len(shapes)} shapes. Use --format nifti.")
    i, j, k, c = shapes.pop()
    return (*(() if k == 1 else (k,)), j, i, *(() if c == 1 else (c,))), np.result_type(*kinds)


def _numbers(labels: Sequence[str]) -> np.ndarray | None:
    """Labels as numbers: their own where they are such, else their place in the alphabet; None where there are none."""
    if not any(labels):
        return None
    split = [label.split() for label in labels]
    if all(part.isdecimal() for parts in split for part in parts) and len({len(parts) for parts in split}) == 1:
        return np.asarray([[int(part) for part in parts] for parts in split], dtype=np.int64)
    names = sorted(set(labels))
    return np.asarray([[names.index(label)] for label in labels], dtype=np.int64)


__all__ = ["as_npz", "write_dataset_json", "write_json", "write_manifest"]
