"""`medgen convert`: the same scans in another format, on the same millimetres, in the same units."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medgen import io
from medgen.errors import DataError, MedgenError
from medgen.io.privacy import Pseudonyms
from medgen.io.source import ReadOptions, Skipped, Source
from medgen.log import note, track
from medgen.tasks.workspace import Workspace

Identity = Literal["pseudonym", "keep"]


@dataclass(frozen=True)
class Converted:
    """What was written and what was not."""

    folder: Path
    written: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    @property
    def failed(self) -> int:
        """How many scans could not be read or written."""
        return len(self.skipped)


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
    failed: list[Skipped] = []
    with io.opened(data) as place:
        found = io.find(place, options)
        for number, source in enumerate(track(found.sources, "Converting"), start=1):
            name = _name(source, place, number, identity)
            if name in work.done:
                continue
            try:
                work.record(name, _write(source, work.folder, name, format, identity, names, options))
            except MedgenError as error:
                note(f"Skipped {Path(source.path).name}: {error}")
                failed.append(Skipped(source.path, str(error)))
    if not work.done:
        first = failed[0].reason if failed else "there is no scan"
        raise DataError(f"Nothing of {Path(data).name} could be converted: {first}")
    if table:
        names.save()
    written = tuple(str(path) for path in work.done.values())
    stated = {"path": "see log", "settings": {k: v for k, v in settings.items() if k != "data"}}
    work.finish({"command": "convert", **stated, "written": written, "failed": len(failed)})
    return Converted(Path(out), written, (*failed, *found.skipped) if not failed else tuple(failed))


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
