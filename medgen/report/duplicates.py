"""Generated scans that were taken for copies, beside the training scans they are nearest to."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float
from torch import Tensor

from medgen.grid import Grid
from medgen.report.pictures import contact_sheet
from medgen.report.sheet import sheet
from medgen.scan import Scan

WARNING = "SHOWS PATIENTS: do not share"

# A generated scan, the training scan nearest to it, and what is said of both.
Pair = tuple[Float[Tensor, "c *space"], Float[Tensor, "c *space"], str]


def duplicate_sheet(pairs: Sequence[Pair], path: Path) -> Path:
    """One PNG of pairs, generated scans on the left, the nearest training scan on the right.

    The picture shows patients and is for those who hold their scans; every pair says so.

    Args:
        pairs: both scans as a model sees them, the first channel being shown, and a caption: the name of the generated
            scan, the pseudonym of the other's case, and r in each space. At least one.
        path: a PNG.
    """
    with TemporaryDirectory() as work:
        parts = [
            contact_sheet([_shown(made), _shown(nearest)], Path(work, f"{n}.png"), title=f"{says} - {WARNING}")
            for n, (made, nearest, says) in enumerate(pairs)
        ]
        return sheet(parts, path, title=f"{WARNING}. Left: generated, not written; right: the nearest training scan")


def _shown(x: Float[Tensor, "c *space"]) -> Scan:
    """The first channel on a plain grid: what a model sees stands upright, and its spacing does not matter here."""
    voxels = x[:1].detach().cpu().numpy().astype(np.float32)
    voxels = voxels[..., None] if voxels.ndim == 3 else voxels
    return Scan(voxels, Grid(voxels.shape[1:], np.eye(4)))


__all__ = ["WARNING", "duplicate_sheet"]
