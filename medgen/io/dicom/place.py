"""Where the slices of a DICOM series are, and which source images lie at the same place."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from medgen.errors import GeometryError
from medgen.grid import Grid
from medgen.io.dicom.origin import Origin
from medgen.io.dicom.values import code, decimal
from medgen.scan import Scan

# Within a slice DICOM allows no slant at all; between slices readers forgive this much.
_PLANE_COSINE, _TILT_DEGREES = 1e-4, 0.1
# Rows and columns as radiologists expect them, by the axis the slices are stacked along.
_CUSTOMARY = {"S": "LPS", "I": "LPI", "R": "PIR", "L": "PIL", "A": "LIA", "P": "LIP"}


def right_angled(grid: Grid) -> None:
    """Refuse grids whose slices DICOM readers would put somewhere else.

    Raises:
        GeometryError: the voxel axes are not at right angles.
    """
    axes = grid.direction
    tilt = np.degrees(np.arccos(min(1.0, abs(float(np.cross(axes[:, 0], axes[:, 1]) @ axes[:, 2])))))
    if abs(float(axes[:, 0] @ axes[:, 1])) > _PLANE_COSINE or tilt > _TILT_DEGREES:
        raise GeometryError(
            f"DICOM slices need voxel axes at right angles; these are off by {grid.shear_degrees:.3g} degrees. "
            "Move the scan to a rectangular grid first: scan.onto(Grid(shape, affine), outside=...)."
        )


def laid_out(scan: Scan, origin: Origin | None) -> Scan:
    """The scan with columns counted along i, rows along j and slices along their normal; values unchanged.

    The axes stay where they are the source's own; else they take the customary view. Both are exact moves.
    """
    grid = scan.grid
    plane = grid.lps[:3, :2] / np.asarray(grid.spacing[:2])
    known = origin.rows_columns if origin else None
    if known is None or not np.allclose(plane.T.ravel(), known, atol=1e-3):
        grid = grid.reorient(_CUSTOMARY[grid.axcodes[2]])
    if np.linalg.det(grid.affine[:3, :3]) < 0:
        grid = grid.flip(2)
    # Stored 0 is exact in every type, so the move changes no value and no type.
    moved = scan.onto(grid, outside=scan.scale.intercept)
    return moved.with_voxels(_slice_by_slice(moved.voxels))


def _slice_by_slice(voxels: Shaped[np.ndarray, "c i j k"]) -> Shaped[np.ndarray, "c i j k"]:
    """The same voxels in the order files hold them, where each slice is one block of memory."""
    if voxels.transpose(0, 3, 2, 1).flags.c_contiguous:
        return voxels
    ordered = np.empty(voxels.transpose(0, 3, 2, 1).shape, voxels.dtype).transpose(0, 3, 2, 1)
    # A few columns at a time stay in the cache: four times as fast as one long copy.
    for i in range(0, voxels.shape[1], 32):
        ordered[:, i : i + 32] = voxels[:, i : i + 32]
    return ordered


def plane(ds: Dataset, grid: Grid, frame: str, thickness: float | None) -> None:
    """Frame of Reference and Image Plane (C.7.4.1, C.7.6.2) of all slices along k; positions come with each slice."""
    ds.FrameOfReferenceUID = frame
    ds.PositionReferenceIndicator = ""
    lps = grid.lps[:3, :3] / np.asarray(grid.spacing)
    ds.ImageOrientationPatient = [decimal(cosine) for cosine in (*lps[:, 0], *lps[:, 1])]
    pixel_spacing(ds, grid)
    ds.SliceThickness = decimal(grid.spacing[2] if thickness is None else thickness)


def pixel_spacing(ds: Dataset, grid: Grid) -> None:
    """Distance between rows, then between columns, mm."""
    ds.PixelSpacing = [decimal(grid.spacing[1]), decimal(grid.spacing[0])]


def position(ds: Dataset, grid: Grid, k: int) -> None:
    """Where slice `k` lies: its first voxel, LPS+ mm."""
    ds.ImagePositionPatient = [decimal(x) for x in grid.lps[:3, 3] + k * grid.lps[:3, 2]]


def nearest_images(origin: Origin, grid: Grid) -> tuple[list[list[int]], bool]:
    """For each slice along k the source images nearest to it, and whether every slice has one in its very place.

    All source images, where the source has no positions or other planes.
    """
    lps = grid.lps
    normal = np.cross(lps[:3, 0], lps[:3, 1])
    normal /= np.linalg.norm(normal)
    everything = [list(range(len(origin.images)))] * grid.shape[2]
    if origin.rows_columns is None or any(image.position is None for image in origin.images):
        return everything, False
    source_normal = np.cross(origin.rows_columns[:3], origin.rows_columns[3:])
    if abs(float(source_normal @ normal)) < 0.999:
        return everything, False
    places = np.array([image.position for image in origin.images]) @ normal
    heights = (lps[:3, 3] + np.arange(grid.shape[2])[:, None] * lps[:3, 2]) @ normal
    apart = np.abs(heights[:, None] - places)
    nearest = apart.min(axis=1)
    matched = [np.flatnonzero(row <= best + 0.01).tolist() for row, best in zip(apart, nearest, strict=True)]
    return matched, bool(math.isclose(0, float(nearest.max()), abs_tol=0.01))


def source_images(origin: Origin, matched: list[list[int]], rename: Callable[[str], str]) -> list[DicomSequence]:
    """Source Image Sequence (C.7.6.1.4) of each slice along k; `matched` from `nearest_images`."""
    items = []
    for image in origin.images:
        item = Dataset()
        item.ReferencedSOPClassUID = image.sop_class
        item.ReferencedSOPInstanceUID = rename(image.sop_instance)
        item.PurposeOfReferenceCodeSequence = code("121322", "DCM", "Source image for image processing operation")
        items.append(item)
    return [DicomSequence([items[n] for n in numbers]) for numbers in matched]


__all__ = ["laid_out", "nearest_images", "pixel_spacing", "plane", "position", "right_angled", "source_images"]
