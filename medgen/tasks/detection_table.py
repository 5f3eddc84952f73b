"""What `evaluate` found about detection: as lines for people, and as files."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.controls import CONTROLS
from medgen.report.scatter import scatter
from medgen.tasks.detection import DETECTOR

_ROWS = {
    "ill": "ill", "method": "method", "scans": "scans", "auroc": "AUROC", "average_precision": "AP",
    "sensitivity": "sens. at 95 % spec.", "auroc_behind": "AUROC behind", "voxel_ap": "voxel AP",
    "best_dice": "best Dice", "dice": "Dice", "aupro": "AUPRO@30",
}  # fmt: skip
_FALSE = {
    "method": "method", "calibration_scans": "calibrated on", "scans": "healthy scans", "flagged": "flagged",
    "expected_interval": "expected by chance", "marked": "marked anywhere",
}  # fmt: skip
_CONTROLS = {"method": "method", **{name: name for name in CONTROLS}, "mean": "mean", "below": "healthier than healthy"}
_EXPLAINS = (
    "[ ]: 95 % intervals, of patients drawn again (of shares: exact binomial). AUROC behind: how far a method is "
    "behind the detector on the same patients. Dice: at the calibrated threshold; best Dice: at the best of all."
)


def lines(found: Mapping[str, Any]) -> list[str]:
    """The tables as Markdown."""
    told = [
        "", f"DETECTION: {found['healthy_scans']} held-out healthy scans; false-alarm rate asked for {found['rate']:g}",
        "", *table(found["rows"], _ROWS), "", "HEALTHY SCANS", "", *table(found["false_positives"], _FALSE),
    ]  # fmt: skip
    if found.get("controls"):
        told += ["", "CONTROL INPUTS: AUROC against healthy scans", "", *table(found["controls"], _CONTROLS)]
    return [*told, "", _EXPLAINS, *found.get("notes", ())]


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Markdown, with each interval beside its number; a column that no row has is left out."""
    shown = {name: title for name, title in columns.items() if any(row.get(name) not in (None, []) for row in rows)}
    cells = [list(shown.values())] + [[_said(row, name) for name in shown] for row in rows]
    wide = [max(len(line[n]) for line in cells) for n in range(len(shown))]
    drawn = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, wide, strict=True)) + " |" for line in cells]
    return [drawn[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *drawn[1:]]


def _said(row: Mapping[str, Any], name: str) -> str:
    value, ends = row.get(name), row.get(f"{name}_interval")
    if value is None:
        return ""
    if isinstance(value, list | tuple) and not (value and isinstance(value[0], str)):
        return "" if not value else f"{value[0]:.2f} to {value[1]:.2f}"
    if isinstance(value, list | tuple):
        return ", ".join(value)
    if not isinstance(value, float):
        return str(value)
    shown = "" if ends is None or not np.isfinite(ends).all() else f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    return f"{value:.3f}{shown}"


def write(found: Mapping[str, Any], scans: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """detection.md, a .csv of each table and of the scans, and a picture of the scans' ranks among the healthy."""
    (folder / "detection.md").write_text("\n".join(lines(found)[1:]) + "\n", encoding="utf-8")
    tables = {"detection": found["rows"], "scans": scans}
    tables |= {name: found.get(name, []) for name in ("false_positives", "controls")}
    for name, rows in tables.items():
        write_csv(rows, folder / f"{name}.csv")
    _picture(scans, folder / "ranks.png")


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Every column that any row has; an interval takes two."""
    flat = [{key: cell for name, value in row.items() for key, cell in _cells(name, value)} for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(flat)


def _cells(name: str, value: Any) -> list[tuple[str, Any]]:
    """An interval takes two columns."""
    if name.endswith("_interval"):
        stem = name.removesuffix("_interval")
        return [(f"{stem}_low", value[0]), (f"{stem}_high", value[1])]
    return [(name, ", ".join(value) if isinstance(value, list | tuple) else value)]


def _picture(scans: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each scan's rank among the healthy ones, by the detector and by the baseline with histograms of gradients."""
    methods = [method for method in (DETECTOR, "hog") if any(row["method"] == method for row in scans)]
    if len(methods) < 2:
        return
    ranks, groups = [], []
    for method in methods:
        mine = [row for row in scans if row["method"] == method]
        healthy = np.sort([row["unusual"] for row in mine if row["group"] == "healthy"])
        if not len(healthy):
            return
        ranks.append(np.searchsorted(healthy, [row["unusual"] for row in mine]) / len(healthy))
        groups = [row["group"] for row in mine]
    axes = (f"share of healthy scans below, {methods[0]}", f"the same, {methods[1]}")
    scatter(np.stack(ranks, 1).astype(np.float64), groups, path, title="Where scans rank among healthy ones", axes=axes)


__all__ = ["lines", "table", "write", "write_csv"]
