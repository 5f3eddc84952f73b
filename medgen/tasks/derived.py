"""Scans that a model made of somebody's: on the source's grid, in its unit and format, marked as derived."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from medgen import io
from medgen.bundle import Bundle
from medgen.scan import Scale, Scan
from medgen.tasks.intake import Intake
from medgen.tasks.ways.sample import synthetic_scan


@dataclass(frozen=True, eq=False)
class Like:
    """A scan whose grid, unit and format others take.

    Args:
        scan: as a model takes it.
        kind: the reader it needed.
    """

    scan: Intake
    kind: str


class DerivedWriter:
    """Writes what a model decoded: as scans like another, or on the bundle's own grid where there is none.

    Args:
        bundle: whose model decoded it.
        folder: of the unfinished output.
        like: the scan whose grid, unit and format they take.
        description: of each, for DICOM.
    """

    def __init__(self, bundle: Bundle, folder: Path, like: Like | None, description: str) -> None:
        self._bundle, self._folder, self._like, self._description = bundle, folder, like, description
        kind = like.kind if like else "raster" if _fits_png(bundle) else "nifti"
        self.format = {"itk": "nifti", "raster": "png"}.get(kind, kind)
        self.scans: list[Scan] = []
        self._rows: list[dict[str, Any]] = []

    def write(self, name: str, values: Float[Tensor, "c *space"], scale: Scale | None, facts: dict[str, Any]) -> None:
        """Write one scan; `scale` says what its values mean, None: what the scan's it is like mean."""
        if self._like is None:
            scan = synthetic_scan(self._bundle, values)
        else:
            scan = derived_scan(values, self._like.scan, scale or self._like.scan.ready.scale)
        self.scans.append(scan)
        self._rows.append({"case": name, "path": self._file(scan, name), "synthetic": "yes", **facts})

    def finish(self, facts: Sequence[str]) -> None:
        """The table of steps, and the .npz that holds all scans where the source was one."""
        if self.format == "npz":
            from medgen.io.raster import as_pictures, write_npz

            arrays = as_pictures(self.scans)
            write_npz(self._folder / "scans.npz", {"train": arrays}, {"train": np.zeros((len(arrays), 1), np.uint8)})
        with (self._folder / "steps.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["case", "path", *facts, "synthetic"])
            writer.writeheader()
            writer.writerows(self._rows)

    def _file(self, scan: Scan, name: str) -> str:
        if self.format == "npz":
            return f"scans.npz#train/{len(self._rows)}"
        place = self._folder / "scans"
        place.mkdir(exist_ok=True)
        if self.format == "dicom":
            from medgen.io.dicom.write import Provenance, write_series

            made = Provenance(
                description=self._description, model=self._bundle.name,
                weights_sha256=self._bundle.weights_sha256, content="derived",
            )  # fmt: skip
            write_series(scan, place / name, provenance=made, name=name)
            return f"scans/{name}"
        target = place / f"{name}{'.png' if self.format == 'png' else '.nii.gz'}"
        io.write(scan, target)
        return target.relative_to(self._folder).as_posix()


def _fits_png(bundle: Bundle) -> bool:
    told = bundle.contract
    return told.planar and told.integers and told.low >= 0 and told.high <= 65535


def derived_scan(values: Float[Tensor, "c *space"], like: Intake, scale: Scale) -> Scan:
    """Model values on a source's grid, stored as it is; beyond the model's window as dark as the model shows."""
    header = replace(like.source.header, synthetic=True, padding=None)
    voxels = values.numpy().astype(np.float32).reshape(len(values), *like.ready.grid.shape)
    scan = Scan(voxels, like.ready.grid, scale, header).onto(like.source.grid, outside=scale.intercept)
    physical = scan.physical()
    stored = np.round(like.source.scale.stored(physical))
    if like.source.voxels.dtype.kind not in "biu":
        return scan.with_voxels(physical, scale=Scale(unit=scale.unit))
    kinds = (like.source.voxels.dtype, np.dtype(np.int16), np.dtype(np.uint16), np.dtype(np.int32))
    for kind in kinds:
        if kind.kind in "iu" and np.iinfo(kind).min <= stored.min() and stored.max() <= np.iinfo(kind).max:
            return scan.with_voxels(stored.astype(kind), scale=replace(like.source.scale, clip=None))
    return scan.with_voxels(physical, scale=Scale(unit=scale.unit))


__all__ = ["DerivedWriter", "Like", "derived_scan"]
