"""JPEG inside DICOM: what a stream says of itself, and lossless or 12-bit JPEG decoded through SimpleITK.

The decoder behind SimpleITK is old C that trusts the tables at the head of a stream; a false one ends the process
instead of raising an error. So every table is checked here first, and only streams in good order reach it.
"""

import struct
import tempfile
from pathlib import Path

import numpy as np

from medgen.errors import UnreadableScan
from medgen.io.dicom.file import Layout

_UID = "1.2.840.10008.1.2.4"
EXTENDED = f"{_UID}.51"
LOSSLESS = frozenset({f"{_UID}.57", f"{_UID}.70"})
# Lossless JPEG codes differences of 0 to 16 bits; transform coding has a run and a size in each symbol.
_LOSSLESS_SYMBOLS, _SYMBOLS = 17, 256


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream states of itself; None where it states none."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0 and len(frame) >= start + 24:
        width, height, left, top = struct.unpack_from(">4I", frame, start + 8)
        return height - top, width - left
    at = 2 if frame[:2] == b"\xff\xd8" else len(frame)
    while at + 9 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker = frame[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">2H", frame, at + 5)
        # A fill byte counts one; every other segment states its own length.
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None


def decode_jpeg(frame: bytes, layout: Layout, syntax: str, name: str) -> np.ndarray:
    """One frame of lossless or extended JPEG (rows, columns[, 3]) as stored, colours not converted.

    Args:
        frame: the stream.
        layout: what the DICOM header says of it.
        syntax: the transfer syntax, `EXTENDED` or one of `LOSSLESS`.
        name: the file's name, for messages.

    Raises:
        UnreadableScan: the stream is damaged, or of a kind that is not supported.
    """
    try:
        _check(frame, layout, lossless=syntax in LOSSLESS)
    except _Malformed as fault:
        raise UnreadableScan(f"{name}: damaged or unsupported JPEG ({fault}). Copy or convert the file.") from fault
    return _through_itk(frame, layout, syntax, name)


class _Malformed(ValueError):
    """What is wrong with a stream."""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _Malformed(what)


def _check(frame: bytes, layout: Layout, *, lossless: bool) -> None:
    """Walk the segments up to the one scan, then make sure that nothing but coded data and the end follow."""
    _require(frame[:2] == b"\xff\xd8", "no beginning")
    at = 2
    components: list[int] = []
    tables: set[int] = set()
    while True:
        _require(at + 4 <= len(frame) and frame[at] == 0xFF, "a segment is cut off")
        marker, length = frame[at + 1], struct.unpack_from(">H", frame, at + 2)[0]
        body = frame[at + 4 : at + 2 + length]
        _require(length >= 2 and len(body) == length - 2, "a segment is cut off")
        at += 2 + length
        if marker == 0xC4:
            tables |= _huffman(body, lossless=lossless)
        elif marker == (0xC3 if lossless else 0xC1):
            _require(not components, "two frame headers")
            components = _frame_header(body, layout)
        elif marker == 0xDA:
            _require(bool(components), "no frame header")
            _scan_header(body, components, tables, lossless=lossless)
            break
        else:
            known = marker in (0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF
            _require(known, f"segment {marker:02X} does not belong here")
            _require(marker != 0xDD or len(body) == 2, "restart interval")
            _require(marker != 0xDB or len(body) in (65, 129, 130, 258), "quantisation table")
    _coded(frame, at)


def _frame_header(body: bytes, layout: Layout) -> list[int]:
    """The components, after all numbers were held against the DICOM header."""
    _require(len(body) >= 9 and len(body) == 6 + 3 * body[5], "frame header")
    precision, rows, columns, count = body[0], *struct.unpack_from(">2H", body, 1), body[5]
    _require((rows, columns, count) == layout.form, "size")
    _require(2 <= precision <= layout.allocated and precision >= min(layout.stored, 16), "precision")
    _require(all(body[7 + 3 * n] == 0x11 for n in range(count)), "subsampled")
    _require(all(body[8 + 3 * n] < 4 for n in range(count)), "quantisation table")
    components = [body[6 + 3 * n] for n in range(count)]
    _require(len(set(components)) == count, "components")
    return components


def _huffman(body: bytes, *, lossless: bool) -> set[int]:
    """The tables a segment defines, by class and number."""
    tables: set[int] = set()
    at = 0
    while at < len(body):
        _require(at + 17 <= len(body), "code table")
        kind, counts = body[at], body[at + 1 : at + 17]
        total = sum(counts)
        symbols = body[at + 17 : at + 17 + total]
        _require(kind & 15 < 4 and kind >> 4 <= (0 if lossless else 1), "code table")
        _require(len(symbols) == total and 0 < total <= (_LOSSLESS_SYMBOLS if lossless else _SYMBOLS), "code table")
        _require(sum(n << 16 - bits for bits, n in enumerate(counts, 1)) <= 1 << 16, "code table")
        _require(len(set(symbols)) == total, "code table")
        _require(kind >> 4 == 1 or max(symbols) <= 16, "code table")
        tables.add(kind)
        at += 17 + total
    return tables


def _scan_header(body: bytes, components: list[int], tables: set[int], *, lossless: bool) -> None:
    count = len(components)
    _require(len(body) == 4 + 2 * count and body[0] == count, "the scan does not hold all components")
    for n, component in enumerate(components):
        selector, table = body[1 + 2 * n], body[2 + 2 * n]
        _require(selector == component, "components")
        _require(table >> 4 in tables and (lossless or 0x10 | table & 15 in tables), "a code table is missing")
        _require(not lossless or table & 15 == 0, "code table")
    first, last, approximation = body[-3:]
    if lossless:
        _require(1 <= first <= 7 and last == 0 and approximation < 16, "predictor")
    else:
        # Some writers state no last coefficient; decoders take all of them.
        _require(first == 0 and last in (0, 63) and approximation == 0, "spectral selection")


def _coded(frame: bytes, at: int) -> None:
    """From `at`, bytes of 255 may only be stuffed, a restart, or the end of the picture."""
    end = len(frame)
    while (at := frame.find(b"\xff", at)) >= 0 and at + 1 < end:
        following = frame[at + 1]
        if following == 0xD9:
            return
        _require(following in (0x00, 0xFF) or 0xD0 <= following <= 0xD7, "more than one scan")
        at += 1 if following == 0xFF else 2
    raise _Malformed("no end")


def _through_itk(frame: bytes, layout: Layout, syntax: str, name: str) -> np.ndarray:
    """Decode with SimpleITK, which reads files only: a bare one that describes nothing but the pixels."""
    import SimpleITK
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID, SecondaryCaptureImageStorage, generate_uid

    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = UID(syntax)
    bare.SOPClassUID, bare.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    bare.Rows, bare.Columns, bare.SamplesPerPixel = layout.rows, layout.columns, layout.samples
    bare.BitsAllocated, bare.BitsStored, bare.HighBit = layout.allocated, layout.stored, layout.stored - 1
    # Under these names no reader inverts or converts: the values come out as they are stored.
    bare.PixelRepresentation = int(layout.signed)
    bare.PhotometricInterpretation = "RGB" if layout.samples == 3 else "MONOCHROME2"
    if layout.samples == 3:
        bare.PlanarConfiguration = 0
    bare.PixelData = encapsulate([frame])
    with tempfile.TemporaryDirectory(prefix="medgen-") as folder:
        path = Path(folder) / "frame.dcm"
        bare.save_as(path, enforce_file_format=True)
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.SetImageIO("GDCMImageIO")
        try:
            values = SimpleITK.GetArrayFromImage(reader.Execute())
        except RuntimeError as fault:
            raise UnreadableScan(f"{name}: the JPEG data cannot be decoded. Copy or export the file again.") from fault
    shape = (layout.rows, layout.columns, layout.samples)[: 2 if layout.samples == 1 else 3]
    if values.size != int(np.prod(shape)):
        raise UnreadableScan(f"{name}: the JPEG data hold {values.size} values, {np.prod(shape)} expected. Damaged.")
    return values.reshape(shape)


__all__ = ["EXTENDED", "LOSSLESS", "codestream_size", "decode_jpeg"]
