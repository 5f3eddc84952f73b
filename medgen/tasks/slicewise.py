"""Volumes through models of images: slice by slice, along one plane or three, with one map of the volume.

Every slice is scored, whatever it shows (a slice that was lost shows nothing), in batches that fit into memory. What
is found goes back to where the slice was cut, and a voxel's value is the mean of those of the planes that scored it.
The volume's own number comes of slices such as were learned from: what a score says of an empty one means little.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medgen.data.dataset import Batch, framed, shows_body
from medgen.data.recipe import Place, Slices
from medgen.scores.base import Found

# Pixels examined at a time.
_PIXELS = 2**18


def in_slices(score: Callable[[Batch], Found], batch: Batch, slices: Slices) -> Found:
    """What a score of images finds in volumes: the mean of its values over slices that show the body, and one map.

    Args:
        score: asked about batches of slices (n, c, *frame); the numbers of one must not depend on the others.
        batch: prepared volumes (b, c, i, j, k), and what is known of them.
        slices: how volumes are cut, the recipe's.
    """
    values, maps = [], []
    for one in batch.each():
        rows, drawn = slicewise(score, one, slices)
        shown = torch.tensor(shows_body(one.x[0], None if one.real is None else one.real[0], slices)).to(rows.device)
        values.append(rows[shown].mean(0) if shown.any() else rows.nanmean(0))
        maps += [] if drawn is None else [drawn]
    return Found(torch.stack(values), torch.stack(maps) if maps else None)


def slicewise(
    score: Callable[[Batch], Found], batch: Batch, slices: Slices
) -> tuple[Float[Tensor, "slices numbers"], Float[Tensor, "i j k"] | None]:
    """What a score of images finds in each slice of one volume, and the volume's map.

    Args:
        score: asked about batches of slices (n, c, *frame); the numbers of one must not depend on the others.
        batch: one prepared volume (1, c, i, j, k), and what is known of it.
        slices: how it is cut.

    Returns:
        A row of values for every slice, in the order of `slices.places`, NaN where nothing of the slice was measured;
        and the map, NaN where no plane scored a voxel, None where the score has none.
    """
    volume = tuple(batch.x.shape[2:])
    real = torch.ones(1, *volume, dtype=torch.bool, device=batch.x.device) if batch.real is None else batch.real
    frame, every = slices.frame(volume), slices.places(volume)
    shown = torch.tensor([bool(real[place.index].any()) for place in every])
    places = [place for place, measured in zip(every, shown.tolist(), strict=True) if measured]
    size = max(1, _PIXELS // (frame[0] * frame[1]))
    found = [score(_cut(batch, real, places[n : n + size], frame)) for n in range(0, len(places), size)]
    rows = torch.cat([one.values for one in found])
    values = rows.new_full((len(every), rows.shape[1]), torch.nan)
    values[shown.to(rows.device)] = rows
    maps = [one.map for one in found if one.map is not None]
    return values, _put_back(torch.cat(maps), places, real) if maps else None


def _cut(batch: Batch, real: Bool[Tensor, "1 i j k"], places: Sequence[Place], frame: tuple[int, int]) -> Batch:
    """Slices of one volume, with what is known of it."""
    x, seen, context = (
        None if values is None else torch.cat([framed(values, place, frame) for place in places])
        for values in (batch.x, real, batch.context)
    )
    assert x is not None
    assert seen is not None
    cond = None if batch.cond is None else batch.cond.expand(len(places), *batch.cond.shape[1:])
    case = batch.cases[0] if batch.cases else ""
    cases = tuple(f"{case}#{place.name}" for place in places)
    return Batch(x, cond, context, cases, None if bool(seen.all()) else seen)


def _put_back(
    maps: Float[Tensor, "n h w"], places: Sequence[Place], real: Bool[Tensor, "1 i j k"]
) -> Float[Tensor, "i j k"]:
    """The volume's map: at each voxel the mean of what the planes say; NaN where none says anything."""
    total, times = maps.new_zeros(real.shape[1:]), maps.new_zeros(real.shape[1:])
    for place, one in zip(places, maps, strict=True):
        said = one[place.inside]
        known = real[0][place.index].to(said.device) & ~said.isnan()
        total[place.index] += torch.where(known, said, 0)
        times[place.index] += known
    return torch.where(times > 0, total / times, torch.nan)


__all__ = ["in_slices", "slicewise"]
