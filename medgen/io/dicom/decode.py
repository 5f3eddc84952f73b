"""The pictures of one DICOM file as stored integers: read in place, or decoded frame by frame.

Every size is checked against the bytes that are there before anything is allocated: the stated length against the
file, the number of frames against the fragments, a codestream's own width and height against the header.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, Shaped

from medgen.errors import UnreadableScan
from medgen.io.dicom.elements import printable_uid, quiet
from medgen.io.dicom.file import DicomFile, Layout, deflated_body, inflate
from medgen.io.dicom.jpeg import EXTENDED, LOSSLESS, codestream_size, decode_jpeg

_UID = "1.2.840.10008.1.2"
NATIVE = frozenset({"", _UID, f"{_UID}.1", f"{_UID}.1.99", f"{_UID}.2"})
_RLE = f"{_UID}.5"
# JPEG baseline, extended, and near-lossless JPEG-LS lose information whatever the header says.
LOSSY = frozenset({f"{_UID}.4.50", EXTENDED, f"{_UID}.4.81"})
# pydicom's own run-length decoder first: the faster one aborts on damaged data in a way no caller can catch. GDCM's
# Python module is not used at all, because it ends the whole process on damaged JPEG; what only GDCM can decode goes
# through SimpleITK, which holds the same code and turns its failures into errors.
_PLUGINS = ("pydicom", "pylibjpeg", "pyjpegls", "pillow")
# Deflate reaches 1000:1 on blank slices, so a ratio alone says little; a ratio and a size together say bomb.
_BOMB_BYTES, _BOMB_RATIO = 2**26, 100
_DECODER_FAULTS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, struct.error)


@dataclass(frozen=True)
class Padding:
    """Stored values, from `low` to `high`, that fill pixels nobody measured."""

    value: int
    low: int
    high: int

    @classmethod
    def of(cls, file: DicomFile) -> "Padding | None":
        """The padding a file declares, None where it declares none."""
        signed = file.layout.signed
        ends = []
        for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
            raw = file.elements.raw(keyword)
            kind = {2: "h", 4: "i"}.get(len(raw))
            if kind:
                # Its sign is that of the pixels; the representation stated beside it is often wrong.
                order = ">" if file.big_endian else "<"
                ends.append(struct.unpack(order + (kind if signed else kind.upper()), raw)[0])
        return cls(ends[0], min(ends), max(ends)) if ends and file.elements.raw("PixelPaddingValue") else None


class PixelReader:
    """Reads the frames of one file, one after the other.

    Args:
        file: the parsed file.
        colour: give three samples a pixel, as red, green and blue.

    Raises:
        UnreadableScan: nothing installed can decode it, or the pixel data are damaged or shorter than the header says.
    """

    def __init__(self, file: DicomFile, *, colour: bool = False) -> None:
        self.file, self.layout, self.colour = file, file.layout, colour
        self._picture: tuple[int, np.ndarray] | None = None
        check_syntax(file)
        if file.syntax not in NATIVE:
            # Compressed frames are counted here, so that nobody allocates for frames that are not there.
            self._fragments = _fragments(file)

    def read(self, index: int, out: Integer[np.ndarray, "rows columns *samples"]) -> None:
        """Put the stored values of frame `index` into `out`, of `layout.dtype`, unused bits and all."""
        if self.colour:
            out[...] = self._coloured(self._bytes(index))
        elif self.file.syntax not in NATIVE:
            out[...] = self._decoded(self._bytes(index), raw=True)
        elif self.file.deflated or self.layout.swapped or not out.flags.c_contiguous:
            out[...] = np.frombuffer(self._bytes(index), self._stored_dtype).reshape(out.shape)
        else:
            with self.file.path.open("rb", buffering=0) as stream:
                stream.seek(self.layout.offset + index * out.nbytes)
                if stream.readinto(out.data.cast("B")) != out.nbytes:
                    raise UnreadableScan(f"{self.file.name}: truncated. Copy or export it again.")
            if self.file.big_endian:
                out.byteswap(inplace=True)

    def picture(self, index: int) -> Integer[np.ndarray, "rows columns"]:
        """The stored values of frame `index`, kept for the next call: the tiles of a mosaic are cut from it."""
        if self._picture is None or self._picture[0] != index:
            values = np.empty((self.layout.rows, self.layout.columns), self.layout.dtype)
            self.read(index, values)
            self._picture = index, values
        return self._picture[1]

    @property
    def _stored_dtype(self) -> np.dtype:
        return self.layout.dtype.newbyteorder(">" if self.file.big_endian else "<")

    def _bytes(self, index: int) -> bytes:
        if self.file.syntax not in NATIVE:
            return self._fragments[index]
        size = frame_bytes(self.layout)
        return self._stream[index * size : (index + 1) * size]

    @cached_property
    def _stream(self) -> bytes:
        """The uncompressed pixel data of all frames."""
        size = frame_bytes(self.layout) * self.layout.frames
        if not self.file.deflated:
            with self.file.path.open("rb") as stream:
                stream.seek(self.layout.offset)
                content = stream.read(size + size % 2)
            return np.frombuffer(content, np.uint16).byteswap().tobytes() if self.layout.swapped else content
        compressed = deflated_body(self.file.path)
        content = inflate(compressed, self.layout.offset + size, self.file.name)[self.layout.offset :]
        if len(content) < size:
            raise UnreadableScan(f"{self.file.name}: truncated. {size} bytes of pixels expected, {len(content)} found.")
        return content

    def _decoded(self, frame: bytes, *, raw: bool) -> np.ndarray:
        """One frame through the decoder of its transfer syntax; `raw` leaves colours as they are stored."""
        from pydicom.encaps import encapsulate
        from pydicom.pixels import convert_color_space, get_decoder

        layout, syntax = self.layout, self.file.syntax or f"{_UID}.1"
        encapsulated = self.file.syntax not in NATIVE
        if encapsulated:
            check_codestream(frame, layout, syntax, self.file.name)
        native = f"{_UID}.2" if self.file.big_endian else f"{_UID}.1"
        decoder = get_decoder(syntax if encapsulated else native)
        plugin = next((name for name in _PLUGINS if name in decoder.available_plugins), "") if encapsulated else ""
        if syntax in LOSSLESS or (syntax == EXTENDED and layout.stored > 8):
            values = decode_jpeg(frame, layout, syntax, self.file.name)
            if raw or layout.samples == 1 or layout.photometric == "RGB":
                return values
            return convert_color_space(values, "YBR_FULL", "RGB")
        options: dict[str, Any] = {
            "rows": layout.rows,
            "columns": layout.columns,
            "number_of_frames": 1,
            "samples_per_pixel": layout.samples,
            "bits_allocated": layout.allocated,
            "bits_stored": layout.stored,
            "pixel_representation": int(layout.signed),
            "photometric_interpretation": layout.photometric,
            "pixel_keyword": "PixelData",
        }
        if layout.samples > 1:
            options["planar_configuration"] = layout.planar
        content = encapsulate([frame], has_bot=False) if encapsulated else frame
        try:
            with quiet():
                values, _ = decoder.as_array(content, raw=raw, decoding_plugin=plugin, **options)
        except _DECODER_FAULTS as fault:
            raise UnreadableScan(
                f"{self.file.name}: the compressed pixel data cannot be decoded (transfer syntax {syntax}). "
                "The file is damaged; copy or export it again."
            ) from fault
        return values

    def _coloured(self, frame: bytes) -> np.ndarray:
        if self.layout.photometric != "PALETTE COLOR":
            return self._decoded(frame, raw=False)
        from pydicom.pixels import apply_color_lut

        stored = self._decoded(frame, raw=True)
        try:
            with quiet():
                coloured = apply_color_lut(stored, self.file.elements.dataset)
        except _DECODER_FAULTS as fault:
            raise UnreadableScan(f"{self.file.name}: the colour palette is damaged.") from fault
        # Palettes of 16 bits spread 8 bits of colour over the range of 16.
        return coloured >> 8 if coloured.dtype == np.uint16 else coloured


def _fragments(file: DicomFile) -> list[bytes]:
    """The compressed bytes of each frame."""
    from pydicom.encaps import generate_frames

    with file.path.open("rb") as stream:
        stream.seek(file.layout.offset)
        content = stream.read()
    _check_items(content, file.name)
    try:
        frames = list(generate_frames(content, number_of_frames=file.layout.frames))
    except (*_DECODER_FAULTS, EOFError) as fault:
        raise UnreadableScan(f"{file.name}: the compressed pixel data are damaged or truncated.") from fault
    if len(frames) < file.layout.frames:
        raise UnreadableScan(
            f"{file.name}: {file.layout.frames} frames expected, {len(frames)} found. The file is damaged."
        )
    return frames


def _check_items(content: bytes, name: str) -> None:
    """Refuse fragments that reach beyond the end of the file: decoders take long to notice, or do not."""
    at = 0
    while at + 8 <= len(content):
        tag, length = content[at : at + 4], struct.unpack_from("<I", content, at + 4)[0]
        if tag != b"\xfe\xff\x00\xe0":
            return
        at += 8 + length
    if at > len(content):
        raise UnreadableScan(f"{name}: the compressed pixel data are cut off. The file is truncated; copy it again.")


def frame_bytes(layout: Layout) -> int:
    """Bytes of one uncompressed frame."""
    size = layout.rows * layout.columns * layout.samples * layout.allocated // 8
    return size * 2 // 3 if layout.photometric == "YBR_FULL_422" else size


def check_syntax(file: DicomFile) -> None:
    """Refuse a transfer syntax nothing here decodes, and pixel data that contradict theirs.

    Raises:
        UnreadableScan: so it is; the message names the transfer syntax.
    """
    layout, syntax = file.layout, file.syntax
    if syntax in NATIVE:
        expected = frame_bytes(layout) * layout.frames
        if layout.length is None or layout.length < expected:
            raise UnreadableScan(
                f"{file.name}: {layout.rows} x {layout.columns} pixels, {layout.frames} frames, need {expected} bytes; "
                f"Pixel Data has {layout.length or 'no stated length'}. It is truncated or damaged; export it again."
            )
        if file.deflated and expected > max(_BOMB_BYTES, _BOMB_RATIO * file.path.stat().st_size):
            raise UnreadableScan(
                f"{file.name}: {file.path.stat().st_size} bytes claim to inflate to {expected}: a decompression bomb."
            )
        if layout.length >= expected + frame_bytes(layout) and layout.length > expected + 1:
            raise UnreadableScan(
                f"{file.name}: Pixel Data has {layout.length} bytes, the header describes {expected}. "
                "There is at least one frame more than it tells."
            )
        return
    from pydicom.pixels import get_decoder

    try:
        with quiet():
            plugins = get_decoder(syntax).available_plugins
    except NotImplementedError as fault:
        raise UnreadableScan(
            f"{file.name}: transfer syntax {printable_uid(syntax)} is not supported. "
            "Convert the file, for example to Explicit VR Little Endian."
        ) from fault
    if syntax not in LOSSLESS and not set(plugins) & set(_PLUGINS):
        raise UnreadableScan(
            f"{file.name}: no decoder is installed for transfer syntax {syntax}. "
            "Run: pip install --upgrade medgen, which brings pylibjpeg, pyjpegls and Pillow."
        )
    if layout.length is not None:
        raise UnreadableScan(f"{file.name}: compressed pixels must be encapsulated in fragments; they are not.")


def check_codestream(frame: bytes, layout: Layout, syntax: str, name: str) -> None:
    """Refuse a compressed frame whose own size is not the header's, before a decoder allocates for it.

    Raises:
        UnreadableScan: so it is.
    """
    if syntax == _RLE:
        # Two bytes of a run-length stream give at most 128.
        if frame_bytes(layout) > 64 * len(frame):
            raise UnreadableScan(f"{name}: {len(frame)} run-length bytes cannot hold {frame_bytes(layout)}. Damaged.")
        return
    # A cut stream decodes slowly, or to a picture whose lower part was made up.
    if b"\xff\xd9" not in frame[-64:]:
        raise UnreadableScan(f"{name}: a compressed picture has no end. The file is truncated; copy it again.")
    size = codestream_size(frame)
    if size != (layout.rows, layout.columns):
        found = f"{size[0]} x {size[1]}" if size else "none that can be told"
        raise UnreadableScan(
            f"{name}: the header says {layout.rows} x {layout.columns} pixels, the compressed picture has {found}."
        )


def tidy(
    stored: Integer[np.ndarray, "rows columns"], layout: Layout, padding: Padding | None
) -> Bool[np.ndarray, "rows columns"] | None:
    """Clear unused bits in place; returns where the pixels are padding, None where none is.

    Args:
        stored: values as they stand in the file; changed in place.
        layout: how many of their bits count.
        padding: the declared padding values.
    """
    spare = layout.allocated - layout.stored
    low, high = (
        (-(1 << layout.stored - 1), (1 << layout.stored - 1) - 1) if layout.signed else (0, (1 << layout.stored) - 1)
    )
    # Padding that does not fit the bits in use can only be seen while the unused bits are still there.
    outside = padding is not None and not (low <= padding.low and padding.high <= high)
    found = _between(stored, padding) if padding is not None and outside else None
    if spare and layout.signed:
        np.left_shift(stored, spare, out=stored)
        np.right_shift(stored, spare, out=stored)
    elif spare:
        np.bitwise_and(stored, stored.dtype.type(high), out=stored)
    if padding is not None and not outside:
        found = _between(stored, padding)
    return found if found is not None and found.any() else None


def _between(stored: np.ndarray, padding: Padding) -> np.ndarray:
    return (stored >= padding.low) & (stored <= padding.high) if padding.low < padding.high else stored == padding.low


def same_pixels(first: tuple[DicomFile, int], second: tuple[DicomFile, int]) -> bool:
    """Whether two frames, each (file, index), hold equal stored values."""
    if first[0].layout.form != second[0].layout.form or first[0].layout.dtype != second[0].layout.dtype:
        return False
    return bool(np.array_equal(stored_frame(*first), stored_frame(*second)))


def stored_frame(file: DicomFile, index: int) -> Shaped[np.ndarray, "rows columns *samples"]:
    """The stored values of one frame; colours as stored."""
    layout = file.layout
    out = np.empty((layout.rows, layout.columns, layout.samples)[: 2 if layout.samples == 1 else 3], layout.dtype)
    PixelReader(file, colour=layout.samples == 3).read(index, out)
    if layout.samples == 1:
        tidy(out, layout, None)
    return out


__all__ = [
    "LOSSY",
    "NATIVE",
    "Padding",
    "PixelReader",
    "check_codestream",
    "check_syntax",
    "frame_bytes",
    "same_pixels",
    "stored_frame",
    "tidy",
]
