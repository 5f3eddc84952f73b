"""DICOM series in: found by content, checked before anything is believed, read in one pass.

The default is to refuse. A missing, doubled or odd slice, a tilted gantry, a truncated file or an unknown encoding is
an error that names the file; repairs happen only where `ReadOptions` asks for them.
"""

from pathlib import Path

import numpy as np

from medgen import log
from medgen.errors import GeometryError, InconsistentSeries, UnreadableScan
from medgen.grid import Grid
from medgen.io.dicom.decode import LOSSY, Padding, check_syntax
from medgen.io.dicom.file import DicomFile, open_file
from medgen.io.dicom.find import find_series, why_not, without_localizers
from medgen.io.dicom.frames import frames_of, is_planar
from medgen.io.dicom.mosaic import without_copies
from medgen.io.dicom.series import Stack, stack
from medgen.io.dicom.voxels import (
    common_scale,
    flipped,
    interpolated,
    is_colour,
    is_flipped,
    load,
    straightened,
    turned,
    unit_of,
)
from medgen.io.source import ReadOptions, Source
from medgen.scan import Header, Scale, Scan

# Where pixel spacing is stated if not for the patient, and what it is then true of.
_PROJECTED = (("ImagerPixelSpacing", "on the detector plane"), ("NominalScannedPixelSpacing", "on the film"))
_COLOURS = ("red", "green", "blue")


def series_header(source: Source, options: ReadOptions = ReadOptions()) -> tuple[Grid, int, Header]:
    """Grid, number of channels and Header of a series, decoding no pixels (except to tell copies of a slice).

    Raises:
        DataError: as `read_series` does for what headers can tell.
    """
    files = _opened(source, options)
    stacked = _stacked(files, source, options)
    channels = 3 if is_colour(files[0]) else len(stacked.slices)
    return stacked.target or stacked.grid, channels, _header(files, stacked, options)


def read_series(source: Source, options: ReadOptions = ReadOptions()) -> Scan:
    """Read one series, one multi-frame file or one picture.

    Args:
        source: as `find_series` gives it.
        options: what to accept and what to repair.

    Returns:
        Stored integers with a Scale where all slices share one rescale (HU for CT), else physical float32 values;
        i runs along rows of the picture, j down its columns, k along the slice normal; channels are times, echoes
        or colours. Declared padding is False in `valid`.

    Raises:
        UnreadableScan: a file is damaged, truncated, encoded in an unsupported way, or no image medgen reads.
        InconsistentSeries: slices are missing, doubled, uneven, or of several kinds.
        GeometryError: geometry is missing or impossible, or the gantry was tilted.
    """
    files = _opened(source, options)
    stacked = _stacked(files, source, options)
    header = _header(files, stacked, options)
    scale = common_scale(stacked)
    values, padded = load(stacked, scale)
    if stacked.at:
        values, padded = interpolated(values, padded, stacked.at)
    if is_flipped(files[0], scale, options):
        values = flipped(values, files[0])
    voxels = values[0].transpose(3, 2, 1, 0) if is_colour(files[0]) else values.transpose(0, 3, 2, 1)
    valid = None if padded is None else ~padded.transpose(2, 1, 0)
    scan = Scan(voxels, stacked.grid, scale or Scale(unit=unit_of(stacked)), header, valid=valid)
    return scan if stacked.target is None else straightened(scan, stacked.target)


def _opened(source: Source, options: ReadOptions) -> list[DicomFile]:
    """The parsed files of a source, refused where one of them cannot belong to it."""
    if not source.files:
        raise UnreadableScan(f"{_where(source)}: a DICOM source without files.")
    files = [open_file(Path(path), force=options.force) for path in source.files]
    for file in files:
        if reason := why_not(file):
            raise UnreadableScan(f"{file.name}: {reason}.")
    files, _ = without_localizers(files)
    total = 0
    for file in files:
        total += file.layout.voxels
        if total > options.max_voxels:
            raise UnreadableScan(
                f"{file.name}: expected at most {options.max_voxels} voxels; found more "
                f"({file.layout.rows} x {file.layout.columns} x {file.layout.frames} here). If right, raise max_voxels."
            )
        check_syntax(file)
        _readable(file, options)
    _one_series(files, _where(source))
    return files


def _readable(file: DicomFile, options: ReadOptions) -> None:
    """Refuse pictures that are no scan, or no scan of the kind asked for."""
    photometric = file.layout.photometric
    if is_colour(file) and not options.colour:
        raise UnreadableScan(
            f"{file.name}: a colour picture ({photometric}), not an intensity image. Pass colour to read it."
        )
    known = ("MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR")
    if photometric not in known and not photometric.startswith("YBR"):
        raise UnreadableScan(f"{file.name}: photometric interpretation {photometric} is not supported.")


def _one_series(files: list[DicomFile], where: str) -> None:
    """Refuse files that belong to several series, patients or frames of reference, or are stored in several ways."""
    first = files[0]
    for file in files[1:]:
        pairs = (
            ("series", first.elements.text("SeriesInstanceUID"), file.elements.text("SeriesInstanceUID")),
            (
                "frames of reference",
                first.elements.text("FrameOfReferenceUID"),
                file.elements.text("FrameOfReferenceUID"),
            ),
            ("patients", first.patient, file.patient),
            ("photometric interpretations", first.layout.photometric, file.layout.photometric),
        )
        for what, one, other in pairs:
            if one != other:
                raise InconsistentSeries(
                    f"{where}: one volume must come from one series of one patient; found several {what}, for example "
                    f"in {first.name} and {file.name}. Move the odd files elsewhere."
                )


def _where(source: Source) -> str:
    return Path(source.path).name or source.path


def _stacked(files: list[DicomFile], source: Source, options: ReadOptions) -> Stack:
    if len(files) == 1 and is_planar(files[0]):
        return _planar(files[0], options)
    frames = [frame for file in without_copies(files) for frame in frames_of(file, options)]
    stacked = stack(frames, _where(source), options)
    if is_colour(files[0]) and len(stacked.slices) > 1:
        raise InconsistentSeries(f"{_where(source)}: several colour pictures at one place; channels hold one of them.")
    return stacked


def _planar(file: DicomFile, options: ReadOptions) -> Stack:
    """One flat picture: its pixels have a size, but no place in the patient."""
    frame = frames_of(file, options)[0]
    down, across = frame.spacing or _projected_spacing(file)
    grid = Grid.from_lps((file.layout.columns, file.layout.rows, 1), np.diag([across, down, 1.0, 1.0]))
    return Stack(((frame,),), grid)


def _projected_spacing(file: DicomFile) -> tuple[float, float]:
    """Millimetres between rows and between columns of a picture that has no calibrated spacing."""
    for keyword, what in _PROJECTED:
        if spacing := file.elements.numbers(keyword, 2):
            if min(spacing) <= 0:
                raise GeometryError(f"{file.name}: {keyword} must be positive; found {spacing}.")
            log.note(f"{file.name}: pixel spacing is measured {what}, not in the patient.")
            return spacing[0], spacing[1]
    ratio = file.elements.numbers("PixelAspectRatio", 2) or (1.0, 1.0)
    if min(ratio) <= 0:
        raise GeometryError(f"{file.name}: the pixel aspect ratio must be positive; found {ratio}.")
    log.note(f"{file.name}: no pixel spacing; columns are taken as 1 mm apart.")
    return ratio[0] / ratio[1], 1.0


def _header(files: list[DicomFile], stacked: Stack, options: ReadOptions) -> Header:
    first = files[0].elements
    colour = is_colour(files[0])
    paddings = set() if colour else {Padding.of(file) for file in files}
    padding = paddings.pop() if len(paddings) == 1 else None
    # Once values were rescaled or interpolated, no single stored value marks what was not measured.
    as_stored = common_scale(stacked) is not None and not stacked.at and stacked.target is None
    flat = stacked.target is None and stacked.grid.shape[2] == 1 and is_planar(files[0])
    header = Header(
        modality=first.code("Modality"),
        body_part=first.code("BodyPartExamined"),
        space=0 if flat else 1,
        photometric="RGB" if colour else files[0].layout.photometric,
        synthetic=any(file.elements.code("SyntheticData") == "YES" for file in files),
        lossy=any(file.elements.text("LossyImageCompression") == "01" or file.syntax in LOSSY for file in files),
        padding=float(padding.value) if padding and as_stored else None,
        channels=_COLOURS if colour else stacked.channels,
    )
    return turned(header, files[0]) if is_flipped(files[0], common_scale(stacked), options) else header


__all__ = ["find_series", "read_series", "series_header"]
