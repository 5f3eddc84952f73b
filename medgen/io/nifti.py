"""NIfTI-1 and NIfTI-2 single files (.nii, .nii.gz), in and out, strictly.

Nothing is guessed: a file whose position, size, checksum or numbers contradict themselves is refused
with a sentence that says what to do. Formats: Cox et al. 2004, "A (sort of) new image data format
standard: NIfTI-1".
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal import igzip
from jaxtyping import Shaped
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from medgen import log
from medgen.errors import ConfigError, DataError, OutputError, UnreadableScan
from medgen.grid import Grid
from medgen.io.atomic import replacing
from medgen.io.checks import INFLATE_FAULTS, finite, within_cap
from medgen.io.nifti_place import grid_of, place
from medgen.io.source import ReadOptions
from medgen.scan import Header, Scale, Scan

_KINDS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_CODES = {np.dtype(kind): code for code, kind in _KINDS.items()}
# The header class, and where it has which magic bytes.
_MAGIC = ((Nifti1Header, 344, b"n+1\0"), (Nifti2Header, 4, b"n+2\0\r\n\x1a\n"))
_RGB24 = 128
_LABEL_INTENT = 1002
_CHUNK = 1 << 20
# How a description begins that says nobody was scanned, and all of it where nothing more is told.
_SYNTHETIC_MARK = "SYNTHETIC"
_SYNTHETIC = f"{_SYNTHETIC_MARK}: generated, shows nobody"
# Deflate cannot shrink anything more than this.
_DEFLATE_LIMIT = 1032


@dataclass(frozen=True)
class _Layout:
    """What a header says: where the voxels lie in the file and what they mean."""

    shape: tuple[int, int, int, int]  # c i j k
    dtype: np.dtype  # in the file's byte order
    offset: int
    colour: bool
    grid: Grid
    scale: Scale
    header: Header
    is_label: bool

    @property
    def size(self) -> int:
        """Bytes of the whole (inflated) file."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


# -- reading ---------------------------------------------------------------------------------------


def read_nifti(path: Path, options: ReadOptions = ReadOptions()) -> Scan:
    """The scan in a NIfTI file, in its stored numbers and its own voxel order.

    Time points, vector components and (with `options.colour`) RGB become channels. An uncompressed
    file is mapped, not read.

    Args:
        path: .nii or .nii.gz; what it is compressed with is seen from its content.
        options: `xform`, `on_nan`, `colour` and `max_voxels` are heeded.

    Raises:
        UnreadableScan: damaged, truncated, surplus bytes, a wrong checksum, or not NIfTI.
        GeometryError: no orientation, two that disagree, or an impossible one.
        DataError: too large, not finite, or colour that was not asked for.
    """
    path = Path(path)
    layout = _layout(path, options)
    stored = _inflated(path, layout) if _is_gzip(path) else _mapped(path, layout)
    if layout.colour:
        voxels = stored.reshape(layout.shape, order="F")
    else:
        voxels = np.moveaxis(stored.reshape((*layout.shape[1:], layout.shape[0]), order="F"), -1, 0)
    voxels = np.require(voxels.astype(layout.dtype.newbyteorder("="), copy=False), requirements="A")
    voxels = finite(voxels, layout.scale, path.name, options)
    return Scan(voxels, layout.grid, scale=layout.scale, header=layout.header, is_label=layout.is_label)


def nifti_header(path: Path, options: ReadOptions = ReadOptions()) -> tuple[Grid, int, np.dtype, Header]:
    """Grid, number of channels, stored type and header of a NIfTI file, without reading its voxels.

    Raises:
        DataError: as `read_nifti`, as far as the header tells.
    """
    layout = _layout(Path(path), options)
    return layout.grid, layout.shape[0], layout.dtype.newbyteorder("="), layout.header


def _layout(path: Path, options: ReadOptions) -> _Layout:
    name = path.name
    head = _parsed(_beginning(path), name)
    shape = _shape(head, name)
    within_cap(shape, name, options)
    colour = int(head["datatype"]) == _RGB24
    if colour and not options.colour:
        raise DataError(
            f"{name}: expected one number a voxel; found RGB colour. Pass colour=True (--colour) to read 3 channels."
        )
    if colour and shape[0] > 1:
        raise DataError(f"{name}: expected one colour image; found {shape[0]} in one file. Split it first.")
    kind = "u1" if colour else _KINDS.get(int(head["datatype"]))
    if kind is None:
        raise UnreadableScan(
            f"{name}: expected 8 to 64 bit integers or floats; found NIfTI datatype {int(head['datatype'])}. "
            "Convert it to float32 first (complex, RGBA and 128 bit numbers are not read)."
        )
    grid, space = grid_of(head, shape[1:], name, options)
    synthetic = bytes(head["descrip"]).startswith(_SYNTHETIC_MARK.encode())
    return _Layout(
        shape=(3, *shape[1:]) if colour else shape,
        dtype=np.dtype(kind).newbyteorder(head.endianness),
        offset=_offset(head, name),
        colour=colour,
        grid=grid,
        scale=Scale() if colour else _scale(head, name),
        header=Header(space=space, photometric="RGB" if colour else "MONOCHROME2", synthetic=synthetic),
        is_label=int(head["intent_code"]) == _LABEL_INTENT,
    )


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _beginning(path: Path) -> bytes:
    """The first bytes of a file, inflated if need be; enough for either header."""
    try:
        with igzip.IGzipFile(path) if _is_gzip(path) else path.open("rb") as stream:
            return stream.read(Nifti2Header.template_dtype.itemsize)
    except FileNotFoundError:
        raise UnreadableScan(f"{path.name}: no such file. Check the path.") from None
    except INFLATE_FAULTS as error:
        raise UnreadableScan(
            f"{path.name}: expected a NIfTI file; its first bytes cannot be read ({_why(error)})."
        ) from error


def _parsed(block: bytes, name: str) -> Nifti1Header:
    for mark in "<>":
        for kind, start, magic in _MAGIC:
            length = kind.template_dtype.itemsize
            if int.from_bytes(block[:4], "little" if mark == "<" else "big") != length or len(block) < length:
                continue
            if block[start : start + len(magic)] == magic:
                return kind(block[:length], endianness=mark, check=False)
            if block[start : start + 2] == b"ni":
                raise UnreadableScan(
                    f"{name}: expected one file with header and voxels; found half of a .hdr/.img pair."
                )
    raise UnreadableScan(f"{name}: expected a NIfTI-1 or NIfTI-2 header; found {len(block)} bytes of something else.")


def _shape(head: Nifti1Header, name: str) -> tuple[int, int, int, int]:
    used = int(head["dim"][0])
    if not 1 <= used <= 7:
        raise UnreadableScan(f"{name}: expected 1 to 7 dimensions; its header announces {used}. The file is damaged.")
    dims = [int(n) for n in head["dim"][1 : used + 1]]
    if min(dims) < 1:
        raise UnreadableScan(f"{name}: expected dimensions of at least 1; its header announces {dims}.")
    i, j, k, times, components, *rest = dims + [1] * (7 - used)
    if max(rest) > 1 or (times > 1 and components > 1):
        raise DataError(f"{name}: expected a volume, a time series or a vector image; found {dims}. Split it first.")
    return times * components, i, j, k


def _offset(head: Nifti1Header, name: str) -> int:
    offset, least = float(head["vox_offset"]), head.template_dtype.itemsize + 4
    if not math.isfinite(offset) or offset < least or offset != int(offset):
        raise UnreadableScan(f"{name}: expected voxels from byte {least} on; its header says byte {offset:g}.")
    return int(offset)


def _scale(head: Nifti1Header, name: str) -> Scale:
    slope, intercept = float(head["scl_slope"]), float(head["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return Scale()
    if not math.isfinite(intercept):
        raise UnreadableScan(f"{name}: expected a finite scl_inter beside scl_slope {slope:g}; found {intercept}.")
    return Scale(slope, intercept)


def _mapped(path: Path, layout: _Layout) -> Shaped[np.ndarray, "n"]:
    _same_size(path.name, path.stat().st_size, layout.size)
    return np.asarray(np.memmap(path, dtype=layout.dtype, mode="r", offset=layout.offset))


def _inflated(path: Path, layout: _Layout) -> Shaped[np.ndarray, "n"]:
    """Inflate the whole stream, no further than the header announces, with checksum and length checked."""
    name, size = path.name, layout.size
    if size > _DEFLATE_LIMIT * path.stat().st_size:
        raise UnreadableScan(f"{name}: its header announces {size} bytes, more than its compressed bytes can hold.")
    try:
        held = np.empty(size, dtype=np.uint8)
        window, done = held.data, 0
        with igzip.IGzipFile(path) as stream:
            while done < size and (count := stream.readinto(window[done : done + _CHUNK])):
                done += count
            # Reading on makes the stream check its checksum, its length and that nothing follows.
            done += len(stream.read(1))
    except INFLATE_FAULTS as error:
        raise UnreadableScan(
            f"{name}: its compressed bytes are damaged or cut short ({_why(error)}). Copy it again."
        ) from error
    except MemoryError as error:
        raise DataError(f"{name}: needs {size / 2**30:.1f} GiB of memory, more than there is.") from error
    _same_size(name, done, size)
    return held[layout.offset :].view(layout.dtype)


def _why(error: Exception) -> str:
    """The reason without the path that the system's errors quote."""
    return getattr(error, "strerror", None) or str(error)


def _same_size(name: str, found: int, expected: int) -> None:
    if found != expected:
        what = "is cut short" if found < expected else "holds more"
        raise UnreadableScan(
            f"{name}: its header announces {expected} bytes; the file {what}. Copy or export it again."
        )


# -- writing ---------------------------------------------------------------------------------------


def write_nifti(scan: Scan, path: Path, *, description: str = "") -> Path:
    """Write a scan as NIfTI: the stored numbers with their Scale, sform and qform alike, nothing else.

    The same scan gives the same bytes. Nothing of the source's header is copied, so nobody's name is.

    Args:
        scan: float64 becomes float32, bool uint8, 64 bit integers int32; several channels a 4-D file, of physical
            values where each has a scale of its own.
        path: ends in .nii or .nii.gz; appears only when complete. Its folder must exist.
        description: the header's `descrip`, ASCII below 80 characters; '' says of a synthetic scan that it is one.

    Returns:
        path.

    Raises:
        OutputError: NIfTI cannot hold these numbers, or the disk is full; nothing is left behind.
        ConfigError: the description does not fit.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise OutputError(f"{path.name}: expected a name ending in .nii or .nii.gz.")
    if len(description) >= 80 or not description.isascii():
        raise ConfigError(f"{path.name}: a NIfTI description is ASCII below 80 characters; found {len(description)}.")
    if scan.header.synthetic and not description:
        description = _SYNTHETIC
    scan = scan.in_one_scale()
    voxels = _storable(_marked(scan, path.name), path.name)
    block = _header(scan, voxels.dtype, path.name, description).binaryblock + bytes(4)
    numbers = np.asfortranarray(np.moveaxis(voxels, 0, -1)).ravel("F")
    with replacing(path, force=True) as part, part.open("wb") as plain:
        # No name and no time in the gzip header: the same scan gives the same bytes.
        stream = igzip.IGzipFile("", "wb", 2, plain, 0) if path.name.endswith(".gz") else plain
        with stream:
            stream.write(block)
            stream.write(numbers.view(np.uint8).data)
    return path


def _marked(scan: Scan, name: str) -> Shaped[np.ndarray, "c i j k"]:
    """The stored voxels, with the padding value (or NaN) where nothing was measured."""
    if scan.valid is None or scan.valid.all():
        return scan.voxels
    if scan.header.padding is not None:
        return np.where(scan.valid, scan.voxels, scan.voxels.dtype.type(scan.header.padding))
    if np.issubdtype(scan.voxels.dtype, np.floating):
        return np.where(scan.valid, scan.voxels, scan.voxels.dtype.type(np.nan))
    log.note(f"{name}: NIfTI integers cannot say which voxels were not measured; they are written as they are.")
    return scan.voxels


def _storable(voxels: Shaped[np.ndarray, "c i j k"], name: str) -> Shaped[np.ndarray, "c i j k"]:
    """The voxels in a little-endian type that every NIfTI reader knows."""
    dtype = voxels.dtype.newbyteorder("=")
    if dtype.kind == "b":
        return voxels.view(np.uint8)
    if dtype in (np.int64, np.uint64):
        if voxels.min() < -(2**31) or voxels.max() >= 2**31:
            raise OutputError(f"{name}: expected integers that fit 32 bits; found up to {int(voxels.max())}.")
        return voxels.astype("<i4")
    if dtype in (np.float64, np.float16):
        largest = np.finfo(np.float32).max
        if np.nanmax(np.abs(voxels), initial=0.0, where=np.isfinite(voxels)) > largest:
            raise OutputError(f"{name}: expected values that fit float32 (up to {largest:.3g}); found larger ones.")
        return voxels.astype("<f4")
    if dtype not in _CODES:
        raise OutputError(f"{name}: NIfTI is written with real numbers of up to 32 bits; found {dtype}.")
    return voxels.astype(dtype.newbyteorder("<"), copy=False)


def _header(scan: Scan, dtype: np.dtype, name: str, description: str) -> Nifti1Header:
    shape = scan.grid.shape if scan.channels == 1 else (*scan.grid.shape, scan.channels)
    head = (Nifti2Header if max(shape) > 32767 else Nifti1Header)(endianness="<")
    head.set_data_shape(shape)
    head["datatype"], head["bitpix"] = _CODES[dtype.newbyteorder("=")], dtype.itemsize * 8
    head["vox_offset"] = head.template_dtype.itemsize + 4
    head["magic"] = head.single_magic
    head["descrip"] = description.encode("ascii")
    head["intent_code"] = _LABEL_INTENT if scan.is_label else 0
    head["scl_slope"], head["scl_inter"] = scan.scale.slope, scan.scale.intercept
    if not np.isfinite([head["scl_slope"], head["scl_inter"]]).all() or head["scl_slope"] == 0:
        raise OutputError(f"{name}: NIfTI keeps the scale in float32, which cannot hold {scan.scale.slope}.")
    head["sform_code"] = scan.header.space
    place(head, scan.grid, name)
    return head


__all__ = ["nifti_header", "read_nifti", "write_nifti"]
