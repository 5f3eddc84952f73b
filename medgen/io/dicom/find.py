"""Which DICOM series lie in a set of files, from their headers alone; files are told by content, never by name."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from medgen import log
from medgen.errors import UnreadableScan
from medgen.io.dicom.elements import Elements, printable_uid
from medgen.io.dicom.file import DicomFile, open_file
from medgen.io.dicom.frames import is_planar
from medgen.io.source import ReadOptions, Skipped, Source

_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")


@dataclass(frozen=True, slots=True)
class _Entry:
    """What finding keeps of a file: little, because there may be a million of them."""

    path: Path
    series: str
    patient: str
    modality: str
    is_localizer: bool
    apart: str
    position: tuple[float, ...]
    axes: tuple[float, ...]
    cut: bool


T = TypeVar("T", _Entry, DicomFile)


def find_series(files: Sequence[Path], options: ReadOptions = ReadOptions()) -> tuple[list[Source], list[Skipped]]:
    """The DICOM volumes and pictures among `files`, from their headers alone.

    Args:
        files: any files; DICOM is told by content, not by name.
        options: `force` also accepts DICOM without preamble.

    Returns:
        One Source for each volume (a series, or one multi-frame file) with its files along the slice normal, and
        every file that was left out, with the reason. Siemens mosaics of one series are one volume in several times,
        unless their SeriesNumber differs: then they are scans of their own.
    """
    skipped: list[Skipped] = []
    series: dict[str, list[_Entry]] = defaultdict(list)
    cut: list[_Entry] = []
    for path in dict.fromkeys(Path(file) for file in files):
        try:
            file = open_file(path, force=options.force)
        except UnreadableScan as fault:
            skipped.append(Skipped(str(path), str(fault)))
            continue
        if reason := why_not(file):
            skipped.append(Skipped(str(path), reason))
            continue
        if file.is_program:
            log.note(f"{file.name}: the preamble begins like a program. Do not run this file.")
        entry = _entry(file)
        (cut if entry.cut else series[entry.series]).append(entry)
    for entry in cut:
        # The cut may go through the identifier itself: what is left of it still tells the series.
        home = next((key for key in series if key.startswith(entry.series)), None)
        if home is None:
            skipped.append(Skipped(str(entry.path), "an image without pixels: the file is truncated or was stripped"))
        else:
            series[home].append(entry)
    groups: list[tuple[str, list[_Entry]]] = []
    for identifier, members in series.items():
        kept, scouts = without_localizers(members)
        skipped += [Skipped(str(entry.path), "a localizer inside a series of other slices") for entry in scouts]
        groups += _groups(identifier, kept)
    return _sources(groups), skipped


def why_not(file: DicomFile) -> str:
    """Why a DICOM file holds no picture medgen reads, '' where it may."""
    if "Image Storage" not in file.kind or "Microscopy" in file.kind:
        known = file.kind or f"SOP class {printable_uid(file.sop_class) if file.sop_class else 'unstated'}"
        return f"{known}: not an image to read"
    if not file.elements.text("SeriesInstanceUID"):
        return "an image without a SeriesInstanceUID: nobody can tell what it belongs to"
    return ""


def without_localizers(files: list[T]) -> tuple[list[T], list[T]]:
    """The files, and apart from them the scouts that lie among other slices."""
    scouts = [file for file in files if file.is_localizer]
    if not scouts or len(scouts) == len(files):
        return files, []
    log.note(f"{len(scouts)} localizers were left out of a series of {len(files)} files: {scouts[0].path.name}, ...")
    return [file for file in files if not file.is_localizer], scouts


def _entry(file: DicomFile) -> _Entry:
    elements = file.elements
    axes = _place(elements, "PlaneOrientationSequence", "ImageOrientationPatient")
    return _Entry(
        path=file.path,
        series=elements.text("SeriesInstanceUID"),
        patient=file.patient,
        modality=elements.code("Modality"),
        is_localizer=file.is_localizer,
        apart=_apart(file, axes),
        position=_place(elements, "PlanePositionSequence", "ImagePositionPatient"),
        axes=axes,
        cut=file.pixels is None,
    )


def _apart(file: DicomFile, axes: tuple[float, ...]) -> str:
    """What sets a file apart from its series: volumes and pictures stand alone, localizers by where they look.

    All other slices stay together whatever their form: if they disagree, reading says so.
    """
    elements = file.elements
    if max(_lenient(elements, "NumberOfFrames") or (1,)) > 1 or is_planar(file):
        return str(file.path)
    if file.is_localizer:
        size = [elements.raw(keyword).hex() for keyword in ("Rows", "Columns", "SamplesPerPixel")]
        return f"{elements.text('FrameOfReferenceUID')} {size} {[round(n, 2) + 0.0 for n in axes]}"
    if file.is_mosaic:
        # Each is a whole volume. Several are its times, unless they only share the identifier of one series.
        return f"mosaic {elements.raw('SeriesNumber').hex()}"
    return ""


def _lenient(elements: Elements, keyword: str) -> tuple[float, ...]:
    """Numbers for sorting; damaged ones count as absent here and are refused when the series is read."""
    try:
        return elements.numbers(keyword)
    except UnreadableScan:
        return ()


def _place(elements: Elements, macro: str, keyword: str) -> tuple[float, ...]:
    """A place from the first level that states it: the file itself, its first frame, or what its frames share."""
    if values := _lenient(elements, keyword):
        return values
    try:
        groups = [elements.items(level) for level in _GROUPS]
        found = [item for group in groups if group for item in group[0].items(macro)]
    except UnreadableScan:
        return ()
    return _lenient(found[0], keyword) if found else ()


def _groups(series: str, entries: list[_Entry]) -> list[tuple[str, list[_Entry]]]:
    """The files of one series as (key, files of one volume)."""
    apart: dict[str, list[_Entry]] = defaultdict(list)
    for entry in entries:
        apart[f"{series} {entry.apart}".strip()].append(entry)
    return [(key, _sorted(members)) for key, members in apart.items()]


def _sorted(entries: list[_Entry]) -> list[_Entry]:
    axes = next((entry.axes for entry in entries if len(entry.axes) == 6), None)
    if axes is None or any(len(entry.position) != 3 for entry in entries):
        return sorted(entries, key=lambda entry: str(entry.path))
    normal = np.cross(axes[:3], axes[3:])
    return sorted(entries, key=lambda entry: (round(float(np.dot(entry.position, normal)), 3), str(entry.path)))


def _sources(groups: list[tuple[str, list[_Entry]]]) -> list[Source]:
    folders = [Path(os.path.commonpath({entry.path.parent for entry in entries})) for _, entries in groups]
    below = Counter(parent for folder in folders for parent in (folder, *folder.parents))
    sources = []
    for (key, entries), folder in zip(groups, folders, strict=True):
        path = str(folder)
        if len(entries) == 1:
            path = str(entries[0].path)
        elif below[folder] > 1:
            path += f"#{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        paths = tuple(entry.path for entry in entries)
        sources.append(Source(path, "dicom", paths, entries[0].patient, entries[0].modality))
    return sorted(sources, key=lambda source: source.path)


__all__ = ["find_series", "why_not", "without_localizers"]
