"""Scans between those of two patients of one class, where a model puts them.

z(t) = (1 - t) z_A + t z_B, or the great circle between them where codes are noise; low <= t <= high
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from torch import Tensor

from medgen.data.labels import label_map
from medgen.data.manifest import Row
from medgen.errors import ConfigError, DataError
from medgen.scan import Scan
from medgen.tasks.walks import between
from medgen.tasks.ways.base import Made, Material
from medgen.tasks.ways.coding import Coding, Read
from medgen.tasks.ways.sample import label_scan, synthetic_scan
from medgen.tasks.ways.sources import (
    Sources,
    by_class,
    covariates_kept,
    patient_name,
    seed_of,
    source_name,
)


class InterpolateWay:
    """What a model decodes between the codes of two patients' scans; a mask too, where it draws pairs.

    Args:
        material: with a bundle whose model encodes and decodes.
        low, high: how far between them, from 0 at the first to 1 at the second; drawn evenly.
        device: 'auto', 'cpu', 'cuda', 'mps'.

    Raises:
        CapabilityError: the model cannot do that.
        ConfigError: there is no bundle, or not 0 <= low <= high <= 1.
        DataError: no class has two patients.
    """

    def __init__(self, material: Material, low: float = 0.25, high: float = 0.75, *, device: str = "auto") -> None:
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"low and high lie between 0 and 1, in this order; found {low:g} and {high:g}.")
        self._material, self._ends = material, (low, high)
        self._coding = Coding(material, "interpolate", device)
        self._rows = by_class(material.manifest)
        several = {name: rows for name, rows in self._rows.items() if len({row.patient for row in rows}) > 1}
        if not several:
            raise DataError(_two_needed("", len(material.manifest.patients)))
        seed = seed_of(material.seed, "interpolate")
        self._sources = Sources(several, self._coding.read, seed=seed, size=lambda read: read.size)

    @property
    def labels(self) -> Sequence[str]:
        """Classes of two patients or more, [''] where there are no classes."""
        return self._sources.labels

    def make(self, label: str, first: int, count: int) -> list[Made]:
        """Candidates `first` to `first + count - 1`; number i depends on (seed, label, i) alone.

        Raises:
            DataError: there is no such class, it has one patient, or none of its scans can be used.
        """
        if label in self._rows and label not in self.labels:
            raise DataError(_two_needed(label, len({row.patient for row in self._rows[label]})))
        numbers = range(first, first + count)
        return [self._sources.made(label, i, lambda _, read, i=i: self._made(label, i, read)) for i in numbers]

    def _made(self, label: str, i: int, a: Read) -> Made:
        seed, coding = seed_of(self._material.seed, "interpolate", label, i), self._coding
        rng = np.random.default_rng(seed)
        t, b = float(rng.uniform(*self._ends)), self._sources.another(label, a.row, rng)
        told = [coding.told(read) for read in (a, b)]
        codes = [coding.encode(read, cond) for read, cond in zip((a, b), told, strict=True)]
        way = "spherical" if coding.is_noise(codes[0]) else "linear"
        cond = told[0]
        if cond is not None and told[1] is not None and cond.ndim == 2:
            cond = (1 - t) * cond + t * told[1]
        values = coding.decode(between(codes[0], codes[1], t, way), cond)
        scan, mask, grid = self._placed(values, a, b, t)
        key = self._material.key
        return Made(
            x=values[: coding.config.images].clone(), scan=scan, label=label, mask=mask,
            covariates=self._between(a.row, b.row, t), how="interpolate",
            sources=(source_name(a.row, key), source_name(b.row, key)), patient=patient_name(a.row, key),
            parameters={
                "t": round(t, 6), "way": way, "grid": grid, "other_patient": patient_name(b.row, key), "seed": seed,
                "weights_sha256": coding.bundle.weights_sha256,
            },
        )  # fmt: skip

    def _placed(self, values: Float[Tensor, "c *space"], a: Read, b: Read, t: float) -> tuple[Scan, Scan | None, str]:
        """Decoded values on the grid that both scans have, else on the bundle's own."""
        coding = self._coding
        if a.taken.source.grid.close(b.taken.source.grid):
            scale = a.taken.ready.scale.between(b.taken.ready.scale, t)
            return *coding.scan(values, a.taken, scale), "sources'"
        scan = synthetic_scan(coding.bundle, values[: coding.config.images])
        if not coding.config.joint:
            return scan, None, "bundle's"
        drawn = label_map(values[coding.config.images :].numpy(), coding.config.labels)
        return scan, replace(label_scan(coding.bundle, drawn), grid=scan.grid), "bundle's"

    def _between(self, a: Row, b: Row, t: float) -> dict[str, str]:
        """What may be said of a scan between two: numbers between theirs, words that they share."""
        ours, theirs, found = covariates_kept(a, self._material), covariates_kept(b, self._material), {}
        for name in ours.keys() & theirs.keys():
            try:
                found[name] = f"{(1 - t) * float(ours[name]) + t * float(theirs[name]):.4g}"
            except ValueError:
                if ours[name] == theirs[name]:
                    found[name] = ours[name]
        return dict(sorted(found.items()))


def _two_needed(label: str, patients: int) -> str:
    of = f"class {label!r} has" if label else "no class has more than"
    return (
        f"Interpolation lies between the scans of two patients of one class; {of} {patients} among the training scans. "
        "Add scans of another patient, or use another way."
    )


__all__ = ["InterpolateWay"]
