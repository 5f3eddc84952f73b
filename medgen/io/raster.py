"""Pictures (PNG, JPEG, TIFF) and .npz collections of pictures, in and out.

Pictures have no millimetres and no patient around them. They lie as a DICOM image of orientation
(1, 0, 0, 0, 1, 0) with 1 mm pixels would: i runs along the columns, to the right of the picture, j down
its rows, and `Header.space` is 0, unknown.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import Image, ImageOps

from medgen.errors import DataError, OutputError, UnreadableScan
from medgen.grid import Grid
from medgen.io.atomic import replacing
from medgen.io.checks import finite, within_cap
from medgen.io.source import ReadOptions
from medgen.scan import Header, Scale, Scan

_FORMATS = ("PNG", "JPEG", "TIFF")
_GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# What Pillow raises (or warns of, where warnings are errors) on damaged pictures; it has no base class for them.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError),
    *(struct.error, zlib.error, UserWarning),
)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# (bits, sample format: 1 unsigned, 2 signed, 3 float) of TIFFs that Pillow reads with their values intact.
_TIFF_KINDS = {(1, 1), (4, 1), (8, 1), (16, 1), (16, 2), (32, 2), (32, 3)}
# On 16-bit scans the default level takes seven times as long, for a twentieth less.
_QUICK: dict[str, Any] = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 1}
_SPLITS = ("train", "val", "test")


def read_raster(path: Path, options: ReadOptions = ReadOptions()) -> Scan:
    """The picture in a PNG, JPEG or TIFF file, as a planar scan (1 or 3, i, j, 1) of the stored numbers.

    A rotation that a JPEG asks viewers for is carried out; a TIFF's resolution is of paper and ignored.

    Args:
        path: the file; its content, not its name, says what it is.
        options: `colour`, `on_nan` and `max_voxels` are heeded.

    Raises:
        UnreadableScan: damaged, truncated, or no such picture.
        DataError: colour that was not asked for, transparency, several pages, or too large.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            within_cap(picture.size, path.name, options)
            _check_kind(picture, path, options)
            lossy = picture.format == "JPEG" or picture.info.get("compression") in ("jpeg", "tiff_jpeg")
            dark_is_high = picture.mode.startswith("I;16") and _tiff_tag(picture, 262, 1) == 0
            upright = _decoded(ImageOps.exif_transpose(picture), path.name, options)
            values = np.asarray(upright)
    except _BOMB:
        raise DataError(f"{path.name}: expected a picture; found too many pixels for one. Cut it into tiles.") from None
    except _BROKEN as error:
        raise UnreadableScan(
            f"{path.name}: expected a whole PNG, JPEG or TIFF; it is damaged, cut short or something else "
            f"({type(error).__name__}). Copy or export it again."
        ) from error
    values = values.astype(np.uint8 if values.dtype == np.bool_ else values.dtype.newbyteorder("="), copy=False)
    voxels = finite(_as_voxels(values), Scale(), path.name, options)
    colour = voxels.shape[0] == 3
    photometric = "RGB" if colour else "MONOCHROME1" if dark_is_high else "MONOCHROME2"
    return Scan(voxels, _plain_grid(voxels.shape[1:]), header=Header(space=0, photometric=photometric, lossy=lossy))


def write_raster(scan: Scan, path: Path) -> Path:
    """Write a planar scan as PNG: physical values rounded to the nearest of 8 or 16 bits.

    A picture has no Scale, so what is stored is what the numbers mean. 16-bit voxels stay 16 bits;
    others take 8 if they fit, else 16.

    Args:
        scan: planar, of 1 channel, or 3 of 8 bits.
        path: ends in .png; appears only when complete.

    Returns:
        path.

    Raises:
        OutputError: a volume, values that no picture holds (negative, above 65535, not finite, or not
            measured), or the disk is full.
    """
    path = Path(path)
    if path.suffix.lower() != ".png" or not scan.is_planar or scan.channels not in (1, 3):
        raise OutputError(
            f"{path.name}: expected a .png name and a planar scan of 1 or 3 channels; found shape "
            f"{scan.voxels.shape}. Write volumes as .nii.gz."
        )
    plain = scan.scale == Scale() and scan.valid is None and scan.voxels.dtype.kind in "ub"
    values = scan.voxels if plain else np.rint(scan.physical())
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):
        raise OutputError(
            f"{path.name}: a PNG holds 0 to 65535; found {low:g} to {high:g}. Rescale the scan or write .nii.gz."
        )
    wide = high > 255 or scan.voxels.dtype == np.uint16
    if wide and scan.channels == 3:
        raise OutputError(f"{path.name}: a colour PNG holds 0 to 255; found {low:g} to {high:g}. Rescale the scan.")
    pixels = values.astype(np.uint16 if wide else np.uint8)[..., 0].transpose(2, 1, 0)
    picture = Image.fromarray(np.ascontiguousarray(pixels if scan.channels == 3 else pixels[..., 0]))
    with replacing(path, force=True) as part:
        picture.save(part, format="PNG")
    return path


def _check_kind(picture: Image.Image, path: Path, options: ReadOptions) -> None:
    """Refuse what Pillow would read with altered values, before it decodes anything."""
    name = path.name
    if (pages := getattr(picture, "n_frames", 1)) > 1:
        raise DataError(f"{name}: expected one picture; found {pages} pages. Save them one by one.")
    if picture.format == "TIFF":
        bits, kind = _tiff_tag(picture, 258, 1), _tiff_tag(picture, 339, 1)
        if (bits, kind) not in _TIFF_KINDS:
            raise UnreadableScan(f"{name}: TIFF of {bits} bits, sample format {kind}, is not read. Save it as 16 bits.")
    if picture.format == "PNG" and picture.mode not in _GREY:
        with path.open("rb") as stream:
            if stream.read(25)[24] == 16:
                raise DataError(f"{name}: expected 8 bits a colour; found 16. Convert it to grey or to 8 bits.")
    if picture.mode not in (*_GREY, "LA", "PA", "P", "RGB", "RGBA"):
        raise DataError(f"{name}: expected grey or RGB; found {picture.mode}. Convert it first.")


def _tiff_tag(picture: Image.Image, tag: int, default: int) -> int:
    """The first value of a TIFF tag; the default where there is none, or no TIFF."""
    value = getattr(picture, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _decoded(picture: Image.Image, name: str, options: ReadOptions) -> Image.Image:
    """The picture as grey or RGB without transparency; a palette becomes the colours it stands for."""
    if picture.has_transparency_data:
        see_through = picture.mode in _GREY or np.asarray(picture.convert("RGBA"))[..., 3].min() < 255
        if see_through:
            raise DataError(f"{name}: expected opaque pixels; some are transparent. Flatten the picture first.")
        picture = picture.convert("L" if picture.mode == "LA" else "RGB")
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGB")
        red, green, blue = (np.asarray(channel) for channel in picture.split())
        if np.array_equal(red, green) and np.array_equal(red, blue):
            return picture.getchannel(0)
    if picture.mode == "RGB" and not options.colour:
        raise DataError(
            f"{name}: expected one number a pixel; found RGB colour. Pass colour=True (--colour) to read 3 channels."
        )
    return picture


def _as_voxels(values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "c i j k"]:
    """(h, w) or (h, w, 3) or (d, h, w) as (c, i, j, k): i = w, j = h, k = d."""
    if values.ndim == 3 and values.shape[-1] == 3:
        return values.transpose(2, 1, 0)[..., None]
    return values.T[None] if values.ndim == 3 else values.T[None, ..., None]


def _plain_grid(shape: tuple[int, ...]) -> Grid:
    return Grid.from_lps(shape, np.eye(4))


# -- .npz collections ------------------------------------------------------------------------------


def npz_items(path: Path) -> list[tuple[str, str, str]]:
    """Every picture or volume of a MedMNIST-style .npz as (fragment, split, label).

    The file holds `train_images`, `train_labels` and the same for val and test; images are (n, h, w),
    (n, h, w, 3) or (n, d, h, w). Only headers and labels are read.

    Returns:
        fragments such as 'train/12' for `read_npz`; labels as text, '' where there are none, the
        numbers of a multi-label row joined by spaces.

    Raises:
        UnreadableScan: damaged, or not of that layout.
    """
    path = Path(path)
    items: list[tuple[str, str, str]] = []
    for split in _SPLITS:
        shape = _npz_shape(path, f"{split}_images")
        if shape is None:
            continue
        labels = [""] * shape[0]
        label_shape = _npz_shape(path, f"{split}_labels")
        if label_shape is not None and 1 <= len(label_shape) <= 2:
            if label_shape[0] != shape[0]:
                raise UnreadableScan(f"{path.name}: {shape[0]} {split} images but {label_shape[0]} labels.")
            rows = _npz_array(path, f"{split}_labels").reshape(shape[0], -1)
            labels = [" ".join(str(number) for number in row) for row in rows.tolist()]
        items += [(f"{split}/{n}", split, label) for n, label in enumerate(labels)]
    if not items:
        raise UnreadableScan(f"{path.name}: expected train_images, val_images or test_images; found none of them.")
    return items


def read_npz(path: Path, fragment: str, options: ReadOptions = ReadOptions()) -> Scan:
    """One item of a MedMNIST-style .npz, such as 'train/12'; the file read last stays in memory.

    Raises:
        UnreadableScan: damaged, or no such item.
        DataError: colour that was not asked for, too large, or not finite.
    """
    path = Path(path)
    split, _, number = fragment.partition("/")
    name, key = f"{path.name}#{fragment}", f"{split}_images"
    status = path.stat() if path.is_file() and split in _SPLITS else None
    shape = _npz_shape_cached(path, key, status.st_mtime_ns, status.st_size) if status else None
    if status is None or shape is None or not number.isdecimal() or int(number) >= shape[0]:
        raise UnreadableScan(f"{name}: no such item. They are called train/0, train/1, ... up to the number of images.")
    within_cap(shape[1:], name, options)
    values = _npz_images(path, key, status.st_mtime_ns, status.st_size)[int(number)]
    colour = len(shape) == 4 and shape[-1] == 3
    if colour and not options.colour:
        raise DataError(
            f"{name}: expected one number a pixel; found RGB colour. Pass colour=True (--colour) to read 3 channels."
        )
    voxels = finite(_as_voxels(values), Scale(), name, options)
    header = Header(space=0, photometric="RGB" if colour else "MONOCHROME2")
    return Scan(voxels, _plain_grid(voxels.shape[1:]), header=header)


def as_pictures(scans: Sequence[Scan]) -> Shaped[np.ndarray, "n ..."]:
    """Voxels (c, i, j, k) of scans of one shape as `write_npz` takes them: (n, k, j, i, c), without single axes.

    >>> scan = Scan(np.zeros((1, 3, 2, 1)), Grid((3, 2, 1), np.eye(4)))
    >>> as_pictures([scan, scan]).shape
    (2, 2, 3)
    """
    single = ((0,) if scans[0].is_planar else ()) + ((3,) if scans[0].channels == 1 else ())
    return np.stack([np.squeeze(scan.voxels.transpose(3, 2, 1, 0), axis=single) for scan in scans])


def write_npz(path: Path, images: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> Path:
    """Write pictures as a MedMNIST-style .npz.

    Args:
        path: ends in .npz; appears only when complete.
        images: (n, h, w), (n, h, w, 3) or (n, d, h, w) for each of 'train', 'val', 'test' there is.
        labels: (n,) or (n, labels) for each of them.

    Returns:
        path.

    Raises:
        OutputError: splits, shapes or types do not fit, or the disk is full.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz" or not images or set(images) - set(_SPLITS) or set(images) != set(labels):
        raise OutputError(f"{path.name}: expected a .npz name and images and labels of train, val or test alike.")
    arrays: dict[str, np.ndarray] = {}
    for split, pictures in images.items():
        rows = np.asarray(labels[split])
        if pictures.ndim not in (3, 4) or pictures.dtype.kind not in "buif" or rows.dtype.kind not in "buif":
            raise OutputError(f"{path.name}: {split} needs images (n, h, w[, 3]) or (n, d, h, w), and number labels.")
        if len(rows) != len(pictures):
            raise OutputError(f"{path.name}: {split} has {len(pictures)} images but {len(rows)} labels.")
        arrays |= {f"{split}_images": pictures, f"{split}_labels": rows.reshape(len(rows), -1)}
    with replacing(path, force=True) as part, part.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def stream_npz(
    path: Path,
    pictures: Iterable[np.ndarray],
    shape: tuple[int, ...],
    kind: np.dtype,
    labels: Shaped[np.ndarray, "n ..."] | None = None,
) -> Path:
    """Write training pictures as a MedMNIST-style .npz one by one: memory does not grow with their number.

    Args:
        path: ends in .npz; appears only when complete.
        pictures: each (h, w), (h, w, 3) or (d, h, w).
        shape: of all of them together, (n, ...).
        kind: in which they are stored.
        labels: (n,) or (n, labels); None: none are written.

    Returns:
        path.

    Raises:
        OutputError: shapes or types do not fit, or the disk is full.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz" or len(shape) not in (3, 4) or np.dtype(kind).kind not in "buif":
        raise OutputError(
            f"{path.name}: expected a .npz name and pictures (h, w[, 3]) or (d, h, w); found {shape[1:]}."
        )
    if labels is not None and (len(labels) != shape[0] or labels.dtype.kind not in "buif"):
        raise OutputError(f"{path.name}: {shape[0]} pictures need as many labels, as numbers; found {len(labels)}.")
    written = 0
    with replacing(path, force=True) as part, zipfile.ZipFile(part, "w", **_QUICK) as archive:
        with archive.open("train_images.npy", "w", force_zip64=True) as stream:
            stream.write(_npy_header(shape, np.dtype(kind)))
            for written, picture in enumerate(pictures, 1):
                if picture.shape != shape[1:] or written > shape[0]:
                    raise OutputError(f"{path.name}: {shape} announced; picture {written} has shape {picture.shape}.")
                stream.write(np.ascontiguousarray(picture, dtype=kind).data)
        if written < shape[0]:
            raise OutputError(f"{path.name}: {shape[0]} pictures announced; found {written}.")
        if labels is not None:
            with archive.open("train_labels.npy", "w", force_zip64=True) as stream:
                rows = np.ascontiguousarray(labels).reshape(len(labels), -1)
                stream.write(_npy_header(rows.shape, rows.dtype))
                stream.write(rows.data)
    return path


def _npy_header(shape: tuple[int, ...], kind: np.dtype) -> bytes:
    stream = io.BytesIO()
    told = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, told)
    return stream.getvalue()


def _npz_shape(path: Path, key: str) -> tuple[int, ...] | None:
    """The shape of one array in the file, from its header alone; None where there is no such array."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{key}.npy" not in archive.namelist():
                return None
            with archive.open(f"{key}.npy") as stream:
                version = np.lib.format.read_magic(stream)
                read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
                shape, _, dtype = read(stream)
    except (OSError, EOFError, ValueError, SyntaxError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UnreadableScan(f"{path.name}: expected an .npz file; it is damaged. Copy it again.") from error
    if dtype.kind not in "buif" or not shape or ("images" in key and len(shape) not in (3, 4)):
        raise UnreadableScan(f"{path.name}: {key} is no array of pictures or labels; found {shape} of {dtype}.")
    return shape


def _npz_array(path: Path, key: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[key]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise UnreadableScan(f"{path.name}: {key} is damaged or too large. Copy it again.") from error


@lru_cache(maxsize=3)
def _npz_shape_cached(path: Path, key: str, changed: int, size: int) -> tuple[int, ...] | None:
    return _npz_shape(path, key)


@lru_cache(maxsize=3)
def _npz_images(path: Path, key: str, changed: int, size: int) -> np.ndarray:
    """The images of one split; the last three are kept, so that thousands of items cost one reading."""
    images = _npz_array(path, key)
    images.setflags(write=False)
    return images


__all__ = ["as_pictures", "npz_items", "read_npz", "read_raster", "stream_npz", "write_npz", "write_raster"]
