"""Label maps in colour, laid over scans: a label has the same colour in every picture."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

# Okabe & Ito 2008: told apart by readers with any colour vision.
_FIRST = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178))
_FILL, _LINE = 0.3, 20

Picture = UInt8[np.ndarray, "_ _ 3"]


def colour_of(label: int) -> tuple[int, int, int]:
    """The colour of a label, 1 or more; beyond the seventh, hues a golden section of the circle apart.

    >>> colour_of(1), colour_of(1) == colour_of(8)
    ((230, 159, 0), False)
    """
    if label <= len(_FIRST):
        return _FIRST[label - 1]
    red, green, blue = hsv_to_rgb(label * 0.618034 % 1, 0.55 + 0.4 * (label % 2), 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def most_marked(labels: Integer[np.ndarray, "i j k"]) -> list[int] | None:
    """Along each axis the plane that shows most of the labels, large and small alike; None where nothing is marked.

    A plane's worth is the sum over labels of its area there, as a part of the label's largest in any plane.
    """
    places = np.nonzero(labels > 0)
    if not len(places[0]):
        return None
    names, which = np.unique(labels[places], return_inverse=True)
    best = []
    for axis, at in enumerate(places):
        planes = labels.shape[axis]
        areas = np.bincount(at * len(names) + which, minlength=planes * len(names)).reshape(planes, len(names))
        best.append(int((areas / areas.max(0)).sum(1).argmax()))
    return best


def laid_over(tile: Picture, labels: Integer[np.ndarray, "_ _"]) -> Picture:
    """`tile` under a label map of the same field of view: labels filled faintly, their borders drawn."""
    shown = _resized(labels, (tile.shape[1], tile.shape[0]))
    edge = np.zeros(shown.shape, bool)
    for axis in (0, 1):
        changes = np.diff(shown, axis=axis) != 0
        # The border is a label's own outermost pixels, on both sides where two labels meet.
        edge |= np.pad(changes, [(0, int(axis == n)) for n in (0, 1)])
        edge |= np.pad(changes, [(int(axis == n), 0) for n in (0, 1)])
    names = np.unique(shown)
    palette = np.asarray([colour_of(int(one)) if one else (0, 0, 0) for one in names])
    colour = palette[np.searchsorted(names, shown)]
    share = np.where(shown > 0, np.where(edge, 1.0, _FILL), 0.0)[..., None]
    return (tile * (1 - share) + colour * share).astype(np.uint8)


def _resized(labels: Integer[np.ndarray, "_ _"], size: tuple[int, int]) -> Integer[np.ndarray, "_ _"]:
    """The label that covers most of each pixel, with smooth borders where pixels are finer than voxels."""
    across, down = size[0] / labels.shape[1], size[1] / labels.shape[0]
    finer = min(across, down) >= 1
    how = Image.Resampling.BILINEAR if finer else Image.Resampling.BOX
    names = [int(one) for one in np.unique(labels) if one]
    shares: list[Float[np.ndarray, "_ _"]] = []
    for name in names:
        inside = Image.fromarray((labels == name).astype(np.float32))
        shares.append(np.asarray(inside.resize(size, how)))
    if not shares:
        return np.zeros((size[1], size[0]), np.int32)
    every = np.stack(shares)
    # A voxel smaller than a pixel, spread over four at worst, is still seen.
    least = 0.5 if finer else 0.24 * min(1, across) * min(1, down)
    return np.where(every.sum(0) > least, np.asarray(names, np.int32)[every.argmax(0)], 0)


def legend(labels: Sequence[int], wide: int) -> Picture:
    """A strip with the colour of each label; of those that do not fit, how many they are."""
    font = ImageFont.load_default(size=13)
    strip = Image.new("RGB", (wide, _LINE), (16, 16, 16))
    draw = ImageDraw.Draw(strip)
    words, at = "masks, label:", 6.0
    draw.text((at, 2), words, fill=(225, 225, 225), font=font)
    at += font.getlength(words) + 10
    for n, one in enumerate(labels):
        room = 18 + font.getlength(str(one)) + 12
        rest = f"and {len(labels) - n} more"
        last = n == len(labels) - 1
        if at + room + (0 if last else font.getlength(rest)) > wide:
            draw.text((at, 2), rest, fill=(225, 225, 225), font=font)
            break
        draw.rectangle((at, 4, at + 12, 16), fill=colour_of(one))
        draw.text((at + 18, 2), str(one), fill=(225, 225, 225), font=font)
        at += room
    return np.asarray(strip)


__all__ = ["colour_of", "laid_over", "legend", "most_marked"]
