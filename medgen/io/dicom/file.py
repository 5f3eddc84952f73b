"""One DICOM file, opened carefully: a bounded read, only the elements medgen needs, and nothing decoded.

The parser is pydicom's; what is added here is distrust. It parses a memory buffer instead of the file, so that
an element that claims four gigabytes costs nothing; a deflated file is inflated only as far as needed; values stay
raw bytes until asked for, and a value that is no number is an error that names the file and the element.
"""

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import UID_dictionary

from medgen.errors import UnreadableScan
from medgen.io.dicom.elements import PARSE_FAULTS, WANTED, Elements, quiet

_PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT = "1.2.840.10008.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
# Headers are read in growing gulps; the first holds nearly every single-frame header.
_GULPS = (2**16, 2**20, 2**24, 2**27)
_MOST_ELEMENTS = 20_000


@dataclass(frozen=True)
class Layout:
    """How the pixels of one file are stored, checked against each other.

    `offset` is where the value of Pixel Data begins (in the inflated stream of a deflated file), `length` its stated
    length, None where it is encapsulated in fragments. `swapped` bytes are stored in pairs, the second first.
    """

    rows: int
    columns: int
    samples: int
    frames: int
    allocated: int
    stored: int
    signed: bool
    photometric: str
    planar: int
    offset: int
    length: int | None
    swapped: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The native type of one sample."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.allocated // 8}")

    @property
    def voxels(self) -> int:
        """Samples in all frames."""
        return self.rows * self.columns * self.samples * self.frames

    @property
    def form(self) -> tuple[int, int, int]:
        """Rows, columns, samples: what all files of one volume share."""
        return self.rows, self.columns, self.samples


@dataclass(frozen=True)
class PixelElement:
    """Where the pixels of a file begin.

    `offset` is where the value starts, `length` what the element states (0xFFFFFFFF: undefined), `stream` how many
    bytes there are to read from (None: a deflated file, nobody knows yet), `words` whether it is stored as words.
    """

    tag: int
    offset: int
    length: int
    stream: int | None
    words: bool


@dataclass(frozen=True)
class DicomFile:
    """One parsed file: the wanted elements, the transfer syntax and where its pixels begin.

    `is_program` tells that the preamble, which carries nothing, begins like an executable.
    `pixels` is None where the file ends before them.
    """

    path: Path
    elements: Elements
    syntax: str
    sop_class: str
    pixels: PixelElement | None
    is_program: bool = False

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    @property
    def kind(self) -> str:
        """The standard's name for this sort of object, such as 'CT Image Storage'; '' for private sorts."""
        return UID_dictionary.get(self.sop_class, ("",))[0]

    @property
    def deflated(self) -> bool:
        """Whether everything after the file's own header is one deflate stream."""
        return self.syntax == _DEFLATED

    @property
    def big_endian(self) -> bool:
        """Whether numbers are stored with the high byte first."""
        return self.syntax == _BIG_ENDIAN

    @property
    def is_multiframe(self) -> bool:
        """Whether the file's header is of the sort that describes each frame in groups."""
        return "Enhanced" in self.kind or "PerFrameFunctionalGroupsSequence" in self.elements

    @property
    def is_localizer(self) -> bool:
        """Whether this is a scout that other slices were planned on."""
        return "LOCALIZER" in [part.upper() for part in self.elements.texts("ImageType")[2:]]

    @property
    def is_mosaic(self) -> bool:
        """Whether the slices of a volume are tiled into one picture."""
        tiles = self.elements.private(0x19, "SIEMENS MR HEADER", 0x0A)
        many = len(tiles) == 2 and int.from_bytes(tiles, "big" if self.big_endian else "little") > 1
        return many or "MOSAIC" in [part.upper() for part in self.elements.texts("ImageType")]

    @property
    def patient(self) -> str:
        """A key that is equal for the files of one patient and does not tell who it is, '' where unknown."""
        identity = self.elements.raw("PatientID").strip(b" \0")
        issuer = self.elements.raw("IssuerOfPatientID").strip(b" \0")
        return "p" + hashlib.sha256(identity + issuer).hexdigest()[:10] if identity else ""

    @cached_property
    def layout(self) -> Layout:
        """How the pixels are stored.

        Raises:
            UnreadableScan: an attribute is missing, or two contradict each other or the length of the file.
        """
        return _layout(self)


def inflate(compressed: bytes, limit: int, name: str) -> bytes:
    """At most `limit` bytes of a raw deflate stream.

    Raises:
        UnreadableScan: the stream is damaged.
    """
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(compressed, limit)
    except zlib.error as fault:
        raise UnreadableScan(f"{name}: the deflated data are damaged. Copy or export the file again.") from fault


def deflated_body(path: Path) -> bytes:
    """The compressed part of a deflated file: all that follows the file meta group."""
    content = path.read_bytes()
    return content[_meta(content).end :]


def looks_like_dicom(start: bytes) -> str:
    """'yes' with the DICM mark, 'maybe' without it but beginning like a dataset, else 'no'."""
    if start[128:132] == b"DICM":
        return "yes"
    return "maybe" if start[:2] in (b"\x08\x00", b"\x02\x00", b"\x00\x08") and len(start) > 8 else "no"


def open_file(path: Path, *, force: bool = False) -> DicomFile:
    """Parse the header of one file.

    Args:
        path: the file.
        force: accept a file without the 'DICM' mark if it parses as an image.

    Raises:
        UnreadableScan: it is no DICOM, cannot be read or is damaged.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            start = stream.read(_GULPS[0])
            if looks_like_dicom(start) != "yes" and not force:
                hint = " It begins like one without preamble: pass --force to try." * (
                    looks_like_dicom(start) == "maybe"
                )
                raise UnreadableScan(f"{path.name}: not a DICOM file ('DICM' expected at byte 128).{hint}")
            if _meta(start).syntax == _DEFLATED:
                opened = _open_deflated(path)
            else:
                opened = _parse_growing(path, lambda n: start if n <= len(start) else _head(stream, n), size)
            return replace(opened, is_program=start[:2] == b"MZ" or start[:4] == b"\x7fELF")
    except OSError as fault:
        raise UnreadableScan(f"{path.name}: cannot be opened ({fault.strerror or 'read error'}).") from fault


@dataclass(frozen=True)
class _Meta:
    """What the file meta group says, and where the dataset behind it begins."""

    syntax: str
    media_class: str
    end: int


def _meta(start: bytes) -> _Meta:
    """The file meta group, always explicit little endian; empty where there is none."""
    at = 132 if start[128:132] == b"DICM" else 0
    found = {b"\x02\x00": "", b"\x10\x00": ""}
    while start[at : at + 2] == b"\x02\x00" and at + 12 <= len(start):
        long = start[at + 4 : at + 6] in (b"OB", b"OW", b"UN", b"UT", b"SQ")
        value = at + (12 if long else 8)
        end = value + struct.unpack_from("<I" if long else "<H", start, value - (4 if long else 2))[0]
        element = start[at + 2 : at + 4]
        if element in found:
            found[element] = start[value:end].strip(b" \0").decode("latin-1")
        at = end
    return _Meta(found[b"\x10\x00"], found[b"\x02\x00"], at)


def _encoding(meta: _Meta, start: bytes) -> tuple[bool, bool]:
    """Whether the dataset has implicit types, and whether its low bytes come first."""
    if meta.syntax:
        return meta.syntax == _IMPLICIT, meta.syntax != _BIG_ENDIAN
    # Without a stated syntax the first element tells: two capitals are an explicit type, and the first group is small.
    group, kind = start[meta.end : meta.end + 2], start[meta.end + 4 : meta.end + 6]
    return not (kind.isalpha() and kind.isupper()), group[:1] != b"\0" or group == b"\0\0"


def _head(stream: io.BufferedReader, count: int) -> bytes:
    stream.seek(0)
    return stream.read(count)


def _open_deflated(path: Path) -> DicomFile:
    compressed = deflated_body(path)
    # Behind the 'DICM' mark the inflated dataset is an ordinary explicit little endian file.
    prefix = bytes(128) + b"DICM"
    opened = _parse_growing(path, lambda n: prefix + inflate(compressed, n - len(prefix), path.name), None)
    pixels = opened.pixels
    if pixels is not None:
        pixels = replace(pixels, offset=pixels.offset - len(prefix), stream=None)
    return DicomFile(path, opened.elements, _DEFLATED, opened.sop_class, pixels)


def _parse_growing(path: Path, head: Callable[[int], bytes], size: int | None) -> DicomFile:
    """Parse ever longer heads until Pixel Data, or the end of the file, is in it."""
    for gulp in _GULPS:
        start = head(gulp)
        whole = len(start) < gulp or (size is not None and len(start) >= size)
        parsed = _parse(path, start, size)
        if parsed is not None and (parsed.pixels is not None or whole):
            return parsed
        if whole:
            raise UnreadableScan(f"{path.name}: the DICOM header is damaged. Copy or export the file again.")
    raise UnreadableScan(f"{path.name}: the header is longer than {_GULPS[-1] >> 20} MiB. This is no image to read.")


def _parse(path: Path, start: bytes, size: int | None) -> DicomFile | None:
    """The file whose beginning is `start`; None where that cannot be parsed, being damaged or cut in a sequence."""
    seen = 0

    def stop(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        nonlocal seen
        seen += 1
        if seen > _MOST_ELEMENTS:
            raise UnreadableScan(f"{path.name}: more than {_MOST_ELEMENTS} header elements. The file is damaged.")
        return tag in _PIXELS

    meta = _meta(start)
    implicit, little = _encoding(meta, start)
    buffer = io.BytesIO(start)
    buffer.seek(meta.end)
    try:
        with quiet():
            dataset = read_dataset(buffer, implicit, little, stop_when=stop, specific_tags=WANTED)
    except RecursionError as fault:
        raise UnreadableScan(f"{path.name}: sequences are nested too deep. The file is damaged or hostile.") from fault
    except PARSE_FAULTS:
        return None
    elements = Elements(dataset, path.name)
    pixels = _pixel_element(start, buffer.tell(), size, little)
    syntax = meta.syntax or ("" if little else _BIG_ENDIAN)
    return DicomFile(path, elements, syntax, elements.text("SOPClassUID") or meta.media_class, pixels)


def _pixel_element(start: bytes, at: int, size: int | None, little: bool) -> PixelElement | None:
    """The pixel element that begins at `at`, None if there is none."""
    order = "<" if little else ">"
    if len(start) < at + 12:
        return None
    group, element = struct.unpack_from(f"{order}HH", start, at)
    if (group << 16 | element) not in _PIXELS:
        return None
    # Without an explicit type these bytes are the low end of a length, which is even; the letters O and U are odd.
    kind = start[at + 4 : at + 6]
    head = 12 if kind in (b"OB", b"OW", b"UN", b"OF", b"OD") else 8
    length = struct.unpack_from(f"{order}I", start, at + head - 4)[0]
    return PixelElement(group << 16 | element, at + head, length, size, kind == b"OW")


def _layout(file: DicomFile) -> Layout:
    name, elements = file.name, file.elements
    if file.pixels is None:
        raise UnreadableScan(f"{name}: the file ends before its pixels. It is truncated; copy or export it again.")
    element = file.pixels
    if element.tag != 0x7FE00010:
        raise UnreadableScan(f"{name}: floating point pixel data; medgen reads integer images.")
    samples = elements.whole("SamplesPerPixel", 1)
    layout = Layout(
        rows=elements.whole("Rows"),
        columns=elements.whole("Columns"),
        samples=samples,
        frames=elements.whole("NumberOfFrames", 1) or 1,
        allocated=elements.whole("BitsAllocated"),
        stored=elements.whole("BitsStored"),
        signed=elements.whole("PixelRepresentation") == 1,
        photometric=elements.code("PhotometricInterpretation") or ("MONOCHROME2" if samples == 1 else "RGB"),
        planar=elements.whole("PlanarConfiguration", 0),
        offset=element.offset,
        length=None if element.length == 0xFFFFFFFF else element.length,
        swapped=element.words and file.big_endian and elements.whole("BitsAllocated") == 8,
    )
    if min(layout.rows, layout.columns) < 1 or samples not in (1, 3):
        raise UnreadableScan(f"{name}: {layout.rows} rows x {layout.columns} columns x {samples} samples is no image.")
    if layout.allocated not in (8, 16, 32):
        raise UnreadableScan(f"{name}: 8, 16 or 32 bits per sample expected; found {layout.allocated}.")
    if elements.whole("PixelRepresentation") > 1:
        raise UnreadableScan(f"{name}: PixelRepresentation must be 0 or 1; it is not.")
    if (layout.samples == 3) != (layout.photometric == "RGB" or layout.photometric.startswith("YBR")):
        raise UnreadableScan(f"{name}: {layout.samples} samples a pixel do not go with {layout.photometric}.")
    if not 1 <= layout.stored <= layout.allocated:
        raise UnreadableScan(f"{name}: {layout.stored} bits stored in {layout.allocated} allocated is impossible.")
    if elements.whole("HighBit", layout.stored - 1) != layout.stored - 1:
        raise UnreadableScan(f"{name}: HighBit must be {layout.stored - 1} for {layout.stored} bits stored; it is not.")
    held = None if element.stream is None else element.stream - element.offset
    if layout.length is not None and held is not None and layout.length > held:
        raise UnreadableScan(
            f"{name}: Pixel Data claims {layout.length} bytes, the file holds {held}. "
            "It is truncated or damaged; copy or export it again."
        )
    return layout


__all__ = [
    "DicomFile",
    "Layout",
    "PixelElement",
    "deflated_body",
    "inflate",
    "looks_like_dicom",
    "open_file",
]
