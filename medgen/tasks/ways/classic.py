"""Classical transforms of training scans, each with the numbers that made it written down."""

from collections.abc import Sequence

from medgen.data.classic import Classical, Mirror
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


class ClassicWay:
    """Rotation, scaling, shift, bending, shading, gamma, blur and noise of one training scan and its mask.

    Needs no model. Where values have a unit they keep their meaning: no gamma, no shading.

    Args:
        material: what scans are made of.
        strength: 1 is moderate, see `medgen.data.classic`.
        mirror: directions that may be exchanged; none by default, as left and right matter.

    Raises:
        LeakageError: a source is of another split than training.
    """

    def __init__(self, material: Material, strength: float = 1.0, *, mirror: Sequence[Mirror] = ()) -> None:
        self._material, self._strength, self._mirror = material, strength, tuple(mirror)
        manifest, options = material.manifest, material.options
        self._sources = Sources(
            by_class(manifest), lambda row: read_source(row, manifest, options), seed=material.seed, size=voxels_of
        )

    @property
    def labels(self) -> Sequence[str]:
        """The training scans' classes, [''] where there are none."""
        return self._sources.labels

    def make(self, label: str, first: int, count: int) -> list[Made]:
        """Candidates `first` to `first + count - 1`; number i depends on (seed, label, i) alone.

        Raises:
            ConfigError: the strength or a direction is wrong.
            DataError: no scan of the class can be used.
        """
        numbers = range(first, first + count)
        return [self._sources.made(label, i, lambda _, source, i=i: self._made(label, i, source)) for i in numbers]

    def _made(self, label: str, i: int, source: Source) -> Made:
        seed, row = seed_of(self._material.seed, "classic", label, i), source.row
        drawn = Classical.drawn(seed, source.scan, strength=self._strength, mirror=self._mirror)
        scan, mask = drawn.apply(source.scan, source.mask)
        key = self._material.key
        return Made(
            x=seen(scan, self._material.recipe), scan=scan, label=label, mask=mask,
            covariates=covariates_kept(row, self._material), how="classic", sources=(source_name(row, key),),
            patient=patient_name(row, key), parameters={"seed": seed, **drawn.model_dump(mode="json")},
        )  # fmt: skip


def voxels_of(source: Source) -> int:
    """Numbers that a source holds."""
    return source.scan.voxels.size


__all__ = ["ClassicWay", "voxels_of"]
