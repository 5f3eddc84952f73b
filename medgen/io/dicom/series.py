"""From the frames of one series to a grid: which slice lies where, and whether that is one regular volume.

Slices are sorted by where they lie along their normal, never by name or number; the distance between slices is the
distance between positions, never a stated thickness. What is not regular is an error unless a repair was asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Float

from medgen import log
from medgen.errors import GeometryError, InconsistentSeries
from medgen.grid import Grid
from medgen.io.checks import within_cap
from medgen.io.dicom.decode import same_pixels
from medgen.io.dicom.frames import SPLITS, Frame
from medgen.io.source import ReadOptions

# Positions are decimal text: two slices closer than this lie at one place, and gaps this uneven are even.
_SAME_MM, _UNEVEN = 0.01, 0.01
# A slow drift within the limit for a single gap must not add up to more than this part of a slice.
_DRIFT = 0.1
_TILT_DEGREES = 0.1
_ORIENTATION = 1e-3
# What must not change along one volume. (Acquisition numbers and times do, in one scan.)
_KINDS = ("TemporalPositionIdentifier", "TemporalPositionIndex", "EchoNumbers", "DiffusionBValue")


@dataclass(frozen=True)
class Stack:
    """Frames in place.

    Args:
        slices: for each channel the frames along k; None where a missing slice is left unmeasured.
        grid: of the slices as they lie; sheared under gantry tilt.
        channels: a name for each channel where there are several.
        at: where slice positions are uneven, the fractional slice each k of the grid lies at; else empty.
        target: the rectangular grid to move sheared slices onto; None where they stay.
    """

    slices: tuple[tuple[Frame | None, ...], ...]
    grid: Grid
    channels: tuple[str, ...] = ()
    at: tuple[float, ...] = ()
    target: Grid | None = None


def stack(frames: Sequence[Frame], where: str, options: ReadOptions) -> Stack:
    """Sort frames into a volume, or several over one grid.

    Args:
        frames: all frames of one series.
        where: what to call the series in messages.
        options: which irregularities to repair.

    Raises:
        GeometryError: positions or orientations are missing or impossible, or the slices are sheared.
        InconsistentSeries: slices are missing, repeated without a reason, unevenly spaced or of several kinds.
    """
    _agree(frames, where)
    row, column, normal = _axes(frames[0])
    ranks = _by_depth(frames, normal, where)
    channels, names = _channels(ranks, where)
    first = channels[0]
    positions = np.array([frame.position for frame in first])
    depths = positions @ normal
    between_rows, between_columns = first[0].spacing
    count, slots, at = _even(depths, first, where, options)
    if len(first) == 1:
        step = normal * (first[0].thickness or 0 if (first[0].thickness or 0) > 0 else 1.0)
    else:
        step = (positions[-1] - positions[0]) / (count - 1)
        _straight(positions, depths, min(first[0].spacing), first, where)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([row * between_columns, column * between_rows, step])
    affine[:3, 3] = positions[0]
    rows, columns = first[0].plane
    grid = Grid.from_lps((columns, rows, count), affine)
    target = _untilted(grid, step, normal, where, options)
    within_cap((len(channels), *(target or grid).shape), where, options)
    slices = tuple(tuple(channel[slot] if slot is not None else None for slot in slots) for channel in channels)
    return Stack(slices, grid, names, at, target)


# -- what all frames must share ----------------------------------------------------------------------


def _agree(frames: Sequence[Frame], where: str) -> None:
    """Refuse frames without geometry, or of several kinds."""
    for frame in frames:
        for what, value in (
            ("ImagePositionPatient", frame.position),
            ("ImageOrientationPatient", frame.orientation),
            ("PixelSpacing", frame.spacing),
        ):
            if len(value) == 0:
                raise GeometryError(
                    f"{where}: {frame.name} has no {what}, so nobody can tell where it lies. "
                    "Export the series again with its geometry, or convert it with the vendor's tool."
                )
    first = frames[0]
    for frame in frames[1:]:
        if frame.plane != first.plane or frame.file.layout.samples != first.file.layout.samples:
            _mixed(where, "sizes", _size(first), first.name, _size(frame), frame.name)
        if np.abs(frame.orientation - first.orientation).max() > _ORIENTATION:
            _mixed(where, "orientations", _direction(first), first.name, _direction(frame), frame.name)
        if not np.allclose(frame.spacing, first.spacing, rtol=1e-4, atol=0):
            found = [f"{f.spacing[0]:g} x {f.spacing[1]:g} mm" for f in (first, frame)]
            _mixed(where, "pixel spacings", found[0], first.name, found[1], frame.name)


def _mixed(where: str, what: str, one: str, one_name: str, other: str, other_name: str) -> None:
    raise InconsistentSeries(
        f"{where}: one series must be one volume; found several {what}: {one} ({one_name}) and {other} ({other_name}). "
        "Move the odd files elsewhere, or read them by themselves."
    )


def _size(frame: Frame) -> str:
    rows, columns, samples = *frame.plane, frame.file.layout.samples
    return f"{rows} x {columns}" + (f" x {samples}" if samples > 1 else "")


def _direction(frame: Frame) -> str:
    normal = np.cross(frame.orientation[:3], frame.orientation[3:])
    return "normal " + " ".join(f"{n:.3f}" for n in normal)


def _axes(frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors along a row, down a column, and their normal."""
    row, column = frame.orientation[:3], frame.orientation[3:]
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > _ORIENTATION or abs(row @ column) > _ORIENTATION:
        raise GeometryError(f"{frame.name}: ImageOrientationPatient must be two perpendicular unit vectors; it is not.")
    row, column = row / lengths[0], column / lengths[1]
    normal = np.cross(row, column)
    return row, column, normal / np.linalg.norm(normal)


# -- order and repetition ----------------------------------------------------------------------------


def _by_depth(frames: Sequence[Frame], normal: np.ndarray, where: str) -> list[list[Frame]]:
    """Frames that lie at one place together, the places along the normal."""
    ordered = sorted(frames, key=lambda frame: (float(frame.position @ normal), frame.name))
    depths = np.array([frame.position @ normal for frame in ordered])
    gaps = np.diff(depths)
    steps = gaps[gaps > _SAME_MM]
    same = max(_SAME_MM, _UNEVEN * float(np.median(steps))) if len(steps) else _SAME_MM
    ranks = [[ordered[0]]]
    for frame, gap in zip(ordered[1:], gaps, strict=True):
        ranks.append([frame]) if gap > same else ranks[-1].append(frame)
    for rank in ranks:
        for frame in rank[1:]:
            if np.linalg.norm(frame.position - rank[0].position) > 10 * same:
                raise InconsistentSeries(
                    f"{where}: {rank[0].name} and {frame.name} lie at one depth, but side by side. "
                    "One series must be one stack of slices; read them by themselves."
                )
    return ranks


def _channels(ranks: list[list[Frame]], where: str) -> tuple[list[list[Frame]], tuple[str, ...]]:
    """One list of frames along the normal for each channel, and the channels' names."""
    fewest, most = min(map(len, ranks)), max(map(len, ranks))
    if most == 1:
        _one_kind([rank[0] for rank in ranks], where)
        return [[rank[0] for rank in ranks]], ()
    copies_only = fewest == most and all(_is_copy(rank[0], frame) for rank in ranks for frame in rank[1:])
    if fewest < most or copies_only:
        ranks = _without_copies(ranks, 1 if copies_only else fewest)
        fewest, most = min(map(len, ranks)), max(map(len, ranks))
    if most == 1:
        _one_kind([rank[0] for rank in ranks], where)
        return [[rank[0] for rank in ranks]], ()
    if fewest == most and (split := _split(ranks)):
        return split
    depth, rank = next((n, rank) for n, rank in enumerate(ranks, 1) if len(rank) == most)
    names = " and ".join(frame.name for frame in rank[:2])
    how = f"every place holds {most} slices" if fewest == most else f"places hold from {fewest} to {most} slices"
    raise InconsistentSeries(
        f"{where}: {how}; at place {depth} of {len(ranks)} {names} differ, and nothing in the headers (time, echo, "
        "b-value, acquisition) tells complete sets apart. Remove the extra files, or split the series."
    )


def _one_kind(frames: list[Frame], where: str) -> None:
    """Refuse slices of several times, echoes or b-values that lie at different places, which would interleave."""
    for keyword in _KINDS:
        one = frames[0]
        other = next((frame for frame in frames if frame.keys.get(keyword) != one.keys.get(keyword)), None)
        if other is not None:
            _mixed(where, f"values of {keyword}", "one", one.name, "another", other.name)


def _is_copy(one: Frame, other: Frame) -> bool:
    return one.rescale == other.rescale and same_pixels((one.file, one.index), (other.file, other.index))


def _without_copies(ranks: list[list[Frame]], enough: int) -> list[list[Frame]]:
    """Ranks of more than `enough` frames without those whose pixels repeat another's."""
    kept, dropped = [], []
    for rank in ranks:
        unique: list[Frame] = []
        for number, frame in enumerate(rank):
            spare = len(rank) - number + len(unique) > enough
            if spare and any(_is_copy(frame, other) for other in unique):
                dropped.append(frame.name)
            else:
                unique.append(frame)
        kept.append(unique)
    if dropped:
        log.note(f"{len(dropped)} slices are identical copies of others and were left out: {', '.join(dropped[:3])}.")
    return kept


def _split(ranks: list[list[Frame]]) -> tuple[list[list[Frame]], tuple[str, ...]] | None:
    """Complete sets of slices told apart by a header value, or by two values together."""
    known = [split for split in SPLITS if all(split[0] in frame.keys for rank in ranks for frame in rank)]
    for chosen in [(one,) for one in known] + list(combinations(known, 2)):
        if sets := _sets(ranks, [keyword for keyword, _, _ in chosen]):
            return sets, tuple(_channel_name(chosen, frames, n) for n, frames in enumerate(sets, 1))
    return None


def _sets(ranks: list[list[Frame]], keywords: list[str]) -> list[list[Frame]] | None:
    """Sorted by the values, frames must fall into runs that hold each place once, with a clear step between runs."""
    labelled = [
        (tuple(frame.keys[keyword] for keyword in keywords), place, frame)
        for place, rank in enumerate(ranks)
        for frame in rank
    ]
    labelled.sort(key=lambda entry: entry[:2])
    size = len(ranks)
    runs = [labelled[start : start + size] for start in range(0, len(labelled), size)]
    for run, following in pairwise(runs):
        if not run[-1][0] < following[0][0]:
            return None
    if any(sorted(place for _, place, _ in run) != list(range(size)) for run in runs):
        return None
    return [[frame for _, _, frame in sorted(run, key=lambda entry: entry[1])] for run in runs]


def _channel_name(chosen: Sequence[tuple[str, str, bool]], frames: list[Frame], number: int) -> str:
    words = []
    for keyword, word, may_be_told in chosen:
        values = {frame.keys[keyword] for frame in frames}
        value = values.pop() if len(values) == 1 and may_be_told else number
        words.append(f"{word} {value:g}" if isinstance(value, int | float) else f"{word} {value}")
    return ", ".join(words)


# -- even spacing ------------------------------------------------------------------------------------


def _even(
    depths: Float[np.ndarray, "n"], frames: list[Frame], where: str, options: ReadOptions
) -> tuple[int, list[int | None], tuple[float, ...]]:
    """How many slices the grid has, which frame each one is, and (only to resample) where each one lies."""
    count = len(depths)
    as_they_are: list[int | None] = list(range(count))
    if count == 1:
        return 1, as_they_are, ()
    gaps = np.diff(depths)
    step = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    tolerance = max(_SAME_MM, _UNEVEN * step)
    # The grid steps by the mean, so that is what each gap, and each place, is held against.
    mean = (depths[-1] - depths[0]) / (count - 1)
    drift = np.abs(depths - depths[0] - mean * np.arange(count)).max()
    even = (np.abs(gaps - mean) <= max(_SAME_MM, _UNEVEN * mean)).all()
    if even and drift <= max(_DRIFT * mean, _SAME_MM):
        return count, as_they_are, ()
    odd = np.zeros(len(gaps), bool) if even else np.abs(gaps - step) > tolerance
    steps = np.round(gaps / step).astype(int)
    lattice = np.concatenate([[0], np.cumsum(steps)])
    off = np.abs(depths - depths[0] - (depths[-1] - depths[0]) / max(lattice[-1], 1) * lattice).max()
    missing = bool((steps >= 1).all() and odd.any() and off <= max(_DRIFT * step, _SAME_MM)) and bool(
        (np.abs(gaps - steps * step) <= tolerance * steps).all()
    )
    if options.on_gap == "fill" and missing:
        return _filled(steps, frames, where)
    if options.on_gap == "resample":
        total = max(1, round((depths[-1] - depths[0]) / step))
        wanted = np.linspace(depths[0], depths[-1], total + 1)
        log.note(f"{where}: uneven slices interpolated onto {total + 1} slices {wanted[1] - wanted[0]:.4g} mm apart.")
        return total + 1, as_they_are, tuple(float(n) for n in np.interp(wanted, depths, np.arange(count)))
    raise InconsistentSeries(f"{where}: {_gap_story(gaps, step, odd, steps if missing else None, frames)}")


def _filled(steps: np.ndarray, frames: list[Frame], where: str) -> tuple[int, list[int | None], tuple[float, ...]]:
    slots: list[int | None] = [0]
    for frame, step in enumerate(steps, 1):
        slots += [None] * (int(step) - 1) + [frame]
    log.note(f"{where}: {len(slots) - len(frames)} missing slices stay unmeasured.")
    return len(slots), slots, ()


def _gap_story(gaps: np.ndarray, step: float, odd: np.ndarray, steps: np.ndarray | None, frames: list[Frame]) -> str:
    """What was found, where, and what to do about it, in a sentence or two."""
    begin = f"{len(frames)} slices; positions along the normal step {step:.4g} mm"
    if not odd.any():
        return f"{begin}, but drift by more than a tenth of a slice. Pass --on-gap resample to interpolate."
    at = int(np.argmax(odd))
    others = int(odd.sum()) - 1
    more = f" (and at {others} more places)" if others else ""
    begin += f" except {gaps[at]:.4g} mm after slice {at + 1} ({frames[at].name}){more}."
    if steps is None:
        return f"{begin} The spacing is uneven. Pass --on-gap resample to interpolate onto even spacing."
    lost = int((steps - 1).sum())
    what = "One slice is missing. Add it" if lost == 1 else f"{lost} slices are missing. Add them"
    return f"{begin} {what}, or pass --on-gap fill / resample."


def _straight(
    positions: Float[np.ndarray, "n 3"], depths: Float[np.ndarray, "n"], pixel: float, frames: list[Frame], where: str
) -> None:
    """Refuse slices that are shifted sideways against the line from first to last."""
    part = (depths - depths[0]) / (depths[-1] - depths[0])
    line = positions[0] + part[:, None] * (positions[-1] - positions[0])
    off = np.linalg.norm(positions - line, axis=1)
    worst = int(np.argmax(off))
    if off[worst] > max(0.05, _DRIFT * pixel):
        raise InconsistentSeries(
            f"{where}: slice {worst + 1} ({frames[worst].name}) lies {off[worst]:.3g} mm sideways of the line from the "
            "first slice to the last. The slices are no regular volume; export the series again."
        )


# -- gantry tilt -------------------------------------------------------------------------------------


def _untilted(grid: Grid, step: np.ndarray, normal: np.ndarray, where: str, options: ReadOptions) -> Grid | None:
    """The grid to move sheared slices onto; None where they are straight, or stay sheared."""
    tilt = float(np.degrees(np.arctan2(np.linalg.norm(np.cross(step, normal)), step @ normal)))
    # Over a few thin slices the rounding of positions alone may exceed the angle.
    sideways = np.linalg.norm(np.cross(step, normal)) * (grid.shape[2] - 1)
    if tilt <= _TILT_DEGREES or sideways <= 2 * _SAME_MM or options.on_tilt == "shear":
        return None
    if options.on_tilt == "error":
        raise GeometryError(
            f"{where}: slices step {tilt:.1f} degrees off their normal (gantry tilt), so the volume is sheared. "
            "Pass --on-tilt shear to keep it so, or --on-tilt resample to straighten it."
        )
    return rectangular(grid)


def rectangular(grid: Grid) -> Grid:
    """The smallest rectangular grid, with the same rows, columns and slice distance, that holds a sheared one."""
    across, down, step = grid.affine[:3, 0], grid.affine[:3, 1], grid.affine[:3, 2]
    normal = np.cross(across, down)
    normal /= np.linalg.norm(normal)
    straight = grid.affine.copy()
    straight[:3, 2] = normal * (step @ normal)
    # How far the last slice is shifted within the plane, in voxels along i and j.
    shift = np.linalg.inv(straight[:3, :3]) @ (step * (grid.shape[2] - 1))
    low, high = np.floor(np.minimum(shift[:2], 0) + 1e-6), np.ceil(np.maximum(shift[:2], 0) - 1e-6)
    across_count, down_count = (int(n + b - a) for n, a, b in zip(grid.shape[:2], low, high, strict=True))
    shape = (across_count, down_count, grid.shape[2])
    return Grid(shape, straight).patch((*low, 0), shape)


__all__ = ["Stack", "rectangular", "stack"]
