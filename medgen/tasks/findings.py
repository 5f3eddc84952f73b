"""What stands out in an anomaly map, as a list: where, how large, how high, and how rarely healthy scans show that."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from medgen.grid import Grid
from medgen.tasks.calibration import Normals, clusters, mask_threshold

# Of one scan; the largest come first.
MOST_FINDINGS = 20


@dataclass(frozen=True)
class Finding:
    """A cluster of voxels above the forming level of the healthy maps.

    Args:
        volume_mm3: its volume on the grid that the model sees.
        x, y, z: its centre, RAS+ mm.
        peak_x, peak_y, peak_z: its highest voxel, RAS+ mm.
        highest: the z there.
        p: (1 + healthy scans whose largest cluster is at least as large) / (healthy scans + 1).
        marked: whether its peak is above the mask's threshold; None without one.
    """

    volume_mm3: float
    x: float
    y: float
    z: float
    peak_x: float
    peak_y: float
    peak_z: float
    highest: float
    p: float
    marked: bool | None = None


def findings(
    z_map: Float[np.ndarray, "i j k"], grid: Grid, known: Normals, rate: float, *, most: int = MOST_FINDINGS
) -> tuple[Finding, ...]:
    """The largest clusters of a z-map, largest first.

    A cluster's p compares it with the largest cluster of each healthy scan, so the chance that a healthy scan has any
    with p <= alpha is at most alpha (Nichols & Holmes 2002, suprathreshold cluster tests).

    Args:
        z_map: healthy spreads, NaN where nothing was scored.
        grid: where its voxels lie.
        known: what healthy maps look like; clusters are compared by their voxels.
        rate: false-alarm rate of the mask.
        most: how many to list.
    """
    from scipy.ndimage import center_of_mass, maximum_position

    labels, sizes = clusters(z_map, known.forming)
    threshold = mask_threshold(known.maxima, rate)
    if not len(known.largest) or not len(sizes):
        return ()
    order = np.argsort(-sizes, kind="stable")[:most] + 1
    centres = grid.world(np.asarray(center_of_mass(labels > 0, labels, order), float))
    peaks = np.asarray(maximum_position(z_map, labels, order))
    found = []
    for number, centre, at, place in zip(order, centres, peaks, grid.world(peaks.astype(float)), strict=True):
        size, highest = int(sizes[number - 1]), float(z_map[tuple(at)])
        found.append(
            Finding(
                round(size * grid.voxel_volume, 3),
                *(round(float(mm), 2) for mm in (*centre, *place)),
                highest=round(highest, 3),
                p=float((1 + np.count_nonzero(known.largest >= size)) / (len(known.largest) + 1)),
                marked=None if threshold is None else highest > threshold,
            )
        )
    return tuple(found)


def write_findings(found: Iterable[tuple[str, Iterable[Finding]]], path: Path) -> None:
    """A CSV of (case, its findings), in the order given."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "finding", *Finding.__dataclass_fields__])
        for case, listed in found:
            for number, one in enumerate(listed, 1):
                cells = ["" if v is None else v if isinstance(v, bool) else f"{v:.6g}" for v in asdict(one).values()]
                writer.writerow([case, number, *cells])


__all__ = ["MOST_FINDINGS", "Finding", "findings", "write_findings"]
