"""`medgen info` and `medgen models`: what is there, without torch."""

from pathlib import Path
from typing import Any

from medgen import io
from medgen.errors import MedgenError
from medgen.io.source import ReadOptions


def info(path: str | Path, options: ReadOptions = ReadOptions()) -> dict[str, Any]:
    """What a file or folder holds: every scan's place and size from its header, and what was skipped and why."""
    with io.opened(path) as place:
        found = io.find(place, options)
        scans = [_described(source, options) for source in found.sources]
    return {
        "path": str(path),
        "scans": scans,
        "skipped": [{"path": one.path, "reason": one.reason} for one in found.skipped],
    }


def _described(source: io.Source, options: ReadOptions) -> dict[str, Any]:
    told: dict[str, Any] = {"path": source.path, "kind": source.kind, "files": len(source.files)}
    try:
        grid, channels, header = io.header(source, options)
    except MedgenError as error:
        return told | {"error": str(error)}
    return told | {
        "shape": list(grid.shape),
        "spacing_mm": [round(s, 4) for s in grid.spacing],
        "axcodes": grid.axcodes,
        "channels": channels,
        "modality": header.modality,
        "synthetic": header.synthetic,
    }


def list_models() -> list[dict[str, Any]]:
    """The presets: name, family, year, paper, dimensions and abilities."""
    from medgen.config import load_preset, preset_names  # pydantic takes longer to import than `info` takes to answer

    found = [{"preset": name, **load_preset(name).about.model_dump(mode="json")} for name in preset_names()]
    return sorted(found, key=lambda row: (row["family"], row["preset"]))


__all__ = ["info", "list_models"]
