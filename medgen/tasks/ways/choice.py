"""The way that a person asked for, ready to make scans."""

from medgen.errors import CapabilityError, ConfigError
from medgen.grid import Grid
from medgen.models import family
from medgen.models.abilities import Ability
from medgen.models.base import ModelConfig
from medgen.tasks.capabilities import families_that
from medgen.tasks.conditions import checked_cells, told_of
from medgen.tasks.ways.base import How, Material, Way
from medgen.tasks.ways.classic import ClassicWay
from medgen.tasks.ways.edit import EditWay
from medgen.tasks.ways.interpolate import InterpolateWay
from medgen.tasks.ways.lesion import LesionWay
from medgen.tasks.ways.morph import MorphWay
from medgen.tasks.ways.orders import Making
from medgen.tasks.ways.sample import SampleWay
from medgen.tasks.ways.shapes import Shapes

_NEEDS: dict[How, tuple[Ability, ...]] = {
    "sample": ("samples",),
    "interpolate": ("encodes", "decodes"),
    "edit": ("encodes", "decodes"),
}


def require_able(asked: Making, config: ModelConfig) -> None:
    """Refuse, before anything is learned, what a model of this config could not do once it is trained.

    Raises:
        CapabilityError: it lacks an ability that a way needs.
        ConfigError: it is not told a covariate that a person fixes or varies.
    """
    kind, able = config.kind, family(config.kind).abilities(config)
    for how in asked.ways:
        for need in _NEEDS.get(how, ()):
            if need not in able:
                told = f"it does not {need.removesuffix('s')}. Models that do: {families_that(need)}."
                raise CapabilityError(f"{kind} cannot {how}: {told}")
    if "lesion" in asked.ways and asked.lesions == "remove" and not able & {"inpaints", "restores"}:
        can = families_that("inpaints", "restores")
        raise CapabilityError(
            f"{kind} cannot take lesions out: it neither inpaints nor restores. Models that do: {can}."
        )
    covariates = told_of(config)["covariates"]
    checked_cells(covariates, asked.tell)
    if unknown := [name for name in asked.vary if name not in {one.name for one in covariates}]:
        told = ", ".join(one.name for one in covariates) or "none"
        raise ConfigError(
            f"The model is told no {unknown[0]!r}, so it cannot vary it. It is told: {told}. --covariates."
        )


def way_of(how: How, material: Material, making: Making, grid: Grid | None) -> Way:
    """One way to make scans.

    Args:
        how: which.
        material: what scans are made of.
        making: what a person decided.
        grid: what of the model's window is written of scans from noise; None: all of it.

    Raises:
        CapabilityError, ConfigError, DataError: the model or the scans do not allow it.
    """
    match how:
        case "sample":
            assert material.bundle is not None
            given = told_of(material.bundle.model.config)["context"]
            return SampleWay(material, grid, Shapes(material, making.shapes) if given else None)
        case "interpolate":
            return InterpolateWay(material)
        case "morph":
            return MorphWay(material)
        case "edit":
            return EditWay(material, making.vary)
        case "lesion":
            return LesionWay(material, making.lesions)
        case "classic":
            return ClassicWay(material)


__all__ = ["require_able", "way_of"]
