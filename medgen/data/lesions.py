"""Lesions painted into healthy scans, to measure detection where nobody drew one: exact masks, known kinds.

Kinds are split, here, for good. Those of `KINDS_A`, drawn with shapes of medgen's own, may train a detector and choose
its settings. Those of `KINDS_B` only test. `medgen evaluate` refuses kinds, or masks, that a bundle was trained with.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from medgen import io
from medgen.data.painting import Field, indices, length
from medgen.data.recipe import foreground
from medgen.data.textures import local_moments, texture, warped_about
from medgen.errors import DataError
from medgen.grid import Grid
from medgen.log import track
from medgen.scan import Scale, Scan

Kind = Literal["hyper", "hypo", "scaled", "iso", "warp", "blur", "missing-slice", "transplant"]
Size = Literal["small", "medium", "large"]
Contrast = Literal["low", "middle", "high"]
Voxels = Bool[np.ndarray, "i j k"]

KINDS_A = ("cut-paste", "blob", "noise", "deformation")
KINDS_B: tuple[Kind, ...] = get_args(Kind)
SIZES: dict[Size, tuple[float, float]] = {"small": (2.0, 7.4), "medium": (7.4, 27.0), "large": (27.0, 100.0)}
# Part of the way to the brightest or darkest tissue; what is left of a value; part of the texture that is another;
# part of a radius by which tissue moves; width of the blur in voxels; part of the signal that is lost; opacity.
STRENGTHS: dict[Kind, tuple[float, float, float]] = {
    "hyper": (0.25, 0.5, 0.75),
    "hypo": (0.25, 0.5, 0.75),
    "scaled": (0.8, 0.6, 0.4),
    "iso": (1 / 3, 2 / 3, 1.0),
    "warp": (0.15, 0.3, 0.45),
    "blur": (0.7, 1.4, 2.8),
    "missing-slice": (1 / 3, 2 / 3, 1.0),
    "transplant": (1 / 3, 2 / 3, 1.0),
}
_LARGEST_ML = 400.0
# Part of a body's volume that shapes of medgen's own fill, about as real strokes do in a brain.
_SHARES: dict[Size, float] = {"small": 0.003, "medium": 0.01, "large": 0.035}
# The width of a lesion's edge in voxels; a change below this part of the scan's range is rounding.
_EDGE, _ROUNDING = 0.7, 1e-3


@dataclass(frozen=True)
class Lesion:
    """What to paint.

    Args:
        kind: one of `KINDS_B`.
        size: millilitres as in `SIZES`; for shapes of medgen's own a part of the body.
        contrast: how strongly it differs, as in `STRENGTHS`.
        seed: decides shape, place and texture.
    """

    kind: Kind
    size: Size = "medium"
    contrast: Contrast = "high"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS_B), ("size", tuple(SIZES)), ("contrast", get_args(Contrast))):
            if getattr(self, name) not in known:
                raise DataError(f"A lesion's {name} is one of {', '.join(known)}; found {getattr(self, name)!r}.")

    def painted(self, scan: Scan, library: Sequence["Mask"] = ()) -> tuple[Scan, Scan, str]:
        """The scan with this lesion, its mask, and the sha256 of the drawn mask it came from ('' for an own shape).

        Args:
            scan: a healthy scan.
            library: drawn masks to choose from by size; empty for a shape of medgen's own.

        Raises:
            DataError: no mask of this size lies mostly inside the body.
        """
        rng, body = np.random.default_rng(self.seed), filled_body(scan)
        if library:
            shape, came_from = _chosen(library, scan.grid, body, self.size, rng)
        else:
            shape, came_from = random_shape(scan.grid, body, self.size, rng), ""
        ill, mask = paint(scan, shape, kind=self.kind, contrast=self.contrast, rng=rng)
        return ill, mask, came_from


def paint(scan: Scan, mask: Voxels, *, kind: Kind, contrast: Contrast, rng: np.random.Generator) -> tuple[Scan, Scan]:
    """The scan with a lesion where `mask` lies inside the body, and the exact mask of it.

    new = old + w (lesion - old), w the mask smoothed by 0.7 voxel, and 0 outside the mask. The returned mask holds the
    voxels whose physical value changed by more than a thousandth of the scan's range, and no other voxel changed at
    all; values stay within that range.

        hyper, hypo     part of the way to the 99th or the 1st percentile of the body, with the scan's own texture
        scaled          value above the scan's lowest times a factor, 0.4 at high contrast
        iso             local mean and spread kept, the texture between them replaced by one with random phases
        warp            tissue swells or shrinks about the middle of each part of the mask
        blur            Gaussian
        missing-slice   signal is lost in whole slices through the mask, as many as have its volume
        transplant      tissue from elsewhere in the same body

    Args:
        scan: images or volumes, any unit; every channel gets the lesion.
        mask: where.
        kind: what.
        contrast: how strongly, as in `STRENGTHS`.
        rng: texture, direction, place of origin.

    Raises:
        DataError: nothing of the mask lies inside the body, or nothing changed there.
    """
    body = filled_body(scan)
    shape = _slices(mask & body, body) if kind == "missing-slice" else mask & body
    if not shape.any():
        raise DataError("No voxel of the mask lies inside the body, so no lesion can be painted. Choose another mask.")
    values = scan.physical().astype(np.float64)
    known = np.nan_to_num(values, nan=float(np.nanmin(values)))
    strength = STRENGTHS[kind][get_args(Contrast).index(contrast)]
    weight = shape.astype(np.float64) if kind == "missing-slice" else _edged(shape)
    state = rng.bit_generator.state
    new = []
    for channel in known:
        rng.bit_generator.state = state  # channels are of one body: what is random is the same in each
        lesion = _lesion(kind, strength, channel, shape, body, rng)
        low, high = channel.min(), channel.max()
        new.append(np.clip(channel + weight * (lesion - channel), low, high))
    return _exact(scan, values, np.stack(new))


def _exact(scan: Scan, old: np.ndarray, new: np.ndarray) -> tuple[Scan, Scan]:
    """The scan with those changes that are more than rounding, and where they are."""
    kind = scan.voxels.dtype
    stored = np.asarray(scan.scale.stored(new))
    stored = stored.round().astype(kind) if kind.kind in "iub" else stored.astype(kind)
    span = np.nanmax(old, axis=(1, 2, 3), keepdims=True) - np.nanmin(old, axis=(1, 2, 3), keepdims=True)
    change = np.abs(scan.scale.physical(stored) - old)
    changed = (np.nan_to_num(change, nan=0.0) > _ROUNDING * span).any(axis=0)
    if not changed.any():
        raise DataError("The lesion changes no voxel by more than rounding. Choose another mask, kind or contrast.")
    mask = replace(
        scan.with_header(synthetic=True, padding=None, channels=()),
        voxels=changed[None].astype(np.uint8), is_label=True, valid=None, scale=Scale(),
    )  # fmt: skip
    return scan.with_voxels(np.where(changed, stored, scan.voxels)).with_header(synthetic=True), mask


def _lesion(
    kind: Kind, strength: float, values: Field, shape: Voxels, body: Voxels, rng: np.random.Generator
) -> Float[np.ndarray, "i j k"]:
    """What one channel (physical) would be, were all of it lesion."""
    lowest = float(values.min())
    match kind:
        case "hyper" | "hypo":
            level = float(np.percentile(values[body], 99 if kind == "hyper" else 1))
            _, spread = local_moments(values, body)
            towards = level + 0.5 * texture(values, body, rng) * spread
            return values + strength * (towards - values)
        case "scaled":
            return lowest + strength * (values - lowest)
        case "iso":
            mean, spread = local_moments(values, body)
            return values + strength * (mean + spread * texture(values, body, rng) - values)
        case "warp":
            return warped_about(values, shape, strength * rng.choice([-1, 1]))
        case "blur":
            from scipy.ndimage import gaussian_filter

            return gaussian_filter(values, [strength if n > 1 else 0 for n in values.shape], mode="nearest")
        case "missing-slice":
            return values + strength * (lowest - values)
        case "transplant":
            return values + strength * (_moved(values, shape, body, rng) - values)


def _moved(values: Field, shape: Voxels, body: Voxels, rng: np.random.Generator) -> Float[np.ndarray, "i j k"]:
    """The values shifted so that other tissue comes to lie in the shape: of twenty shifts the one with most of it."""
    places, middle = np.argwhere(body), np.argwhere(shape).mean(0)
    inside, best, most = np.argwhere(shape), np.zeros(3, dtype=int), -1.0
    for place in places[rng.integers(len(places), size=20)]:
        shift = np.round(place - middle).astype(int)
        source = inside + shift
        fits = ((source >= 0) & (source < values.shape)).all(1)
        tissue = np.zeros(len(source), dtype=bool)
        tissue[fits] = body[tuple(source[fits].T)] & ~shape[tuple(source[fits].T)]
        if tissue.mean() > most:
            best, most = shift, float(tissue.mean())
    return np.roll(values, [-int(s) for s in best], axis=(0, 1, 2))


def _edged(shape: Voxels) -> Float[np.ndarray, "i j k"]:
    from scipy.ndimage import gaussian_filter

    width = [_EDGE if n > 1 else 0 for n in shape.shape]
    return np.where(shape, gaussian_filter(shape.astype(np.float64), width), 0.0)


def _slices(shape: Voxels, body: Voxels) -> Voxels:
    """The body's slices about the middle of the shape, as many as hold its voxels; rows of an image."""
    axis = 2 if shape.shape[2] > 1 else 1
    others = tuple(n for n in range(3) if n != axis)
    held, area = shape.sum(others), body.sum(others)
    if not held.any():
        return shape
    middle = float(np.average(np.arange(len(held)), weights=held))
    count = max(1, round(held.sum() / max(1, area[round(middle)])))
    first = int(np.clip(round(middle - (count - 1) / 2), 0, len(held) - count))
    chosen = np.zeros(len(held), dtype=bool)
    chosen[first : first + count] = True
    return body & np.expand_dims(chosen, others)


# -- shapes --------------------------------------------------------------------------------------------


def filled_body(scan: Scan) -> Voxels:
    """Where the body is, with whatever dark places it encloses.

    Raises:
        DataError: there is none.
    """
    from scipy.ndimage import binary_fill_holes

    body = foreground(scan)
    # In three dimensions an image one voxel thick encloses nothing.
    filled = np.asarray(binary_fill_holes(body[..., 0] if scan.is_planar else body)).reshape(body.shape)
    if not filled.any():
        raise DataError("The scan has no foreground, so no lesion can be painted. Check that it holds an image.")
    return filled if scan.valid is None else filled & scan.valid


def random_shape(grid: Grid, body: Voxels, size: Size, rng: np.random.Generator) -> Voxels:
    """A smooth blob of medgen's own inside the body: distance from a place in it, made uneven by smooth noise.

    It fills a fixed part of the body: 0.3, 1 or 3.5 per cent of a volume, and that to the power of 2/3 of an image.
    """
    from scipy.ndimage import gaussian_filter

    share = _SHARES[size] ** (2 / 3 if grid.shape[2] == 1 else 1)
    count = max(1, round(share * int(body.sum())))
    places = np.argwhere(body)
    centre = places[rng.integers(len(places))]
    away = length((indices(grid.shape) - centre) * grid.spacing)
    # As wide as the blob itself would be as a ball.
    width = (count / 4) ** (1 / (2 if grid.shape[2] == 1 else 3))
    noise = gaussian_filter(rng.normal(size=grid.shape), [width if n > 1 else 0 for n in grid.shape], mode="wrap")
    uneven = away * np.exp(0.5 * (noise - noise.mean()) / max(float(noise.std()), 1e-12))
    nearest = np.argsort(uneven[body], kind="stable")[:count]
    shape = np.zeros(grid.shape, dtype=bool)
    shape[tuple(places[nearest].T)] = True
    return shape


@dataclass(frozen=True)
class Mask:
    """A drawn mask on disk.

    Args:
        name: its file's.
        path: where.
        millilitres: volume.
        sha256: of place and voxels, whatever the file is called and however it is packed.
    """

    name: str
    path: str
    millilitres: float
    sha256: str


def mask_library(folder: str | Path) -> tuple[Mask, ...]:
    """The drawn masks of a folder by name; empty ones, and those above 400 mL, which are faults, left out.

    Raises:
        DataError: there is none.
    """
    sources = io.find(folder).sources
    found = [drawn_mask(source.path) for source in track(sources, "Reading masks")]
    kept = sorted((one for one in found if 0 < one.millilitres <= _LARGEST_ML), key=lambda one: one.name)
    if not kept:
        raise DataError(f"{Path(folder).name}: expected masks of lesions; none of {len(found)} holds 0 to 400 mL.")
    return tuple(kept)


def drawn_mask(path: str) -> Mask:
    """A drawn mask with its volume and hash."""
    scan = io.read(path)
    drawn = (scan.voxels > 0).any(axis=0)
    digest = hashlib.sha256(repr((scan.grid.shape, scan.grid.affine.round(3).tolist())).encode())
    digest.update(np.packbits(drawn).tobytes())
    return Mask(Path(path).name, path, float(drawn.sum()) * scan.grid.voxel_volume / 1000, digest.hexdigest())


def place(mask: Scan, grid: Grid, body: Voxels) -> Voxels:
    """A drawn mask on another grid, by world coordinates, and only what lies inside the body there."""
    drawn = replace(mask, voxels=(mask.voxels > 0).any(axis=0, keepdims=True).astype(np.uint8), is_label=True)
    return (drawn.onto(grid, outside=0).voxels[0] > 0) & body


def _chosen(
    library: Sequence[Mask], grid: Grid, body: Voxels, size: Size, rng: np.random.Generator
) -> tuple[Voxels, str]:
    """A mask of the size, most of which lies inside the body, in an order that the seed decides."""
    low, high = SIZES[size]
    fitting = [one for one in library if low <= one.millilitres < high]
    for n in rng.permutation(len(fitting))[:50]:
        shape = place(io.read(fitting[n].path), grid, body)
        held = shape.sum() * grid.voxel_volume / 1000
        if held >= 0.5 * fitting[n].millilitres and held >= 0.5 * low:
            return shape, fitting[n].sha256
    raise DataError(
        f"None of {len(fitting)} masks of {low:g} to {high:g} mL lies mostly inside the body of this scan. The masks "
        "and the scans must share a space, such as MNI; or paint shapes of medgen's own."
    )


__all__ = [
    "KINDS_A", "KINDS_B", "SIZES", "STRENGTHS", "Contrast", "Kind", "Lesion", "Mask", "Size", "drawn_mask",
    "filled_body", "mask_library", "paint", "place", "random_shape",
]  # fmt: skip
