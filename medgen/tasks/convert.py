"""`medgen convert`: the same scans in another format, on the same millimetres, in the same units."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medgen import io
from medgen.errors import DataError, MedgenError, OutputError
from medgen.io.privacy import Pseudonyms
from medgen.io.source import ReadOptions, Skipped, Source
from medgen.log import note, track
from medgen.tasks.workspace import Workspace

Identity = Literal["pseudonym", "keep"]


@dataclass(frozen=True)
class Converted:
    """What was written and what was not.

    Args:
        folder: where.
        written: file or folder names in it.
        skipped: everything left out, and why.
        failed: how many of these are scans that could not be read or written.
    """

    folder: Path
    written: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    failed: int = 0


def convert(
    data: str | Path,
    out: str | Path,
    *,
    format: Literal["nifti", "dicom", "png"] = "nifti",
    identity: Identity = "pseudonym",
    table: str | Path | None = None,
    options: ReadOptions = ReadOptions(),
    force: bool = False,
) -> Converted:
    """Write every scan of a file or folder in another format.

    Args:
        data: file, folder, DICOM series, zip or .npz.
        out: a folder that must not exist.
        format: 'nifti' (.nii.gz), 'dicom' (one folder a series) or 'png' (images only).
        identity: DICOM to DICOM: 'pseudonym' replaces patient and UIDs consistently, 'keep' stays in the
            patient's study.
        table: CSV that keeps originals beside pseudonyms, outside `out`; None keeps nothing.
        options: how strict reading is.
        force: replace an existing output.

    Raises:
        DataError: nothing could be converted.
        PrivacyError: the table lies inside `out`.
        OutputError: `out` exists, or the disk is full.
    """
    names = Pseudonyms(Path(table) if table else None)
    names.guard(Path(out))
    settings = {"data": str(Path(data).resolve()), "format": format, "identity": identity, "options": vars(options)}
    work = Workspace(out, settings, force=force)
    if work.resumed and format == "dicom" and identity == "pseudonym":
        work.start_again()  # the key that the first pseudonyms were made with is gone
    failed: list[Skipped] = []
    taken: set[str] = set()
    with io.opened(data) as place:
        found = io.find(place, options)
        work.record()
        for number, source in enumerate(track(found.sources, "Converting"), start=1):
            name = _unused(_name(source, place, number, identity), taken)
            if name in work.done:
                continue
            try:
                work.record(name, _write(source, work.folder, name, format, identity, names, options))
            except MedgenError as error:
                if isinstance(error.__cause__, OSError) and isinstance(error, OutputError):
                    raise  # the disk is to blame, not the scan
                note(f"Skipped {Path(source.path).name}: {error}")
                failed.append(Skipped(source.path, str(error)))
    if not work.done:
        work.discard()
        first = failed[0].reason if failed else "there is no scan"
        raise DataError(f"Nothing of {Path(data).name} could be converted: {first}")
    if table:
        names.save()
    written = tuple(str(path) for path in work.done.values())
    count = len(failed) + sum(_seems_a_scan(one) for one in found.skipped)
    stated = {"path": "see log", "settings": {k: v for k, v in settings.items() if k != "data"}}
    work.finish({"command": "convert", **stated, "written": written, "failed": count})
    return Converted(Path(out), written, (*failed, *found.skipped), count)


def _seems_a_scan(skipped: Skipped) -> bool:
    """Whether a file that was not even tried calls itself one, and is no report or scout either."""
    named = Path(skipped.path).suffix.lower() in (".dcm", ".ima", ".npz")
    return named and not any(what in skipped.reason for what in ("not an image to read", "localizer"))


def _unused(name: str, taken: set[str]) -> str:
    """`name`, or with the first number that makes it unlike those given before; capitals make no difference."""
    chosen, number = name, 2
    while chosen.lower() in taken:
        chosen, number = f"{name}-{number}", number + 1
    taken.add(chosen.lower())
    return chosen


def _name(source: Source, place: Path, number: int, identity: Identity) -> str:
    """A name for an output: from the file's, or a number where the file's name may be somebody's."""
    if source.kind == "dicom" and identity == "pseudonym":
        return f"series-{number:04d}"
    path, _, fragment = source.path.partition("#")
    inside = Path(path).name if Path(path) == place else Path(path).relative_to(place).as_posix()
    stem = inside.removesuffix(".gz").rsplit(".", 1)[0] if Path(path).is_file() else inside
    return "_".join(part for part in (stem.replace("/", "_"), fragment.replace("/", "_")) if part)


def _write(
    source: Source,
    folder: Path,
    name: str,
    format: str,
    identity: Identity,
    names: Pseudonyms,
    options: ReadOptions,
) -> str:
    scan = io.read(source, options)
    if format == "dicom":
        from medgen.io.dicom.write import Provenance, write_series

        copied = Provenance(description="The same voxels in another file", content="copy")
        files = source.files if source.kind == "dicom" else ()
        write_series(
            scan, folder / name, provenance=copied, source=files, identity=identity, pseudonyms=names, name=name
        )
        return name
    target = folder / f"{name}{'.nii.gz' if format == 'nifti' else '.png'}"
    target.unlink(missing_ok=True)
    io.write(scan, target)
    return target.name


__all__ = ["Converted", "convert"]
