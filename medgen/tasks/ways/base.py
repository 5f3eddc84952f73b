"""What every way of making scans works with, and what it makes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from medgen.bundle import Bundle
from medgen.data.manifest import Manifest
from medgen.data.recipe import Recipe
from medgen.io.source import ReadOptions
from medgen.scan import Scan

# From noise, so that it shows nobody; or of somebody's scan, so that it shows that patient.
Origin = Literal["synthetic", "derived"]
How = Literal["sample", "interpolate", "morph", "edit", "lesion", "classic"]


@dataclass(frozen=True, eq=False)
class Made:
    """One scan that was made, on its way through the gates into an output folder.

    Args:
        x: what a model sees of it, image channels only, on [0, 1].
        scan: as it will be written: on its grid, in its unit.
        label: its class, '' for none.
        mask: its label map on the grid of `scan`; None where there is none.
        covariates: what else is said of it, such as age.
        how: which way it was made.
        sources: cases of the training scans that it was made of; none where it came from noise.
        patient: whose those are, the first's where they are of two; '' where it came from noise.
        parameters: what was done, as plain values.
        seen: the label map on the voxels of `x`, where a model drew it; None where it did not.
    """

    x: Float[Tensor, "c *space"]
    scan: Scan
    label: str = ""
    mask: Scan | None = None
    covariates: Mapping[str, str] = field(default_factory=dict)
    how: How = "sample"
    sources: tuple[str, ...] = ()
    patient: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seen: Int[np.ndarray, "*space"] | None = None

    @property
    def origin(self) -> Origin:
        """Whether it shows somebody."""
        return "derived" if self.sources else "synthetic"


@dataclass(frozen=True, eq=False)
class Material:
    """What scans are made of.

    Args:
        manifest: the training split, and nothing else: nobody held out is ever a source.
        recipe: from a scan to what a model sees.
        options: how strict reading is.
        seed: decides everything that is random.
        bundle: a trained model; None for ways that need none.
        tell: covariates that a person has fixed, such as {'age': '70'}.
        key: salt of the sources' pseudonyms, `medgen.tasks.ways.sources.secret_of` the whole dataset.
    """

    manifest: Manifest
    recipe: Recipe
    options: ReadOptions
    seed: int = 0
    bundle: Bundle | None = None
    tell: Mapping[str, str] = field(default_factory=dict)
    key: str = ""


@runtime_checkable
class Way(Protocol):
    """Makes scans of a class, one after another for as long as they are asked for."""

    @property
    def labels(self) -> Sequence[str]:
        """Classes it can make, [''] where there are none."""
        ...

    def make(self, label: str, first: int, count: int) -> list[Made]:
        """Candidates `first` to `first + count - 1` of a class; number i depends on (seed, label, i) alone."""
        ...


__all__ = ["How", "Made", "Material", "Origin", "Way"]
