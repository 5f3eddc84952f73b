"""Boxes of positions: tiles whose cores cover a scan, and random patches whose cores count without bias."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A box of positions with the core that counts.

    Args:
        origin, size: of the box, margins included.
        core: (first, last + 1) along each axis, in the whole's positions.
    """

    origin: tuple[int, ...]
    size: tuple[int, ...]
    core: tuple[tuple[int, int], ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """The box in (c, *whole)."""
        return (slice(None), *(slice(o, o + n) for o, n in zip(self.origin, self.size, strict=True)))

    @property
    def core_in_whole(self) -> tuple[slice, ...]:
        """The core in (b, c, *whole)."""
        return (slice(None), slice(None), *(slice(first, last) for first, last in self.core))

    @property
    def core_in_window(self) -> tuple[slice, ...]:
        """The core in (b, c, *box)."""
        inside = (slice(f - o, e - o) for (f, e), o in zip(self.core, self.origin, strict=True))
        return (slice(None), slice(None), *inside)


def tiles(space: tuple[int, ...], tile: int, reach: int) -> Iterator[Window]:
    """Boxes whose cores cover `space` once; margins of `reach` end at the border of the whole.

    Where a margin would leave the scan there is none: networks pad there as they do for the whole scan.
    """
    for first in product(*[range(0, n, tile) for n in space]):
        core = tuple((f, min(f + tile, n)) for f, n in zip(first, space, strict=True))
        begin = tuple(max(0, f - reach) for f, _ in core)
        end = tuple(min(n, e + reach) for (_, e), n in zip(core, space, strict=True))
        yield Window(begin, tuple(e - b for b, e in zip(begin, end, strict=True)), core)


def drawn_window(space: tuple[int, ...], size: tuple[int, ...], reach: int) -> tuple[Window, Float[Tensor, "1 *box"]]:
    """A random box, and what each of its positions (1, *box) counts for.

    A margin counts nothing, a core one over the chance of lying in a core, so that sums have no bias.
    """
    origin, core, weights = [], [], torch.ones(())
    for n, count in zip(space, size, strict=True):
        margin = reach if count < n else 0
        starts = torch.arange(-margin, n - count + margin + 1).clamp(0, n - count)
        firsts = torch.where(starts == 0, 0, starts + margin)
        lasts = torch.where(starts == n - count, n, starts + count - margin)
        at = torch.arange(n)
        chance = ((at >= firsts[:, None]) & (at < lasts[:, None])).double().mean(0)
        pick = int(torch.randint(len(starts), ()))
        start, first, last = int(starts[pick]), int(firsts[pick]), int(lasts[pick])
        line = torch.zeros(count, dtype=torch.float64)
        line[first - start : last - start] = 1 / chance[first:last]
        weights = weights[..., None] * line
        origin.append(start)
        core.append((first, last))
    return Window(tuple(origin), tuple(size), tuple(core)), weights[None].float()


def cut(values: Tensor | None, window: Window) -> Tensor | None:
    """A box of (b, c, *whole)."""
    return None if values is None else values[(slice(None), *window.index)]


__all__ = ["Window", "cut", "drawn_window", "tiles"]
