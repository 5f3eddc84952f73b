"""A user's own CSV of scans: each line is checked against the disk, and names fill what it does not say."""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from medgen.data.layout import MADE, RESERVED, Draft, draft, pieces, relative
from medgen.errors import DataError
from medgen.io import find, format_of
from medgen.io.source import ReadOptions, Skipped, Source
from medgen.log import track


def covariates(line: Mapping[str, str]) -> dict[str, str]:
    """What a line says beyond the table's own columns, which in a table of made scans include all after `origin`."""
    columns = list(line)
    told = columns[: columns.index(MADE[0])] if set(MADE) <= set(columns) else columns
    return {name: line[name] for name in told if name not in RESERVED and line[name]}


def read_table(path: Path) -> tuple[Path, list[dict[str, str]]]:
    """The root and the lines of a CSV or TSV."""
    if not path.is_file():
        raise DataError(f"{path.name}: no such file. Expected a CSV with a column 'path'.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", restval="")
            lines = [
                {k.strip(): (v or "").strip() for k, v in line.items() if k and isinstance(v, str)} for line in reader
            ]
            columns = [name.strip() for name in reader.fieldnames or []]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path.name}: expected a CSV in UTF-8; it cannot be read as one.") from error
    if "path" not in columns:
        raise DataError(f"{path.name}: expected a column 'path'; found {', '.join(columns[:12]) or 'no header'}.")
    roots = {line.get("root", "") for line in lines} - {""}
    if len(roots) > 1:
        raise DataError(f"{path.name}: one table has one root; found {len(roots)} in its column 'root'.")
    return path.parent / (roots.pop() if roots else ""), lines


def drafts_of_table(path: Path, options: ReadOptions) -> tuple[Path, list[Draft], list[Skipped]]:
    """Drafts of a user's own table; what a column does not say is told by names and files."""
    root, lines = read_table(path)
    if not lines:
        raise DataError(f"{path.name}: the table has a header but no rows.")
    seen: dict[str, tuple[Source, ...]] = {}
    drafts = []
    for number, line in enumerate(track(lines, "looking for files"), 2):
        parts = line.get("path", "").split(";")
        sources = [source for part in parts if (source := _source(root, part, seen, options))]
        if len(sources) < len(parts) or (line.get("mask") and not (root / line["mask"]).exists()):
            raise DataError(f"{path.name}, line {number}: no such scan or mask. Paths start from {root.name or root}.")
        whole = replace(sources[0], files=tuple(chain.from_iterable(source.files for source in sources)))
        one = draft(whole, root)
        one.path = ";".join(relative(source.path, root) for source in sources)
        one.case = line.get("case", "")
        one.patient = line.get("patient") or one.patient
        one.label, one.mask = line.get("label", one.label), line.get("mask", "")
        one.domain, one.split = line.get("domain", one.domain), line.get("split", "")
        one.covariates = covariates(line)
        drafts.append(one)
    _fill_cases(drafts)
    return root, drafts, []


def _source(root: Path, part: str, seen: dict[str, tuple[Source, ...]], options: ReadOptions) -> Source | None:
    """The one scan at a path of a table, None where there is none or more than one."""
    base, fragment = pieces(part)
    place = root / base
    if not part.strip() or not place.exists():
        return None
    kind = "dicom" if place.is_dir() else format_of(place)
    if kind in ("nifti", "itk", "raster"):
        return Source(str(place), kind, (place,))
    if base not in seen:
        seen[base] = find(place, options).sources
    whole = f"{place}#{fragment}" if fragment else str(place)
    exact = [source for source in seen[base] if source.path == whole]
    chosen = exact or [source for source in seen[base] if not fragment]
    return chosen[0] if len(chosen) == 1 else None


def _fill_cases(drafts: list[Draft]) -> None:
    """Names for the cases that have none, each unique."""
    taken = Counter(one.case for one in drafts if one.case)
    for number, one in enumerate(drafts, 1):
        if not one.case:
            stem = one.stem if one.source.kind in ("nifti", "itk", "raster") and one.stem else f"row-{number}"
            one.case = stem if not taken[stem] else f"{stem}-{number}"
            taken[one.case] += 1
        one.patient = one.patient or one.case


__all__ = ["covariates", "drafts_of_table", "read_table"]
