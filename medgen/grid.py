"""Where the voxels of a scan are: a shape and an affine, and every geometric question about them.

The one alphabet for axes: voxels `i j k`, world `x y z` in millimetres, RAS+ (x to the patient's
right, y anterior, z superior). DICOM and ITK speak LPS+; `Grid.from_lps` and `Grid.lps` are the only
two places where the two meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Float

from medgen.errors import GeometryError

# Whole numbers are numbers too, which a checker of types at run time must be told.
Numbers = Sequence[float | int] | np.ndarray

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Grid:
    """A lattice of voxel centres, world = affine @ (i, j, k, 1).

    Args:
        shape: voxels along i, j, k; a planar image is `(I, J, 1)`.
        affine: 4x4, index to RAS+ millimetres of voxel centres.

    Raises:
        GeometryError: the shape is empty, or the affine is not finite, singular, or not affine.

    >>> grid = Grid((4, 5, 6), np.diag([2.0, 2.0, 3.0, 1.0]))
    >>> grid.spacing, grid.axcodes
    ((2.0, 2.0, 3.0), 'RAS')
    >>> grid.flip(0).world([3, 0, 0]).tolist() == grid.world([0, 0, 0]).tolist()
    True
    """

    shape: tuple[int, int, int]
    affine: Float[np.ndarray, "4 4"]

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1 or shape != tuple(self.shape):
            raise GeometryError(f"A grid needs three axes of at least one whole voxel; found shape {self.shape}.")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError("An affine must be a finite 4x4 matrix. Check the file's geometry header.")
        if not np.allclose(affine[3], [0, 0, 0, 1]):
            raise GeometryError(f"The last row of an affine must be 0 0 0 1; found {affine[3].tolist()}.")
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if not (spacing > 0).all() or not (spacing < 1e4).all():
            raise GeometryError(f"Voxel spacing must lie in (0, 10000) mm; found {spacing.tolist()}.")
        if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
            raise GeometryError("The affine is singular: its three voxel axes lie in one plane.")
        affine[3] = [0, 0, 0, 1]
        # Adding 0 turns -0 into 0, so that equal grids have equal bytes, and equal hashes.
        affine += 0.0
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    # -- the two doors to LPS ------------------------------------------------------------------

    @classmethod
    def from_lps(cls, shape: Numbers, affine: Float[np.ndarray, "4 4"]) -> "Grid":
        """The grid of an affine given in LPS+ millimetres, as DICOM and ITK state it."""
        return cls(_whole(shape), _LPS @ np.asarray(affine, dtype=np.float64))

    @property
    def lps(self) -> Float[np.ndarray, "4 4"]:
        """The affine in LPS+ millimetres, as DICOM and ITK want it."""
        return _LPS @ self.affine

    # -- questions -----------------------------------------------------------------------------

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxel centres along i, j, k."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return i, j, k

    @property
    def origin(self) -> Float[np.ndarray, "3"]:
        """World position of voxel (0, 0, 0), millimetres."""
        return self.affine[:3, 3]

    @property
    def direction(self) -> Float[np.ndarray, "3 3"]:
        """Unit vectors of the voxel axes, one a column."""
        return self.affine[:3, :3] / np.asarray(self.spacing)

    @property
    def axcodes(self) -> str:
        """The nearest anatomical direction of each voxel axis, such as 'RAS' or 'LPI'."""
        from nibabel.orientations import aff2axcodes

        return "".join(aff2axcodes(self.affine))

    @property
    def centre(self) -> Float[np.ndarray, "3"]:
        """World position of the middle of the field of view, millimetres."""
        return self.world((np.asarray(self.shape) - 1) / 2)

    @property
    def voxel_volume(self) -> float:
        """Cubic millimetres in one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def shear_degrees(self) -> float:
        """How far the voxel axes are from right angles, in degrees; 0 for a rectangular grid."""
        cosines = self.direction.T @ self.direction - np.eye(3)
        return float(np.degrees(np.arcsin(np.clip(np.abs(cosines).max(), 0, 1))))

    def world(self, ijk: Numbers) -> Float[np.ndarray, "*n 3"]:
        """World positions (..., 3) in millimetres of voxel positions (..., 3)."""
        return np.asarray(ijk, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index(self, xyz: Numbers) -> Float[np.ndarray, "*n 3"]:
        """Fractional voxel positions (..., 3) of world positions (..., 3) in millimetres."""
        return (np.asarray(xyz, dtype=np.float64) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def index_of(self, other: "Grid") -> Float[np.ndarray, "4 4"]:
        """The matrix from voxel positions of `other` to voxel positions of this grid."""
        return np.linalg.inv(self.affine) @ other.affine

    def corners(self) -> Float[np.ndarray, "8 3"]:
        """World positions of the eight corner voxel centres, millimetres."""
        last = np.asarray(self.shape) - 1
        return self.world(np.stack(np.meshgrid(*[(0, n) for n in last], indexing="ij"), -1).reshape(-1, 3))

    def close(self, other: "Grid", *, millimetres: float = 1e-3) -> bool:
        """Whether both have one shape and no voxel centre is further apart than `millimetres`."""
        if self.shape != other.shape:
            return False
        apart = np.linalg.norm(self.corners() - other.corners(), axis=1).max()
        # A singleton axis has no corner that shows its direction: compare the axes as well.
        step = np.abs(self.affine[:3, :3] - other.affine[:3, :3]).max()
        return bool(apart <= millimetres and step <= millimetres)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    # -- other grids ---------------------------------------------------------------------------

    def patch(self, start: Numbers, shape: Numbers) -> "Grid":
        """The lattice window of `shape` that begins at voxel `start`; it may reach outside."""
        affine = self.affine.copy()
        affine[:3, 3] = self.world(start)
        return Grid(_whole(shape), affine)

    def crop(self, start: Numbers, shape: Numbers) -> "Grid":
        """The window of `shape` that begins at voxel `start` and lies inside.

        Raises:
            GeometryError: the window reaches outside the grid.
        """
        if any(a < 0 or a + n > m for a, n, m in zip(start, shape, self.shape, strict=True)):
            raise GeometryError(f"Crop of {tuple(shape)} at {tuple(start)} leaves the grid {self.shape}.")
        return self.patch(start, shape)

    def pad(self, before: Numbers, after: Numbers) -> "Grid":
        """The grid with `before` and `after` extra voxels along each axis."""
        shape = [b + n + a for b, n, a in zip(before, self.shape, after, strict=True)]
        return self.patch([-b for b in before], shape)

    def centred(self, shape: Numbers) -> "Grid":
        """The window of `shape` around the middle of this grid, on the same lattice."""
        return self.patch([(m - n) // 2 for m, n in zip(self.shape, shape, strict=True)], shape)

    def flip(self, axis: int) -> "Grid":
        """The same voxels counted backwards along `axis`."""
        if axis not in (0, 1, 2):
            raise GeometryError(f"A voxel axis is 0, 1 or 2; found {axis}.")
        affine = self.affine.copy()
        start = [0, 0, 0]
        start[axis] = self.shape[axis] - 1
        affine[:3, 3] = self.world(start)
        affine[:3, axis] *= -1
        return Grid(self.shape, affine)

    def permute(self, order: Sequence[int]) -> "Grid":
        """The same voxels with axes in another order: new axis n is old axis `order[n]`."""
        if sorted(order) != [0, 1, 2]:
            raise GeometryError(f"An axis order is a permutation of 0, 1, 2; found {tuple(order)}.")
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, list(order)]
        i, j, k = order
        return Grid((self.shape[i], self.shape[j], self.shape[k]), affine)

    def reorient(self, axcodes: str) -> "Grid":
        """The same voxels with axes flipped and permuted to run nearest to `axcodes`, such as 'RAS'."""
        from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

        letters = axcodes.upper()
        if len(letters) != 3 or any(sum(c in pair for c in letters) != 1 for pair in ("LR", "PA", "IS")):
            raise GeometryError(f"Orientation codes name L/R, P/A and I/S once each, as in 'RAS'; found {axcodes!r}.")
        moves = ornt_transform(io_orientation(self.affine), axcodes2ornt(letters)).astype(int)
        grid = self
        for axis, (_, sign) in enumerate(moves):
            grid = grid.flip(axis) if sign < 0 else grid
        return grid.permute([int(np.flatnonzero(moves[:, 0] == axis)[0]) for axis in range(3)])

    def respaced(self, spacing: Numbers) -> "Grid":
        """The grid with other `spacing` (mm) over the same field of view, about the same centre."""
        old, new = np.asarray(self.spacing), np.asarray(spacing, dtype=np.float64)
        if new.shape != (3,) or not (new > 0).all():
            raise GeometryError(f"Spacing is three positive numbers in mm; found {tuple(spacing)}.")
        shape = np.maximum(1, np.round(np.asarray(self.shape) * old / new - 1e-6)).astype(int)
        affine = self.affine.copy()
        affine[:3, :3] = self.direction * new
        affine[:3, 3] = self.centre - affine[:3, :3] @ ((shape - 1) / 2)
        return Grid(_whole(shape), affine)

    # -- as plain data -------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """Plain lists, for JSON."""
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    @classmethod
    def from_dict(cls, data: dict) -> "Grid":
        """The grid that `to_dict` wrote."""
        return cls(tuple(data["shape"]), np.asarray(data["affine"], dtype=np.float64))


def _whole(numbers: Numbers) -> tuple[int, int, int]:
    """Python's integers for numpy's; what is no shape stays as it is, for Grid to refuse."""
    return cast("tuple[int, int, int]", tuple(int(n) if n == int(n) else n for n in numbers))


__all__ = ["Grid", "Numbers"]
