"""Scans of one patient whose anatomy has gone part of the way towards another's of the class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from medgen.data.manifest import Row
from medgen.data.morph import displacement, landmarks, morphed
from medgen.data.window import flat, prepared
from medgen.errors import ConfigError, DataError
from medgen.grid import Grid
from medgen.tasks.ways.base import Made, Material
from medgen.tasks.ways.sources import (
    Source,
    Sources,
    by_class,
    covariates_kept,
    patient_name,
    read_source,
    seed_of,
    seen,
    source_name,
)


@dataclass(frozen=True, eq=False)
class _Ready:
    """A source, and what of it is matched on the lattice that all prepared scans have."""

    source: Source
    image: Float[np.ndarray, "i j k"]
    labels_map: np.ndarray | None
    lattice: Grid

    @property
    def size(self) -> int:
        """Numbers it holds."""
        return self.source.scan.voxels.size + 2 * self.image.size


class MorphWay:
    """One patient's scan, moved part of the way towards another's anatomy; its mask goes with it. Needs no model.

    Both are matched by how they look and, where they have them, by their label maps. What is written has the texture
    of the first and shapes between both.

    Args:
        material: what scans are made of.
        low, high: how far to go, from 0 (nowhere) to 1 (all the way); drawn evenly.

    Raises:
        ConfigError: not 0 < low <= high <= 1.
        DataError: no class has two patients.
        LeakageError: a source is of another split than training.
    """

    def __init__(self, material: Material, low: float = 0.3, high: float = 1.0) -> None:
        if not 0 < low <= high <= 1:
            raise ConfigError(f"low and high lie between 0 and 1, in this order; found {low:g} and {high:g}.")
        self._material, self._ends = material, (low, high)
        self._rows = {
            name: rows for name, rows in by_class(material.manifest).items() if len({row.patient for row in rows}) > 1
        }
        if not self._rows:
            raise DataError("To move one patient's anatomy towards another's takes two patients of a class; found one.")
        seed = seed_of(material.seed, "morph")
        self._sources = Sources(self._rows, lambda row: self._ready(row), seed=seed, size=lambda one: one.size)

    @property
    def labels(self) -> Sequence[str]:
        """Classes of two patients or more, [''] where there are no classes."""
        return self._sources.labels

    def make(self, label: str, first: int, count: int) -> list[Made]:
        """Candidates `first` to `first + count - 1`; number i depends on (seed, label, i) alone.

        Raises:
            DataError: no scan of the class can be used.
        """
        numbers = range(first, first + count)
        return [self._sources.made(label, i, lambda _, a, i=i: self._made(label, i, a)) for i in numbers]

    def _ready(self, row: Row) -> _Ready:
        source = read_source(row, self._material.manifest, self._material.options)
        ready, _ = prepared(flat(source.scan), self._material.recipe)
        drawn = None
        if source.mask is not None:
            drawn = flat(source.mask).onto(ready.grid, outside=0).voxels[0].astype(np.int64)
        return _Ready(source, ready.voxels[0], drawn, ready.grid)

    def _made(self, label: str, i: int, a: _Ready) -> Made:
        seed = seed_of(self._material.seed, "morph", label, i)
        rng = np.random.default_rng(seed)
        t, b = (
            round(float(rng.uniform(*self._ends)), 4),
            self._sources.another(label, a.source.row, rng, lambda one: one.image.shape == a.image.shape),
        )
        maps = [one.labels_map for one in (b, a) if one.labels_map is not None]
        labels = sorted({int(one) for drawn in maps for one in np.unique(drawn) if one})
        known = [landmarks(one.image, one.labels_map if len(maps) == 2 else None, labels) for one in (b, a)]
        scan, mask = morphed(a.source.scan, a.source.mask, displacement(*known), a.lattice, t)
        row, other, key = a.source.row, b.source.row, self._material.key
        return Made(
            x=seen(scan, self._material.recipe), scan=scan, label=label, mask=mask,
            covariates=covariates_kept(row, self._material), how="morph",
            sources=(source_name(row, key), source_name(other, key)), patient=patient_name(row, key),
            parameters={"t": t, "other_patient": patient_name(other, key), "seed": seed},
        )  # fmt: skip


__all__ = ["MorphWay"]
