"""Scans in and out: one door for every format.

`find` says what a file or folder holds without reading voxels, `read` gives one Scan, `header` tells
place and channels cheaply, `write` saves one, `opened` unpacks a zip for as long as it is needed.
Readers are imported when they are used, so this module costs next to nothing.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

from medgen.errors import DataError, GeometryError, UnreadableScan
from medgen.io.source import Found, ReadOptions, Skipped, Source

_NIFTI = (".nii", ".nii.gz")
_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
_RASTER = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_NPZ = (".npz",)
Format = Literal["nifti", "itk", "raster", "npz", "dicom", "none"]
_FORMATS: dict[Format, tuple[str, ...]] = {"nifti": _NIFTI, "itk": _ITK, "raster": _RASTER, "npz": _NPZ}
_NO_SCAN = re.compile(
    r"\.(txt|json|csv|tsv|md|rst|pdf|ya?ml|toml|xml|html?|log|py|ipynb|sh|m|mat|xlsx?|docx?|pptx?|bval|bvec|trk|tck|gii|pkl"
    r"|pt|pth|ckpt|safetensors|npy|h5|hdf5|db|sqlite|gif|svg|bmp|mp4|avi|lock|sha256|md5|cff|css|js|stl|obj|vtk|vtp|part)$"
    r"|^(readme|licen[cs]e|copying|notice|authors|changes|changelog|sha256sums|md5sums?|makefile)$"
)
_DATA_OF_A_HEADER = (".raw", ".zraw", ".raw.gz")
_PAIRS = (".hdr", ".img", ".hdr.gz", ".img.gz")
_PACKED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_ZIP_BYTES = 64 * 2**30
_ZIP_FILES = 1_000_000


def find(path: str | Path, options: ReadOptions = ReadOptions()) -> Found:
    """Every scan in a file, a folder (nested too), one DICOM series or one item of an .npz file.

    Formats are told by extension; whatever has no telling extension is offered to the DICOM reader,
    which looks at content. Hidden files, `*.part` and links to folders are not followed.

    Args:
        path: 'a.nii.gz', 'folder', 'folder#1a2b3c4d' (one DICOM series of several), 'x.npz#train/12'.
        options: how strict to be.

    Raises:
        DataError: there is nothing at `path`, no such series or item in it, or it is a zip (see `opened`).
    """
    place, fragment = _split_fragment(path)
    if place.is_file() and place.suffix.lower() == ".zip":
        raise DataError(f"{place.name} is a zip: unpack it, or use `with medgen.io.opened(path) as folder`.")
    files = _walk(place) if place.is_dir() else [place]
    found = _sorted_out(files, place, options)
    if not fragment:
        return found
    chosen = tuple(source for source in found.sources if source.path.rpartition("#")[2] == fragment)
    if not chosen:
        there = [source.path.rpartition("#")[2] for source in found.sources if "#" in source.path]
        raise DataError(
            f"{place.name}: no series or item #{fragment}; it holds {len(found.sources)} scans"
            + (f", such as #{', #'.join(there[:5])}." if there else " without any '#'.")
        )
    return Found(chosen, found.skipped)


def read(path: str | Path | Source, options: ReadOptions = ReadOptions()) -> "medgen.scan.Scan":
    """One scan, from a path as `find` takes it, or from a Source that `find` gave.

    Several files joined by ';' are the channels of one scan and must share one grid. A zip that
    holds one scan is read too.

    Raises:
        DataError: nothing there, no scan, or several scans and no word on which one.
        GeometryError: channels lie on different grids.
    """
    if isinstance(path, Source):
        return _read_source(path, options)
    if isinstance(path, str) and ";" in path and not Path(path).exists():
        return _stacked([read(part, options) for part in path.split(";")], path)
    with opened(path) as place:
        return _read_source(_only(place, options), options)


def header(
    path: str | Path | Source, options: ReadOptions = ReadOptions()
) -> "tuple[medgen.grid.Grid, int, medgen.scan.Header]":
    """Grid, number of channels and Header of one scan, without reading voxels where the format allows."""
    if not isinstance(path, Source):
        if isinstance(path, str) and ";" in path and not Path(path).exists():
            parts = path.split(";")
            grid, channels, first = header(parts[0], options)
            return grid, channels * len(parts), first
        with opened(path) as place:
            return header(_only(place, options), options)
    if path.kind == "nifti":
        from medgen.io.nifti import nifti_header

        grid, channels, _, told = nifti_header(path.files[0], options)
        return grid, channels, told
    if path.kind == "dicom":
        from medgen.io.dicom.read import series_header

        return series_header(path, options)
    scan = _read_source(path, options)
    return scan.grid, scan.channels, scan.header


def write(scan: "medgen.scan.Scan", path: str | Path) -> None:
    """Save a scan as .nii, .nii.gz or (planar) .png, as the name says.

    Raises:
        DataError: the name has another extension.
    """
    path = Path(path)
    match format_of(path):
        case "nifti":
            from medgen.io.nifti import write_nifti

            write_nifti(scan, path)
        case "raster" if path.suffix.lower() == ".png":
            from medgen.io.raster import write_raster

            write_raster(scan, path)
        case _:
            raise DataError(
                f"{path.name}: scans are written as .nii, .nii.gz or .png; for a DICOM series use "
                "medgen.io.dicom.write.write_series."
            )


@contextmanager
def opened(path: str | Path, *, max_bytes: int = _ZIP_BYTES) -> Iterator[Path]:
    """A real folder with the contents of a zip while the block runs; any other path comes back as it is.

    Args:
        path: a zip, or anything else.
        max_bytes: refuse zips that unpack to more.

    Raises:
        UnreadableScan: the zip is damaged, encrypted, too large, or a member would land outside.
    """
    path = Path(path)
    if not (path.is_file() and path.suffix.lower() == ".zip"):
        yield path
        return
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="medgen-") as folder:
        _unpack(path, Path(folder), max_bytes)
        yield Path(folder)


# -- finding ---------------------------------------------------------------------------------------


def _split_fragment(path: str | Path) -> tuple[Path, str]:
    """The file or folder, and what stands behind '#' unless that belongs to its name."""
    place = Path(path)
    if place.exists():
        return place, ""
    base, mark, fragment = str(path).rpartition("#")
    if mark and Path(base or ".").exists():
        return Path(base or "."), fragment
    missing = Path(base) if mark else place
    raise DataError(f"{missing.name}: no such file or folder. Check the path; its parent is {_parent_state(missing)}.")


def _parent_state(place: Path) -> str:
    return "there" if place.parent.exists() else "missing too"


def _walk(folder: Path) -> list[Path]:
    """Every visible file below `folder`, in a fixed order."""
    files = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".part"))
        files += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return files


def format_of(path: Path) -> Format:
    """The reader a file name calls for: a kind, 'none' for no scan, or 'dicom' where content must tell."""
    name = path.name.lower()
    for kind, endings in _FORMATS.items():
        if name.endswith(endings):
            return kind
    return "none" if _NO_SCAN.search(name) or name.endswith(_DATA_OF_A_HEADER + _PAIRS + _PACKED) else "dicom"


def _why_none(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(".part"):
        return "an unfinished file"
    if name.endswith(_DATA_OF_A_HEADER):
        return "belongs to a .nhdr or .mhd file"
    if name.endswith(_PAIRS):
        return "Analyze or two-file NIfTI: convert it to .nii"
    if name.endswith(_PACKED):
        return "packed: unpack it, or give a zip by itself"
    return "not a scan"


def _sorted_out(files: list[Path], place: Path, options: ReadOptions) -> Found:
    sources: list[Source] = []
    skipped: list[Skipped] = []
    offered: list[Path] = []
    for file in files:
        match format_of(file):
            case "none":
                skipped.append(Skipped(str(file), _why_none(file)))
            case "dicom":
                offered.append(file)
            case "npz":
                _add_npz(file, sources, skipped)
            case kind:
                sources.append(Source(str(file), kind, (file,)))
    if offered:
        from medgen.io.dicom.read import find_series

        series, rest = find_series(offered, options)
        sources += series
        skipped += rest
    return Found(tuple(sorted(sources, key=_natural)), tuple(skipped))


def _natural(source: Source) -> list:
    """Sorting key under which item 2 comes before item 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", source.path)]


def _add_npz(file: Path, sources: list[Source], skipped: list[Skipped]) -> None:
    from medgen.io.raster import npz_items

    try:
        items = npz_items(file)
    except DataError as error:
        skipped.append(Skipped(str(file), str(error)))
        return
    for fragment, split, label in items:
        sources.append(Source(f"{file}#{fragment}", "npz", (file,), label=label, split=split))


# -- reading ---------------------------------------------------------------------------------------


def _only(path: Path, options: ReadOptions) -> Source:
    """The one scan at `path`."""
    place, fragment = _split_fragment(path)
    if fragment and format_of(place) == "npz":
        # Its reader knows which items there are; to list thousands for each of them takes minutes.
        return Source(str(path), "npz", (place,))
    found = find(path, options)
    exact = [source for source in found.sources if source.path == str(path)]
    sources = exact or list(found.sources)
    if len(sources) == 1:
        return sources[0]
    if sources:
        names = ", ".join(_name(source) for source in sources[:5])
        raise DataError(f"{path.name}: expected one scan, found {len(sources)}: {names}, ... Name one of them.")
    reasons = "; ".join(f"{Path(skip.path).name}: {skip.reason}" for skip in found.skipped[:5])
    raise UnreadableScan(f"{path.name}: no scan in it." + (f" Left out: {reasons}" if reasons else " It is empty."))


def _name(source: Source) -> str:
    return Path(source.path).name


def _read_source(source: Source, options: ReadOptions) -> "medgen.scan.Scan":
    match source.kind:
        case "nifti":
            from medgen.io.nifti import read_nifti

            return read_nifti(source.files[0], options)
        case "itk":
            from medgen.io.itk import read_itk

            return read_itk(source.files[0], options)
        case "raster":
            from medgen.io.raster import read_raster

            return read_raster(source.files[0], options)
        case "npz":
            from medgen.io.raster import read_npz

            return read_npz(source.files[0], source.path.rpartition("#")[2], options)
        case "dicom":
            from medgen.io.dicom.read import read_series

            return read_series(source, options)


def _stacked(scans: "list[medgen.scan.Scan]", path: str) -> "medgen.scan.Scan":
    """One scan whose channels are the given scans."""
    import numpy as np

    first, name = scans[0], Path(path.split(";")[0]).name
    for number, scan in enumerate(scans[1:], 1):
        if not scan.grid.close(first.grid, millimetres=1e-2):
            raise GeometryError(f"{name}: channel {number} lies on another grid than channel 0. Respace it first.")
    same = all((scan.scale, scan.voxels.dtype) == (first.scale, first.voxels.dtype) for scan in scans)
    if same:
        voxels, scale = np.concatenate([scan.voxels for scan in scans]), first.scale
    else:
        # Channels measured on different scales only fit into one array as physical values.
        scale = replace(first.scale, slope=1.0, intercept=0.0, clip=None)
        voxels = np.concatenate([scan.scale.physical(scan.voxels) for scan in scans])
    valids = [scan.valid for scan in scans if scan.valid is not None]
    valid = np.logical_and.reduce(valids) if valids else None
    return replace(first, voxels=voxels, scale=scale, valid=valid)


# -- zips ------------------------------------------------------------------------------------------


def _unpack(path: Path, folder: Path, max_bytes: int) -> None:
    """Unpack after every member was checked; nothing is written outside `folder`."""
    import shutil
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            for info in members:
                _check_member(info, path)
            total = sum(info.file_size for info in members)
            room = min(max_bytes, shutil.disk_usage(folder).free)
            if total > room or len(members) > _ZIP_FILES:
                raise UnreadableScan(
                    f"{path.name}: unpacks to {total / 2**30:.1f} GiB in {len(members)} files, more than the "
                    f"{room / 2**30:.1f} GiB allowed here. Unpack it yourself and give the folder."
                )
            for info in members:
                archive.extract(info, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise UnreadableScan(f"{path.name}: the zip is damaged or unsupported ({type(error).__name__}).") from error


def _check_member(info: "zipfile.ZipInfo", path: Path) -> None:
    member = PurePosixPath(info.filename.replace("\\", "/"))
    link = (info.external_attr >> 16) & 0o170000 == 0o120000
    if member.is_absolute() or ".." in member.parts or ":" in info.filename or "\0" in info.filename or link:
        raise UnreadableScan(f"{path.name}: a member is a link or would land outside the folder. Refused.")
    if info.flag_bits & 0x1:
        raise UnreadableScan(f"{path.name}: the zip is encrypted. Unpack it yourself and give the folder.")


__all__ = ["Found", "ReadOptions", "Skipped", "Source", "find", "format_of", "header", "opened", "read", "write"]
