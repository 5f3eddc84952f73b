"""A picture of numbers over a quantity that doubles: lines with intervals."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from medgen.report.pictures import NOTICE, saved

_WIDE, _TALL, _MARGIN, _LINE = 520, 360, 56, 18
_BACKGROUND, _FRAME, _INK = (16, 16, 16), (90, 90, 90), (225, 225, 225)
# Okabe & Ito 2008: told apart by readers with any colour vision. Further lines begin again.
_COLOURS = (
    (200, 200, 200), (230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0),
)  # fmt: skip

# At this quantity, this number, from here to there.
Point = tuple[float, float, float, float]


def curves(series: Mapping[str, Sequence[Point]], path: Path, *, title: str, axes: tuple[str, str]) -> Path:
    """Draw a line for each series, with its intervals, over a logarithmic axis.

    Args:
        series: by name: (quantity above 0, number, both ends of its interval), in the order of quantities.
        path: a PNG.
        title: what is shown.
        axes: what is across, and what is up.
    """
    font = ImageFont.load_default(size=13)
    points = [point for several in series.values() for point in several]
    across = sorted({point[0] for point in points}) or [1.0]
    lines = [title, f"across: {axes[0]}, logarithmic; up: {axes[1]}; bars: 95 % intervals", NOTICE]
    beside = _MARGIN + _WIDE + 16
    widths = [beside + 60 + font.getlength(name) for name in series] + [16 + font.getlength(line) for line in lines]
    tall = _TALL + 2 * _MARGIN + _LINE * len(lines)
    picture = Image.new("RGB", (int(max(widths)), tall), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    low, high = min([p[2] for p in points] or [0.0]), max([p[3] for p in points] or [1.0])
    span = max(high - low, 1e-6)
    low, high = low - 0.06 * span, high + 0.06 * span

    def place(quantity: float, number: float, aside: float = 0) -> tuple[float, float]:
        first, last = log(across[0]), log(across[-1])
        share = (log(quantity) - first) / (last - first) if last > first else 0.5
        right = _MARGIN + 24 + share * (_WIDE - 48) + aside
        return right, _MARGIN / 2 + _TALL * (1 - (number - low) / (high - low))

    draw.rectangle((_MARGIN, _MARGIN / 2, _MARGIN + _WIDE, _MARGIN / 2 + _TALL), outline=_FRAME)
    for n in range(5):
        number = low + (high - low) * n / 4
        draw.text((6, place(across[0], number)[1] - 8), f"{number:.3f}", fill=_INK, font=font)
    for quantity in across:
        draw.text((place(quantity, low)[0] - 8, _MARGIN / 2 + _TALL + 4), f"{quantity:g}", fill=_INK, font=font)
    for n, (name, several) in enumerate(series.items()):
        colour, aside = _COLOURS[n % len(_COLOURS)], 4 * (n - (len(series) - 1) / 2)
        draw.line([place(point[0], point[1], aside) for point in several], fill=colour, width=2)
        for quantity, number, start, end in several:
            right, up = place(quantity, number, aside)
            draw.line((right, place(quantity, start)[1], right, place(quantity, end)[1]), fill=colour)
            draw.ellipse((right - 3, up - 3, right + 3, up + 3), fill=colour)
        draw.line((beside, _MARGIN + _LINE * n, beside + 18, _MARGIN + _LINE * n), fill=colour, width=3)
        draw.text((beside + 26, _MARGIN + _LINE * n - 8), name, fill=_INK, font=font)
    for n, line in enumerate(lines):
        draw.text((6, _TALL + 1.2 * _MARGIN + _LINE * n), line, fill=_INK, font=font)
    return saved(picture, path)


__all__ = ["curves"]
