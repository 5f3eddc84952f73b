"""One row of a manifest as a model sees it: the scan prepared, what is told of it, and its mask."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from monai.transforms import Transform
from torch import Tensor

from medgen import io
from medgen.data.covariates import Covariate
from medgen.data.labels import label_channels, labels_on, one_hot
from medgen.data.manifest import Manifest, Row
from medgen.data.recipe import Recipe
from medgen.data.window import flat, prepared, what_was_cut
from medgen.errors import DataError, MedgenError
from medgen.grid import Grid
from medgen.io.source import ReadOptions
from medgen.scan import Scan


class Prepare(Transform):
    """A manifest row to the dict that is cached: tensors, whole numbers and text only, or the reason why not.

    Args:
        recipe: how scans become tensors.
        classes: labels in the order of their indices; empty for none.
        covariates: what else of a row the model is told.
        context: give the row's mask with the scan.
        labels: of the mask, which become channels of the scan's own, or of what is given with it.
        options: how strict reading is.
    """

    def __init__(
        self,
        recipe: Recipe,
        classes: Sequence[str] = (),
        covariates: Sequence[Covariate] = (),
        context: bool = False,
        labels: Sequence[int] = (),
        options: ReadOptions = ReadOptions(),
    ) -> None:
        self.recipe, self.classes, self.covariates = recipe, tuple(classes), tuple(covariates)
        self.context, self.labels, self.options = context, tuple(labels), options

    def row(self, row: Row, manifest: Manifest) -> dict[str, str]:
        """What of a manifest's row decides the prepared scan."""
        told = {"case": row.case, "path": manifest.locate(row.path), "label": row.label}
        told |= {f"covariate {one.name}": row.covariates.get(one.name, "") for one in self.covariates}
        return told | ({"mask": row.mask and manifest.locate(row.mask)} if self._masked else {})

    @property
    def _masked(self) -> bool:
        return self.context or bool(self.labels)

    def __call__(self, row: Mapping[str, str]) -> dict[str, Any]:
        """{'case', 'path', 'x', 'cond', 'scale', 'warning'[, 'context', 'labels', 'real']} or {..., 'error'}."""
        try:
            source = flat(io.read(row["path"], self.options))
            scan, real = prepared(source, self.recipe)
            x, given = self._with_mask(row, source, scan) if self._masked else (model_view(scan), {})
        except MedgenError as error:
            return {"case": row["case"], "path": row["path"], "error": str(error)}
        if not real.all():
            given["real"] = real_view(real)
        cells = {one.name: row[f"covariate {one.name}"] for one in self.covariates}
        if self.recipe.slices and scan.is_planar:
            told = "The model sees slices of volumes; this is an image. Leave it out, or train on images."
            return {"case": row["case"], "path": row["path"], "error": told}
        return {
            "case": row["case"],
            "path": row["path"],
            "x": x.contiguous(),
            "cond": condition(row["label"], cells, self.classes, self.covariates),
            "scale": torch.tensor([scan.scale.slope, scan.scale.intercept], dtype=torch.float64),
            "warning": what_was_cut(source, self.recipe),
            **given,
        }

    def _with_mask(self, row: Mapping[str, str], source: Scan, scan: Scan) -> tuple[Tensor, dict[str, Any]]:
        """The scan as a model sees it, its mask among its channels or beside it.

        Raises:
            DataError: there is no mask to learn, it cannot be read, or it was drawn on another grid.
        """
        x = model_view(scan)
        if self.context:
            return x, {"context": given_view(row["mask"], source.grid, scan.grid, self.labels, self.options)}
        if not row["mask"]:
            raise DataError(
                "The model learns scans together with their masks, and this one has none, which is not the same as an "
                "empty one. Add a mask (all 0 where there is nothing to mark), or train with --masks none."
            )
        ramps = label_channels(labels_on(row["mask"], source.grid, scan.grid, self.options), self.labels)
        # How many of the last channels are no image.
        return torch.cat([x, model_view(Scan(ramps, scan.grid))]), {"labels": len(self.labels)}


def model_view(scan: Scan) -> Float[Tensor, "c *space"]:
    """A copy of the voxels as a model sees them: an image loses its singleton axis."""
    return torch.tensor(scan.voxels[..., 0] if scan.is_planar else scan.voxels)


def real_view(real: Bool[np.ndarray, "i j k"]) -> Bool[Tensor, "*space"]:
    """A mask as a model sees it."""
    return torch.tensor(real[..., 0] if real.shape[2] == 1 else real)


def mask_view(path: str, grid: Grid, options: ReadOptions = ReadOptions()) -> Float[Tensor, "1 *space"]:
    """A mask of findings on a prepared scan's grid, 1 where there is any and 0 elsewhere; zeros without a `path`."""
    if not path:
        return model_view(Scan(np.zeros((1, *grid.shape), np.float32), grid))
    found = flat(io.read(path, options))
    drawn = np.any(found.voxels > 0, axis=0, keepdims=True).astype(np.float32)
    return model_view(Scan(drawn, found.grid, is_label=True).onto(grid, outside=0))


def given_view(
    path: str, source: Grid, ready: Grid, labels: Sequence[int], options: ReadOptions = ReadOptions()
) -> Float[Tensor, "k *space"]:
    """A scan's mask as it is given to a model: 0 or 1 for each of its labels; zeros without a `path`.

    Args:
        path: of the mask.
        source: the scan's grid, which is the mask's, too.
        ready: the prepared scan's.
        labels: what to tell apart; none: whatever is marked is 1.
        options: how strict reading is.

    Raises:
        DataError: the mask cannot be read, or was drawn on another grid.
    """
    if not labels:
        return mask_view(path, ready, options)
    drawn = labels_on(path, source, ready, options) if path else np.zeros(ready.shape, dtype=np.int32)
    return model_view(Scan(one_hot(drawn, labels), ready))


def condition(
    label: str, cells: Mapping[str, str], classes: Sequence[str], covariates: Sequence[Covariate]
) -> int | Float[Tensor, " numbers"]:
    """What a model is told of a scan: its class's index, -1 where there are none; with covariates a row of numbers.

    The row holds one 0 or 1 a class (all 0 for a label it does not know), then each covariate's numbers.
    """
    if not covariates:
        return classes.index(label) if classes else -1
    told = [float(label == name) for name in classes]
    return torch.tensor(told + [number for one in covariates for number in one.numbers(cells.get(one.name, ""))])


__all__ = ["Prepare", "condition", "given_view", "mask_view", "model_view", "real_view"]
