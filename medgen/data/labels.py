"""Label maps as channels beside a scan's own, so that a model learns what lies where together with how it looks.

A label's channel is a ramp of the signed distance d (voxels) from the label's boundary, positive inside:

    ramp = clip(1/2 + d / (2 reach), 0, 1)

Ramps are easier to model than steps: one moves smoothly where a boundary moves, so principal components, flows and
decoders meet nearly linear changes instead of voxels that jump, and what they blur still crosses 1/2 in its place.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer

from medgen import io
from medgen.data.manifest import Manifest
from medgen.data.window import flat
from medgen.errors import DataError, GeometryError, MedgenError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.log import track
from medgen.scan import Scale, Scan

# Voxels from a boundary to where a ramp ends.
REACH = 3.0
# A mask with more labels than this is an image, or a parcellation too fine to draw.
MOST_LABELS = 16
# Label maps are written as 16-bit numbers where 8 bits do not hold them.
_LARGEST = 2**15 - 1


def label_channels(labels_map: Integer[np.ndarray, "*space"], labels: Sequence[int]) -> Float[np.ndarray, "k *space"]:
    """A ramp for each label: above 1/2 in its voxels and nowhere else, so that `label_map` gives the map back.

    The boundary runs halfway between voxels, so a structure one voxel thin survives. Other values are background.

    Args:
        labels_map: a label a voxel, 0 for none.
        labels: the labels that get a channel, in its order.

    >>> print(label_channels(np.array([0, 0, 1, 1]), (1,)).round(2))
    [[0.25 0.42 0.58 0.75]]
    """
    ramps = np.zeros((len(labels), *labels_map.shape), dtype=np.float32)
    for n, label in enumerate(labels):
        inside = labels_map == label
        if not inside.any():
            continue
        # Beyond the reach of a label its ramp is 0 anyway.
        near = tuple(_reached(np.flatnonzero(inside.any(_others(axis, inside.ndim)))) for axis in range(inside.ndim))
        ramps[n][near] = _ramp(inside[near])
    return ramps


def _others(axis: int, dims: int) -> tuple[int, ...]:
    return tuple(other for other in range(dims) if other != axis)


def _reached(places: Integer[np.ndarray, " n"]) -> slice:
    margin = int(REACH) + 2
    return slice(max(0, int(places[0]) - margin), int(places[-1]) + margin + 1)


def _ramp(inside: np.ndarray) -> np.ndarray:
    from scipy.ndimage import distance_transform_edt

    if inside.all():
        return np.ones(inside.shape, dtype=np.float32)
    within, beyond = distance_transform_edt(inside), distance_transform_edt(~inside)
    # From voxel centres to the boundary halfway between them.
    distance = np.where(inside, np.asarray(within) - 0.5, 0.5 - np.asarray(beyond))
    return np.clip(0.5 + distance / (2 * REACH), 0, 1).astype(np.float32)


def label_map(channels: Float[np.ndarray, "k *space"], labels: Sequence[int]) -> Integer[np.ndarray, "*space"]:
    """The label with the highest channel where that exceeds 1/2, else 0; of equal ones the first.

    >>> label_map(np.array([[0.2, 0.9, 0.6], [0.1, 0.3, 0.7]]), (1, 4)).tolist()
    [0, 1, 4]
    """
    names = np.asarray(labels, dtype=np.int32)
    return np.where(channels.max(0) > 0.5, names[channels.argmax(0)], 0).astype(np.int32)


def one_hot(labels_map: Integer[np.ndarray, "*space"], labels: Sequence[int]) -> Float[np.ndarray, "k *space"]:
    """A channel for each label: 1 in its voxels, 0 elsewhere.

    >>> one_hot(np.array([0, 4]), (1, 4)).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    return np.stack([labels_map == label for label in labels]).astype(np.float32)


# -- files -----------------------------------------------------------------------------------------------


def read_labels(path: str, options: ReadOptions = ReadOptions()) -> Scan:
    """A file's label map, whole numbers.

    Raises:
        DataError: it cannot be read, has several channels, or values that are no labels.
    """
    found = flat(io.read(path, options))
    if found.channels != 1:
        raise DataError(f"A mask holds one label a voxel; found {found.channels} channels. Give one label map a scan.")
    values = found.physical()
    whole = np.rint(values)
    # NaN is not close to itself, either.
    if not np.all(np.abs(values - whole) < 1e-3) or whole.min() < 0 or whole.max() > _LARGEST:
        raise DataError(
            f"A mask's values are labels: whole numbers from 0 (background) to {_LARGEST}. Found others, as in a "
            "probability map or an image. Threshold it, or leave the mask out."
        )
    return Scan(whole.astype(np.int32), found.grid, Scale(), is_label=True)


def labels_on(path: str, scan: Grid, ready: Grid, options: ReadOptions = ReadOptions()) -> Integer[np.ndarray, "i j k"]:
    """The label map of the mask at `path` on a prepared scan's grid, by nearest neighbour.

    Args:
        path: of the mask.
        scan: the grid of the scan that it was drawn on.
        ready: where it is wanted.
        options: how strict reading is.

    Raises:
        GeometryError: the mask was not drawn on that scan's grid.
        DataError: it cannot be read, or is no label map.
    """
    drawn = read_labels(path, options)
    if not drawn.grid.close(scan, millimetres=1e-3 * max(1.0, *scan.spacing)):
        raise GeometryError(
            f"A mask lies on its scan's grid; found a mask of {_told(drawn.grid)} for a scan of {_told(scan)}. "
            "Resample the mask onto the scan (nearest neighbour), or take the mask away."
        )
    # What rounding is left between the two places is none of the mask's.
    return Scan(drawn.voxels, scan, is_label=True).onto(ready, outside=0).voxels[0]


def _told(grid: Grid) -> str:
    size, spacing = " x ".join(map(str, grid.shape)), " x ".join(f"{mm:.4g}" for mm in grid.spacing)
    origin = ", ".join(f"{mm:.4g}" for mm in grid.origin)
    return f"{size} voxels of {spacing} mm, axes {''.join(grid.axcodes)}, origin ({origin}) mm"


def label_values(manifest: Manifest, options: ReadOptions = ReadOptions()) -> tuple[int, ...]:
    """The labels that the masks of these scans hold, in ascending order; masks that cannot be read say nothing.

    Raises:
        DataError: the masks are all empty, too many, or no label maps.
    """
    found: set[int] = set()
    paths = sorted({manifest.locate(row.mask) for row in manifest.rows if row.mask})
    first: MedgenError | None = None
    for path in track(paths, "Looking at masks"):
        try:
            found |= set(np.unique(read_labels(path, options).voxels).tolist()) - {0}
        except MedgenError as error:
            first = first or error
        if len(found) > MOST_LABELS:
            raise DataError(
                f"The masks hold more than {MOST_LABELS} labels, up to {Path(path.partition('#')[0]).name}; a model is "
                f"told at most {MOST_LABELS}. Merge labels, or train with --masks none."
            )
    if not found and first is not None:
        raise DataError(f"None of {len(paths)} masks could be read; the first: {first}")
    if not found:
        raise DataError(f"All {len(paths)} masks are empty: there is no label to learn. Train with --masks none.")
    return tuple(sorted(found))


__all__ = [
    "MOST_LABELS", "REACH", "label_channels", "label_map", "label_values", "labels_on", "one_hot", "read_labels",
]  # fmt: skip
