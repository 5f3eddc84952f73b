"""Pictures of scans: contact sheets, and anomaly maps laid over the scan on a fixed, stated scale."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from medgen.io.atomic import replacing
from medgen.report.labels import laid_over, legend, most_marked
from medgen.scan import Scan

NOTICE = "Research use only, not a medical device"
# The colours of a map mean the same in every picture: this z is faint yellow, that z full red.
Z_SHOWN = (3.0, 10.0)
_BACKGROUND, _INK = 16, (225, 225, 225)
_TALL, _NARROW = 160, 320
# Scans so many times brighter or darker than the middle one share no grey window.
_UNALIKE = 4

Picture = UInt8[np.ndarray, "_ _ 3"]
Labels = Integer[np.ndarray, "i j k"]


def views(
    scan: Scan, at: Sequence[int] | None = None, *, window: tuple[float, float] | None = None
) -> list[Float[np.ndarray, "_ _"]]:
    """Axial, coronal and sagittal planes through voxel `at` of the scan turned to RAS (an image: itself), in [0, 1].

    Head and front are up; patient right is on the left of the picture, as radiologists look.
    """
    scan = _upright(scan)
    values = scan.physical()[0]
    low, high = window or _window(values)
    shown = np.clip((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-9), 0, 1)
    return planes(shown, at, planar=scan.is_planar)


def planes(
    values: Shaped[np.ndarray, "i j k"], at: Sequence[int] | None = None, *, planar: bool
) -> list[Shaped[np.ndarray, "_ _"]]:
    """The planes that `views` shows, of any array on an RAS grid."""
    if planar:
        return [values[:, :, 0].T]
    i, j, k = at if at is not None else [n // 2 for n in values.shape]
    turned = [values[:, :, k], values[:, j, :], values[i, :, :]]
    return [plane.T[::-1, ::-1] for plane in turned]


def _window(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(np.percentile(known, 99.7))) if len(known) else (0.0, 1.0)


def _upright(scan: Scan) -> Scan:
    return scan if scan.is_planar else scan.onto(scan.grid.reorient("RAS"), outside=float("nan"))


def _sizes(scan: Scan) -> list[tuple[int, int]]:
    """Picture sizes (w, h) of the three planes, true to millimetres, with the tallest at a fixed height."""
    mm = np.asarray(scan.grid.shape) * np.asarray(scan.grid.spacing)
    pairs = [(mm[0], mm[1])] if scan.is_planar else [(mm[0], mm[1]), (mm[0], mm[2]), (mm[1], mm[2])]
    scale = _TALL / max(height for _, height in pairs)
    return [(max(1, round(w * scale)), max(1, round(h * scale))) for w, h in pairs]


def _tile(gray: Float[np.ndarray, "_ _"], size: tuple[int, int]) -> Picture:
    picture = Image.fromarray((np.clip(gray, 0, 1) * 255).astype(np.uint8))
    return np.repeat(np.asarray(picture.resize(size, Image.Resampling.BICUBIC))[..., None], 3, axis=2)


def _row(tiles: Sequence[Picture]) -> Picture:
    tall = max(tile.shape[0] for tile in tiles)
    padded = [np.pad(tile, ((0, tall - tile.shape[0]), (0, 4), (0, 0)), constant_values=_BACKGROUND) for tile in tiles]
    return np.concatenate(padded, axis=1)


def _stack(rows: Sequence[Picture]) -> Picture:
    wide = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 4), (0, wide - row.shape[1]), (0, 0)), constant_values=_BACKGROUND) for row in rows]
    return np.concatenate(padded, axis=0)


def _captioned(body: Picture, lines: Sequence[str]) -> Image.Image:
    font = ImageFont.load_default(size=13)
    widest = max(int(font.getlength(line)) for line in lines) + 16
    canvas = Image.new("RGB", (max(body.shape[1], widest), body.shape[0] + 18 * len(lines) + 8), (_BACKGROUND,) * 3)
    canvas.paste(Image.fromarray(body), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for n, line in enumerate(lines):
        draw.text((6, body.shape[0] + 4 + 18 * n), line, fill=_INK, font=font)
    return canvas


def saved(picture: Image.Image, path: Path) -> Path:
    """Write a PNG, whole or not at all."""
    with replacing(path, force=True) as part:
        # PIL's optimize=True takes ten times as long for a tenth fewer bytes, and most of the time of scoring a scan.
        picture.save(part, format="PNG", compress_level=3)
    return path


def contact_sheet(
    scans: Sequence[Scan], path: Path, *, title: str, columns: int = 6, masks: Sequence[Scan | None] = ()
) -> Path:
    """One PNG of many scans: volumes as three planes, images as themselves, all in one grey window.

    Where scans are several times brighter than others, as those of no unit may be, each has its own window. Of several
    channels the first is shown, but colour pictures as they are. The title says all of that.

    Args:
        scans: at least one.
        path: a PNG.
        title: what is shown.
        columns: images in a row; of volumes a third.
        masks: a label map of each scan, None where there is none: each scan is shown a second time under its labels,
            beside the first (images) or below it (volumes), through the planes with most of them.
    """
    upright = [_upright(scan) for scan in scans]
    windows, own = _windows(upright)
    shown = [
        None if mask is None else mask.onto(scan.grid, outside=0).voxels[0].astype(np.int32)
        for scan, mask in zip(upright, masks or [None] * len(scans), strict=True)
    ]
    paired = any(labels is not None for labels in shown)
    tiles = [
        _shown(scan, window, labels, twice=paired) for scan, window, labels in zip(upright, windows, shown, strict=True)
    ]
    across = columns if upright[0].is_planar else columns // 3
    across = max(1, across // 2 if upright[0].is_planar and paired else across)
    body = _stack([_row(tiles[n : n + across]) for n in range(0, len(tiles), across)])
    if paired:
        names = sorted({int(one) for labels in shown if labels is not None for one in np.unique(labels) if one > 0})
        body = _stack([body, legend(names, max(_NARROW, body.shape[1]))])
    return saved(_captioned(body, [title, *_remarks(upright[0], own), NOTICE]), path)


def _remarks(scan: Scan, own: bool) -> list[str]:
    """What a reader of the sheet would otherwise take for granted."""
    said = []
    if scan.channels > 1 and not _is_colour(scan):
        name = f" ({scan.header.channels[0]})" if len(scan.header.channels) == scan.channels else ""
        said.append(f"shown: channel 1 of {scan.channels}{name}")
    if own:
        said.append("grey values: a window for each scan")
    return ["; ".join(said)] if said else []


def _is_colour(scan: Scan) -> bool:
    return scan.is_planar and scan.channels == 3 and not scan.header.channels


def _windows(scans: Sequence[Scan]) -> tuple[list[tuple[float, float]], bool]:
    """The grey window of each scan, and whether it is its own: one for all shows who is brighter, if anything."""
    limits = np.asarray([_window(scan.physical()[: 3 if _is_colour(scan) else 1]) for scan in scans])
    low, high = np.median(limits, axis=0).tolist()
    widths = limits[:, 1] - limits[:, 0]
    if widths.max() > _UNALIKE * max(high - low, 1e-9) or 0 < widths.min() * _UNALIKE < high - low:
        return [(first, last) for first, last in limits.tolist()], True
    return [(low, high)] * len(scans), False


def _shown(scan: Scan, window: tuple[float, float], labels: Labels | None, *, twice: bool) -> Picture:
    """A scan turned to RAS; where `twice`, under its labels, too, or beside an empty place where it has none."""
    at = None if labels is None else most_marked(labels)
    sizes = _sizes(scan)
    if _is_colour(scan):
        low, high = window
        values = np.nan_to_num((scan.physical()[:, :, :, 0] - low) / max(high - low, 1e-9))
        plain = [np.stack([_tile(one.T, sizes[0])[..., 0] for one in values], axis=2)]
    else:
        plain = [_tile(v, s) for v, s in zip(views(scan, at, window=window), sizes, strict=True)]
    if not twice:
        return _row(plain)
    if labels is None:
        second = [np.full_like(tile, _BACKGROUND) for tile in plain]
    else:
        over = planes(labels, at, planar=scan.is_planar)
        second = [laid_over(tile, plane) for tile, plane in zip(plain, over, strict=True)]
    return (
        np.concatenate([_row(plain), _row(second)], axis=1) if scan.is_planar else _stack([_row(plain), _row(second)])
    )


def overlay(scan: Scan, z_map: Scan, path: Path, *, title: str) -> Path:
    """The scan, and beside it the scan under its anomaly map, through the voxel with the highest z.

    Args:
        scan: the source scan.
        z_map: healthy spreads above the healthy mean, on the same grid; NaN was not scored.
        path: a PNG.
        title: case, score and p-value.
    """
    upright, upright_map = _upright(scan), _upright(z_map)
    z = upright_map.voxels[0]
    at = [int(n) for n in np.unravel_index(np.nan_to_num(z, nan=-np.inf).argmax(), z.shape)]
    sizes = _sizes(upright)
    plain = [_tile(v, s) for v, s in zip(views(upright, at), sizes, strict=True)]
    maps = planes(np.nan_to_num(z, nan=0.0), at, planar=scan.is_planar)
    coloured = [_coloured(tile, plane, size) for tile, plane, size in zip(plain, maps, sizes, strict=True)]
    body = (
        np.concatenate([_row(plain), _row(coloured)], axis=1)
        if scan.is_planar
        else _stack([_row(plain), _row(coloured)])
    )
    legend = np.repeat(np.linspace(*Z_SHOWN, 160, dtype=np.float32)[None], 10, axis=0)
    bar = _coloured(np.full((10, 160, 3), _BACKGROUND, np.uint8), legend, (160, 10))
    low, high = Z_SHOWN
    says = f"colour: z from {low:g} (faint) to {high:g} (full) healthy standard deviations, the same in every picture"
    return saved(_captioned(_stack([body, bar]), [title, says, NOTICE]), path)


def _coloured(tile: Picture, z: Float[np.ndarray, "_ _"], size: tuple[int, int]) -> Picture:
    """`tile` tinted from yellow to red where z is above the shown range's start."""
    resized = np.asarray(Image.fromarray(z.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    low, high = Z_SHOWN
    strength = np.clip((resized - low) / (high - low), 0, 1)[..., None]
    colour = np.concatenate([np.full_like(strength, 255), 220 * (1 - strength), 20 + 0 * strength], axis=2)
    alpha = np.where(resized[..., None] > low, 0.35 + 0.5 * strength, 0.0)
    return (tile * (1 - alpha) + colour * alpha).astype(np.uint8)


__all__ = ["NOTICE", "Z_SHOWN", "contact_sheet", "overlay", "planes", "saved", "views"]
