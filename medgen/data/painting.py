"""Shapes as signed distances in millimetres, smooth noise, and how to paint them into a volume.

A distance is negative inside. Painting turns it into the part of each cell that lies inside, so that
edges have honest partial volumes.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from medgen.grid import Grid

Points = Float[np.ndarray, "*space 3"]
Field = Float[np.ndarray, "*space"]
Number = float | int


def indices(shape: Sequence[int]) -> Float[np.ndarray, "i j k 3"]:
    """Voxel positions of every voxel."""
    return np.stack(np.meshgrid(*[np.arange(n, dtype=np.float64) for n in shape], indexing="ij"), -1)


def finer_points(grid: Grid, finer: int) -> Float[np.ndarray, "i j k 3"]:
    """World positions of the middles of `finer`^3 parts of every voxel."""
    return grid.world((indices([n * finer for n in grid.shape]) + 0.5) / finer - 0.5)


def averaged(values: Field, finer: int) -> Float[np.ndarray, "i j k"]:
    """The mean of every `finer`^3 cells."""
    i, j, k = (n // finer for n in values.shape)
    return values.reshape(i, finer, j, finer, k, finer).mean(axis=(1, 3, 5))


def mirrored(p: Points) -> Points:
    """The same points with left folded onto right."""
    return np.concatenate([np.abs(p[..., :1]), p[..., 1:]], -1)


def length(vectors: Points) -> Field:
    """Euclidean length of each vector."""
    # einsum is several times faster than linalg.norm over a last axis of three.
    return np.sqrt(np.einsum("...x,...x->...", vectors, vectors))


def ellipsoid(p: Points, centre: Sequence[Number], radii: Sequence[Number]) -> Field:
    """Approximate signed distance (mm, negative inside) to an ellipsoid."""
    scaled = (p - np.asarray(centre, dtype=np.float64)) / np.asarray(radii, dtype=np.float64)
    far = length(scaled)
    return far * (far - 1) / np.maximum(length(scaled / np.asarray(radii)), 1e-9)


def tube(p: Points, path: Sequence[Sequence[Number]]) -> Field:
    """Signed distance to a chain of rounded cones through (x, y, z, radius) in mm."""
    distance = np.full(p.shape[:-1], np.inf)
    for start, stop in pairwise(path):
        a, b = np.array(start, dtype=np.float64), np.array(stop, dtype=np.float64)
        step = b[:3] - a[:3]
        along = np.clip((p - a[:3]) @ step / (step @ step), 0, 1)
        gap = length(p - a[:3] - along[..., None] * step)
        distance = np.minimum(distance, gap - a[3] - along * (b[3] - a[3]))
    return distance


def union(a: Field, b: Field, blend: Number) -> Field:
    """Distance to both together, rounded over `blend` mm where they meet."""
    h = np.clip(0.5 + 0.5 * (b - a) / blend, 0, 1)
    return b + (a - b) * h - blend * h * (1 - h)


def intersection(a: Field, b: Field, blend: Number) -> Field:
    """Distance to what both share, rounded over `blend` mm where their surfaces cross."""
    return -union(-a, -b, blend)


def waves(p: Points, rng: np.random.Generator, count: int, wavelengths: tuple[Number, Number]) -> Field:
    """Smooth noise of unit variance: plane waves of random direction, phase and wavelength (mm)."""
    ways = rng.normal(size=(count, 3))
    ways *= 2 * np.pi / rng.uniform(*wavelengths, (count, 1)) / np.linalg.norm(ways, axis=1, keepdims=True)
    phases = rng.uniform(0, 2 * np.pi, count)
    total = np.zeros(p.shape[:-1])
    for way, phase in zip(ways, phases, strict=True):
        total += np.cos(p @ way + phase)
    return total * np.sqrt(2 / count)


def inside(distance: Field, edge: Number) -> Field:
    """How much of a cell of `edge` mm lies inside."""
    return np.clip(0.5 - distance / edge, 0, 1)


def paint(image: Field, distance: Field, value: Number | Field, edge: Number) -> None:
    """Put `value` wherever `distance` is negative, in part where cells lie on the edge; changes `image`."""
    image += inside(distance, edge) * (value - image)


def thickness(distance: Field, half: Number) -> Field:
    """0 outside, rising to 1 at `half` mm from the edge like the chord through a rounded body."""
    inward = np.clip(-distance / half, 0, 1)
    return np.sqrt(inward * (2 - inward))


def rotation(*degrees: Number) -> Float[np.ndarray, "3 3"]:
    """Turns by `degrees` about the first axis, then the second, then the third."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[b, a], turn[a, b] = np.sin(angle), -np.sin(angle)
        matrix = turn @ matrix
    return matrix


def turned(p: Points, centre: Sequence[Number], degrees: Number) -> Points:
    """Points in a frame about `centre`, turned by `degrees` in the plane of x and y."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = p[..., 0] - centre[0], p[..., 1] - centre[1]
    return np.stack([c * x - s * y, s * x + c * y, p[..., 2]], -1)


def band(offset: Field, half: Number, *, rim: bool = False) -> Field:
    """1 within `half` mm of a line, with soft edges; `rim` keeps the two edges only."""
    inside = np.clip((half - np.abs(offset)) / 2.5 + 0.5, 0, 1)
    return inside * (np.abs(offset) > half - 3) if rim else inside


__all__ = [
    "Field",
    "Number",
    "Points",
    "averaged",
    "band",
    "ellipsoid",
    "finer_points",
    "indices",
    "inside",
    "intersection",
    "length",
    "mirrored",
    "paint",
    "rotation",
    "thickness",
    "tube",
    "turned",
    "union",
    "waves",
]
