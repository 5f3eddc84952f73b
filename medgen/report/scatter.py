"""A picture of points in a plane, coloured by class."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from medgen.report.pictures import NOTICE, saved

_SIDE, _MARGIN, _DOT, _LINE = 480, 24, 4, 18
_BACKGROUND, _FRAME, _INK = (16, 16, 16), (90, 90, 90), (225, 225, 225)
# Okabe & Ito 2008: told apart by readers with any colour vision. Further classes begin again.
_COLOURS = (
    (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178),
    (200, 200, 200),
)  # fmt: skip


def scatter(
    points: Float[np.ndarray, "n 2"], labels: Sequence[str], path: Path, *, title: str, axes: tuple[str, str]
) -> Path:
    """Draw points with a legend of their labels, both axes at one scale.

    Args:
        points: where; up is more of the second number.
        labels: of each point, '' where none is known.
        path: a PNG.
        title: what is shown.
        axes: what the numbers are.
    """
    names = sorted(set(labels))
    font = ImageFont.load_default(size=13)
    lines = [title, f"across: {axes[0]}; up: {axes[1]}; one scale for both", NOTICE]
    counts = Counter(labels)
    legend = [f"{name or 'no label'} ({counts[name]})" for name in names]
    beside = 2 * _MARGIN + _SIDE
    widths = [beside + 40 + font.getlength(one) for one in legend] + [16 + font.getlength(line) for line in lines]
    wide = int(max(widths))
    tall = _SIDE + 2 * _MARGIN + _LINE * len(lines) + 8
    picture = Image.new("RGB", (wide, max(tall, _MARGIN + _LINE * len(legend))), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((_MARGIN, _MARGIN, _MARGIN + _SIDE, _MARGIN + _SIDE), outline=_FRAME)
    centre = (points.min(0) + points.max(0)) / 2 if len(points) else np.zeros(2)
    reach = 1.06 * float(np.abs(points - centre).max()) if len(points) else 1.0
    at = (points - centre) / max(reach, 1e-12) * np.asarray([1, -1]) * _SIDE / 2 + _MARGIN + _SIDE / 2
    for (across, down), label in zip(at.tolist(), labels, strict=True):
        colour = _COLOURS[names.index(label) % len(_COLOURS)]
        draw.ellipse((across - _DOT, down - _DOT, across + _DOT, down + _DOT), fill=colour, outline=_BACKGROUND)
    for n, one in enumerate(legend):
        left, top = beside, _MARGIN + _LINE * n
        draw.ellipse((left, top + 4, left + 2 * _DOT, top + 4 + 2 * _DOT), fill=_COLOURS[n % len(_COLOURS)])
        draw.text((left + 16, top), one, fill=_INK, font=font)
    for n, line in enumerate(lines):
        draw.text((6, _SIDE + 2 * _MARGIN + _LINE * n), line, fill=_INK, font=font)
    return saved(picture, path)


__all__ = ["scatter"]
