"""Scans from noise: nobody's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from medgen.bundle import Bundle
from medgen.data.labels import label_map
from medgen.errors import CapabilityError
from medgen.grid import Grid
from medgen.models.abilities import Samples
from medgen.models.base import can
from medgen.scan import Scale, Scan
from medgen.seeds import derived_seed
from medgen.tasks.capabilities import families_that
from medgen.tasks.conditions import checked_cells, conditions_for, drawn_cells, told_of
from medgen.tasks.intake import require_whole
from medgen.tasks.ways.base import Made, Material

# Scans drawn at a time: a whole number of every family's own micro-batches.
AT_ONCE = {2: 32, 3: 8}


class SampleWay:
    """Draws scans of a class from a model's prior, with their label maps where it has learned those.

    Args:
        material: with a bundle whose model samples.
        grid: what of the model's window is kept: padding is not; None: all of it.
        shapes: gives the image (k, *space) that scan i is drawn for, and the cases it is of; None where the model is
            given none.

    Raises:
        CapabilityError: the model does not sample, or sees slices.
        ConfigError: a covariate that was fixed is none that the model was told.
    """

    def __init__(
        self,
        material: Material,
        grid: Grid | None = None,
        shapes: Callable[[int], tuple[Tensor, tuple[str, ...]]] | None = None,
    ) -> None:
        assert material.bundle is not None
        self._bundle, self._seed, self._shapes = material.bundle, material.seed, shapes
        require_sampling(self._bundle)
        self._config = self._bundle.model.config
        self._covariates = told_of(self._config)["covariates"]
        self._told = checked_cells(self._covariates, material.tell)
        self._grid = grid or Grid.from_dict(self._bundle.contract.grid)

    @property
    def labels(self) -> Sequence[str]:
        """The model's classes."""
        return self._config.classes or ("",)

    def make(self, label: str, first: int, count: int) -> list[Made]:
        """Candidates of a class; the model draws them in fixed blocks, so number i is the same however it is asked."""
        size = AT_ONCE[self._config.dims]
        made: list[Made] = []
        for block in range(first // size, -(-(first + count) // size)):
            made += self._block(label, block, size)
        skipped = first % size
        return made[skipped : skipped + count]

    @torch.no_grad()
    def _block(self, label: str, block: int, size: int) -> list[Made]:
        numbers = range(block * size, (block + 1) * size)
        # A model of one class knows no name for it.
        which = self._config.classes.index(label) if self._config.classes else 0
        cells = [self._cells(which, number) for number in numbers]
        cond = conditions_for(self._config, [label] * size, cells)
        # Shapes come in turn over all classes, so that each class is drawn for all of them.
        shapes = [self._shapes(number * len(self.labels) + which) for number in numbers] if self._shapes else []
        given = {"context": torch.stack([shape for shape, _ in shapes])} if shapes else {}
        seed = derived_seed(self._seed, 1, which, block)
        drawn = cast(Samples, self._bundle.model).sample(size, seed=seed, cond=cond, **given).clamp(0, 1).cpu()
        made = []
        for n, values in enumerate(drawn):
            shape, sources = shapes[n] if shapes else (None, ())
            facts = {"shape of": ";".join(sources)} if sources else {}
            made.append(self._made(values, label, cells[n], shape, facts))
        return made

    def _cells(self, which: int, number: int) -> dict[str, str]:
        drawn = drawn_cells(self._covariates, derived_seed(self._seed, 2, which, number))
        return drawn | self._told

    def _made(
        self, values: Tensor, label: str, cells: Mapping[str, str], shape: Tensor | None, facts: dict[str, Any]
    ) -> Made:
        labels = self._config.labels
        images = self._bundle.contract.channels
        mask = drawn = None
        if labels:
            drawn = label_map((values[images:] if shape is None else shape).numpy(), labels)
            mask = label_scan(self._bundle, drawn).onto(self._grid, outside=0)
        scan = synthetic_scan(self._bundle, values[:images]).onto(self._grid, outside=0)
        return Made(values[:images].clone(), scan, label, mask, dict(cells), parameters=facts, seen=drawn)


def require_sampling(bundle: Bundle) -> None:
    """Refuse a bundle that draws no scans.

    Raises:
        CapabilityError: its model does not sample, or sees slices.
    """
    if not can(bundle.model, "samples"):
        raise CapabilityError(
            f"{bundle.name} cannot augment: it does not sample. Models that can: {families_that('samples')}."
        )
    require_whole(bundle.recipe, bundle.name, "augment")


def label_scan(bundle: Bundle, labels: np.ndarray) -> Scan:
    """A label map (*space) as a scan on the bundle's grid."""
    kind = np.uint8 if labels.max(initial=0) < 256 else np.int16
    drawn = bundle.contract.physical_scan(labels[None].astype(kind), Scale())
    return replace(drawn, is_label=True)


def synthetic_scan(bundle: Bundle, values: Tensor) -> Scan:
    """Generated values (c, *space) as a scan in the training scans' unit, whole numbers where theirs were."""
    scan = bundle.contract.physical_scan(values.cpu().numpy().astype(np.float32))
    if not bundle.contract.integers:
        return scan
    physical = np.round(scan.physical())
    low, high = physical.min(), physical.max()
    kind = next(
        k for k in (np.uint8, np.int16, np.uint16, np.int32) if np.iinfo(k).min <= low and high <= np.iinfo(k).max
    )
    return scan.with_voxels(physical.astype(kind), scale=Scale(unit=bundle.contract.unit))


__all__ = ["AT_ONCE", "SampleWay", "label_scan", "require_sampling", "synthetic_scan"]
