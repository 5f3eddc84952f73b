"""NRRD and MetaImage (.nrrd, .nhdr, .mha, .mhd), read through SimpleITK.

ITK fills what a file leaves out: a missing orientation becomes identity, a damaged compressed block
zeros. So the header text and the data block are checked first, and SimpleITK only decodes what passed.
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal import igzip
from jaxtyping import Float

from medgen.errors import DataError, GeometryError, UnreadableScan
from medgen.grid import Grid
from medgen.io.checks import INFLATE_FAULTS, finite, within_cap
from medgen.io.source import ReadOptions
from medgen.scan import Header, Scale, Scan

_HEADER_BYTES = 1 << 20
_CHUNK = 1 << 20
_NRRD_SPACES = {
    "left-posterior-superior",
    "lps",
    "right-anterior-superior",
    "ras",
    "left-anterior-superior",
    "las",
}
_PACKINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_NUMBERS = ("UInt8", "Int8", "UInt16", "Int16", "UInt32", "Int32", "UInt64", "Int64", "Float32", "Float64")


@dataclass(frozen=True)
class _Block:
    """Where the voxels' bytes are: the file, the first byte, and how they are packed."""

    path: Path
    start: int
    packing: str  # raw, gzip or zlib


def read_itk(path: Path, options: ReadOptions = ReadOptions()) -> Scan:
    """The scan in an NRRD or MetaImage file.

    Vector components and a fourth axis become channels; a planar image becomes (I, J, 1) with
    `Header.space` 0, because two axes do not tell where in the patient they lie.

    Args:
        path: .nrrd, .nhdr, .mha or .mhd.
        options: `on_nan` and `max_voxels` are heeded.

    Raises:
        UnreadableScan: damaged, truncated, surplus bytes, or a variant that is not read.
        GeometryError: orientation or unit of length is missing or unknown.
        DataError: too large, or not finite.
    """
    import SimpleITK

    path = Path(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    start, fields = _fields(path)
    block = (_nrrd_block if "dimension" in fields else _meta_block)(path, start, fields)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UnreadableScan(f"{path.name}: its header cannot be read ({_reason(error)}).") from error
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if not 2 <= len(size) <= 4 or (len(size) == 4 and components > 1):
        raise DataError(f"{path.name}: expected a planar image, a volume or a series of volumes; found size {size}.")
    within_cap((*size, components), path.name, options)
    _check_block(block, math.prod(size) * components * _item_bytes(reader.GetPixelID(), path.name), path.name)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise UnreadableScan(f"{path.name}: its voxels cannot be read ({_reason(error)}).") from error
    voxels = _voxels(SimpleITK.GetArrayFromImage(image), len(size), components)
    grid = _grid(voxels.shape[1:], image, path.name)
    voxels = finite(voxels, Scale(), path.name, options)
    return Scan(voxels, grid, header=Header(space=0 if len(size) == 2 else 1))


def _voxels(values: np.ndarray, dimensions: int, components: int) -> np.ndarray:
    """ITK's array (t, k, j, i, c), whichever of those it has, as (c, i, j, k)."""
    values = values if components > 1 else values[..., None]
    if dimensions == 2:
        values = values[None]
    if dimensions == 4:
        return values[..., 0].transpose(0, 3, 2, 1)
    return values.transpose(3, 2, 1, 0)


def _grid(shape: tuple[int, ...], image: "SimpleITK.Image", name: str) -> Grid:
    dimensions = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(dimensions, dimensions)
    used = min(dimensions, 3)
    if dimensions == 4 and (direction[:3, 3].any() or direction[3, :3].any()):
        raise GeometryError(f"{name}: expected a fourth axis apart from space; its direction mixes them.")
    lps: Float[np.ndarray, "4 4"] = np.eye(4)
    lps[:used, :used] = (direction * np.array(image.GetSpacing()))[:used, :used]
    lps[:used, 3] = image.GetOrigin()[:used]
    try:
        return Grid.from_lps(shape, lps)
    except GeometryError as error:
        raise GeometryError(f"{name}: {error}") from None


# -- header text -----------------------------------------------------------------------------------


def _fields(path: Path) -> tuple[int, dict[str, str]]:
    """Where the header ends, and its fields with lower-case names."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_HEADER_BYTES)
    except OSError as error:
        raise UnreadableScan(f"{path.name}: cannot be opened ({error.strerror}). Check the path.") from error
    nrrd = text.startswith(b"NRRD000")
    fields: dict[str, str] = {}
    end = 0
    while end < len(text):
        line = text[end : text.find(b"\n", end) + 1 or len(text)]
        end += len(line)
        key, mark, value = line.decode("latin-1").partition(":" if nrrd else "=")
        if nrrd and not line.strip():
            break
        # NRRD's 'key:=value' pairs are free text of the writer, not fields.
        if mark and not (nrrd and value.startswith("=")):
            fields[key.strip().lower()] = value.strip()
        if not nrrd and key.strip() == "ElementDataFile":
            break
    if not ("dimension" in fields if nrrd else {"ndims", "elementdatafile"} <= fields.keys()):
        raise UnreadableScan(f"{path.name}: expected an NRRD or MetaImage header; found something else.")
    return end, fields


def _nrrd_block(path: Path, start: int, fields: dict[str, str]) -> _Block:
    name = path.name
    if fields["dimension"] != "2":
        if fields.get("space", "").lower() not in _NRRD_SPACES or "space directions" not in fields:
            raise GeometryError(
                f"{name}: expected 'space' (such as left-posterior-superior) and 'space directions'; one is missing, "
                "so nobody knows which side is left. Export it again with its orientation."
            )
        units = fields.get("space units", "mm").replace('"', " ").split()
        if set(units) - {"mm", "millimeter", "millimeters"}:
            raise GeometryError(f"{name}: expected 'space units' in mm; found another unit. Convert it first.")
    packing = _PACKINGS.get(fields.get("encoding", "").lower())
    skips = {fields.get(f"{what}{gap}skip", "0") for what in ("line", "byte") for gap in (" ", "")}
    if packing is None or skips != {"0"}:
        raise UnreadableScan(f"{name}: expected raw or gzip encoding and no skipped bytes. Save it again in that way.")
    detached = fields.get("data file", fields.get("datafile"))
    return _Block(path, start, packing) if detached is None else _Block(_beside(path, detached), 0, packing)


def _meta_block(path: Path, start: int, fields: dict[str, str]) -> _Block:
    name = path.name
    wanted = (("elementspacing",), ("transformmatrix", "orientation", "rotation"), ("offset", "origin", "position"))
    if not all(any(key in fields for key in keys) for keys in wanted):
        raise GeometryError(
            f"{name}: expected ElementSpacing, TransformMatrix and Offset; one is missing, so nobody knows where it "
            "lies. Export it again with its orientation."
        )
    if fields.get("distanceunits", "mm").lower() != "mm":
        raise GeometryError(f"{name}: expected DistanceUnits mm; found another unit. Convert it first.")
    if fields.get("binarydata", "true").lower() != "true" or fields.get("headersize", "0") != "0":
        raise UnreadableScan(
            f"{name}: expected binary voxels without a header of their own. Save it again in that way."
        )
    packing = "zlib" if fields.get("compresseddata", "false").lower() == "true" else "raw"
    local = fields["elementdatafile"].upper() == "LOCAL"
    return _Block(path, start, packing) if local else _Block(_beside(path, fields["elementdatafile"]), 0, packing)


def _beside(path: Path, data: str) -> Path:
    """The data file a header names; one file, at or below the header's folder."""
    place = path.parent / data
    if data.upper().startswith("LIST") or "%" in data or len(data) > 255:
        raise UnreadableScan(f"{path.name}: expected one data file; its header names a list. Save it as one file.")
    if not place.resolve().is_relative_to(path.parent.resolve()):
        raise UnreadableScan(f"{path.name}: expected its data file beside it; its header points outside the folder.")
    if not place.is_file():
        raise UnreadableScan(f"{path.name}: the data file its header names is not there. Copy both together.")
    return place


# -- data block ------------------------------------------------------------------------------------


def _item_bytes(pixel: int, name: str) -> int:
    import SimpleITK

    for number in _NUMBERS:
        if pixel in (getattr(SimpleITK, f"sitk{number}"), getattr(SimpleITK, f"sitkVector{number}")):
            return np.dtype(number.lower()).itemsize
    raise UnreadableScan(f"{name}: expected real numbers of 8 to 64 bits; found another type. Convert it to float32.")


def _check_block(block: _Block, expected: int, name: str) -> None:
    """Refuse a data block that is not exactly `expected` bytes, unpacked, with the right checksum."""
    try:
        with block.path.open("rb") as stream:
            stream.seek(block.start)
            match block.packing:
                case "raw":
                    found = block.path.stat().st_size - block.start
                case "gzip":
                    found = _gzip_length(stream, expected)
                case _:
                    found = _zlib_length(stream, expected)
    except INFLATE_FAULTS as error:
        raise UnreadableScan(f"{name}: its compressed voxels are damaged or cut short. Copy it again.") from error
    if found != expected:
        what = "fewer" if found < expected else "more"
        raise UnreadableScan(
            f"{name}: its header announces {expected} bytes of voxels; there are {what}. Copy it again."
        )


def _gzip_length(stream: BinaryIO, limit: int) -> int:
    length = 0
    with igzip.IGzipFile(fileobj=stream, mode="rb") as unpacked:
        while length <= limit and (chunk := unpacked.read(_CHUNK)):
            length += len(chunk)
    return length


def _zlib_length(stream: BinaryIO, limit: int) -> int:
    unpacker, length, packed = zlib.decompressobj(), 0, b""
    while not unpacker.eof and length <= limit:
        packed = unpacker.unconsumed_tail or stream.read(_CHUNK)
        if not packed:
            raise EOFError
        length += len(unpacker.decompress(packed, _CHUNK))
    return length + len(unpacker.unused_data)


def _reason(error: RuntimeError) -> str:
    """The last line of ITK's message without paths."""
    line = str(error).strip().splitlines()[-1]
    return line.rpartition(":")[2].strip() or "unknown reason"


__all__ = ["read_itk"]
