"""Pictures that exist already, beside and below each other."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from medgen.report.pictures import NOTICE, saved

_BACKGROUND, _INK, _GAP, _LINE = (16, 16, 16), (225, 225, 225), 12, 18


def sheet(pictures: Sequence[Path], path: Path, *, title: str, width: int = 1600) -> Path:
    """One PNG of many, in reading order, as many in a row as fit.

    Args:
        pictures: PNG files, at least one.
        path: a PNG.
        title: what is shown.
        width: pixels that rows keep to, unless one picture is wider.
    """
    tiles = []
    for picture in pictures:
        with Image.open(picture) as opened:
            tiles.append(opened.convert("RGB"))
    wide, tall = (max(tile.size[axis] for tile in tiles) + _GAP for axis in (0, 1))
    across = max(1, min(len(tiles), width // wide))
    rows = -(-len(tiles) // across)
    canvas = Image.new("RGB", (max(across * wide, width // 2), rows * tall + 2 * _LINE + 8), _BACKGROUND)
    for number, tile in enumerate(tiles):
        canvas.paste(tile, (number % across * wide, number // across * tall))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for number, line in enumerate((title, NOTICE)):
        draw.text((6, rows * tall + 4 + number * _LINE), line, fill=_INK, font=font)
    return saved(canvas, path)


__all__ = ["sheet"]
