"""The anatomy of one scan moved part of the way towards another's, with its own texture and its label map.

A(p + t u(p)): u takes the first scan's shapes to the second's (registration by diffeomorphic demons; Vercauteren et al.
2009, "Diffeomorphic demons: efficient non-parametric image registration"), 0 < t <= 1 goes part of the way. How people
of a class differ is learned from pairs of them instead of from random bending (Hauberg et al. 2016, "Dreaming more
data: class-dependent distributions over diffeomorphisms for learned data augmentation").
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer
from scipy.ndimage import map_coordinates

from medgen.data.classic import stored_as
from medgen.data.labels import label_channels, label_map
from medgen.data.window import flat
from medgen.grid import Grid
from medgen.scan import Scan

# Registration halves edges as often as this and takes so many steps there; finer levels cost most and move least.
_LEVELS = ((4, 40), (2, 40))
# Width of the displacement's smoothing, in voxels of a level; weight of the image beside its labels.
_SMOOTH, _IMAGE = 1.0, 0.5


def landmarks(
    image: Float[np.ndarray, "i j k"], labels_map: Integer[np.ndarray, "i j k"] | None, labels: Sequence[int]
) -> Float[np.ndarray, "i j k"]:
    """What is matched: the image on [0, 1], and ramps of its labels, up and down in turn so that they stay apart.

    Args:
        image: one channel of a prepared scan.
        labels_map: its labels; None where there are none.
        labels: those that either scan has.
    """
    if labels_map is None or not labels:
        return image.astype(np.float32)
    ramps = label_channels(labels_map, labels)
    signs = np.asarray([(1 + n // 2) * (-1) ** n for n in range(len(labels))], dtype=np.float32)
    return (_IMAGE * image + np.tensordot(signs, ramps, 1)).astype(np.float32)


def displacement(fixed: Float[np.ndarray, "i j k"], moving: Float[np.ndarray, "i j k"]) -> Float[np.ndarray, "3 i j k"]:
    """u in voxels such that moving(p + u(p)) is like fixed(p).

    Args:
        fixed, moving: what is matched, on one lattice.
    """
    import SimpleITK

    planar = fixed.shape[2] == 1
    pictures = [SimpleITK.GetImageFromArray((one[..., 0] if planar else one).T.astype(np.float32)) for one in
                (fixed, moving)]  # fmt: skip
    dims, field = 2 if planar else 3, None
    for factor, steps in _LEVELS:
        shrinks = [min(factor, max(1, n // 8)) for n in fixed.shape[:dims]]
        a, b = (_coarser(one, shrinks) for one in pictures)
        demons = SimpleITK.DiffeomorphicDemonsRegistrationFilter()
        # One thread adds up in one order: the same scans give the same field.
        demons.SetNumberOfThreads(1)
        demons.SetNumberOfIterations(steps)
        demons.SetSmoothDisplacementField(True)
        demons.SetStandardDeviations(_SMOOTH)
        field = demons.Execute(a, b) if field is None else demons.Execute(a, b, SimpleITK.Resample(field, a))
    assert field is not None
    found = SimpleITK.GetArrayFromImage(SimpleITK.Resample(field, pictures[0])).T
    full = np.zeros((3, *fixed.shape), dtype=np.float32)
    full[:dims] = found.reshape(dims, *fixed.shape)
    return full


def _coarser(picture, shrinks: Sequence[int]):
    import SimpleITK

    if max(shrinks) == 1:
        return picture
    return SimpleITK.Shrink(
        SimpleITK.SmoothingRecursiveGaussian(picture, [0.5 * max(shrinks)] * len(shrinks)), list(shrinks)
    )


def morphed(
    scan: Scan, mask: Scan | None, u: Float[np.ndarray, "3 i j k"], lattice: Grid, t: float
) -> tuple[Scan, Scan | None]:
    """The scan whose anatomy has gone the way `t` of `u`, on its own grid, and its label map.

    Images are interpolated with cubic splines, which keep their texture, and stay within their range; labels by their
    ramps, so that boundaries stay smooth.

    Args:
        scan: image or volume.
        mask: its label map, on its grid.
        u: displacement in voxels of `lattice`.
        lattice: where `u` is.
        t: part of the way.
    """
    work = flat(scan)
    looks = _looks(work.grid, u, lattice, t)
    values = work.physical()
    values = np.nan_to_num(values, nan=float(np.nanmin(values)))
    moved = np.stack([
        np.clip(map_coordinates(one.astype(np.float64), looks, order=3, mode="nearest"), one.min(), one.max())
        for one in values
    ])  # fmt: skip
    made = stored_as(work, moved).onto(scan.grid, outside=0)
    if mask is None:
        return made, None
    drawn = flat(mask)
    there = [int(label) for label in np.unique(drawn.voxels) if label]
    regions = np.zeros_like(drawn.voxels)
    if there:
        ramps = label_channels(drawn.voxels[0].astype(np.int64), there)
        seen = np.stack([map_coordinates(ramp, looks, order=1, mode="nearest") for ramp in ramps])
        regions = label_map(seen, there)[None].astype(drawn.voxels.dtype)
    return made, drawn.with_voxels(regions).with_header(synthetic=True).onto(mask.grid, outside=0)


def _looks(grid: Grid, u: Float[np.ndarray, "3 i j k"], lattice: Grid, t: float) -> Float[np.ndarray, "3 x y z"]:
    """Voxel positions on `grid` that each of its voxels shows."""
    to = lattice.index_of(grid)
    back = np.linalg.inv(to)
    voxels = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float64) for n in grid.shape], indexing="ij"))
    places = np.einsum("ab,b...->a...", to[:3, :3], voxels) + to[:3, 3].reshape(3, 1, 1, 1)
    moves = np.stack([map_coordinates(one, places, order=1, mode="nearest") for one in u])
    return voxels + t * np.einsum("ab,b...->a...", back[:3, :3], moves)


__all__ = ["displacement", "landmarks", "morphed"]
